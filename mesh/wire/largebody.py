"""Reading of large messages from the socket straight into the memory of their frames, bypassing the parser.

A parser in Python copies a body four times: a read becomes an object, the object a piece of the body, the pieces a
buffer, and the buffer the frame. For 4 MB, this takes 3 of the 4 ms that a worker spends on a request. So if a parsed
head announces a long body, the connection lets a `LargeBody` read in its place. As an `asyncio.BufferedProtocol`, it
has the kernel write into the frame. The heads of chunks are then removed in place, by moving the bytes that follow
them.

This is not a second HTTP parser. It only understands the plainest form of a chunk's head, and leaves everything else to
the parser, including the end of a body. The parser has seen the head of the message but none of the chunks read here,
and continues from there.
"""

import asyncio
import ctypes
import re
from collections.abc import Callable
from typing import Protocol

from mesh.wire import framing

LEAST = 64 * 1024
"""Minimum number of missing bytes for which a `LargeBody` is used. With fewer, it saves less than the change of the
reader costs (2 us)."""

Begun = bytes | bytearray | memoryview
Memory = Callable[[int, Begun], memoryview]
"""A function that returns memory for a message of that many bytes, whose beginning is given. The handler gets a view of
this memory instead of bytes."""

MAPPED = 1 << 20
"""Bytes of a message above which it is read into memory from a `Memory`. Smaller messages are always bytes."""

_CHUNK = re.compile(rb"([0-9a-fA-F]{1,8})\r\n")
_BETWEEN = re.compile(rb"\r\n([0-9a-fA-F]{1,8})\r\n")  # the end of a chunk and the head of the next
_BEGUN = re.compile(rb"\r?|\r\n(?:[0-9a-fA-F]{1,8}\r?)?")  # a part of that
_LONGEST = 12  # bytes of it
_END = 1024  # bytes that are read at once after the message: its last chunk and trailers
_CRLF = b"\r\n"
_INVALID = b"!"  # for the parser, where a chunk's head must be

_new = ctypes.pythonapi.PyBytes_FromStringAndSize
_new.argtypes, _new.restype = (ctypes.c_void_p, ctypes.c_ssize_t), ctypes.py_object
_address = ctypes.pythonapi.PyBytes_AsString
_address.argtypes, _address.restype = (ctypes.py_object,), ctypes.c_void_p
_view = ctypes.pythonapi.PyMemoryView_FromMemory
_view.argtypes, _view.restype = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int), ctypes.py_object
_WRITABLE = 0x200  # PyBUF_WRITE


class BodyConnection(Protocol):
    """A connection that lets a `LargeBody` read in its place."""

    def data_received(self, data: bytes) -> None:
        """Parses bytes that were read from the socket."""

    def eof_received(self) -> bool:
        """Notes that the peer has ended its output."""

    def connection_lost(self, exc: Exception | None) -> None:
        """Notes that the connection has ended."""

    def pause_writing(self) -> None:
        """Notes that the peer is slow to read."""

    def resume_writing(self) -> None:
        """Notes that the peer has caught up."""

    def body_moved(self, count: int) -> None:
        """Notes that `count` bytes have arrived."""

    def body_ended(self, body: bytes | bytearray | memoryview, rest: bytes, *, last: bool) -> None:
        """Takes the part of the body that has arrived, and resumes reading. `rest` is what was read after it, beginning
        with a chunk's head. `last` means that the body has no chunks, so the message is complete."""


