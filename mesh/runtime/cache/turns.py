"""Whose load the model server carries out next: `placement.queue`, with somebody waiting in it.

A load that lasts gives its place to the next one and goes on beside it: a few models whose warm-up call does not end
would otherwise hold up every cold start of the pod until they are given up, which takes a minute and a half. Only so
many places are given away at once, since each such load keeps a processor busy. The agent and the model server both
count so, in step.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from placement.queue import LoadQueue, QueueStatistics

LONG = 5.0
"""Seconds after which a load gives its place away."""

LENT = 8
"""Places that may be given away at once."""


class _Turn:
    """One turn that was taken."""

    __slots__ = ("lent", "on_long")

    def __init__(self, on_long: Callable[[], None] | None) -> None:
        self.on_long = on_long
        self.lent = False  # its place was given away


class Turns:
    """A few loads at a time; the others wait in the order that the queue gives them, by model."""

    def __init__(self, count: int, *, long: float | None = None) -> None:
        """Takes `long`, seconds, instead of `LONG`."""
        self.count = count
        self._long = LONG if long is None else long
        self._lent = 0
        self._overdue: list[_Turn] = []  # turns that are long, and whose place is theirs until another one's comes back
        self._free = count
        self._queue: LoadQueue[str] = LoadQueue()
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self._apart = asyncio.Lock()  # held by the load that is to be apart
        self._held = False  # it has its turn, and nobody else gets one
        self._ended = asyncio.Event()  # a turn has

    @asynccontextmanager
    async def apart(self, model_id: str, *, idle_ms: int = 0) -> AsyncIterator[None]:
        """Holds one turn while nobody else does: waits for those who have one, and others wait for its end."""
        async with self._apart, self.turn(model_id, idle_ms=idle_ms):
            self._held = True
            try:
                while self.taken > 1:
                    self._ended.clear()
                    await self._ended.wait()
                yield
            finally:
                self._held = False
                free, self._free = self._free, 0
                for _ in range(free):
                    self._give()

    @asynccontextmanager
    async def turn(
        self, model_id: str, *, idle_ms: int = 0, on_long: Callable[[], None] | None = None
    ) -> AsyncIterator[None]:
        """Holds one turn. `idle_ms` is the time since the model's last use, 0 where a caller waits; `on_long` is called
        when it has become long.

        Cancelled, its place in the queue is given up."""
        await self._take(model_id, idle_ms)
        turn = _Turn(on_long)
        timer = asyncio.get_running_loop().call_later(self._long, self._became_long, turn)
        try:
            yield
        finally:
            timer.cancel()
            self._end(turn)

    def lift(self, model_id: str) -> None:
        """A caller has come for a model that may be queued without one."""
        if model_id in self._queue:
            self._queue.push(model_id, waiting=True)

    def ahead_of(self, model_id: str) -> int:
        """How many have their turn before that load. For people: O(n)."""
        return self._queue.ahead_of(model_id) if model_id in self._queue else 0

    @property
    def taken(self) -> int:
        """Loads that have their turn now."""
        return self.count - self._free + self._lent

    def statistics(self) -> QueueStatistics:
        """How long the queue is."""
        return self._queue.statistics()

    async def _take(self, model_id: str, idle_ms: int) -> None:
        if self._free and not self._held:
            self._free -= 1
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[model_id] = future
        self._queue.push(model_id, waiting=not idle_ms, idle_ms=idle_ms)
        try:
            await future
        except asyncio.CancelledError:
            self._queue.cancel(model_id)
            if future.done() and not future.cancelled():
                self._give()  # its turn had just come
            raise
        finally:
            if self._waiting.get(model_id) is future:
                del self._waiting[model_id]

    def _became_long(self, turn: _Turn) -> None:
        if self._lent < LENT:
            self._lend(turn)
        else:
            self._overdue.append(turn)
        if turn.on_long is not None:
            turn.on_long()

    def _lend(self, turn: _Turn) -> None:
        turn.lent = True
        self._lent += 1
        self._give()

    def _end(self, turn: _Turn) -> None:
        self._ended.set()
        if turn.lent:
            self._lent -= 1
            if self._overdue:
                self._lend(self._overdue.pop(0))
        else:
            if turn in self._overdue:
                self._overdue.remove(turn)
            self._give()

    def _give(self) -> None:
        while not self._held and (model_id := self._queue.pop()) is not None:
            future = self._waiting.get(model_id)
            if future is not None and not future.done():
                future.set_result(None)
                return
        self._free += 1
