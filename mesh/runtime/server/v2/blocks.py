"""Memory of large requests: read into once, used by the model in place, and used again by later requests.

In ordinary memory, a request of 4 MB needs two blocks: its frame, and a copy of its contents that begins at the
boundary that ONNX Runtime needs (`alignment`). glibc also scatters such blocks: any small allocation may take a piece
of a free block, and the next tensor no longer fits. One caller with 4 MB tensors made the server grow by 40 to 85 MB.

So large messages are read into separate mappings, at an offset that puts the contents at a boundary. A mapping is free
when neither the frame of its message nor an array of the contents is referenced any more. New pages cost 2 ms for 4 MB,
so free mappings are kept for later messages until `trim`.
"""

import mmap
import weakref
from collections import deque

import numpy as np

from mesh.runtime.server.v2.alignment import BOUNDARY
from mesh.wire import framing

_UNIT = 256 << 10  # bytes: sizes are rounded up to a multiple, so that messages of similar sizes use the same mappings
_MOST_FREE = 32 << 20  # bytes of free mappings that are kept
_WASTE = 2  # a mapping of up to this many times the size is used
_RAW = 0x3A  # tag of a ModelInferRequest's raw contents
_LENGTH_DELIMITED = 2
_MAX_HEAD = 4096  # bytes in which the contents' beginning is looked for


class Blocks:
    """The mappings of one server. Messages may be freed in any thread."""

    __slots__ = ("_free",)

    def __init__(self) -> None:
        self._free: deque[mmap.mmap] = deque()  # its operations are atomic

    @property
    def free(self) -> int:
        """The number of bytes in free mappings."""
        return sum(map(len, tuple(self._free)))

    def memory(self, size: int, begun: bytes | bytearray | memoryview) -> memoryview:
        """Returns memory for a frame of `size` bytes, of which `begun` has arrived. If the frame's raw contents begin
        in `begun`, the memory is placed so that the contents begin at a boundary."""
        shift = -contents_at(begun) % BOUNDARY
        block = self._block(size + shift)
        array = np.frombuffer(block, np.uint8)
        # The view refers to this array, and so does everything that is made of the view.
        weakref.finalize(array, self._freed, block).atexit = False
        return memoryview(array)[shift : shift + size]  # type: ignore[arg-type]

    def trim(self) -> None:
        """Returns free mappings to the system."""
        self._free.clear()

    def _block(self, size: int) -> mmap.mmap:
        for _ in range(len(self._free)):
            try:
                block = self._free.popleft()
            except IndexError:  # another thread has trimmed
                break
            if size <= len(block) <= _WASTE * size + _UNIT:
                return block
            self._free.append(block)
        return mmap.mmap(-1, -(-size // _UNIT) * _UNIT, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def _freed(self, block: mmap.mmap) -> None:
        self._free.appendleft(block)  # the last used one is the likeliest to be in a cache
        while len(self._free) > 1 and self.free > _MOST_FREE:
            self._free.pop()


def contents_at(begun: bytes | bytearray | memoryview) -> int:
    """Returns the offset in a frame of the raw contents that begin in `begun`, the beginning of the frame, and continue
    beyond it. Returns 0 if there are none."""
    head = bytes(begun[:_MAX_HEAD])
    at = framing.PREFIX
    if head[:1] != b"\0":
        return 0
    try:
        while True:
            tag = head[at]
            length = shift = 0
            at += 1
            if tag & 7 != _LENGTH_DELIMITED or tag > 0x7F:
                return 0
            while True:
                byte = head[at]
                at += 1
                length |= (byte & 0x7F) << shift
                shift += 7
                if byte < 0x80:
                    break
            if at + length > len(head):
                return at if tag == _RAW else 0
            at += length
    except IndexError:  # it begins later
        return 0
