"""Replies that the client builds itself, from the status in the reply's headers or trailers, or from a fault."""

from collections.abc import Mapping

from mesh import statuses
from mesh.wire import call, framing, metadata
from mesh.wire.reply import Reply

_CODES = {b"%d" % code: int(code) for code in statuses.Code}
_UNKNOWN = int(statuses.Code.UNKNOWN)


def reply(special: Mapping[bytes, bytes], headers: list[call.Header], trailers: list[call.Header]) -> Reply:
    """Returns the reply without its message. `special` are the transport's own headers and trailers. Without a status,
    or with an unknown one, the code is UNKNOWN."""
    status = special.get(b"grpc-status")
    raw = special.get(b"grpc-message", b"")
    if status is None:
        code, text = _UNKNOWN, "the reply ended without a status"
    else:
        code, text = _CODES.get(status, _UNKNOWN), metadata.decode_text(raw)
    return Reply(code, text, None, headers, trailers, special.get(b"grpc-encoding", b""), raw)


def not_grpc(status: int) -> Reply:
    """Returns the reply to report for an HTTP answer that is not gRPC and has no gRPC status."""
    code = statuses.code_of_http(status)
    return Reply(int(code), f"the server answered with HTTP status {status}, not with gRPC")


def broken(error: framing.FrameError) -> Reply:
    """Returns the failure that replaces a reply which breaks the framing, is too large, or has no room in the
    budget."""
    if error.reason is statuses.Reason.BAD_REQUEST:  # the reason for requests; in a reply the server is at fault
        return failure(statuses.Reason.INTERNAL, f"the reply is broken: {error.text}")
    text = f"in the reply, {error.text}"
    return failed(statuses.MeshError(error.reason, text, details=error.details, retry_after=error.retry_after))


def failure(reason: statuses.Reason, text: str) -> Reply:
    """Returns a reply that fails with this reason."""
    return failed(statuses.MeshError(reason, text))


def failed(error: statuses.MeshError) -> Reply:
    """Returns the reply for an error, with its details for programs."""
    trailers = [(metadata.DETAILS, metadata.encode_bin(error.grpc_details()))]
    return Reply(int(error.reason.code), error.text, None, [], trailers)