class LargeBody(asyncio.BufferedProtocol):
    """The reader of one large body, or of the first message in a body."""

    __slots__ = ("_behind", "_chunked", "_connection", "_end", "_left", "_memory", "_size", "_tail", "_view", "filled")

    def __init__(
        self,
        connection: BodyConnection,
        size: int,
        left: int | None = None,
        *,
        memory: Memory | None = None,
        begun: Begun = b"",
    ) -> None:
        """Makes a reader of `size` bytes. `left` is the number of bytes left in the current chunk, or None if the body
        has no chunks. `memory` is asked for memory if the message is large; `begun` is the beginning of the message."""
        self._connection = connection
        self._size = size
        self._chunked = left is not None
        self._left = size if left is None else left
        self._memory: bytes | memoryview
        self._view: memoryview
        if memory is not None and size > MAPPED:
            self._memory = self._view = memory(size, begun)
        else:
            self._memory = _new(None, size)  # not initialised: nothing reads it before it is filled
            self._view = _view(_address(self._memory), size, _WRITABLE)
        self._tail = b""  # the beginning of what stands between two chunks
        self._end = memoryview(b"")
        self._behind = 0  # bytes in it
        self.filled = 0  # bytes of the body

    @property
    def whole(self) -> bool:
        """True if all of the message has arrived, except perhaps the line break after its last chunk."""
        return self.filled == self._size

    def put(self, data: bytes | bytearray | memoryview) -> None:
        """Takes bytes of the message that were read before this reader took over. They are never the whole message."""
        self._view[: len(data)] = data
        self._take(len(data))

    def drop(self) -> None:
        """Frees the memory now, because uvloop's transport keeps a reference to this protocol until it gets another
        buffered one."""
        self._memory = b""
        self._view = self._end = memoryview(b"")

    # --- as a protocol ---

    def get_buffer(self, sizehint: int) -> memoryview:
        """Returns the memory for the next read."""
        return self._view[self.filled :] if self.filled < self._size else self._end[self._behind :]

    def buffer_updated(self, nbytes: int) -> None:
        """Takes the bytes of one read, which are already in the buffer."""
        if self.filled < self._size:
            self._connection.body_moved(nbytes)
            self._take(nbytes)
        else:
            self._behind += nbytes
            self._finish()

    def eof_received(self) -> bool:
        """Passes the event on to the connection."""
        return self._connection.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """Passes the event on to the connection."""
        self._connection.connection_lost(exc)

    def pause_writing(self) -> None:
        """Passes the event on to the connection."""
        self._connection.pause_writing()

    def resume_writing(self) -> None:
        """Passes the event on to the connection."""
        self._connection.resume_writing()

    # --- chunks ---

    def _take(self, count: int) -> None:
        """Takes the `count` bytes that were just read into the buffer, and removes the chunk heads from them."""
        view, size = self._view, self._size
        filled = at = self.filled
        end = at + count
        left = self._left
        while True:
            taken = min(left, end - at)
            if at != filled:
                view[filled : filled + taken] = view[at : at + taken]
            filled += taken
            at += taken
            left -= taken
            if at == end or filled == size:
                break
            known = len(self._tail)
            self._tail += bytes(view[at : min(at + _LONGEST - known, end)])
            between = _BETWEEN.match(self._tail)
            if between is None and _BEGUN.fullmatch(self._tail) is not None:
                break  # it goes on in the next read
            if between is None or not (left := int(between[1], 16)):
                self.filled = filled
                self._give_up(self._tail[:known] + bytes(view[at:end]))
                return
            at += between.end() - known
            self._tail = b""
        self.filled = filled
        self._left = left
        if filled == size:
            rest = bytes(view[at:end])
            if left:
                self._done(b"%x\r\n%b" % (left, rest))
            elif not self._chunked:
                self._done(b"")
            else:  # what ends the chunk is not for the parser, which has not seen its beginning
                self._end = memoryview(bytearray(max(_END, 2 * len(rest))))
                self._end[: len(rest)] = rest
                self._behind = len(rest)
                self._finish()

    def _finish(self) -> None:
        """Ends this reader once the line break after the message's last chunk has arrived."""
        if self._behind >= len(_CRLF):
            rest = bytes(self._end[: self._behind])
            self._done(rest[len(_CRLF) :] if rest.startswith(_CRLF) else _INVALID)

    def _done(self, rest: bytes) -> None:
        body = self._memory
        self.drop()
        self._connection.body_ended(body, rest, last=not self._chunked)

    def _give_up(self, rest: bytes) -> None:
        body = bytearray(self._view[: self.filled])
        self.drop()
        self._connection.body_ended(body, rest[len(_CRLF) :] if rest.startswith(_CRLF) else _INVALID, last=False)


def begins(data: memoryview, limit: int) -> tuple[int, int, int] | None:
    """Returns the size of the frame, the size of its first chunk, and the position in `data` at which both begin.
    Returns None unless a large message begins in `data` and at least `LEAST` bytes of it are missing."""
    head = _CHUNK.match(data)
    if head is None:
        return None
    at = head.end()
    left = int(head[1], 16)
    begun = bytes(data[at : at + framing.PREFIX])
    if left < framing.PREFIX or len(begun) < framing.PREFIX:
        return None
    try:
        size = framing.frame_end(begun, 0, limit)
    except framing.FrameError:
        return None
    return (size, left, at) if size - (len(data) - at) >= LEAST else None
