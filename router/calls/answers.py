"""Answers to calls that fail in the router. Their text and details are bounded.

A loader's error may have thousands of characters. It is cut here, because the caller would otherwise get none of it
(`statuses.MAX_TEXT`).
"""

from mesh.statuses import MeshError, shortened
from mesh.wire import metadata
from mesh.wire.call import Call

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
