"""The metadata of the data port's answers: the pod's load, or a status with its reason."""

import time

from mesh.runtime.sharedmemory.board import Board
from mesh.statuses import MeshError, Reason, shortened
from mesh.wire import headers
from mesh.wire.call import Call, Headers
from mesh.wire.metadata import DETAILS, Block, encode_bin

_NOT_HERE = ((headers.NOT_HERE, b"1"),)
_VERIFY_FIRST = ((headers.VERIFY_FIRST, b"1"),)


_LOADS = tuple(Block(((headers.LOAD, b"%d" % count),)) for count in range(256))


def load(in_flight: int) -> Headers:
    """Returns the header with the number of other calls in flight in this pod, for the router."""
    return _LOADS[in_flight] if in_flight < 256 else ((headers.LOAD, b"%d" % in_flight),)


_MAX_TEXT = 1500
"""Maximum length of an error's text, in bytes. The text is sent twice, percent-encoded and in base64, and clients limit
all trailers to 8 KiB."""


def fail(call: Call, error: MeshError) -> None:
    """Answers with an error. Shortens a text that is too long for clients."""
    if len(error.text) * 4 > _MAX_TEXT and len(encoded := error.text.encode(errors="replace")) > _MAX_TEXT:
        text = encoded[:_MAX_TEXT].decode(errors="ignore") + "..."
        error = MeshError(error.reason, text, retry_after=error.retry_after, details=error.details)
    if error.reason is Reason.NOT_HERE:
        call.fail(error.reason.code, error.text, _NOT_HERE)
    else:
        call.fail(error.reason.code, shortened(error.text), (), ((DETAILS, encode_bin(error.grpc_details())),))


def not_here(call: Call, board: Board, method: int, started_ns: int) -> None:
    """Answers that this pod does not have the copy, and counts the call. The router, whose view is outdated, then tries
    another pod. `method` and `started_ns` are for the histogram."""
    call.fail(Reason.NOT_HERE.code, "this pod does not have the copy that the call is for", _NOT_HERE)
    board.observe(method, Reason.NOT_HERE.code, time.monotonic_ns() - started_ns)


def verify_first(call: Call, board: Board, method: int, started_ns: int) -> None:
    """Answers that the router must read the model's record before this pod may answer, and counts the call. No model
    has run. `method` and `started_ns` are for the histogram."""
    text = "this pod cannot reach etcd and answers only calls whose router has verified the model's record"
    call.fail(Reason.NOT_HERE.code, text, _VERIFY_FIRST)
    board.observe(method, Reason.NOT_HERE.code, time.monotonic_ns() - started_ns)
