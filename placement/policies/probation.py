"""Newcomers prove themselves first: a small queue in front of another policy, so that a scan cannot flush the cache.

A model that is called once, by a nightly job over all models say, is worth nothing to keep; under plain recency it
pushes out one that is called every minute. Here a newcomer stands in a queue until newcomers after it have brought
`share` of all bytes. If it was called again by then, it moves into the other policy's care; if not, it goes before all
others. Who was let go from the queue is remembered for a while (its id, nothing else) and does not queue a second time:
a model that comes back soon is no scan.

The queue's length is counted in bytes that came, not in those that are still in it: so the order does not depend on
when somebody looked and found that one of them had proven itself.

The idea is that of 2Q (Johnson and Shasha, VLDB 1994) and S3-FIFO (Yang and others, SOSP 2023), whose small queue of
a tenth is taken over. "Called again" is learned late, as all uses are: when a copy comes up to go.
"""

from collections.abc import Callable
from typing import Generic

from placement.policies.base import K, Policy, Standing, Uses

SHARE = 0.10
"""Of the bytes; see docs/placement.md for others."""

GHOSTS = 1.0
"""How many are remembered that were let go, as a multiple of the copies that are there."""

MIN_GHOSTS = 16

_PROVEN = 2
"""Calls after which a copy is no newcomer: the one that it was loaded for, and another."""


class Probation(Generic[K]):
    """`inner`, behind a queue of newcomers."""

    __slots__ = (
        "_arrived",
        "_bytes",
        "_front",
        "_ghosts",
        "_inner",
        "_queue",
        "_share",
        "_sizes",
        "_uses",
        "name",
    )

    def __init__(self, inner: Policy[K], uses: Uses[K], *, share: float = SHARE) -> None:
        self.name = f"{inner.name}+probation"
        self._inner = inner
        self._uses = uses
        self._share = share
        self._sizes: dict[K, tuple[int, float]] = {}  # bytes and cost of every copy, queued or not
        self._bytes = 0  # sum of those
        self._arrived = 0  # bytes of all newcomers that ever came
        self._queue: dict[K, int] = {}  # newcomers, the oldest first; what had arrived before each
        self._ghosts: dict[K, None] = {}  # let go from the queue, the oldest first
        self._front: dict[K, int] = {}  # what the last walk would have let go from the queue, and its place

    def __len__(self) -> int:
        return len(self._sizes)

    def __contains__(self, key: object) -> bool:
        return key in self._sizes

    def add(self, key: K, *, size: int, cost: float) -> None:
        """It queues, unless it was let go from the queue a short while ago."""
        self.remove(key)
        self._sizes[key] = (size, cost)
        self._bytes += size
        if key in self._ghosts:
            del self._ghosts[key]
            self._inner.add(key, size=size, cost=cost)
        else:
            self._queue[key] = self._arrived
            self._arrived += size

    def resize(self, key: K, *, size: int, cost: float) -> None:
        """It stays where it is."""
        if key not in self._sizes:
            return
        grown = size - self._sizes[key][0]
        self._sizes[key] = (size, cost)
        self._bytes += grown
        if key not in self._queue:
            self._inner.resize(key, size=size, cost=cost)

    def remove(self, key: K, *, evicted_at: int | None = None) -> None:
        """Evicted from the queue, it is remembered."""
        if key not in self._sizes:
            return
        self._bytes -= self._sizes.pop(key)[0]
        self._front.pop(key, None)
        if key not in self._queue:
            self._inner.remove(key, evicted_at=evicted_at)
            return
        del self._queue[key]
        if evicted_at is not None:
            self._ghosts[key] = None
            while len(self._ghosts) > max(MIN_GHOSTS, GHOSTS * len(self._sizes)):
                del self._ghosts[next(iter(self._ghosts))]

    def walk(self, enough: Callable[[K], bool]) -> list[K]:
        """Newcomers that have had their time, then the others, then the newcomers that are left."""
        found: list[K] = []
        ended = False
        self._front = {}
        overdue = self._arrived - self._share * self._bytes
        proven: list[K] = []
        for key, before in self._queue.items():
            if before >= overdue:
                break
            if self._uses(key)[1] >= _PROVEN:
                proven.append(key)
                continue
            self._front[key] = len(self._front)
            found.append(key)
            if enough(key):
                ended = True
                break
        for key in proven:
            size, cost = self._sizes[key]
            del self._queue[key]
            self._inner.add(key, size=size, cost=cost)
        if ended:
            return found

        def and_end(key: K) -> bool:
            nonlocal ended
            ended = enough(key)
            return ended

        found += self._inner.walk(and_end)
        if ended:
            return found
        for key in self._queue:
            if key not in self._front:
                found.append(key)
                if enough(key):
                    break
        return found

    def standing(self, key: K, *, now: int, spare: bool = False) -> Standing:
        """Those whose time had passed at the last walk come first, newcomers that are left last."""
        place = self._front.get(key)
        if place is not None:
            return 0, place
        if key in self._queue:
            return 2, -max(0, now - self._uses(key)[0])
        return self._inner.standing(key, now=now, spare=spare)
