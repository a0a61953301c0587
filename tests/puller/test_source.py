"""The location that a path and a storage key name."""

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puller.errors import PullError, PullErrorKind
from puller.source import Source, locate, redact, resolve, rewritten_key


@pytest.mark.parametrize(
    ("path", "scheme", "name"),
    [
        pytest.param("/models/a.onnx", "file", "a.onnx", id="absolute"),
        pytest.param("/models/a/", "file", "a", id="folder"),
        pytest.param("file:///models/a%20b.onnx", "file", "a b.onnx", id="file-uri"),
        pytest.param("HTTPS://host/x/y.onnx?sig=s/ecret#f", "https", "y.onnx", id="query"),
        pytest.param("http://host", "http", "", id="no-path"),
        pytest.param("http://host/a%2F..%2Fb", "http", "a/../b", id="encoded-slash"),
        pytest.param("s3://bucket/key", "s3", "key", id="s3"),
        pytest.param("ftp://host/key", "ftp", "key", id="unknown-scheme"),
    ],
)
def test_locations(path, scheme, name):
    location = locate(path)
    assert (location.scheme, location.name, location.uri) == (scheme, name, path)


@pytest.mark.parametrize("path", ["", "models/a.onnx", "/a\0b", "http://host/a\r\nX: y", "../a", "http://[bad/x"])
def test_paths_that_name_nothing(path):
    """Empty, relative and malformed paths are reported as mistakes in the registration."""
    with pytest.raises(PullError) as caught:
        locate(path)
    assert caught.value.kind is PullErrorKind.BAD_REQUEST


@pytest.mark.parametrize(
    "key",
    ["{", "[]", "1", '"text"', '{"schema_path": 3}', "[" * 100_000],
    ids=["syntax", "list", "number", "string", "schema", "deep"],
)
def test_keys_that_are_no_key(key):
    """A key that is not a JSON object, or has a `schema_path` that is not a string, fails the load, as in ModelMesh."""
    with pytest.raises(PullError) as caught:
        resolve(Source("/a", key))
    assert caught.value.kind is PullErrorKind.BAD_REQUEST


@pytest.mark.parametrize(
    ("uri", "kind", "said", "path"),
    [
        pytest.param("s3://b/p/a.onnx", "s3", {"bucket": "b"}, "p/a.onnx", id="s3"),
        pytest.param("s3://b/p/", "s3", {"bucket": "b"}, "p/", id="s3-folder"),
        pytest.param("s3://b/a%2Fb?c#d", "s3", {"bucket": "b"}, "a%2Fb?c#d", id="s3-taken-as-it-is"),
        pytest.param("s3://b", "s3", {"bucket": "b"}, "", id="s3-bucket"),
        pytest.param("gs://b/p", "gcs", {"bucket": "b"}, "p", id="gs"),
        pytest.param("azure://acc/c/p/q", "azure", {"account_name": "acc", "container": "c"}, "p/q", id="azure"),
        pytest.param(
            "https://acc.blob.core.windows.net/c/p%20q/r",
            "azure",
            {"account_name": "acc", "container": "c"},
            "p q/r",
            id="azure-url",
        ),
        pytest.param("hf://org/repo", "hf", {"repository": "org/repo"}, "", id="hf"),
        pytest.param("hf://org/repo:v1", "hf", {"repository": "org/repo", "revision": "v1"}, "", id="hf-revision"),
        pytest.param(
            "hf://org/repo@refs%2Fpr%2F1/onnx/a.onnx",
            "hf",
            {"repository": "org/repo", "revision": "refs/pr/1"},
            "onnx/a.onnx",
            id="hf-file",
        ),
    ],
)
def test_uris_and_keys_mean_the_same(uri, kind, said, path):
    """A URI gives the same location as a path with the equivalent storage_params: the same store, path and name."""
    one = resolve(Source(uri)).model
    key = json.dumps({"storage_params": {"type": kind, **said}})
    for other in (resolve(Source(path, key)).model, resolve(Source("/" + path, key)).model):
        assert (other.scheme, other.path, other.name) == (one.scheme, one.path, one.name)
        assert other.uri.rstrip("/") == one.uri.rstrip("/")
    assert one.path == path
    assert one.settings.type == kind
    assert {name: one.settings.text(name) for name in said} == said


def test_claims(tmp_path):
    """A claim is a folder below the operator's folder for claims. No path leads out of it, and without that folder
    there are no claims."""
    model = resolve(Source("pvc://models/fraud/de.onnx"), claims=tmp_path).model
    assert (model.scheme, model.uri, model.name) == ("file", f"{tmp_path}/models/fraud/de.onnx", "de.onnx")
    key = '{"storage_params": {"type": "pvc", "name": "models"}}'
    assert resolve(Source("fraud/de.onnx", key), claims=tmp_path).model.uri == model.uri
    for path in ("pvc://models/../other/a", "pvc://../a", "pvc://.hidden/a", "pvc:///a", "pvc://a%2Fb/c"):
        with pytest.raises(PullError):
            resolve(Source(path), claims=tmp_path)
    with pytest.raises(PullError, match="no volume claims"):
        resolve(Source("pvc://models/a"))


