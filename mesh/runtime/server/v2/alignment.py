"""Memory for models' inputs, aligned to 64 bytes.

ONNX Runtime computes on an array in place, and some kernels sum the elements before the first boundary of a vector
register separately. The last bits of an answer would then depend on the contents' offset in the message, for example on
the length of the request's `id`. Every input therefore begins at a boundary.

A run in the event loop ends before the next request is read, so all these runs share one `Scratch`. Writing into it
takes 0.1 us, whereas an array with its own memory takes 1.6 us. Inputs that are needed later are copied (`own`).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mesh.runtime.server.v2.tensors import Array, Raw

BOUNDARY = 64
"""Alignment in bytes: a cache line, and the widest vector register."""

_LARGE = 1 << 20
"""Size in bytes from which on contents may already begin at a boundary: large messages are read into aligned memory
(`blocks`)."""

_FREE = 256 << 10
"""Bytes of the shared memory. For larger contents, the cost of an allocation is negligible."""


def block(size: int) -> Array:
    """Returns an array of `size` uninitialised uint8 elements at a boundary."""
    memory = np.empty(size + BOUNDARY, np.uint8)
    begin = -memory.ctypes.data % BOUNDARY
    return memory[begin : begin + size]


def empty(shape: tuple[int, ...], dtype: "np.dtype[Any]") -> Array:
    """Returns an uninitialised array of numbers at a boundary."""
    count = 1
    for dimension in shape:
        count *= dimension
    return np.ndarray(shape, dtype, block(count * dtype.itemsize))


def own(feed: Mapping[str, Array]) -> dict[str, Array]:
    """Returns the arrays with copies of all numbers, in memory of their own. Arrays of strings are returned as they
    are."""
    return {name: array if array.dtype.hasobject else _copy(array) for name, array in feed.items()}


def _copy(array: Array) -> Array:
    copied = empty(array.shape, array.dtype)
    copied[...] = array
    return copied


class Scratch:
    """Memory for the numbers of one request at a time. Call `begin` for each request, then `put` for each of the
    request's inputs."""

    __slots__ = ("_at", "_memory", "_size", "memory")

    def __init__(self, size: int = _FREE) -> None:
        self._memory = block(size)
        self._size = size
        self.memory = memoryview(self._memory)  # type: ignore[arg-type]
        """The whole memory, for code that writes to its beginning itself."""
        self._at = 0

    def begin(self) -> None:
        """Frees the memory for the next request."""
        self._at = 0

    def put(self, contents: Raw, shape: tuple[int, ...], dtype: "np.dtype[Any]") -> Array:
        """Returns an array of that shape over a copy of `contents`, which must have as many bytes. If they do not fit
        here, the copy is in newly allocated memory."""
        begin = self._at
        end = begin + len(contents)
        if end > self._size or end == begin:
            return put(contents, shape, dtype)
        memory = self.memory
        memory[begin:end] = contents
        self._at = end + -end % BOUNDARY
        return _array(shape, dtype, memory, begin)


_array = np.ndarray


def put(contents: Raw, shape: tuple[int, ...], dtype: "np.dtype[Any]") -> Array:
    """Returns an array of that shape over a copy of `contents`, like `Scratch.put`, in newly allocated memory. Large
    contents that begin at a boundary are not copied (`blocks`)."""
    if len(contents) >= _LARGE:
        whole = np.frombuffer(contents, dtype)
        if not whole.ctypes.data % BOUNDARY:
            return whole.reshape(shape)
    array = empty(shape, dtype)
    if array.size:
        array.reshape(-1).view(np.uint8)[:] = np.frombuffer(contents, np.uint8)
    return array


LOOP = Scratch()
"""The memory of the event loop's thread, of which a server has one."""
