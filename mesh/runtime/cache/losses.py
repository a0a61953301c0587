"""Copies that a running model server has lost, which are withdrawn as soon as its relay has noticed.

A foreign server may unload a model at another program's request, or lose it. Its relay then answers *not here*, and
marks the copy's slot. This module does the rest, as for every unload: it removes the key, unloads what may be left in
the server, and releases memory and files.
"""

import asyncio
from collections.abc import Callable

from mesh.process.tasks import turned
from mesh.runtime.cache.books.entries import EntryState
from mesh.runtime.cache.books.ledger import Ledger
from mesh.runtime.cache.evictions.unloads import Unloads
from mesh.runtime.sharedmemory.slot import SlotState

_LOOK = 0.25  # seconds between two checks of the number of losses


class Losses:
    """The watch over copies that one pod's server has lost. `count` returns the number of losses so far."""

    def __init__(self, ledger: Ledger, unloads: Unloads, count: Callable[[], int]) -> None:
        self._ledger = ledger
        self._unloads = unloads
        self._count = count

    async def run(self) -> None:
        """Withdraws lost copies, several times a second, until cancelled."""
        seen = 0
        while True:
            turned()
            count = self._count()
            if count != seen:
                seen = count
                self._withdraw()
            await asyncio.sleep(_LOOK)

    def _withdraw(self) -> None:
        for entry in list(self._ledger.entries.values()):
            use = self._ledger.use(entry) if entry.state is EntryState.LOADED else None
            if use is not None and use.state is SlotState.LOST:
                self._unloads.start(entry, "the model server no longer has it")
