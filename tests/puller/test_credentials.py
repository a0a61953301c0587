"""The storage secret: which of its settings apply, and that they are never shown."""

import copy
import json
import pickle
import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puller import objects_client, objects_errors
from puller.credentials import Secrets
from puller.errors import PullError, PullErrorKind
from puller.http_client import HttpPolicy
from puller.source import Source, resolve

S3 = {
    "type": "s3",
    "access_key_id": "AKIDSECRET",
    "secret_access_key": "topsecret",
    "endpoint_url": "http://127.0.0.1:1",
    "region": "us-east-1",
    "bucket": "of-the-secret",
}


@pytest.fixture
def secrets(tmp_path):
    """A function that writes keys of the secret, and returns the secret."""

    def write(**stores: object) -> Secrets:
        for name, store in stores.items():
            (tmp_path / name).write_text(store if isinstance(store, str) else json.dumps(store))
        return Secrets(tmp_path)

    return write


def settings(secrets: Secrets, path: str = "a", **key: object):
    return resolve(Source(path, json.dumps(key)), secrets=secrets).model.settings


def test_which_key_counts(secrets):
    """The named key applies, else the default of the type, else the general default. A URI uses the default of its
    type."""
    store = secrets(
        mine={**S3, "bucket": "mine"},
        default={**S3, "bucket": "default"},
        default_s3={**S3, "bucket": "default-s3"},
        default_gcs={"type": "gcs", "bucket": "default-gcs"},
    )
    assert settings(store, storage_key="mine").origin == "mine"
    assert settings(store).origin == "default"
    assert settings(store, storage_params={"type": "s3"}).text("bucket") == "default-s3"
    assert settings(store, storage_params={"type": "gcs"}).text("bucket") == "default-gcs"
    assert settings(store, "gs://b/a").origin == "default_gcs"
    assert settings(store, "s3://b/a").origin == "default_s3"
    assert settings(store, "s3://b/a", storage_key="mine").origin == "mine"
    assert settings(store, "azure://account/c/a").origin == ""


def test_a_type_without_default_starts_from_nothing(secrets):
    """A known type without a default starts without settings: the general default is not used."""
    store = secrets(default=S3)
    assert settings(store, "s3://b/a").origin == ""
    assert not settings(store, "s3://b/a").has("secret_access_key")


def test_what_overrides_what(secrets):
    """storage_params override the secret's settings, and the URI overrides both. The old bucket attribute overrides
    only the secret's bucket."""
    store = secrets(mine=S3, old={**{k: v for k, v in S3.items() if k != "bucket"}, "default_bucket": "old"})
    assert settings(store, storage_key="mine").text("bucket") == "of-the-secret"
    assert settings(store, storage_key="mine", bucket="top").text("bucket") == "top"
    assert settings(store, storage_key="mine", bucket="top", storage_params={"bucket": "p"}).text("bucket") == "p"
    params = {"bucket": "p", "region": "eu-west-1"}
    both = settings(store, "s3://uri/a", storage_key="mine", storage_params=params)
    assert (both.text("bucket"), both.text("region")) == ("uri", "eu-west-1")
    assert settings(store, storage_key="old").text("bucket") == "old"
    assert settings(store, storage_key="old", bucket="top").text("bucket") == "top"


def test_dotted_overrides(secrets):
    """Dotted overrides reach into nested objects and create missing ones. Only strings replace strings."""
    store = secrets(mine={"type": "http", "url": "http://host", "headers": {"a": "1", "b": ["2"]}, "number": 7})
    got = settings(store, storage_key="mine", storage_params={"headers.a": "x", "headers.c": "y"})
    assert got.texts("headers") == {"a": ["x"], "b": ["2"], "c": ["y"]}
    for params in ({"headers.b": "x"}, {"number": "8"}, {"headers": "x"}, {"url.x": "y"}, {"a": 7}, {"a": {"b": "c"}}):
        with pytest.raises(PullError, match="storage_params"):
            settings(store, storage_key="mine", storage_params=params)


def test_a_rotated_secret_counts_at_once(secrets):
    """A changed secret applies at once: it is read at each load, and changed settings get another client."""
    before = settings(secrets(mine=S3), storage_key="mine")
    after = settings(secrets(mine={**S3, "secret_access_key": "rotated"}), storage_key="mine")
    assert after.text("secret_access_key") == "rotated"
    assert before.fingerprint() != after.fingerprint()
    assert after.fingerprint() == settings(secrets(), storage_key="mine").fingerprint()


