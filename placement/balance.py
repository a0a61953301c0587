"""The choice of the copy that answers a call: the one whose pod is the least busy. Every hit comes here: a plain loop.

A pod's load is what the router has in flight there now plus what the pod itself said with its last reply
(`mesh-load`). The second figure covers other routers and lags behind. It also counts this router's own calls, an error
that is the same for every copy. Ties are broken by `turn`, a counter that the caller keeps, so that an idle mesh does
not send all its calls to one copy. Measured: 0.4 µs for 2 copies, 1 µs for 8.
"""

from collections.abc import Sequence
from typing import Protocol


class LoadedPod(Protocol):
    """A copy, as far as balancing needs it."""

    @property
    def in_flight(self) -> int:
        """Our calls in flight there."""

    @property
    def load(self) -> int:
        """Calls in flight there as its pod last said."""


def least_loaded(copies: Sequence[LoadedPod], turn: int = 0) -> int:
    """Returns the index of the copy to call. Raises ValueError if there is none."""
    count = len(copies)
    if count == 1:
        return 0
    if not count:
        raise ValueError("no copies to choose from")
    index = best = turn % count
    copy = copies[index]
    least = copy.in_flight + copy.load
    for _ in range(count - 1):
        index += 1
        if index == count:
            index = 0
        copy = copies[index]
        load = copy.in_flight + copy.load
        if load < least:
            best, least = index, load
    return best
