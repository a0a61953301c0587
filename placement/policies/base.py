"""What every eviction policy is, and the heap that may be behind.

Uses are learned late. In an agent every call is counted on the use board, where reading one slot costs microseconds and
a pod holds thousands of copies; so a policy is not told of uses. It asks, when a copy comes up as the next to go: the
copy's rank is computed anew, and if it was used since, it sinks. That is exact, as long as a use never makes a copy
rank lower, which holds for every policy here: what the heap knows of a copy is then never above the truth, so whoever
is at the top with a fresh figure is really the first. The simulator asks in the same way, of plain lists.

A use costs a policy nothing, a look at the first few copies O(log n) each.
"""

import heapq
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeAlias, TypeVar

K = TypeVar("K", bound=Hashable)

Uses: TypeAlias = Callable[[K], tuple[int, int]]
"""Of a copy: the time of its last use (its load, until it is called), and the calls since it was loaded. Times in any
unit of one clock that does not go back; neither figure shrinks while the copy is there."""

Standing: TypeAlias = tuple[int, float]
"""How far a copy is from going; the lowest goes first. Comparable among the copies of one policy at one moment."""

SPARE = 4
"""How much less a copy counts whose model has another copy elsewhere: losing it costs no cold start, only capacity. Not
infinitely less: a second copy was made because the model is busy, and it would be the first victim of every load."""


class Policy(Protocol[K]):
    """An order of eviction over the copies of one pod."""

    @property
    def name(self) -> str:
        """As `named` understands it."""

    def add(self, key: K, *, size: int, cost: float) -> None:
        """A copy is there now. `size` in bytes, `cost` of loading it again in milliseconds."""

    def resize(self, key: K, *, size: int, cost: float) -> None:
        """What was predicted has been measured."""

    def remove(self, key: K, *, evicted_at: int | None = None) -> None:
        """It is gone. `evicted_at`: when, where it made way for another. An unknown key is ignored."""

    def walk(self, enough: Callable[[K], bool]) -> list[K]:
        """The copies in the order in which they would go, up to the first for which `enough` is true. Changes nothing
        that a caller could see."""

    def standing(self, key: K, *, now: int, spare: bool = False) -> Standing:
        """How far it is from going; with `spare`, as a copy that has another elsewhere."""

    def __len__(self) -> int: ...

    def __contains__(self, key: object) -> bool: ...


R = TypeVar("R", float, tuple[float, int])
"""A rank."""


class Order(Generic[K, R]):
    """Keys by a rank that may have grown since it was last computed. Ties go by age in the order."""

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
        """Puts it in, or in anew where its rank may have fallen."""
        self._ties += 1
        self._live[key] = self._ties
        heapq.heappush(self._heap, (self._rank(key), self._ties, key))
        if len(self._heap) > 2 * len(self._live) + 64:
            self._heap = [item for item in self._heap if self._live.get(item[2]) == item[1]]
            heapq.heapify(self._heap)

    def discard(self, key: K) -> None:
        """Takes it out, if it is in."""
        self._live.pop(key, None)

    def lowest(self) -> R | None:
        """A lower bound of all ranks; exact right after a `walk`."""
        heap = self._heap
        while heap and self._live.get(heap[0][2]) != heap[0][1]:
            heapq.heappop(heap)
        return heap[0][0] if heap else None

    def walk(self, enough: Callable[[K], bool]) -> list[K]:
        """Lowest rank first, up to and with the first key that is `enough`."""
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
