"""Messages of one direction of one call, between the connection that reads them and the coroutine that takes them.

Bytes go in as they come, whole frames come out in order. It asks its connection to stop reading while more is held than
a slow taker should make us hold, and is told how the stream ended: by its end, or by an error that the taker gets. The
server's calls and the client's reply streams are the same in this, so both use it.
"""

import asyncio
from collections import deque
from collections.abc import Callable

from mesh import statuses
from mesh.wire import framing

HIGH = 256 * 1024  # bytes of whole frames held, above which reading pauses: about what one read of a socket brings
LOW = HIGH // 4
_COST = 128  # bytes that a frame costs us beside its own, so that a flood of empty messages counts too


class Inbox:
    """Frames of a byte stream. One feeder, one taker at a time."""

    __slots__ = ("_buffer", "_ended", "_error", "_frames", "_held", "_hold", "_holding", "_limit", "_need", "_waiter")

    def __init__(self, limit: int, hold: Callable[[bool], None]) -> None:
        """`limit`: bytes of the largest message. `hold`: told True when its connection shall not read, then False."""
        self._limit = limit
        self._hold = hold
        self._holding = False
        self._frames: deque[bytes] = deque()
        self._held = 0  # bytes, as the frames' cost
        self._buffer = bytearray()  # the beginning of a frame that has not all come
        self._need = framing.PREFIX  # bytes: nothing can be done before the buffer has so many
        self._ended = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def drained(self) -> bool:
        """Whether the stream has ended and every frame was taken."""
        return self._ended and not self._frames

    def feed(self, data: bytes) -> None:
        """Takes the next bytes of the stream. Raises `framing.FrameError`; the stream is unusable after that."""
        if self._error is not None:
            return
        buffer = self._buffer
        if not buffer and framing.frame_end(data, 0, self._limit) == len(data):  # as most peers write it
            self._add(data)
        else:
            buffer += data
            if len(buffer) < self._need:
                return
            self._cut()
        if self._held > HIGH and not self._holding:
            self._holding = True
            self._hold(True)
        if self._frames:
            self._wake()

    def end(self, *, whole: bool = True) -> None:
        """The stream is over. Raises `framing.FrameError` if that is within a message, which must be `whole`."""
        if whole and self._buffer:
            raise framing.FrameError(statuses.Reason.BAD_REQUEST, "the stream ended in the middle of a message")
        self._ended = True
        self._release()  # nothing more will come: the connection may be another call's from here on
        self._wake()

    def fail(self, error: Exception, *, drop: bool) -> None:
        """The stream is broken. With `drop` the taker gets `error` next, else after the frames that came before it."""
        if self._error is None and not self._ended:
            self._error = error
        if drop:
            self._error = error
            self._frames.clear()
            self._held = 0
        self._buffer.clear()
        self._release()
        self._wake()

    def take(self) -> bytes | None:
        """The next frame if there is one already."""
        if not self._frames:
            return None
        frame = self._frames.popleft()
        self._held -= len(frame) + _COST
        if self._holding and self._held <= LOW:
            self._release()
        return frame

    async def read(self) -> bytes | None:
        """The next frame; None at the end. Raises what `fail` was given. A cancelled read loses nothing."""
        while (frame := self.take()) is None:
            if self._error is not None:
                raise self._error
            if self._ended:
                return None
            if self._waiter is not None:
                raise RuntimeError("two tasks read the messages of one call")
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return frame

    def _cut(self) -> None:
        buffer = self._buffer
        start = 0
        with memoryview(buffer) as view:
            while (end := framing.frame_end(buffer, start, self._limit)) <= len(buffer):
                self._add(bytes(view[start:end]))
                start = end
        self._need = end - start
        del buffer[:start]

    def _add(self, frame: bytes) -> None:
        self._frames.append(frame)
        self._held += len(frame) + _COST

    def _release(self) -> None:
        if self._holding:
            self._holding = False
            self._hold(False)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