@pytest.mark.parametrize("name", ["absent", "../mine", "..data", ".hidden", "a/b", "", "a" * 300, "a\nb"])
def test_names_that_are_no_key(secrets, name):
    """A load fails if the key that it names is missing. A name that leads outside the secret is invalid."""
    store = secrets(mine=S3)
    if not name:
        assert resolve(Source("/a", '{"storage_key": ""}'), secrets=store).model.scheme == "file"
        return
    with pytest.raises(PullError) as caught:
        settings(store, storage_key=name)
    assert caught.value.kind is (PullErrorKind.SETTINGS if name == "absent" else PullErrorKind.BAD_REQUEST)


def test_a_type_that_no_key_can_be_named_after_is_refused_as_a_type(secrets):
    with pytest.raises(PullError, match=r"^the type s3/x in storage_params is not a type of store") as caught:
        settings(secrets(), storage_params={"type": "s3/x"})
    assert caught.value.kind is PullErrorKind.BAD_REQUEST


@pytest.mark.parametrize(
    "content", ['{"type": "s3", topsecret}', '["topsecret"]', '{"topsecret": "s3"}', "[" * 100_000]
)
def test_keys_that_cannot_be_read(secrets, content):
    """A key that cannot be read, even the default one, is an error that quotes none of its content. Continuing without
    the key would hide the cause."""
    for name, key in (("mine", {"storage_key": "mine"}), ("default", {})):
        with pytest.raises(PullError) as caught:
            settings(secrets(**{name: content}), **key)
        assert "topsecret" not in "".join(traceback.format_exception(caught.value))


def test_a_store_of_another_type(secrets):
    with pytest.raises(PullError, match="type s3"):
        settings(secrets(mine=S3), "gs://b/a", storage_key="mine")


def test_headers_of_an_http_store_stay_on_its_host(secrets):
    """Headers of a default HTTP store are sent only to URLs of its origin. A named store is refused for another
    host."""
    web = {"type": "http", "url": "https://models.example/base", "headers": {"Authorization": "topsecret"}}
    store = secrets(default_http=web, web=web)
    assert settings(store, "https://models.example/other/a").has("headers")
    for elsewhere in ("https://evil.example/a", "http://models.example/a", "https://models.example:444/a"):
        assert not settings(store, elsewhere).has("headers")
        with pytest.raises(PullError) as caught:
            settings(store, elsewhere, storage_key="web")
        assert caught.value.kind is PullErrorKind.FORBIDDEN
    with pytest.raises(PullError, match="the registration sets url"):
        settings(store, storage_key="web", storage_params={"url": "https://evil.example"})
    model = resolve(Source("sub/a b.onnx", '{"storage_key": "web"}'), secrets=store).model
    assert (model.scheme, model.uri) == ("https", "https://models.example/base/sub/a%20b.onnx")


@pytest.mark.parametrize(
    ("store", "params"),
    [
        ({"type": "gcs", "bucket": "b", "private_key": "k", "client_email": "e"}, {"endpoint_url": "https://evil"}),
        (
            {"type": "azure", "account_name": "acc", "container": "c", "sas_token": "t"},
            {"endpoint_url": "https://evil"},
        ),
        (
            {"type": "azure", "account_name": "acc", "container": "c", "client_id": "i", "client_secret": "s"}
            | {"tenant_id": "t"},
            {"authority_host": "https://evil"},
        ),
        (
            {"type": "azure", "account_name": "acc", "container": "c", "account_key": "a2V5"},
            {"connection_string": "BlobEndpoint=https://evil/;AccountName=acc"},
        ),
    ],
)
def test_tokens_go_to_no_host_that_a_registration_chose(secrets, store, params):
    """Tokens are never sent to a host that a registration chose, because anyone who gets a token can use it. Endpoint
    and credentials must come from the same place."""
    got = settings(secrets(mine=store), storage_key="mine", storage_params=params)
    with pytest.raises(PullError) as caught:
        objects_client.connect(got, HttpPolicy(allow_private=True), on_google=True)
    assert caught.value.kind is PullErrorKind.FORBIDDEN


