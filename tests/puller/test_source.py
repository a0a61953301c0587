"""What a path and a key name."""

import contextlib
import json

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
        pytest.param("s3://bucket/key", "s3", "key", id="unknown-scheme"),
    ],
)
def test_locations(path, scheme, name):
    """Scheme and last element of each form that a registration may use."""
    location = locate(path)
    assert (location.scheme, location.name, location.uri) == (scheme, name, path)


@pytest.mark.parametrize("path", ["", "models/a.onnx", "/a\0b", "http://host/a\r\nX: y", "../a", "http://[bad/x"])
def test_paths_that_name_nothing(path):
    """Empty, relative and malformed paths are the registration's fault."""
    with pytest.raises(PullError) as caught:
        locate(path)
    assert caught.value.kind is PullErrorKind.BAD_REQUEST


@pytest.mark.parametrize(
    "key",
    ["{", "[]", "1", '"text"', '{"schema_path": 3}', "[" * 100_000],
    ids=["syntax", "list", "number", "string", "schema", "deep"],
)
def test_keys_that_are_no_key(key):
    """Invalid JSON fails the load, as in the predecessor, with a clear kind."""
    with pytest.raises(PullError) as caught:
        resolve(Source("/a", key))
    assert caught.value.kind is PullErrorKind.BAD_REQUEST


@pytest.mark.parametrize("attribute", ['"storage_key": "mine"', '"storage_params": {"type": "s3"}', '"bucket": "b"'])
def test_stores_with_credentials_are_not_supported_yet(attribute):
    """What selects a store is refused rather than ignored."""
    with pytest.raises(PullError, match="store not supported by this version") as caught:
        resolve(Source("/a", "{" + attribute + "}"))
    assert caught.value.kind is PullErrorKind.BAD_REQUEST


@pytest.mark.parametrize("key", ["", "  ", "{}", '{"model_type": "onnx"}', '{"storage_key": "", "storage_params": {}}'])
def test_keys_that_select_nothing_are_tolerated(key):
    """Absent, empty and unrelated attributes do not disturb."""
    assert resolve(Source("/a", key)).schema is None


def test_the_key_for_the_model_server():
    """Sizes and local paths in, store attributes out, the rest as it was."""
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
    """User, password, query and fragment stay out; host and path stay in."""
    assert "secret" not in redact(uri)
    assert "host/a" in redact(uri)


@given(st.text(), st.text())
def test_any_text_is_resolved_or_refused(path, key):
    """Bad input is a PullError, never another exception."""
    with contextlib.suppress(PullError):
        resolve(Source(path, key))
