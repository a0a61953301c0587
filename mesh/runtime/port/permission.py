"""The copy that a call names, and whether this pod may answer for it."""

import binascii
from time import CLOCK_BOOTTIME, clock_gettime_ns
from typing import NamedTuple

from mesh.runtime.port import answers
from mesh.runtime.sharedmemory.board import MODE_BITS, Board
from mesh.statuses import MeshError, Reason
from mesh.wire import headers
from mesh.wire.call import Call
from mesh.wire.metadata import decode_bin
from placement.fence import CallVerdict, Mode, Said, judge


class Named(NamedTuple):
    """A call's metadata for the data port."""

    model_id: bytes | None
    token: bytes | None  # of the copy
    named_as: bytes | None  # the names for the reply


def named(call: Call) -> Named:
    """Returns the model id, the copy's token, and the names for the reply, from a call's metadata. Caches the result
    for calls with the same metadata. Raises MeshError if a binary model id is not base64."""
    head = call.head
    if head is None:
        return _named(call)
    note = head.note
    if type(note) is not Named:
        note = head.note = _named(call)
    return note


def _named(call: Call) -> Named:
    model_id = token = binary = named_as = None
    for key, value in call.headers:
        if key == headers.COPY:
            token = value
        elif key == headers.MODEL_ID:
            model_id = value
        elif key == headers.MODEL_ID_BIN:
            binary = value
        elif key == headers.AS:
            named_as = value
    if model_id is None and binary is not None:
        try:
            model_id = decode_bin(binary)
        except (binascii.Error, ValueError):
            raise MeshError(
                Reason.BAD_REQUEST, "the header mm-model-id-bin is not base64: encode the id in base64"
            ) from None
    return Named(model_id, token, named_as)


def proven(fence: int) -> bool:
    """Returns whether the agent's proof that it has its lease is fresh. If so, every call may be answered."""
    # The mode is in the lowest bits, where a few nanoseconds make no difference.
    return fence & MODE_BITS == Mode.PROVEN and fence > clock_gettime_ns(CLOCK_BOOTTIME)


def permitted(call: Call, board: Board, fence: int, method: int, started_ns: int) -> bool:
    """Returns whether this pod may serve a call although its agent's proof is not fresh. If not, answers the call
    first. `method` and `started_ns` are for the histogram."""
    said = Said.NOTHING
    for key, _ in call.headers:
        if key == headers.VERIFIED:
            said = Said.VERIFIED
            break
        if key == headers.ETCD_AWAY:
            said = Said.AWAY
    verdict = judge(Mode(fence & MODE_BITS), fence & ~MODE_BITS, clock_gettime_ns(CLOCK_BOOTTIME), said)
    if verdict is CallVerdict.NOT_HERE:
        answers.not_here(call, board, method, started_ns)
    elif verdict is CallVerdict.VERIFY_FIRST:
        answers.verify_first(call, board, method, started_ns)
    return verdict is CallVerdict.ANSWER
