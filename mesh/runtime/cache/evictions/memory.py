"""The memory of the model server, and of its device, as the system sees them, against what the ledger believes.

Sizes are measured when a model is loaded, and a model may take more later: a first call with a large input, an arena
that grows. So the server's private resident memory is watched, whatever the ledger says.

The shares are of the hard limit of the process (`capacity.limit`): above 90 % the least recently used copies go, one
after the other as long as it helps; above 95 % loads are refused too. At 100 % an allocation fails in whoever asks for
it, and the server goes on. (90 % of the capacity itself, as the design has it, would evict from every cache that is
merely full.)

A device is watched in the same way: sessions take workspace there as they are called, and others may use it too. Its
limit is all of its memory, the shares are higher, and the capacity is told apart: `capacity.device_capacity` leaves as
much as calls may need.
"""

import asyncio
from collections.abc import Callable

from mesh.options.values import format_bytes
from mesh.process.tasks import turned
from mesh.runtime.cache.books.entries import Entry, State
from mesh.runtime.cache.books.ledger import Ledger
from mesh.runtime.cache.evictions.eviction import Eviction
from mesh.telemetry import logs

log = logs.get(__name__)

EVICT, REFUSE = 0.90, 0.95
DEVICE_EVICT, DEVICE_REFUSE = 0.95, 0.98

INTERVAL = 1.0
"""Seconds between two looks: freed memory is given back within 0.3 s of an unload, so the next look sees it."""


class MemoryWatch:
    """Looks every second. `used` gives the bytes, 0 where there is no server."""

    def __init__(
        self,
        ledger: Ledger,
        eviction: Eviction,
        *,
        limit_bytes: int,
        used: Callable[[], int],
        device: bool = False,
    ) -> None:
        """`device`: it is a device's memory that is watched. A limit of 0 watches nothing."""
        self.limit_bytes = limit_bytes
        self.refusal = ""  # why no loads are taken; empty: they are
        self._ledger = ledger
        self._used = used
        self._eviction = eviction
        self._device = device
        self._what = "the device's memory is taken to" if device else "the model server takes"
        self._shares = (DEVICE_EVICT, DEVICE_REFUSE) if device else (EVICT, REFUSE)
        self._high = False
        self._acted = False  # at the last look

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(INTERVAL)
            self.look()
            turned()

    def look(self) -> None:
        """One look, and what follows from it."""
        if not self.limit_bytes:
            return
        evict, refuse = self._shares
        used = self._used()
        text = f"{self._what} {format_bytes(used)} of {format_bytes(self.limit_bytes)}"
        self.refusal = f"{text}: no loads above {refuse:.0%}" if used > refuse * self.limit_bytes else ""
        high = used > evict * self.limit_bytes
        if high != self._high:
            log.warning("memory is short" if high else "memory is enough again", what=text)
        self._high = high
        if not high:
            return
        # Copies whose size is on the books already are on their way out: their memory counts as given back.
        excess = used - int(evict * self.limit_bytes) - self._leaving()
        victims: list[Entry] = []

        def enough(entry: Entry) -> bool:
            nonlocal excess
            use = self._ledger.use(entry)
            if not entry.pinned and (use is None or not use.in_flight):
                victims.append(entry)
                excess -= max(self._of(entry), 1)
            return excess <= 0

        # A device's figure may be as old as the pause between two looks: the next may not tell yet of what has gone.
        self._acted = excess > 0 and not (self._device and self._acted)
        if self._acted:
            self._ledger.order(enough)
        for entry in victims:
            self._eviction.evict(entry, f"{text}, copies go above {evict:.0%}")

    def _leaving(self) -> int:
        return sum(self._of(entry) for entry in self._ledger.entries.values() if entry.state is State.UNLOADING)

    def _of(self, entry: Entry) -> int:
        """Bytes that a copy takes in the memory that is watched."""
        return entry.footprint.device_bytes if self._device else entry.footprint.host_bytes
