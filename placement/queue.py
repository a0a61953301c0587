"""The queue of a pod's loads: the order in which they get their turns, and the forecast of when each will be done.

A model server loads a few models at a time; the other loads wait. Loads with a waiting caller come first, in the order
in which the callers arrived, so that none starves. Then come loads without a caller (preloads, copies for a drain), the
most recently used first. A caller that arrives for a queued model moves its load up.

A caller that cannot be served by its deadline gets an error immediately, with the time to wait, and the load continues:
see `forecast`.
"""

import heapq
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from placement import words

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Queued:
    """A waiting load, as `mesh status` shows it."""

    key: Hashable
    waiting: bool  # a caller waits for it
    idle_ms: int  # since the model's last use, when it was queued; 0 with a caller


@dataclass(frozen=True, slots=True)
class QueueStatistics:
    """Length of the queue."""

    queued: int
    waiting: int  # with a caller


class LoadQueue(Generic[K]):
    """The loads of one pod that wait for their turn."""

    __slots__ = ("_arrivals", "_heap", "_items")

    def __init__(self) -> None:
        self._arrivals = 0
        self._heap: list[tuple[int, int, int, K]] = []  # class, order within it, arrival, key
        self._items: dict[K, tuple[int, int, int]] = {}  # queued loads; other items of the heap are void

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, key: object) -> bool:
        return key in self._items

    def push(self, key: K, *, waiting: bool, idle_ms: int = 0) -> None:
        """Queues a load. A load that is queued already may move up, but never back."""
        known = self._items.get(key)
        if known is not None and (known[0] == 0 or (not waiting and known[1] <= idle_ms)):
            return
        self._arrivals += 1
        item = (0, self._arrivals, self._arrivals) if waiting else (1, max(0, idle_ms), self._arrivals)
        self._items[key] = item
        heapq.heappush(self._heap, (*item, key))

    def cancel(self, key: K) -> bool:
        """Removes a load that is no longer wanted. Returns False if it was not queued."""
        return self._items.pop(key, None) is not None

    def pop(self) -> K | None:
        """Returns the load whose turn it is, or None if the queue is empty."""
        while self._heap:
            kind, order, arrival, key = heapq.heappop(self._heap)
            if self._items.get(key) == (kind, order, arrival):
                del self._items[key]
                return key
        return None

    def ahead_of(self, key: K) -> int:
        """Counts the loads ahead of the given load, or all loads if it is not queued. Takes O(n), so it is for
        forecasts and people."""
        item = self._items.get(key)
        return len(self._items) if item is None else sum(1 for other in self._items.values() if other < item)

    def ahead_of_a_caller(self) -> int:
        """Counts the loads that would be ahead of a load for a caller that arrives now. Takes O(n)."""
        return sum(1 for kind, _, _ in self._items.values() if kind == 0)

    def __iter__(self) -> Iterator[Queued]:
        """Iterates in the order of turns."""
        for key, (kind, order, _) in sorted(self._items.items(), key=lambda item: item[1]):
            yield Queued(key, kind == 0, 0 if kind == 0 else order)

    def statistics(self) -> QueueStatistics:
        """Returns the length of the queue."""
        return QueueStatistics(len(self._items), self.ahead_of_a_caller())


@dataclass(frozen=True, slots=True)
class Forecast:
    """The expected end of a load, and whether it is soon enough."""

    expected_ms: int  # from now
    in_time: bool
    retry_after_ms: int  # 0 if it is in time
    why: str


def forecast(
    load_ms: int,
    *,
    deadline_ms: int | None = None,
    ahead: int = 0,
    in_progress: int = 0,
    threads: int = 1,
    mean_load_ms: int = 0,
    begun_ms: int | None = None,
) -> Forecast:
    """Forecasts the end of a load for a caller. Times in milliseconds from now.

    `load_ms` is the usual time of this model's load; if it is 0, the time is unknown and no caller is turned away.
    `ahead` loads have their turn before this one, and `in_progress` loads have it now; each takes `mean_load_ms`, and
    those in progress count as half done. `begun_ms` is the time since this load began, None while it waits.
    `deadline_ms` is None if the caller has no deadline.
    """
    if begun_ms is not None:
        left = load_ms - begun_ms
        if load_ms and left <= 0:
            return Forecast(0, True, 0, f"should have been done {words.span(-left)} ago")
        wait = 0
    else:
        left = load_ms
        # Each thread finishes its load and takes the next; a free thread starts at once.
        busy = min(in_progress, max(1, threads))
        rounds = (ahead + busy) // max(1, threads)
        wait = max(0, rounds * mean_load_ms - (mean_load_ms // 2 if rounds else 0))
    expected = wait + left
    if deadline_ms is None or not load_ms or expected <= deadline_ms:
        return Forecast(expected, True, 0, f"expected in {words.span(expected)}")
    why = f"loading takes {words.span(left)}"
    if wait:
        why += f" after a wait of {words.span(wait)} for {ahead + in_progress} loads before it"
    return Forecast(expected, False, expected, f"{why}, the deadline is in {words.span(deadline_ms)}")
