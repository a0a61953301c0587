"""Recognition of requests that differ from an earlier one only in their numbers.

A client usually sends similar requests: the same names, datatype and shape, with other contents and perhaps another
`id`. If all other bytes are equal, and at the same offsets, parsing would yield nothing new. Comparing them takes 1 us;
parsing and checking them takes 6 us (one input of 64 floats), half of the time that the server adds to a call of a
small model.

Only the simplest requests are recognised: uncompressed, one input of a numeric type, raw contents at the end. All
others are always parsed.
"""

from typing import NamedTuple

import numpy as np

from mesh.runtime.server.v2 import alignment
from mesh.runtime.server.v2.reply import ReplyWriter
from mesh.runtime.server.v2.tensors import Array, Tensor
from mesh.wire import encoding

MAX_BYTES = 256 << 10
"""Largest frame that is compared: its contents must fit into `alignment.LOOP`."""

_MAX_FIELDS = 16384

_MAX_KNOWN = 32  # names and lengths of frames that one model remembers
_MAX_TRIES = 256  # requests to learn from: a client whose requests are never plain must not pay for each of them

Asked = tuple[dict[str, Array], int, ReplyWriter, bool, bytes]
"""The meaning of a request: the model's input, its size in bytes, the wanted outputs, True if they are to be raw, and
the id."""


class _Same(NamedTuple):
    """The common parts of all requests of one kind and length."""

    head: bytes  # the frame up to the id's text, or up to the contents if there is no id
    id_at: int
    id_end: int  # 0: no id
    middle: bytes  # from the end of the id to the contents
    raw_at: int
    memory: memoryview  # the event loop's, for the contents
    feed: dict[str, Array]  # over that memory
    size: int
    answer: ReplyWriter


class Shortcuts:
    """The requests that are recognised for one model."""

    __slots__ = ("_known", "_other_names", "_tries")

    def __init__(self) -> None:
        self._known: dict[int, _Same] = {}  # by length of the frame
        self._other_names: dict[bytes, _Same] = {}  # of the same length, by the beginning of the frame
        self._tries = 0

    def find(self, frame: bytes) -> Asked | None:
        """Returns the meaning of a frame if it is like an earlier one, or None. The input is in `alignment.LOOP`."""
        same = self._known.get(len(frame))
        if same is None:
            return None
        if not frame.startswith(same.head):
            same = self._other_names.get(_kind(frame))
            if same is None or not frame.startswith(same.head):
                return None
        request_id = b""
        if same.id_end:
            request_id = frame[same.id_at : same.id_end]
            # Beyond ASCII it must be checked to be UTF-8, which parsing does.
            if not request_id.isascii() or not frame.startswith(same.middle, same.id_end):
                return None
        same.memory[:] = frame[same.raw_at :]
        return same.feed, same.size, same.answer, True, request_id

    def learn(self, frame: bytes, tensor: Tensor, shape: tuple[int, ...], answer: ReplyWriter) -> None:
        """Remembers a frame that was parsed and found valid, if it is simple enough."""
        if self._tries >= _MAX_TRIES or len(self._known) + len(self._other_names) >= _MAX_KNOWN:
            return
        length, kind = len(frame), _kind(frame)
        if kind in self._other_names or (length in self._known and _kind(self._known[length].head) == kind):
            return
        self._tries += 1
        if frame[0] or len(frame) > MAX_BYTES or not tensor.kind.plain:
            return
        fields = list(encoding.fields(memoryview(frame)[5:], limit=_MAX_FIELDS))
        order = [tag for tag, _, _ in fields]
        if order[-1:] != [_RAW] or order.count(_RAW) != 1 or order.count(_ID) > 1:
            return
        if not _PLAIN.issuperset(order):
            return
        raw_at, end = fields[-1][1] + 5, fields[-1][2] + 5
        id_at = id_end = 0
        for tag, start, stop in fields:
            if tag == _ID and stop > start:
                id_at, id_end = start + 5, stop + 5
        memory = alignment.LOOP.memory[: end - raw_at]
        same = _Same(
            head=frame[: id_at or raw_at],
            id_at=id_at,
            id_end=id_end,
            middle=frame[id_end:raw_at] if id_end else b"",
            raw_at=raw_at,
            memory=memory,
            feed={tensor.name: np.ndarray(shape, tensor.kind.dtype, memory)},
            size=end - raw_at,
            answer=answer,
        )
        if length in self._known:
            self._other_names[kind] = same
        else:
            self._known[length] = same


# Tags of a ModelInferRequest's fields. The router has looked at name and version.
_NAME, _VERSION, _ID, _INPUT, _OUTPUT, _RAW = 0x0A, 0x12, 0x1A, 0x2A, 0x32, 0x3A
_PLAIN = frozenset((_NAME, _VERSION, _ID, _INPUT, _OUTPUT, _RAW))


def _kind(frame: bytes) -> bytes:
    """Returns the length and the name in a frame, because a model may be called by its id and by aliases of the same
    length."""
    if len(frame) > 6 and frame[5] == _NAME:
        return frame[: 7 + frame[6]]
    return frame[:5]
