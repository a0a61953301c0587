"""Answering a call with a failure of ours: code, text and details, all of them bounded.

gRPC clients refuse a reply with more than 8 KiB of metadata, and the details repeat the text in base64: a loader's text
of a few thousand characters must be cut here, or the caller would see neither.
"""

from mesh.statuses import MeshError
from mesh.wire import metadata
from mesh.wire.call import Call

_MAX_TEXT = 1500  # characters

DETAILS = metadata.DETAILS


def cut(error: MeshError) -> MeshError:
    """The same error with a text that fits into metadata."""
    if len(error.text) <= _MAX_TEXT:
        return error
    text = error.text[: _MAX_TEXT - 3] + "..."
    return MeshError(error.reason, text, retry_after=error.retry_after, details=error.details)


def fail(call: Call, error: MeshError) -> None:
    """Answers `call` with `error`."""
    error = cut(error)
    call.fail(error.reason.code, error.text, trailers=((DETAILS, metadata.encode_bin(error.grpc_details())),))