@pytest.mark.parametrize(
    "path",
    [
        "s3://b/../a",
        "s3://b/a/../../c",
        "s3://b/./a",
        "s3://b//a",
        "s3://b/a//b",
        "s3:///a",
        "s3://../a",
        "gs://b/a/..",
        "azure://account/c/../d",
        "azure://Not_One/c/d",
        "https://acc.blob.core.windows.net/c/%2e%2e/d",
        "hf://org",
        "hf://org/repo@../../x",
        "hf://../repo/x",
        "hf://org/repo/../../x",
    ],
)
def test_paths_in_stores_that_lead_elsewhere(path):
    """Paths that lead out of their bucket or folder, and malformed paths, are refused before any request to the
    store."""
    with pytest.raises(PullError) as caught:
        resolve(Source(path))
    assert caught.value.kind is PullErrorKind.BAD_REQUEST


def test_a_signed_url_of_azure_is_a_url():
    """A signed URL of Azure, whose signature is in the query, is requested unchanged."""
    uri = "https://acc.blob.core.windows.net/c/a.onnx?sig=secret"
    model = resolve(Source(uri)).model
    assert (model.scheme, model.uri) == ("https", uri)
    assert "secret" not in model.shown


def test_a_schema_is_beside_its_model():
    """A schema is taken from its model's store, unless the schema is a URI."""
    request = resolve(Source("s3://b/m/a.onnx", '{"schema_path": "m/schema.json"}'))
    assert request.schema is not None
    assert (request.schema.uri, request.schema.settings.text("bucket")) == ("s3://b/m/schema.json", "b")
    request = resolve(Source("s3://b/m/a.onnx", '{"schema_path": "https://host/schema.json"}'))
    assert request.schema is not None
    assert request.schema.scheme == "https"
    assert resolve(Source("/a", '{"schema_path": "/s.json"}')).schema == locate("/s.json")


@pytest.mark.parametrize(
    ("path", "key", "text"),
    [
        ("/a", '{"storage_key": "mine"}', "no storage secret"),
        ("/a", '{"storage_params": {"type": "s3"}}', "bucket is missing"),
        ("/a", '{"storage_params": {"type": "ftp"}}', "must be s3, gcs"),
        ("/a", '{"bucket": "b"}', "the type of the store of .* is unknown"),
        ("/a", '{"storage_params": []}', ""),
        ("/a", '{"storage_params": [1]}', "must be a JSON object"),
        ("/a", '{"storage_key": 7}', "must be a string"),
        ("a", '{"storage_params": {"type": 7}}', "must be a string"),
        ("file:///a", '{"storage_key": "mine"}', "give only one of them"),
    ],
)
def test_stores_that_are_not_named_well(path, key, text):
    """The error says what is missing or wrong in the name of a store."""
    if not text:
        assert resolve(Source(path, key)).model.scheme == "file"
        return
    with pytest.raises(PullError, match=text) as caught:
        resolve(Source(path, key))
    assert caught.value.kind is (PullErrorKind.SETTINGS if "secret" in text else PullErrorKind.BAD_REQUEST)


@pytest.mark.parametrize("key", ["", "  ", "{}", '{"model_type": "onnx"}', '{"storage_key": "", "storage_params": {}}'])
def test_keys_that_select_nothing_are_tolerated(key):
    assert resolve(Source("/a", key)).schema is None


def test_the_key_for_the_model_server():
    """The key for the model server has sizes and local paths in place of store attributes, and is otherwise
    unchanged."""
    request = resolve(Source("/a", '{"model_type": {"name": "onnx"}, "schema_path": "/s.json", "storage_key": ""}'))
    key = json.loads(rewritten_key(request.key, disk_bytes=7, schema="/local/s.json"))
    assert key == {"model_type": {"name": "onnx"}, "disk_size_bytes": 7, "schema_path": "/local/s.json"}


@pytest.mark.parametrize(
    "uri",
    [
        "https://user:secret@host/a",
        "https://secret@host/a",
        "https://host/a?token=secret",
        "https://host/a#secret",
        "https://user:se@secret@host/a?x",
    ],
)
def test_secrets_are_not_shown(uri):
    """A location is shown with its host and path, without user, password, query and fragment."""
    assert "secret" not in redact(uri)
    assert "host/a" in redact(uri)


uris = st.builds(
    lambda scheme, rest: scheme + rest,
    st.sampled_from(
        ["s3://", "gs://", "azure://", "pvc://", "hf://", "https://acc.blob.core.windows.net/", "file:", "/"]
    ),
    st.text(st.sampled_from("ab/.@:%2eEfF?#\\~ \u00e9\udcff\x00")),
)
keys = st.builds(
    lambda **key: json.dumps(key),
    storage_key=st.sampled_from(["", "mine", "../mine", "..data"]),
    storage_params=st.dictionaries(
        st.sampled_from(["type", "bucket", "name", "container", "a.b"]), st.text(max_size=5)
    ),
    schema_path=st.sampled_from(["", "s.json", "../../s.json", "/etc/passwd"]),
)


@given(st.text() | uris, st.text() | keys)
def test_any_text_is_resolved_or_refused(path, key):
    """Any text resolves or raises PullError, never another exception, and no resolved path in a store or below the
    claims contains `..`."""
    with contextlib.suppress(PullError):
        request = resolve(Source(path, key), claims=Path("/claims"))
        for location in (request.model, request.schema):
            if location is not None and location.settings.type:
                assert not {"..", "."} & set(location.path.split("/"))
            if location is not None and location.uri.startswith("/claims"):
                assert not {"..", "."} & set(location.uri.split("/"))
