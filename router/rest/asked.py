"""A V2 request over HTTP, parsed from its path and headers, independent of the HTTP server.

Paths are split before they are decoded, because ids may contain `/`, which most clients write as `%2F`. Headers are
read only when they are needed, so that a request is not refused for faults in parts that it does not use.
"""

import asyncio
import urllib.parse
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from mesh.statuses import MeshError, Reason
from mesh.wire import headers as names
from mesh.wire import metadata
from mesh.wire.call import Header
from router.calls import extensions
from router.inference.models import Caller

TIMEOUT = 300.0
"""Timeout of calls without one, in seconds: longer than a cold start may take."""

HEADER_LENGTH = "Inference-Header-Content-Length"

MODELS = "/v2/models/"

_PASSED = ("traceparent", "tracestate", "baggage")  # besides x- and mm-
_CREDENTIALS = frozenset({names.AUTHORIZATION.decode(), names.CLIENT_CERTIFICATE.decode()})
"""The headers by which the dispatcher identifies the caller, and which it passes to no model server."""

_NOT_PASSED = ("x-forwarded-", "x-envoy-", "x-request-timeout", "x-real-ip", "x-mesh-")


class Fields(Protocol):
    """The headers of a request by case-insensitive name. aiohttp implements this in C."""

    def getall(self, key: str, default: tuple[()]) -> Sequence[str]:
        """Returns all values of the header with that name."""

    def items(self) -> Iterable[tuple[str, str]]:
        """Returns names and values in the order in which they arrived."""


class PlainFields:
    """The headers of a request as received by `mesh.wire`."""

    __slots__ = ("_items",)

    def __init__(self, headers: Iterable[Header]) -> None:
        """Decodes the headers, whose names are in lower case."""
        self._items = [(name.decode("latin-1"), value.decode("utf-8", "surrogateescape")) for name, value in headers]

    def getall(self, key: str, default: tuple[()]) -> Sequence[str]:
        """Returns all values of the header with that name."""
        lower = key.lower()
        return [value for name, value in self._items if name == lower] or default

    def items(self) -> Iterable[tuple[str, str]]:
        """Returns names and values in the order in which they arrived."""
        return self._items


class ModelPath(NamedTuple):
    """The parts of a path below `/v2/models/`."""

    model: str
    version: str  # "": any
    operation: str  # "": the model itself


class Asked:
    """One request."""

    __slots__ = ("_fields", "path", "peer")

    def __init__(self, path: str, fields: Fields, peer: str) -> None:
        """Makes a request. `path` is not decoded and excludes the query."""
        self.path = path
        self.peer = peer
        self._fields = fields

    def target(self) -> ModelPath:
        """Returns the parts of the path. Raises MeshError."""
        return split_path(self.path)

    def caller(self) -> Caller:
        """Returns the caller, whose timeout starts now. Raises MeshError."""
        return Caller(asyncio.get_running_loop().time() + self.timeout(), self.metadata(), self.peer)

    def inference(self) -> ModelPath:
        """Returns the parts of the path of an inference. Raises MeshError for any other path."""
        target = self.target()
        if target.operation != "infer":
            if (refusal := extensions.of_operation(self.path)) is not None:
                raise refusal
            text = f"{self.path:.200} does not accept POST: an inference is POST /v2/models/MODEL/infer"
            raise MeshError(Reason.UNKNOWN_METHOD, text)
        return target

    def header_length(self) -> int | None:
        """Returns the length of the body's JSON part if binary tensors follow it, or None if the body is JSON only.
        Raises MeshError."""
        text = self._one(HEADER_LENGTH)
        if text is None:
            return None
        if not (text.isascii() and text.isdigit() and len(text) < 16):
            raise MeshError(Reason.BAD_REQUEST, f"{HEADER_LENGTH} is {text!r:.60}, not a whole number")
        return int(text)

    def encoding(self) -> str:
        """Returns the Content-Encoding, or "" if there is none. Raises MeshError."""
        encoding = self._one("Content-Encoding")
        if encoding is None:
            return ""
        encoding = encoding.strip().lower()
        return "" if encoding == "identity" else encoding

    def timeout(self) -> float:
        """Returns the caller's timeout in seconds, from `grpc-timeout` (in gRPC's format) or `x-request-timeout` (in
        seconds), or TIMEOUT without these headers. Raises MeshError."""
        if (grpc := self._one("grpc-timeout")) is not None:
            seconds = metadata.parse_timeout(grpc.encode("ascii", "replace"))
            text = f"the header grpc-timeout is {grpc!r:.60}, not a time above 0 in gRPC's form, such as 500m or 10S"
        elif (plain := self._one("x-request-timeout")) is not None:
            text = f"the header x-request-timeout is {plain!r:.60}, not a number of seconds above 0"
            try:
                seconds = float(plain)
            except ValueError:
                seconds = None
        else:
            return TIMEOUT
        if seconds is None or not 0 < seconds < 1e9:
            raise MeshError(Reason.BAD_REQUEST, text)
        return seconds

    def metadata(self) -> list[Header]:
        """Returns the headers that become the call's metadata: the client's own (`x-`), the mesh's (`mm-`), those for
        tracing, and the client's credentials."""
        passed: list[Header] = []
        for name, value in self._fields.items():
            lower = name.lower()
            if lower not in _CREDENTIALS:
                if not lower.startswith(("x-", "mm-")) and lower not in _PASSED:
                    continue
                if lower.startswith(_NOT_PASSED):
                    continue
            if not (value.isascii() and value.isprintable()):
                continue
            encoded = lower.encode("ascii", "replace")
            if not encoded.startswith(names.INTERNAL):
                passed.append((encoded, value.encode()))
        return passed

    def _one(self, name: str) -> str | None:
        """Returns a header's value, or None if it is missing. Raises MeshError if there are two different values."""
        values = self._fields.getall(name, ())
        if not values:
            return None
        if len(distinct := set(values)) > 1:
            text = f"the header {name} has {len(distinct)} different values: send one"
            raise MeshError(Reason.BAD_REQUEST, text)
        return values[0]


def split_path(raw_path: str) -> ModelPath:
    """Returns model, version and operation of a path below `/v2/models/`. Raises MeshError."""
    segments = raw_path.removeprefix(MODELS).split("/")
    operation = segments.pop() if len(segments) > 1 and segments[-1] in ("infer", "ready") else ""
    version = ""
    if len(segments) > 2 and segments[-2] == "versions":
        version = decoded(segments.pop())
        segments.pop()
    model = decoded("/".join(segments))
    if not model:
        raise MeshError(Reason.BAD_REQUEST, "the path has no model id: use /v2/models/MODEL/infer")
    return ModelPath(model, version, operation)


def decoded(text: str) -> str:
    """Returns the percent-decoded text. Raises MeshError if the result is not UTF-8."""
    try:
        return urllib.parse.unquote(text, errors="strict")
    except UnicodeDecodeError as error:
        raise MeshError(
            Reason.BAD_REQUEST, "the path is not UTF-8 after percent-decoding: encode names as UTF-8"
        ) from error
