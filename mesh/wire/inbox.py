"""The messages of one direction of a call, between the connection that reads them and the coroutine that takes them.

Bytes enter as they arrive, and whole frames leave in order. The inbox asks its connection to stop reading while it
holds too much for a slow reader, and records how the stream ended: normally, or by an error, which the reader gets.
Both the server's calls and the client's reply streams use it.

For a reader that only passes bytes on, a frame above a bound leaves in pieces, as its bytes arrive (`pieces`).
"""

import asyncio
from collections import deque
from collections.abc import Callable

from mesh import statuses
from mesh.wire import budget as budgets
from mesh.wire import framing
from mesh.wire import pieces as policy

HIGH = 256 * 1024  # bytes of whole frames above which reading pauses: about as much as one read of a socket brings
LOW = HIGH // 4
_PIECE = 64 * 1024  # bytes below which pieces are joined while they wait, because passing on each one costs 20 us
_COST = 128  # overhead of each frame in bytes, so that a flood of empty messages counts too


class Inbox:
    """The frames of a byte stream, for one feeder and one reader at a time."""

    __slots__ = (
        "_budget",
        "_buffer",
        "_counted",
        "_ended",
        "_error",
        "_frames",
        "_held",
        "_hold",
        "_holding",
        "_joined",
        "_limit",
        "_most",
        "_need",
        "_option",
        "_parts",
        "_passing",
        "_pieces",
        "_taken",
        "_waiter",
    )

    def __init__(
        self,
        limit: int,
        hold: Callable[[bool], None],
        budget: budgets.Budget = budgets.UNBOUNDED,
        most: int = 0,
        pieces: policy.Pieces | None = None,
    ) -> None:
        """Makes an empty inbox. `limit` is the size of the largest message in bytes. `hold` is called with True to
        pause the connection's reading, and with False to resume it. `budget` counts the messages, up to `most` bytes
        (0: the budget's bound for a request of the message's size). With `pieces`, large messages are taken in
        pieces, and the limit of `pieces` applies instead of `limit`."""
        self._limit = limit if pieces is None else pieces.limit
        self._option = statuses.MAX_MESSAGE if pieces is None else policy.OPTION
        self._pieces = 0 if pieces is None else pieces.above + framing.PREFIX  # bytes of the largest undivided frame
        self._passing = 0  # bytes still to come of the frame that is taken in pieces
        self._hold = hold
        self._holding = False
        self._frames: deque[bytes] = deque()
        self._parts: list[bytes] = []  # small pieces after them, which are joined when they are taken
        self._joined = 0  # bytes of them
        self._held = 0  # bytes, including the overhead of frames
        self._buffer = bytearray()  # the beginning of an incomplete frame
        self._budget = budget
        self._most = most
        self._counted = 0  # bytes of the budget
        self._taken = 0  # bytes of the frame taken last, which its reader holds until it asks for the next
        self._need = framing.PREFIX  # bytes that the buffer must have before the next step
        self._ended = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def drained(self) -> bool:
        """True if the stream has ended and every frame was taken."""
        return self._ended and not self._frames and not self._parts

    @property
    def partial(self) -> bool:
        """True if a message has begun and not ended."""
        return bool(self._buffer) or self._passing > 0

    def feed(self, data: bytes) -> None:
        """Takes the next bytes of the stream. Raises `framing.FrameError`; the stream is unusable after that."""
        if self._error is not None:
            return
        if self._passing:
            data = self._pass(data)
        buffer = self._buffer
        if not data:  # all of it belongs to a frame in pieces
            pass
        elif not buffer and framing.frame_end(data, 0, self._limit, self._option) == len(data):  # as most peers write
            self._add(data)
        else:
            buffer += data
            if len(buffer) >= self._need:
                self._cut()
            elif not self._pieces:
                return
        self._count()
        if self._held > HIGH and not self._holding:
            self._holding = True
            self._hold(True)
        if self._frames or self._parts:
            self._wake()

    def end(self, *, whole: bool = True) -> None:
        """Ends the stream. Raises `framing.FrameError` if a message is incomplete and `whole` is set."""
        if whole and self.partial:
            raise framing.FrameError(statuses.Reason.BAD_REQUEST, "the stream ended in the middle of a message")
        self._ended = True
        self._release()  # no more input follows: the connection may now serve another call
        self._wake()

    def fail(self, error: Exception, *, drop: bool) -> None:
        """Breaks the stream. With `drop` the reader gets `error` next, otherwise after the frames that arrived before
        it."""
        if self._error is None and not self._ended:
            self._error = error
        if drop:
            self._error = error
            self._frames.clear()
            self._parts.clear()
            self._held = self._taken = 0
        self._buffer.clear()
        self._need = framing.PREFIX
        self._joined = self._passing = 0
        self._count()
        self._release()
        self._wake()

    def take(self) -> bytes | None:
        """Returns the next frame, or the next piece of one, or None if neither has arrived."""
        if not self._frames:
            if not self._parts:
                return None
            self._join()
        frame = self._frames.popleft()
        self._taken = len(frame) + _COST
        self._held -= self._taken
        self._count()
        if self._holding and self._held <= LOW:
            self._release()
        return frame

    async def read(self) -> bytes | None:
        """Returns the next frame or piece of one, or None at the end. Raises the error passed to `fail`. A cancelled
        read loses nothing."""
        while (frame := self.take()) is None:
            if self._error is not None or self._ended:
                self._taken = 0
                self._count()
                if self._error is not None:
                    raise self._error
                return None
            if self._waiter is not None:
                raise RuntimeError("two tasks read the messages of one call: only one may")
            if self._taken:  # the reader is done with it, and the next one may take long
                self._taken = 0
                self._count()
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
            while (end := framing.frame_end(buffer, start, self._limit, self._option)) <= len(buffer):
                self._add(bytes(view[start:end]))
                start = end
            if self._pieces and end - start > self._pieces:
                self._passing = end - len(buffer)
                self._add(bytes(view[start:]))
                start, end = len(buffer), len(buffer) + framing.PREFIX
        self._need = end - start
        del buffer[:start]

    def _pass(self, data: bytes) -> bytes:
        """Takes what belongs to the frame that is taken in pieces, and returns the rest."""
        piece = data[: self._passing]
        self._passing -= len(piece)
        self._held += len(piece) if self._parts else len(piece) + _COST
        self._parts.append(piece)
        self._joined += len(piece)
        if self._joined >= _PIECE or not self._passing:
            self._join()
        return data[len(piece) :]

    def _join(self) -> None:
        parts, self._parts, self._joined = self._parts, [], 0
        self._frames.append(parts[0] if len(parts) == 1 else b"".join(parts))

    def close(self) -> None:
        """Drops the frames that were not taken, as nothing will read them."""
        self._frames.clear()
        self._parts.clear()
        self._buffer.clear()
        self._need = framing.PREFIX
        self._joined = self._passing = 0
        self._held = self._taken = 0
        self._count()

    def __del__(self) -> None:
        """Returns the bytes to the budget if a stream is dropped without a close."""
        if self._counted:
            self._budget.give(self._counted)

    def _count(self) -> None:
        """Counts everything held here in the budget, including the rest of a message that has begun."""
        size = self._held + self._taken + (max(self._need, len(self._buffer)) if self._buffer else 0)
        more = size - self._counted
        if more > 0 and not self._budget.take(more, self._most or self._budget.most(size)):
            error = self._budget.refusal(f"a message of {size} bytes")
            raise framing.FrameError(error.reason, error.text, retry_after=error.retry_after, details=error.details)
        if more < 0:
            self._budget.give(-more)
        self._counted = size

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
