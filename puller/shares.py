"""Turns that many stores share, so that a store that hangs does not take all of them.

A store may have `each` turns, and all stores together `total`; when these are taken, each store may still have `least`,
up to `most` in total. So a store that holds its turns until they time out leaves other stores their share, however many
of its models are wanted. Waiters are served in the order of arrival, except that a waiter whose store may have no more
turns is passed over.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Shares:
    """The turns of all stores, for one event loop."""

    def __init__(self, *, total: int, each: int, least: int, most: int) -> None:
        self._total, self._each, self._least, self._most = total, each, least, most
        self._taken: Counter[str] = Counter()
        self._waiting: dict[asyncio.Future[None], str] = {}  # in the order of arrival

    @property
    def taken(self) -> int:
        """The number of turns that are taken."""
        return self._taken.total()

    @property
    def waiting(self) -> int:
        """The number of waiters."""
        return len(self._waiting)

    async def acquire(self, store: str) -> None:
        """Takes a turn of the store, once there is one. `release` gives it back."""
        if self._may(store) and store not in self._waiting.values():
            self._taken[store] += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[turn] = store
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release(store)  # the turn was granted at the same moment
            raise
        finally:
            self._waiting.pop(turn, None)

    def release(self, store: str) -> None:
        """Gives back a turn, and passes turns to the waiters that may now have one, in the order of arrival."""
        self._taken[store] -= 1
        if not self._taken[store]:
            del self._taken[store]
        for turn, waits in list(self._waiting.items()):
            if not turn.done() and self._may(waits):
                self._taken[waits] += 1
                del self._waiting[turn]
                turn.set_result(None)

    @asynccontextmanager
    async def turn(self, store: str) -> AsyncIterator[None]:
        """Holds a turn for as long as the block lasts."""
        await self.acquire(store)
        try:
            yield
        finally:
            self.release(store)

    def _may(self, store: str) -> bool:
        here, all_of_them = self._taken[store], self._taken.total()
        if here >= self._each:
            return False
        return all_of_them < self._total or (here < self._least and all_of_them < self._most)
