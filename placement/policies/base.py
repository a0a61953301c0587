"""The interface of eviction policies, and a heap whose ranks may be out of date.

In an agent, calls are counted on the use board. It takes microseconds to read one slot of the board, and a pod holds
thousands of copies. Policies are therefore not notified of uses. A policy computes a copy's rank again when the copy
comes up as the next victim; if the copy was used since, it sinks. This is exact as long as a use never lowers a copy's
rank, which holds for every policy here: the rank in the heap is then never above the true one, so a copy that is at the
top with a newly computed rank is really the first. The simulator works in the same way, on plain lists.

A use costs a policy nothing; a look at each of the first few copies costs O(log n).
"""

import heapq
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeAlias, TypeVar

K = TypeVar("K", bound=Hashable)

Uses: TypeAlias = Callable[[K], tuple[int, int]]
"""A function that returns the time of a copy's last use (of its load, until it is called), and the number of its calls
since it was loaded. Times are in any unit of one clock that does not go back; neither figure shrinks while the copy
exists."""

Standing: TypeAlias = tuple[int, float]
"""A copy's distance from eviction: the copy with the lowest is evicted first. Values are comparable among the copies of
one policy at one moment."""

SPARE = 4
"""The factor by which a copy is worth less if its model has another copy elsewhere: its loss costs capacity but no cold
start. With an infinite factor, the second copy of a busy model would be the first victim of every load."""


class Policy(Protocol[K]):
    """An order in which the copies of one pod are evicted."""

    @property
    def name(self) -> str:
        """The policy's name in `named`."""

    def add(self, key: K, *, size: int, cost: float) -> None:
        """Adds a copy. `size` is in bytes. `cost` is the time to load the copy again, in milliseconds."""

    def resize(self, key: K, *, size: int, cost: float) -> None:
        """Replaces a copy's size and cost, for example once they are measured. An unknown key is ignored."""

    def remove(self, key: K, *, evicted_at: int | None = None) -> None:
        """Removes a copy. `evicted_at` is the time of its eviction, if it was evicted. An unknown key is ignored."""

    def walk(self, enough: Callable[[K], bool]) -> list[K]:
        """Returns the copies in the order of eviction, up to and including the first for which `enough` is true. The
        call does not change the order."""

    def standing(self, key: K, *, now: int, spare: bool = False) -> Standing:
        """Returns a copy's distance from eviction. With `spare`, the copy is treated as one whose model has another
        copy elsewhere."""

    def __len__(self) -> int: ...

    def __contains__(self, key: object) -> bool: ...


R = TypeVar("R", float, tuple[float, int])
"""The type of a rank."""


class RankedKeys(Generic[K, R]):
    """Keys in the order of ranks that may have grown since they were computed. Keys with equal ranks are in the order
    of their insertion."""

    __slots__ = ("_heap", "_live", "_rank", "_ties")

    def __init__(self, rank: Callable[[K], R]) -> None:
        self._rank: Callable[[K], R] = rank
        self._heap: list[tuple[R, int, K]] = []  # a rank here is at most the true one
        self._live: dict[K, int] = {}  # key -> its tie-breaker; items of the heap with another one are void
        self._ties = 0

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, key: object) -> bool:
        return key in self._live

    def add(self, key: K) -> None:
        """Inserts a key, or inserts it again. A key whose rank may have fallen must be inserted again."""
        self._ties += 1
        self._live[key] = self._ties
        heapq.heappush(self._heap, (self._rank(key), self._ties, key))
        if len(self._heap) > 2 * len(self._live) + 64:
            self._heap = [item for item in self._heap if self._live.get(item[2]) == item[1]]
            heapq.heapify(self._heap)

    def discard(self, key: K) -> None:
        """Removes a key, if it exists."""
        self._live.pop(key, None)

    def lowest(self) -> R | None:
        """Returns a lower bound of all ranks, which is exact right after a `walk`, or None if there are no keys."""
        heap = self._heap
        while heap and self._live.get(heap[0][2]) != heap[0][1]:
            heapq.heappop(heap)
        return heap[0][0] if heap else None

    def walk(self, enough: Callable[[K], bool]) -> list[K]:
        """Returns keys, lowest rank first, up to and including the first for which `enough` is true."""
        heap, live, rank = self._heap, self._live, self._rank
        seen: list[tuple[R, int, K]] = []
        while heap:
            known, tie, key = heap[0]
            if live.get(key) != tie:
                heapq.heappop(heap)
                continue
            true = rank(key)
            if true > known:
                heapq.heapreplace(heap, (true, tie, key))
                continue
            seen.append(heapq.heappop(heap))
            if enough(key):
                break
        for item in seen:
            heapq.heappush(heap, item)
        return [key for _, _, key in seen]
