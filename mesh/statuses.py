"""The one table of statuses: the reasons of failures, their gRPC and HTTP codes, and whether a caller may retry.

Mesh raises or answers its failures as a `MeshError` with a `Reason`. Only this module knows the codes of a reason. The
reason is also sent as `google.rpc.ErrorInfo` in the trailer `grpc-status-details-bin`, so that a program can tell apart
two failures with the same code. Errors that the *model server* answers are passed through, and never become a
`MeshError`.
"""

import enum
from collections.abc import Mapping

from mesh.pb import details_pb2

DOMAIN = "mesh-serving"


class Code(enum.IntEnum):
    """gRPC status codes, by their numbers on the wire (grpc/grpc, doc/statuscodes.md)."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class Reason(enum.Enum):
    """Reasons of errors: (gRPC code, HTTP code, may the caller retry)."""

    UNKNOWN_MODEL = (Code.NOT_FOUND, 404, False)
    UNKNOWN_VERSION = (Code.NOT_FOUND, 404, False)
    """The model or alias exists, but has no such version."""
    UNKNOWN_METHOD = (Code.UNIMPLEMENTED, 404, False)
    UNSUPPORTED = (Code.UNIMPLEMENTED, 501, False)
    """A part or an extension of a protocol that the mesh does not support."""
    BAD_REQUEST = (Code.INVALID_ARGUMENT, 400, False)
    UNSUPPORTED_TYPE = (Code.INVALID_ARGUMENT, 415, False)
    """A content type that the mesh does not accept."""
    UNAUTHENTICATED = (Code.UNAUTHENTICATED, 401, False)
    """The caller is not known: the request has no credentials, or none that are valid."""
    FORBIDDEN = (Code.PERMISSION_DENIED, 403, False)
    CONFLICT = (Code.ALREADY_EXISTS, 409, False)
    PRECONDITION = (Code.FAILED_PRECONDITION, 412, False)
    LOAD_FAILED = (Code.INTERNAL, 500, False)
    CONTENT_CHANGED = (Code.INTERNAL, 500, False)
    """The content at the model's path is not the content that the registration's first load found, so no pod may load
    it."""
    INTERNAL = (Code.INTERNAL, 500, False)
    NOT_FETCHED = (Code.UNAVAILABLE, 503, True)
    """The model's files cannot be fetched for a passing reason: the store is unavailable, busy or being written to."""
    NOWHERE = (Code.FAILED_PRECONDITION, 503, False)
    """No pod can load the model: its constraints exclude all pods, or it is larger than the memory of each."""
    NO_ROOM = (Code.RESOURCE_EXHAUSTED, 429, True)
    OVERLOADED = (Code.RESOURCE_EXHAUSTED, 429, True)
    """Too many waiters, a full queue, or too many bytes of bodies in memory."""
    TOO_LARGE = (Code.RESOURCE_EXHAUSTED, 413, False)
    """A message or headers above the limit. gRPC libraries use the same code for this."""
    NOT_IN_TIME = (Code.UNAVAILABLE, 503, True)
    """The load cannot finish by the caller's deadline; it continues."""
    DEADLINE = (Code.DEADLINE_EXCEEDED, 504, True)
    TOO_SLOW = (Code.DEADLINE_EXCEEDED, 408, True)
    """A body that arrives more slowly than the minimum rate."""
    CANCELLED = (Code.CANCELLED, 499, True)
    QUARANTINED = (Code.FAILED_PRECONDITION, 503, False)
    LOST = (Code.UNAVAILABLE, 503, True)
    """The server or the connection was lost after the request was sent, and the method is not known to be safe. The
    caller decides whether to retry."""
    REGISTRY_AWAY = (Code.UNAVAILABLE, 503, True)
    NOT_HERE = (Code.UNAVAILABLE, 503, True)
    """Inside the mesh only: this pod does not have the copy that the call is meant for."""
    FORMER_LIFE = (Code.UNAVAILABLE, 503, True)
    """An id cannot be registered with other attributes yet, because a pod may still answer from its old
    registration."""
    UNAVAILABLE = (Code.UNAVAILABLE, 503, True)
    """The mesh is starting or stopping, or has no pods yet."""

    def __init__(self, code: Code, http: int, retry: bool) -> None:
        self.code = code
        self.http = http
        self.retry = retry

    # Two reasons may have equal codes: without this, Enum would make the second an alias of the first.
    def __new__(cls, *args: object) -> "Reason":
        """Gives each member a different value, so that members with equal codes are not aliases."""
        member = object.__new__(cls)
        member._value_ = len(cls.__members__)
        return member


MAX_TEXT = 1500
"""Limit on the text of an error on the wire, in bytes. gRPC clients refuse a reply with more than 8 KiB of metadata,
and the details repeat the text in base64."""


