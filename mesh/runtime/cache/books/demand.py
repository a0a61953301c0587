"""How much memory this pod's models in use want, in pods: what a pool of pods is scaled by.

A cache that works well is full, so its fill tells nothing. What tells is the *working set*: copies that were called
within a window of time, and copies that made way though their last call lies within it. As long as that fits, more
pods would hold only what nobody calls; where it does not fit, models in use drive each other out.

The sum over the pods of a pool is how many pods the pool wants. A model that made way here and was loaded in another
pod since counts in both, for the rest of the window; so a pool that is far too small asks for more than it will need,
and takes it back afterwards. Placement prefers the same pod for the same model, which keeps that small.
"""

import time
from collections.abc import Callable

from mesh.runtime.cache.books.entries import Entry, State
from mesh.runtime.cache.books.ledger import Ledger
from placement.footprint import Footprint, total

WINDOW = 600.0
"""Seconds. Shorter: fewer pods, and more models that are loaded again when they are called again."""

_MOST = 20_000  # copies that made way and are remembered


class Demand:
    """One pod's."""

    def __init__(self, ledger: Ledger, *, window: float = WINDOW, clock: Callable[[], float] = time.monotonic) -> None:
        """`window` in seconds."""
        self._ledger = ledger
        self._window = window
        self._clock = clock
        self._left: dict[str, tuple[float, Footprint]] = {}  # copies that made way: when they were last used

    def made_way(self, entry: Entry) -> None:
        """That copy is about to make way for another."""
        self._left.pop(entry.model_id, None)
        self._left[entry.model_id] = (self._clock() - self._ledger.idle_ms(entry) / 1000, entry.footprint)
        if len(self._left) > _MOST:
            del self._left[next(iter(self._left))]

    def working_set(self) -> Footprint:
        """What it takes. Pinned copies and loads under way belong to it."""
        ledger, oldest = self._ledger, self._clock() - self._window
        here = [entry for entry in ledger.entries.values() if entry.state is not State.UNLOADING]
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
        """Pods such as this one that it would fill, by the memory that it fills more of."""
        return self.working_set().share_of(self._ledger.capacity)