@pytest.mark.parametrize(
    "params",
    [
        {"type": "gcs", "bucket": "b", "endpoint_url": "https://evil"},
        {"type": "gcs", "bucket": "b", "endpoint_url": "https://evil", "identity": "ambient"},
        {"type": "gcs", "bucket": "b", "endpoint_url": "https://evil", "identity": "ambient", "sas_token": "x"},
        {"type": "azure", "container": "c", "identity": "ambient", "private_key": "x", "account_name": "acc"}
        | {"endpoint_url": "https://evil"},
        {"type": "azure", "container": "c", "identity": "ambient"}
        | {"connection_string": "BlobEndpoint=https://evil/;AccountName=acc"},
    ],
)
def test_an_endpoint_of_a_registration_is_asked_as_nobody(secrets, monkeypatch, params):
    """An endpoint that a registration chose is called without the pod's identity, whatever else the registration
    says."""
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", "the-pods")
    monkeypatch.setenv("AZURE_STORAGE_TOKEN", "the-pods")
    got = settings(secrets(), storage_params=params)
    assert objects_client.connect(got, HttpPolicy(allow_private=True), on_google=True).anonymous


@pytest.mark.parametrize(
    "params",
    [
        {"type": "s3", "bucket": "b", "endpoint_url": "https://elsewhere"},
        {"type": "azure", "account_name": "acc", "container": "c", "authority_host": "https://elsewhere"}
        | {"client_id": "i", "client_secret": "s", "tenant_id": "t"},
        {"type": "azure", "container": "c", "connection_string": "BlobEndpoint=https://elsewhere/;AccountName=acc"},
    ],
)
def test_an_endpoint_of_a_registration_takes_the_operators_leave(secrets, params):
    """An endpoint that a registration chose is subject to the operator's rules for addresses, because its server could
    redirect the pod to an internal address."""
    got = settings(secrets(), storage_params=params)
    with pytest.raises(PullError, match="--http-allow-private") as caught:
        objects_client.connect(got, HttpPolicy(), on_google=False)
    assert caught.value.kind is PullErrorKind.FORBIDDEN
    objects_client.connect(got, HttpPolicy(allow_private=True), on_google=False)


def test_headers_of_an_http_store_go_to_its_own_url_only(secrets):
    """Headers of an HTTP store are sent only to the URL that the secret names. They are not sent to a URL from a
    registration, nor if neither the secret nor the registration names a URL."""
    secret = {"type": "http", "headers": {"Authorization": "Bearer operator"}}
    named = secrets(default_http={**secret, "url": "https://good.example/models"}, nowhere=secret)
    own = {"storage_params": {"url": "https://evil.example"}}

    def sent(path: str, **key: object):
        return resolve(Source(path, json.dumps(key)), secrets=named).model.settings.texts("headers")

    assert sent("https://good.example/m.onnx") == {"Authorization": ["Bearer operator"]}
    assert sent("https://evil.example/m.onnx") == {}
    assert sent("https://evil.example/m.onnx", **own) == {}
    for key in ({"storage_key": "nowhere"}, {"storage_key": "default_http", **own}):
        with pytest.raises(PullError) as caught:
            sent("https://evil.example/m.onnx", **key)
        assert caught.value.kind is PullErrorKind.FORBIDDEN
        assert "operator" not in caught.value.text


def test_explicit_keys_are_used_alone(secrets, monkeypatch):
    """Explicit keys are used without any keys, tokens or endpoints of the environment."""
    for name, value in {
        "AWS_SESSION_TOKEN": "envtoken",
        "AWS_ACCESS_KEY_ID": "envkey",
        "AWS_ENDPOINT_URL_S3": "http://evil",
        "AWS_ENDPOINT_URL": "http://evil",
        "AWS_SKIP_SIGNATURE": "true",
        "AWS_REGION": "eu-west-9",
    }.items():
        monkeypatch.setenv(name, value)
    target = objects_client.connect(settings(secrets(mine=S3), storage_key="mine"), HttpPolicy(), on_google=False)
    assert target.endpoint == S3["endpoint_url"]
    assert not target.anonymous
    config = target.client.config
    assert config["endpoint_url_s3"] == config["endpoint"] == S3["endpoint_url"]
    assert config["region"] == "us-east-1"
    assert "token" not in str(config)
    assert target.client.credential_provider() == {
        "access_key_id": "AKIDSECRET",
        "secret_access_key": "topsecret",
        "token": None,
        "expires_at": None,
    }


