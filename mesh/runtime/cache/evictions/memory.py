"""A watch over the memory that the model server and its device really use, independent of the ledger.

Sizes are measured when a model is loaded, but the model may need more later, when a call has a large input or an arena
grows. Therefore the server's private resident memory is watched.

The hard limit of the process is `capacity.limit`. Above 90 % of it, the next copies in the order of eviction are
evicted, unless they are pinned or have calls in flight. Above 95 %, loads are refused too. At 100 %, an allocation
fails in the code that asks for it, and the server continues. (90 % of the capacity itself would evict from every cache
that is merely full.)

A device is watched in the same way: sessions need workspace on the device when they are called, and other processes may
use the device too. The limit is all of the device's memory, and the shares are higher. The capacity is separate:
`capacity.device_capacity` leaves enough memory for calls.
"""

import asyncio
from collections.abc import Callable

from mesh.options.values import format_bytes
from mesh.process.tasks import turned
from mesh.runtime.cache.books.entries import CacheEntry, EntryState
from mesh.runtime.cache.books.ledger import Ledger
from mesh.runtime.cache.evictions.eviction import Eviction
from mesh.telemetry import logs

log = logs.get(__name__)

EVICT, REFUSE = 0.90, 0.95
DEVICE_EVICT, DEVICE_REFUSE = 0.95, 0.98

INTERVAL = 1.0
"""Seconds between two measurements. Memory is released within 0.3 s of an unload, so the next measurement includes the
release."""


class MemoryWatch:
    """The watch over one kind of memory. `used` returns the bytes in use, or 0 if no server runs."""

    def __init__(
        self,
        ledger: Ledger,
        eviction: Eviction,
        *,
        limit_bytes: int,
        used: Callable[[], int],
        device: bool = False,
    ) -> None:
        """Makes a watch, over a device's memory if `device` is set. With a limit of 0, it watches nothing."""
        self.limit_bytes = limit_bytes
        self.refusal = ""  # why loads are refused; empty: they are not
        self._ledger = ledger
        self._used = used
        self._eviction = eviction
        self._device = device
        self._shares = (DEVICE_EVICT, DEVICE_REFUSE) if device else (EVICT, REFUSE)
        self._high = False
        self._acted = False  # at the last look

    async def run(self) -> None:
        """Measures every `INTERVAL` seconds until cancelled."""
        while True:
            await asyncio.sleep(INTERVAL)
            self.look()
            turned()

    def look(self) -> None:
        """Reads the memory once, and evicts copies or refuses loads if necessary."""
        if not self.limit_bytes:
            return
        evict, _ = self._shares
        used = self._used()
        text = self._text(used)
        self.refusal = self._refused(used)
        high = used > evict * self.limit_bytes
        if high != self._high:
            log.warning("memory is low" if high else "memory is sufficient again", what=text)
        self._high = high
        if not high:
            return
        # The memory of copies being unloaded counts as released.
        excess = used - int(evict * self.limit_bytes) - self._leaving()
        victims: list[CacheEntry] = []

        def enough(entry: CacheEntry) -> bool:
            nonlocal excess
            use = self._ledger.use(entry)
            if not entry.pinned and (use is None or not use.in_flight):
                victims.append(entry)
                excess -= max(self._of(entry), 1)
            return excess <= 0

        # A device's figure may be as old as the pause between two looks: the next may not yet show freed memory.
        self._acted = excess > 0 and not (self._device and self._acted) and self._may_evict()
        if self._acted:
            self._ledger.order(enough)
            self._begun(victims)
        for entry in victims:
            self._eviction.evict(entry, f"{text}, and the pod evicts copies above {evict:.0%}")

    def full(self) -> str:
        """Returns the reason why no load may begin at this moment, or "" if one may. Subclasses may read the memory
        again."""
        return self.refusal

    def _may_evict(self) -> bool:
        """Returns True. A subclass returns False while evictions cannot help."""
        return True

    def _refused(self, used: int) -> str:
        """Returns the reason why loads are refused when this many bytes are in use, or "" if loads may begin."""
        _, refuse = self._shares
        if used <= refuse * self.limit_bytes:
            return ""
        return f"{self._text(used)}, and the pod accepts no loads above {refuse:.0%}"

    def _text(self, used: int) -> str:
        shown, limit = format_bytes(used), format_bytes(self.limit_bytes)
        if self._device:
            return f"{shown} of the device's {limit} are in use"
        return f"the model server takes {shown} of {limit}"

    def _begun(self, victims: list[CacheEntry]) -> None:
        """Does nothing. A subclass notes the copies that are about to be evicted."""

    def _leaving(self) -> int:
        return sum(self._of(entry) for entry in self._ledger.entries.values() if entry.state is EntryState.UNLOADING)

    def _of(self, entry: CacheEntry) -> int:
        """Returns the bytes that a copy uses of the watched memory."""
        return entry.footprint.device_bytes if self._device else entry.footprint.host_bytes
