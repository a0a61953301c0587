"""Probation for newcomers: a small queue in front of another policy, so that a scan cannot flush the cache.

A model that is called once, for example by a nightly job over all models, is not worth keeping, yet under plain recency
it evicts a model that is called every minute. Here a newcomer stays in a queue until later newcomers have added `share`
of all bytes. A newcomer that was called again in that time moves to the other policy; any other is evicted before all
other copies. The id of a model evicted from the queue is remembered for a while, and the model does not queue again if
it comes back soon, because then it is not part of a scan.

The queue's length is counted in bytes that have arrived, not in those still queued, so the order does not depend on
when a newcomer was found to have proven itself.

The idea is from 2Q (Johnson and Shasha, VLDB 1994) and S3-FIFO (Yang and others, SOSP 2023), whose small queue of a
tenth is used here too. A second call is noticed late, as are all uses: when the copy comes up for eviction.
"""

from collections.abc import Callable
from typing import Generic

from placement.policies.base import K, Policy, Standing, Uses

SHARE = 0.10
"""The queue's share of all bytes; docs/placement.md compares other shares."""

GHOSTS = 1.0
"""Number of remembered evictions from the queue, as a multiple of the number of current copies."""

MIN_GHOSTS = 16

_PROVEN = 2
"""Number of calls that end a copy's time as a newcomer: the call that loaded it, and another one."""


class Probation(Generic[K]):
    """The policy `inner` behind a queue of newcomers."""

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
        self._queue: dict[K, int] = {}  # newcomers, the oldest first, each with `_arrived` before it
        self._ghosts: dict[K, None] = {}  # evicted from the queue, the oldest first
        self._front: dict[K, int] = {}  # newcomers that the last walk would have evicted, by place

    def __len__(self) -> int:
        return len(self._sizes)

    def __contains__(self, key: object) -> bool:
        return key in self._sizes

    def add(self, key: K, *, size: int, cost: float) -> None:
        """Queues a copy, unless it was evicted from the queue recently."""
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
        """Replaces a copy's size and cost. A newcomer keeps its place in the queue."""
        if key not in self._sizes:
            return
        grown = size - self._sizes[key][0]
        self._sizes[key] = (size, cost)
        self._bytes += grown
        if key not in self._queue:
            self._inner.resize(key, size=size, cost=cost)

    def remove(self, key: K, *, evicted_at: int | None = None) -> None:
        """Removes a copy; one evicted from the queue is remembered."""
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
        """Returns newcomers whose time in the queue is over, then copies of the other policy, then the remaining
        newcomers, up to and including the first for which `enough` is true. Newcomers whose time in the queue is over
        and that were called again move to the other policy."""
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
        """Returns the rank: newcomers whose time in the queue was over at the last walk come first, the remaining ones
        last."""
        place = self._front.get(key)
        if place is not None:
            return 0, place
        if key in self._queue:
            return 2, -max(0, now - self._uses(key)[0])
        return self._inner.standing(key, now=now, spare=spare)