def test_the_environment_must_not_replace_googles_key(secrets, monkeypatch):
    """A token in the environment is an error if the secret has a Google key, because obstore would prefer the token."""
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", "envtoken")
    store = secrets(mine={"type": "gcs", "bucket": "b", "private_key": "topsecret", "client_email": "e"})
    with pytest.raises(PullError, match="GOOGLE_BEARER_TOKEN") as caught:
        objects_client.connect(settings(store, storage_key="mine"), HttpPolicy(), on_google=False)
    assert "envtoken" not in caught.value.text


@pytest.mark.parametrize(
    "change",
    [
        {"secret_access_key": ""},
        {"endpoint_url": "topsecret"},
        {"endpoint_url": "http://user:topsecret@host"},
        {"endpoint_url": "http://host?topsecret"},
        {"certificate": "topsecret"},
        {"region": "topsecret "},
        {"identity": "mine", "access_key_id": "", "secret_access_key": ""},
        {"access_key_id": {"topsecret": 1}},
    ],
)
def test_settings_that_make_no_client(secrets, change):
    """Settings from which no client can be made are refused. The error names their key in the secret, but shows no
    secret values."""
    with pytest.raises(PullError, match="key mine") as caught:
        objects_client.connect(
            settings(secrets(mine={**S3, **change}), storage_key="mine"), HttpPolicy(), on_google=False
        )
    assert caught.value.kind is PullErrorKind.SETTINGS
    shown = "".join(traceback.format_exception(caught.value))
    assert "topsecret" not in shown.replace("region 'topsecret '", "")


@given(
    # Marks around the secret make it a text that occurs nowhere else.
    secret=st.text(max_size=40).map(lambda text: f"zqx{text}xqz"),
    name=st.sampled_from(["access_key_id", "secret_access_key", "session_token", "private_key", "anything"]),
)
def test_settings_show_nothing(tmp_path_factory, secret, name):
    """Settings do not reveal their secrets in their own text, or in the text of the request and location that contain
    them. They can be neither pickled nor copied."""
    folder = tmp_path_factory.getbasetemp() / "shown"
    folder.mkdir(exist_ok=True)
    (folder / "mine").write_text(json.dumps({**S3, name: secret}))
    request = resolve(Source("a", '{"storage_key": "mine"}'), secrets=Secrets(folder))
    got = request.model.settings
    for text in (repr(got), str(got), repr(request), f"{request.model}", got.fingerprint(), request.model.shown):
        assert secret not in text
    for copied in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError):
            copied(got)


@pytest.mark.parametrize(
    "text",
    [
        "status code: 403 <Code>AccessDenied</Code><StringToSign>topsecret</StringToSign>",
        "status code: 400 <Code>topsecret-not-a-code!</Code>",
        'uri: Some(https://acc/c?sig=topsecret) "dns error"',
        "no marker at all, topsecret",
    ],
)
def test_errors_quote_nothing_of_what_a_server_says(text):
    """Errors name the file and the host, but quote no requests, signatures or bodies."""
    target = objects_client.Target(None, "https://host", False)  # type: ignore[arg-type]
    error = objects_errors.translated(ValueError(text), "s3://b/a", target)
    assert "topsecret" not in error.text
    assert "s3://b/a at https://host" in error.text


def test_the_version_of_a_secret_changes_with_each_of_its_keys(tmp_path):
    """The version of a secret changes when one of its keys is added, changed or removed, but not when the secret is
    only read."""
    secret = tmp_path / "secret"
    secret.mkdir()
    secrets = Secrets(secret)
    seen = [secrets.version]
    for change in (
        lambda: (secret / "minio").write_text('{"type": "s3"}'),
        lambda: (secret / "minio").write_text('{"type": "s3", "bucket": "b"}'),
        lambda: (secret / "other").write_text("{}"),
        lambda: (secret / "minio").unlink(),
    ):
        change()
        assert secrets.version == secrets.version
        seen.append(secrets.version)
    assert len(set(seen)) == len(seen)
    assert Secrets(None).version == Secrets(tmp_path / "none").version == ""
