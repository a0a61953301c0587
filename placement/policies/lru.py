"""Least recently used first. The default: simple to explain, and hard to beat if models have similar sizes."""

from collections.abc import Callable
from typing import Generic

from placement.policies.base import SPARE, K, RankedKeys, Standing, Uses


class Lru(Generic[K]):
    """The policy `lru`."""

    __slots__ = ("_order", "_uses")

    name = "lru"

    def __init__(self, uses: Uses[K]) -> None:
        self._uses = uses
        self._order: RankedKeys[K, float] = RankedKeys(lambda key: uses(key)[0])

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, key: object) -> bool:
        return key in self._order

    def add(self, key: K, *, size: int, cost: float) -> None:
        """Adds a copy. Its size and cost do not affect the order."""
        self._order.add(key)

    def resize(self, key: K, *, size: int, cost: float) -> None:
        """Does nothing: the order does not depend on sizes."""

    def remove(self, key: K, *, evicted_at: int | None = None) -> None:
        """Removes a copy, if it exists."""
        self._order.discard(key)

    def walk(self, enough: Callable[[K], bool]) -> list[K]:
        """Returns copies, the least recently used first, up to and including the first for which `enough` is true."""
        return self._order.walk(enough)

    def standing(self, key: K, *, now: int, spare: bool = False) -> Standing:
        """Returns the negated idle time; a spare counts as idle `SPARE` times as long."""
        return 1, -max(0, now - self._uses(key)[0]) * (SPARE if spare else 1)
