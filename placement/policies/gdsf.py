"""Greedy-dual-size-frequency: copies that are cheap to load again, large and rarely used are evicted first.

Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy", HP Labs 1998. A copy is
worth `calls x milliseconds to load it again / MiB`. Its rank is that worth plus an *inflation*: the rank of the last
victim at the time of the copy's last use. Unused copies therefore fall behind, however much they were once worth.

A policy learns of uses late (`base`). It needs the inflation at the time of the use, not the current one, so it keeps a
history of the inflation, thinned to a bounded length.

Calls count by their square root. With the plain number, a model that was hot for an hour would stay for days, because
the inflation would need as many evictions to reach it; docs/placement.md compares the hit rates.
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from typing import Generic

from placement.policies.base import SPARE, K, RankedKeys, Standing, Uses

HISTORY = 4096
"""Steps of the inflation that are kept."""

_MIB = 1 << 20


class Gdsf(Generic[K]):
    """The policy `gdsf`."""

    __slots__ = ("_facts", "_levels", "_order", "_seen", "_times", "_uses")

    name = "gdsf"

    def __init__(self, uses: Uses[K]) -> None:
        self._uses = uses
        self._order: RankedKeys[K, tuple[float, int]] = RankedKeys(self._place)
        self._facts: dict[K, float] = {}  # milliseconds to load it again, for each MiB
        self._seen: dict[K, tuple[int, float]] = {}  # last use as known, and the inflation at that time
        self._times: list[int] = []  # when the inflation rose ...
        self._levels: list[float] = []  # ... and to what; both grow

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, key: object) -> bool:
        return key in self._order

    def add(self, key: K, *, size: int, cost: float) -> None:
        """Adds a copy. It is worth more if it takes longer to load, or is smaller."""
        self._facts[key] = max(cost, 1.0) * _MIB / max(size, 1)
        self._seen.pop(key, None)
        self._order.add(key)

    def resize(self, key: K, *, size: int, cost: float) -> None:
        """Replaces a copy's size and cost. Its worth may have fallen, so it is inserted again."""
        if key in self._order:
            self._facts[key] = max(cost, 1.0) * _MIB / max(size, 1)
            self._order.add(key)

    def remove(self, key: K, *, evicted_at: int | None = None) -> None:
        """Removes a copy. An eviction raises the inflation to the rank of the victim, or to the lowest rank if that is
        lower."""
        if key not in self._order:
            return
        if evicted_at is not None:
            lowest = self._order.lowest()
            place = self._place(key)
            self._inflate((place if lowest is None else min(place, lowest))[0], evicted_at)
        self._order.discard(key)
        del self._facts[key]
        self._seen.pop(key, None)

    def walk(self, enough: Callable[[K], bool]) -> list[K]:
        """Returns copies, the lowest rank first, up to and including the first for which `enough` is true."""
        return self._order.walk(enough)

    def standing(self, key: K, *, now: int, spare: bool = False) -> Standing:
        """Returns a copy's rank; a spare is worth `SPARE` times less."""
        if not spare:
            return 1, self._place(key)[0]
        return 1, self._level(key, self._uses(key)[0]) + self._worth(key) / SPARE

    def _worth(self, key: K) -> float:
        return math.sqrt(max(1, self._uses(key)[1])) * self._facts[key]

    def _place(self, key: K) -> tuple[float, int]:
        """Returns a copy's rank, and the time of its last use as a tie-breaker."""
        last, calls = self._uses(key)
        return self._level(key, last) + math.sqrt(max(1, calls)) * self._facts[key], last

    def _level(self, key: K, last: int) -> float:
        """Returns the inflation at the time of a copy's last use."""
        seen = self._seen.get(key)
        if seen is not None and seen[0] == last:
            return seen[1]
        index = bisect_right(self._times, last)
        level = self._levels[index - 1] if index else 0.0
        if seen is not None:
            level = max(level, seen[1])  # the history may have been thinned meanwhile
        self._seen[key] = (last, level)
        return level

    def _inflate(self, level: float, now: int) -> None:
        if self._levels and level <= self._levels[-1]:
            return
        if self._times and now <= self._times[-1]:
            self._levels[-1] = level
            return
        self._times.append(now)
        self._levels.append(level)
        if len(self._times) > HISTORY:
            del self._times[1:-1:2]
            del self._levels[1:-1:2]
