"""Secrets in a registration, which are found by their name or form and masked completely."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.schema import confidential

SECRET = [
    *("secret_access_key", "secretAccessKey", "session_token", "SAS", "sas_token", "account_key", "private_key"),
    *("headers.Authorization", "X-Amz-Signature", "x-goog-signature", "apiKey", "api-key", "APIKEY", "Set-Cookie"),
    *("AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "db_password", "passphrase", "client_key", "connection_string", "token"),
    *("connectionString", "hf_token", "oauth2_client_secret", "headers.X-Api-Key", "azure.client_secret", "pwd"),
]
PLAIN = [
    *("storage_key", "access_key_id", "private_key_id", "client_email", "certificate", "client_certificate", "bucket"),
    *("tokenizer", "max_tokens", "pad_token", "eos_token_id", "schema_path", "model_type", "key", "primary_key", ""),
    *("headers.Accept", "region", "endpoint_url", "disk_size_bytes", "secretary", "passenger", "version", "signatures"),
]


@pytest.mark.parametrize("name", SECRET)
def test_names_of_secrets(name):
    assert confidential.is_secret(name)


@pytest.mark.parametrize("name", PLAIN)
def test_names_of_other_things(name):
    assert not confidential.is_secret(name)


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("https://user:hunter2@host/m.onnx", "https://***@host/m.onnx"),
        ("https://hunter2@host/m.onnx", "https://***@host/m.onnx"),
        ("s3://AKIA:hunter2@bucket/m", "s3://***@bucket/m"),
        ("https://host/m?X-Amz-Signature=hunter2&v=1", "https://host/m?X-Amz-Signature=***&v=1"),
        ("https://a.blob.core.windows.net/c/m?sv=1&sig=hunter2%3D", None),
        ("https://host/m?v=1&access%5Ftoken=hunter2", None),
        ("https://host/m#token=hunter2", "https://host/m#token=***"),
    ],
)
def test_secrets_of_a_path(path, shown):
    """Secrets in a path are found, reported without being shown, and masked. The rest of the path stays."""
    (told,) = confidential.found(path, "")
    assert told.startswith("the path: ")
    assert "hunter2" not in told
    masked = confidential.masked_path(path)
    assert "hunter2" not in masked
    assert shown is None or masked == shown
    assert not confidential.found(masked.replace("***@", ""), "") or "***" in masked


@pytest.mark.parametrize(
    "path",
    [
        *(
            "",
            "/models/a@b.onnx",
            "file:///m",
            "s3://bucket/a@b/m.onnx",
            "hf://owner/repo@refs%2Fpr%2F1/m",
            "pvc://c/m",
        ),
        *("azure://account/container/m", "https://host/m?version=3&format=onnx", "models/sig=1/m.onnx"),
    ],
)
def test_paths_without_secrets_stay_as_they_are(path):
    assert confidential.found(path, "") == []
    assert confidential.masked_path(path) == path


@pytest.mark.parametrize(
    ("key", "where"),
    [
        ({"storage_params": {"type": "s3", "secret_access_key": "hunter2"}}, "storage_params.secret_access_key"),
        (
            {"storage_params": {"headers": {"Authorization": ["Bearer hunter2"]}}},
            "storage_params.headers.Authorization",
        ),
        ({"storage_params": {"headers.Cookie": "hunter2"}}, "headers.Cookie"),
        ({"storage_params": {"endpoint_url": "https://u:hunter2@minio"}}, "endpoint_url"),
        ({"a": [{"b": {"password": 122333}}]}, "a.b.password"),
        ({"x": "-----BEGIN RSA PRIVATE KEY-----\nhunter2\n-----END RSA PRIVATE KEY-----"}, "private key"),
        ({"x": "DefaultEndpointsProtocol=https;AccountName=a;AccountKey=hunter2;"}, "account"),
        ({"gcs": json.dumps({"private_key": "-----BEGIN PRIVATE KEY-----\nhunter2"})}, "gcs.private_key"),
        ({"storage_params": json.dumps({"secret_access_key": "hunter2"})}, "storage_params.secret_access_key"),
        ({"x": json.dumps([json.dumps({"password": "hunter2"})])}, "x.password"),
        ({"x": "region=eu;secret_access_key=hunter2"}, "secret_access_key in x"),
    ],
)
def test_secrets_of_a_key(key, where):
    """Secrets in a key are found at any depth, also in texts that contain JSON or settings."""
    text = json.dumps(key)
    (told,) = confidential.found("", text)
    assert where in told
    for secret in ("hunter2", "122333"):
        assert secret not in told
        assert secret not in confidential.masked_key(text)
    assert json.loads(confidential.masked_key(text)).keys() == key.keys()


def test_a_key_that_is_no_json_is_searched_too():
    assert confidential.found("", "https://user:hunter2@host")
    assert confidential.masked_key("https://user:hunter2@host") == "https://***@host"
    assert confidential.found("", "region=eu secret_access_key=hunter2") == ["the key: secret_access_key"]
    assert confidential.masked_key("region=eu secret_access_key=hunter2") == "region=eu secret_access_key=***"
    assert confidential.found("", "minio") == []
    assert confidential.masked_key("minio") == "minio"


def test_a_key_that_nobody_can_look_through_is_refused_and_not_shown():
    """A key is refused and masked if it is nested too deeply to be parsed, or contains a text that is."""
    for depth in (900, 2000, 100_000):
        text = '{"a":' * depth + '{"password":"hunter2"}' + "}" * depth
        for key in (text, json.dumps({"x": text})):
            assert confidential.found("", key)
            assert "hunter2" not in confidential.masked_key(key)
    assert confidential.found("", "[" * 100_000)
    assert confidential.too_deep("[" * 100_000)
    assert not confidential.too_deep('{"password": "hunter2"}')
    assert confidential.masked_key("[" * 100_000) == confidential.MASK


@pytest.mark.parametrize(
    "key",
    [
        '{"storage_key": "minio", "schema_path": "s.json"}',
        '{ "storage_params" : {"type":"s3","bucket":"b","access_key_id":"AK","secret_access_key":""} }',
        '{"token": true, "password": null, "tokens": ["a"]}',
        *("", "minio", "[]", "3", "not json {", "region=eu", '{"x": "{\\"region\\":  1}"}', '{"x": "{not json"}'),
    ],
)
def test_keys_without_secrets_stay_as_they_are(key):
    assert confidential.found("", key) == []
    assert confidential.masked_key(key) == key


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=20)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=10), inner, max_size=3)),
    max_leaves=8,
)


@given(VALUES, st.sampled_from(SECRET[:10]))
def test_whatever_stands_around_a_secret_it_is_found_and_masked(around, name):
    text = json.dumps({"around": around, "deep": [{name: "hunter2-hunter2"}]})
    assert any(name in told for told in confidential.found("", text))
    assert "hunter2-hunter2" not in confidential.masked_key(text)


@given(st.text(max_size=60), st.text(max_size=60))
def test_any_text_is_looked_through(path, key):
    confidential.found(path, key)
    confidential.masked_key(key)
    if not confidential.found(path, ""):
        assert confidential.masked_path(path) == path