def shortened(text: str, limit: int = MAX_TEXT) -> str:
    """Returns the text cut to at most `limit` bytes. A text may repeat input of callers, which can be of any length.

    Characters that UTF-8 cannot encode are replaced, because protobuf would refuse them."""
    raw = text[: limit + 1].encode("utf-8", "replace")  # cut first: it may have megabytes
    return raw.decode() if len(raw) <= limit else raw[: limit - 3].decode("utf-8", "ignore") + "..."


class MeshError(Exception):
    """A failure with its reason, and a text that says what happened and what the reader can do, if anything.

    `retry_after` is the time to wait before a retry, in seconds, or None if it is unknown. `details` are short strings
    for programs.
    """

    def __init__(
        self, reason: Reason, text: str, *, retry_after: float | None = None, details: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(text)
        self.reason = reason
        self.text = text
        self.retry_after = retry_after
        self.details = dict(details or {})

    def grpc_details(self) -> bytes:
        """Returns the value of the trailer `grpc-status-details-bin`: an encoded google.rpc.Status."""
        status = details_pb2.Status(code=self.reason.code, message=shortened(self.text))
        info = details_pb2.ErrorInfo(reason=self.reason.name, domain=DOMAIN, metadata=self.details)
        status.details.add(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=info.SerializeToString())
        if self.retry_after is not None:
            seconds = int(self.retry_after)
            delay = details_pb2.Duration(seconds=seconds, nanos=int((self.retry_after - seconds) * 1e9))
            retry = details_pb2.RetryInfo(retry_delay=delay)
            status.details.add(type_url="type.googleapis.com/google.rpc.RetryInfo", value=retry.SerializeToString())
        return status.SerializeToString()

    def __str__(self) -> str:
        return f"{self.reason.name}: {self.text}"


MAX_MESSAGE = "--max-message"
"""The option of routers, runtime pods and `mesh up` that bounds one message."""


def above_limit(what: str, limit: int, option: str = MAX_MESSAGE) -> str:
    """Returns the text of an error about something larger than `limit` bytes. `option` is the option that sets the
    limit, or "" if none does."""
    return f"{what} is above the limit of {limit} bytes" + (f" (set by {option})" if option else "")


def not_unicode(what: str) -> MeshError:
    """Returns the error for a text that UTF-8 cannot represent, such as half of a surrogate pair from JSON's escapes.
    `what` names the text."""
    text = f"{what} is not valid Unicode: it contains half of a surrogate pair (\\ud800 to \\udfff); remove it"
    return MeshError(Reason.BAD_REQUEST, text)


def too_large(what: str, limit: int, option: str = MAX_MESSAGE) -> MeshError:
    """Returns the error for something larger than `limit` bytes. Its details name the limit and the option for
    programs."""
    details = {"limit_bytes": str(limit)} | ({"option": option} if option else {})
    return MeshError(Reason.TOO_LARGE, above_limit(what, limit, option), details=details)


_HTTP_OF_CODE = {
    Code.OK: 200,
    Code.CANCELLED: 499,
    Code.UNKNOWN: 500,
    Code.INVALID_ARGUMENT: 400,
    Code.DEADLINE_EXCEEDED: 504,
    Code.NOT_FOUND: 404,
    Code.ALREADY_EXISTS: 409,
    Code.PERMISSION_DENIED: 403,
    Code.RESOURCE_EXHAUSTED: 429,
    Code.FAILED_PRECONDITION: 412,
    Code.ABORTED: 409,
    Code.OUT_OF_RANGE: 400,
    Code.UNIMPLEMENTED: 501,
    Code.INTERNAL: 500,
    Code.UNAVAILABLE: 503,
    Code.DATA_LOSS: 500,
    Code.UNAUTHENTICATED: 401,
}


def http_of_code(code: int) -> int:
    """Returns the HTTP status for a gRPC code that a model server answered (google.rpc.Code's own mapping)."""
    try:
        return _HTTP_OF_CODE[Code(code)]
    except ValueError:
        return 500


_CODE_OF_HTTP = {
    400: Code.INTERNAL,
    401: Code.UNAUTHENTICATED,
    403: Code.PERMISSION_DENIED,
    404: Code.UNIMPLEMENTED,
    429: Code.UNAVAILABLE,
    502: Code.UNAVAILABLE,
    503: Code.UNAVAILABLE,
    504: Code.UNAVAILABLE,
}


def code_of_http(status: int) -> Code:
    """Returns the gRPC code for a reply that is not gRPC, from its HTTP status (grpc/grpc,
    doc/http-grpc-status-mapping.md)."""
    return _CODE_OF_HTTP.get(status, Code.UNKNOWN)
