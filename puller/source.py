"""What a registration's path and key name: one location in one store, perhaps a second one for its schema.

`path` is a URI (`file:`, `http:`, `https:`) or an absolute path, which means a file. `key` is the predecessor's JSON
object; of it, `schema_path` names a second file, `model_type` is passed on, and whatever selects a store with
credentials (`storage_key`, `storage_params`, `bucket`) is refused for as long as no provider understands it.
"""

import json
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

from puller.errors import PullError, PullErrorKind

_STORE_ATTRIBUTES = ("storage_key", "storage_params", "bucket")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class Source:
    """What was registered."""

    path: str
    key: str = ""


@dataclass(frozen=True, slots=True)
class Location:
    """Something to fetch."""

    scheme: str  # lower case; chooses the provider
    uri: str  # as registered; may hold credentials
    name: str  # the last element of its path, decoded; may be anything, or empty

    @property
    def shown(self) -> str:
        """The URI for people: without user, password, query and fragment."""
        return redact(self.uri)


@dataclass(frozen=True, slots=True)
class Request:
    """A source, resolved."""

    model: Location
    schema: Location | None
    key: dict[str, Any]  # what was registered


def redact(uri: str) -> str:
    """A URI without what may be secret: signed URLs carry their secret in the query."""
    head = re.split(r"[?#]", uri, maxsplit=1)[0]
    text = re.sub(r"(//)[^/]*@", r"\1", head)
    return text + "?…" if "?" in uri else text


def resolve(source: Source) -> Request:
    """Reads path and key. Raises PullError(BAD_REQUEST)."""
    key = _parse_key(source.key)
    for attribute in _STORE_ATTRIBUTES:
        if key.get(attribute):
            text = f"modelKey names a store ({attribute}); this version pulls only file:, http: and https: paths"
            raise PullError(PullErrorKind.BAD_REQUEST, f"store not supported by this version: {text}")
    schema = key.get("schema_path")
    if schema is not None and not isinstance(schema, str):
        raise PullError(PullErrorKind.BAD_REQUEST, "schema_path in modelKey is not a string")
    return Request(locate(source.path), locate(schema) if schema else None, key)


def locate(path: str) -> Location:
    """The location that a path or URI names. Raises PullError(BAD_REQUEST)."""
    if not path:
        raise PullError(PullErrorKind.BAD_REQUEST, "the model has no path")
    if _CONTROL.search(path):
        raise PullError(PullErrorKind.BAD_REQUEST, f"the path {redact(path)!r} holds control characters")
    if path.startswith("/"):
        return Location("file", path, _last(path))
    match = _SCHEME.match(path)
    if match is None:
        text = f"{redact(path)!r} is neither an absolute path nor a URI such as file:///models/a.onnx or https://…"
        raise PullError(PullErrorKind.BAD_REQUEST, text)
    try:
        name = _last(urlsplit(path).path)
    except ValueError as error:  # its text may quote the part with the password
        raise PullError(PullErrorKind.BAD_REQUEST, f"{redact(path)!r} is not a valid URI") from error
    return Location(match[1].lower(), path, unquote(name))


def rewritten_key(key: dict[str, Any], *, disk_bytes: int, schema: str | None) -> str:
    """The key as a model server gets it after the pull: sizes and local paths instead of stores."""
    kept = {name: value for name, value in key.items() if name not in _STORE_ATTRIBUTES and name != "schema_path"}
    kept["disk_size_bytes"] = disk_bytes
    if schema is not None:
        kept["schema_path"] = schema
    return json.dumps(kept, separators=(",", ":"))


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _parse_key(text: str) -> dict[str, Any]:
    if not text.strip():
        return {}
    try:
        key = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PullError(PullErrorKind.BAD_REQUEST, "modelKey is not JSON") from error
    if not isinstance(key, dict):
        raise PullError(PullErrorKind.BAD_REQUEST, "modelKey is not a JSON object")
    return key
