"""The turns of loads at the model server: `placement.queue`, with tasks that wait in it.

A long load lends its place to the next one and runs concurrently with it. Otherwise, a few models whose warm-up call
does not end would delay all cold starts of the pod until these loads are given up, which takes a minute and a half. The
number of places lent at the same time is limited, because each long load keeps a processor busy. The agent and the
model server both count turns in this way, so they agree.

A load that must run alone makes other loads wait until it has ended or become long. While a long load keeps it waiting,
other loads may go ahead of it. After a minute (`APART`), they wait for it too.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from placement.queue import LoadQueue, QueueStatistics

LONG = 5.0
"""Seconds after which a load lends its place."""

APART = 60.0
"""Seconds for which a load that must run alone waits for a long load without making others wait. After that, others
wait too."""

LENT = 8
"""Maximum number of places that are lent at the same time."""


class _Turn:
    __slots__ = ("lent", "on_long")

    def __init__(self, on_long: Callable[[], None] | None) -> None:
        self.on_long = on_long
        self.lent = False  # set once its place is lent


class Turns:
    """The turns of one model server. A few loads have their turn at the same time, and the others wait in the queue,
    where a model has one place."""

    def __init__(self, count: int, *, long: float | None = None) -> None:
        """Makes turns for `count` concurrent loads. A load is long after `long` seconds (None: `LONG`)."""
        self.count = count
        self._long = LONG if long is None else long
        self._lent = 0
        self._overdue: list[_Turn] = []  # long turns that keep their place until another's is returned
        self._free = count  # negative while more turns are under way than may be
        self._queue: LoadQueue[str] = LoadQueue()
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self._lasting: set[_Turn] = set()  # turns that are long
        self._apart = asyncio.Lock()  # held by the load that must run alone
        self._held = False  # no other load gets a turn
        self._changed = asyncio.Event()  # a turn has ended, or become long

    def resize(self, count: int) -> None:
        """Sets the number of concurrent turns. Turns under way continue, so a lower number takes effect when they
        end."""
        more, self.count = count - self.count, count
        self._free += min(more, 0)
        for _ in range(more):
            self._give()

    @asynccontextmanager
    async def apart(self, model_id: str, *, idle_ms: int = 0) -> AsyncIterator[None]:
        """Holds a turn that begins once no other load has one. Other loads then wait until this turn has ended, or
        until this load has become long. `idle_ms` is as for `turn`."""
        loop = asyncio.get_running_loop()
        async with self._apart, self._turn(model_id, idle_ms) as own:
            limit = loop.time() + APART
            timers = [loop.call_at(limit, self._changed.set)]
            try:
                while self.taken > 1:
                    self._held = loop.time() >= limit or not self._lasting - {own}
                    if not self._held:
                        self._open()
                    self._changed.clear()
                    await self._changed.wait()
                self._held = True
                timers.append(loop.call_later(self._long, self._open))
                yield
            finally:
                for timer in timers:
                    timer.cancel()
                self._open()

    @asynccontextmanager
    async def turn(
        self, model_id: str, *, idle_ms: int = 0, on_long: Callable[[], None] | None = None
    ) -> AsyncIterator[None]:
        """Holds one turn. `idle_ms` is the time since the model's last use, or 0 if a caller waits. `on_long` is called
        once the load has become long.

        If cancelled while waiting, gives up its place in the queue.
        """
        async with self._turn(model_id, idle_ms, on_long):
            yield

    @asynccontextmanager
    async def _turn(
        self, model_id: str, idle_ms: int, on_long: Callable[[], None] | None = None
    ) -> AsyncIterator[_Turn]:
        await self._take(model_id, idle_ms)
        turn = _Turn(on_long)
        timer = asyncio.get_running_loop().call_later(self._long, self._became_long, turn)
        try:
            yield turn
        finally:
            timer.cancel()
            self._end(turn)

    def lift(self, model_id: str) -> None:
        """Makes a load urgent if it is in the queue, because a caller now waits for it."""
        if model_id in self._queue:
            self._queue.push(model_id, waiting=True)

    def ahead_of(self, model_id: str) -> int:
        """Returns the number of loads that get their turn before this one, or 0 if this load does not wait. For
        operators. O(n)."""
        return self._queue.ahead_of(model_id) if model_id in self._queue else 0

    @property
    def taken(self) -> int:
        """The number of loads that have their turn now."""
        return self.count - self._free + self._lent

    def statistics(self) -> QueueStatistics:
        """Returns the length of the queue."""
        return self._queue.statistics()

    async def _take(self, model_id: str, idle_ms: int) -> None:
        if self._free > 0 and not self._held:
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
                self._give()  # its turn had just begun
            raise
        finally:
            if self._waiting.get(model_id) is future:
                del self._waiting[model_id]

    def _open(self) -> None:
        """Lets other loads take turns again."""
        self._held = False
        free, self._free = self._free, min(self._free, 0)
        for _ in range(free):
            self._give()

    def _became_long(self, turn: _Turn) -> None:
        self._lasting.add(turn)
        self._changed.set()
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
        self._lasting.discard(turn)
        self._changed.set()
        if turn.lent:
            self._lent -= 1
            if self._overdue:
                self._lend(self._overdue.pop(0))
        else:
            if turn in self._overdue:
                self._overdue.remove(turn)
            self._give()

    def _give(self) -> None:
        if self._free < 0:
            self._free += 1
            return
        while not self._held and (model_id := self._queue.pop()) is not None:
            future = self._waiting.get(model_id)
            if future is not None and not future.done():
                future.set_result(None)
                return
        self._free += 1
