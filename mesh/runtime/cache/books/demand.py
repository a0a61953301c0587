"""The memory that this pod's models in use need, counted in pods: the figure by which a pool of pods is scaled.

A cache that works well is full, so its fill level says nothing. The *working set* is a better measure: copies called
within a window of time, and evicted copies whose last call is within the window. If the working set fits, more pods
would only hold models that are not called. If it does not fit, models in use evict each other.

The sum over the pods of a pool is the number of pods that the pool needs. A model that was evicted here and then loaded
in another pod counts in both pods for the rest of the window. A pool that is far too small therefore asks for more pods
than it will need, and later for fewer. Placement prefers the same pod for the same model, which keeps that error small.
"""

import time
from collections.abc import Callable

from mesh.runtime.cache.books.entries import CacheEntry, EntryState
from mesh.runtime.cache.books.ledger import Ledger
from placement.footprint import Footprint, total

WINDOW = 600.0
"""The window, in seconds. A shorter window means fewer pods, and more models that must be loaded again for their next
call."""

_MOST = 20_000  # evicted copies that are remembered


class Demand:
    """The demand of one pod."""

    def __init__(self, ledger: Ledger, *, window: float = WINDOW, clock: Callable[[], float] = time.monotonic) -> None:
        """Makes the demand of an empty pod. Copies last called within `window` seconds are in use."""
        self._ledger = ledger
        self._window = window
        self._clock = clock
        self._left: dict[str, tuple[float, Footprint]] = {}  # evicted copies: when they were last used

    def made_way(self, entry: CacheEntry) -> None:
        """Notes that a copy is about to be evicted. It counts until the window has passed since its last use."""
        self._left.pop(entry.model_id, None)
        self._left[entry.model_id] = (self._clock() - self._ledger.idle_ms(entry) / 1000, entry.footprint)
        if len(self._left) > _MOST:
            del self._left[next(iter(self._left))]

    def working_set(self) -> Footprint:
        """Returns the size of the working set: evicted copies, copies here and loads under way that were used within
        the window, and all pinned copies."""
        ledger, oldest = self._ledger, self._clock() - self._window
        here = [entry for entry in ledger.entries.values() if entry.state is not EntryState.UNLOADING]
        names = {entry.model_id for entry in here}
        self._left = {
            model_id: (used, size)
            for model_id, (used, size) in self._left.items()
            if used >= oldest and model_id not in names
        }
        sizes = [size for _, size in self._left.values()]
        sizes += [entry.footprint for entry in here if entry.pinned or ledger.idle_ms(entry) <= self._window * 1000]
        return total(sizes)

    def pods(self) -> float:
        """Returns the number of pods like this one that the working set would fill, by the kind of memory that is
        scarcer."""
        return self.working_set().share_of(self._ledger.capacity)
