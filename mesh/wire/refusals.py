"""The server's own answers to requests that no handler should see: the reason, and its encoding.

A request with gRPC's content type gets a gRPC status, trailers-only; any other gets plain HTTP, with a line of text for
people who try a browser or curl on the port. This module decides which requests are refused; `serverconnection` decides
what happens to their connection.
"""

import http
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from mesh import statuses
from mesh.wire import call, metadata

MAX_HEADERS = 256  # header lines of one request

_GRPC = b"application/grpc"

# `allow` is for 405, and harmless with other codes.
_HTTP = (
    b"HTTP/1.1 %d %b\r\ncontent-type: text/plain\r\ncontent-length: %d\r\nallow: POST\r\nconnection: close\r\n\r\n%b\n"
)


class Refusal(NamedTuple):
    """The reason why a request is refused. `http` is the HTTP status of the answer, or 0 for a gRPC request."""

    reason: statuses.Reason
    text: str
    http: int = 0
    details: Mapping[str, str] = MappingProxyType({})
    retry_after: float | None = None

    def trailers(self) -> bytes:
        """Returns the header lines by which an answer to a gRPC request gives programs the reason."""
        error = statuses.MeshError(self.reason, self.text, details=self.details, retry_after=self.retry_after)
        return metadata.encode_headers(((metadata.DETAILS, metadata.encode_bin(error.grpc_details())),))

    def over_http(self) -> bytes:
        """Returns the whole answer to a request that is not gRPC."""
        text = self.text.encode("ascii", "backslashreplace")
        status = http.HTTPStatus(self.http)
        return _HTTP % (status, status.phrase.encode(), len(text) + 1, text)


def _plain(text: str, status: http.HTTPStatus) -> Refusal:
    return Refusal(statuses.Reason.BAD_REQUEST, text, status)


NO_POST = _plain("the method is not POST, which gRPC requires", http.HTTPStatus.METHOD_NOT_ALLOWED)
NO_GRPC = _plain("the content type is not application/grpc", http.HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
NO_PATH = _plain("the request target is not a path", http.HTTPStatus.BAD_REQUEST)
OLD_HTTP = _plain("the protocol is not HTTP/1.1, which is required", http.HTTPStatus.HTTP_VERSION_NOT_SUPPORTED)


def is_grpc(content_type: bytes) -> bool:
    """Returns whether the content type is gRPC, with or without `+proto` and the like, but not
    `application/grpc-web`."""
    return content_type == _GRPC or content_type.startswith((_GRPC + b"+", _GRPC + b";"))


def of_error(error: statuses.MeshError) -> Refusal:
    """Returns the refusal of a message that is broken or too large, or for which there is no room now."""
    return Refusal(error.reason, error.text, details=error.details, retry_after=error.retry_after)


def too_slow(rate: int) -> Refusal:
    """Returns the refusal of a body that arrives too slowly. `rate` is the minimum, in bytes a second."""
    text = f"the message arrived at less than {rate} bytes a second: send it faster, or in smaller parts"
    return Refusal(statuses.Reason.TOO_SLOW, text)


def of_headers(target: bytes, headers: list[call.Header], limit: int, read: int) -> Refusal | None:
    """Returns the refusal of a head that is too large, or None for any other. `limit` is in bytes; `read` is an upper
    bound of the head's size."""
    if len(headers) > MAX_HEADERS:
        return Refusal(
            statuses.Reason.TOO_LARGE, f"{len(headers)} headers are above the limit of {MAX_HEADERS}: send fewer"
        )
    # Counted exactly only if the head may be too large, which is rare.
    if read > limit and len(target) + sum(len(name) + len(value) + 4 for name, value in headers) > limit:
        return Refusal(
            statuses.Reason.TOO_LARGE,
            f"the headers have more than {limit} bytes: send fewer or shorter ones",
            details={"limit_bytes": str(limit)},
        )
    return None


def of_bytes(why: str, *, grpc: bool, large: bool = False) -> Refusal:
    """Returns the refusal of bytes that cannot be parsed. `grpc` is true if they belong to a request that was valid
    gRPC so far, and `large` if the head or the trailers are too long."""
    if grpc:
        return Refusal(statuses.Reason.BAD_REQUEST, why)
    return _plain(why, http.HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE if large else http.HTTPStatus.BAD_REQUEST)
