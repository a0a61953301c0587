"""Answers to calls that fail in the router, with texts of limited length.

The error of a load may have thousands of characters. It is shortened here, because gRPC clients refuse a reply whose
metadata is too long, and would show none of the text (`statuses.MAX_TEXT`).
"""

from google.protobuf.message import DecodeError

from mesh import statuses
from mesh.pb import details_pb2
from mesh.statuses import MeshError, Reason, shortened
from mesh.telemetry import logs
from mesh.wire import metadata
from mesh.wire.call import Call
from mesh.wire.localcall import LocalAnswer

log = logs.get(__name__)

DETAILS = metadata.DETAILS


def cut(error: MeshError) -> MeshError:
    """Returns the error with its text cut to what fits into metadata."""
    text = shortened(error.text)
    if text == error.text:
        return error
    return MeshError(error.reason, text, retry_after=error.retry_after, details=error.details)


def fail(call: Call, error: MeshError) -> None:
    """Answers `call` with `error`."""
    error = cut(error)
    call.fail(error.reason.code, error.text, trailers=((DETAILS, metadata.encode_bin(error.grpc_details())),))


def internal(call: Call, what: str) -> None:
    """Logs the exception that is being handled, and answers `call` with INTERNAL. `what` says what has failed."""
    log.exception(f"{what} failed in the router's own code", method=call.method)
    fail(call, internal_error())


def internal_error() -> MeshError:
    """Returns the error for a fault of the router's own code, which the caller has to log."""
    return MeshError(Reason.INTERNAL, "internal error; the router's log has the cause")


def stopping() -> MeshError:
    """Returns the error for a call that this router cannot carry because it is stopping."""
    return MeshError(Reason.UNAVAILABLE, "this router is stopping: try again")


def our_own(answer: LocalAnswer) -> MeshError | None:
    """Returns the error in an answer if a router or a pod of the mesh made it. Returns None for other answers: of a
    model server, without an error, or with details that cannot be read."""
    encoded = answer.metadata(DETAILS)
    if encoded is None:
        return None
    try:
        status = details_pb2.Status.FromString(metadata.decode_bin(encoded))
        reason, retry_after, details = None, None, {}
        for detail in status.details:
            if detail.type_url.endswith("/google.rpc.ErrorInfo"):
                info = details_pb2.ErrorInfo.FromString(detail.value)
                if info.domain == statuses.DOMAIN and info.reason in Reason.__members__:
                    reason, details = Reason[info.reason], dict(info.metadata)
            elif detail.type_url.endswith("/google.rpc.RetryInfo"):
                delay = details_pb2.RetryInfo.FromString(detail.value).retry_delay
                retry_after = delay.seconds + delay.nanos / 1e9
    except (ValueError, DecodeError):  # details from a model server, and malformed: use its code and text
        return None
    if reason is None or reason.code != answer.code:
        return None
    return MeshError(reason, answer.text, retry_after=retry_after, details=details)
