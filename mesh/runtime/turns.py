"""Whose load the model server carries out next: `placement.queue`, with somebody waiting in it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from placement.queue import LoadQueue, QueueStatistics


class Turns:
    """A few loads at a time; the others wait in the order that the queue gives them, by model."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = count
        self._queue: LoadQueue[str] = LoadQueue()
        self._waiting: dict[str, asyncio.Future[None]] = {}

    @asynccontextmanager
    async def turn(self, model_id: str, *, idle_ms: int) -> AsyncIterator[None]:
        """One turn. `idle_ms` is the time since the model's last use, 0 where a caller waits.

        Cancelled, its place in the queue is given up."""
        await self._take(model_id, idle_ms)
        try:
            yield
        finally:
            self._give()

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
        return self.count - self._free

    def statistics(self) -> QueueStatistics:
        """How long the queue is."""
        return self._queue.statistics()

    async def _take(self, model_id: str, idle_ms: int) -> None:
        if self._free:
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

    def _give(self) -> None:
        while (model_id := self._queue.pop()) is not None:
            future = self._waiting.get(model_id)
            if future is not None and not future.done():
                future.set_result(None)
                return
        self._free += 1
