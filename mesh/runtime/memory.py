"""The model server's memory as the system sees it, against what the ledger believes.

Sizes are measured when a model is loaded, and a model may take more later: a first call with a large input, an arena
that grows. So the server's private resident memory is watched, whatever the ledger says.

How much it may be. A full cache is the normal state, so the process must have room beyond its capacity for itself, for
calls at work and for what malloc cannot give back; `limit` is all of that together, and the hard limit of the process.
The shares are of that limit: above 90 % the least recently used copies go, one after the other as long as it helps;
above 95 % loads are refused too. At 100 % an allocation fails in whoever asks for it, and the server goes on.
(90 % of the capacity itself, as the design has it, would evict from every cache that is merely full.)
"""

import asyncio
from collections.abc import Callable
from pathlib import Path

from mesh.runtime.ledger import Entry, Ledger
from mesh.settings import format_bytes
from mesh.telemetry import logs

log = logs.get(__name__)

EVICT, REFUSE = 0.90, 0.95
HEADROOM_SHARE = 0.25
HEADROOM_LEAST = 512 << 20
"""The server itself takes about 100 MB; the data port alone may hold 256 MiB of inputs."""

INTERVAL = 1.0
"""Seconds between two looks: freed memory is given back within 0.3 s of an unload, so the next look sees it."""

AUTO_SHARE = 0.75  # of the memory at hand, where the operator names no capacity


def limit(capacity_bytes: int) -> int:
    """What the server's process may take in all."""
    return capacity_bytes + max(int(capacity_bytes * HEADROOM_SHARE), HEADROOM_LEAST)


def auto_capacity(available_bytes: int) -> int:
    """The capacity whose limit is a good part of the memory at hand; at least 64 MiB."""
    whole = int(available_bytes * AUTO_SHARE)
    capacity = int(whole / (1 + HEADROOM_SHARE))
    if capacity * HEADROOM_SHARE < HEADROOM_LEAST:
        capacity = whole - HEADROOM_LEAST
    return max(64 << 20, capacity)


class MemoryWatch:
    """Looks every second. `resident` gives the bytes, 0 where there is no server; `evict` lets a copy go."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        limit_bytes: int,
        resident: Callable[[], int],
        evict: Callable[[Entry, str], None],
    ) -> None:
        self.limit_bytes = limit_bytes
        self.refusal = ""  # why no loads are taken; empty: they are
        self._ledger = ledger
        self._resident = resident
        self._evict = evict
        self._high = False
        self._unloading = 0

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(INTERVAL)
            self.look()

    def look(self) -> None:
        """One look, and what follows from it."""
        resident = self._resident()
        text = f"the model server takes {format_bytes(resident)} of {format_bytes(self.limit_bytes)}"
        self.refusal = f"{text}: no loads above {REFUSE:.0%}" if resident > REFUSE * self.limit_bytes else ""
        high = resident > EVICT * self.limit_bytes
        if high != self._high:
            log.warning("memory is short" if high else "memory is enough again", what=text)
        self._high = high
        if not high:
            return
        # Copies whose size is on the books already are on their way out: their memory counts as given back.
        excess = resident - int(EVICT * self.limit_bytes) - (self._ledger.physical_bytes - self._ledger.committed_bytes)
        victims: list[Entry] = []

        def enough(entry: Entry) -> bool:
            nonlocal excess
            use = self._ledger.use(entry)
            if not entry.pinned and (use is None or not use.in_flight):
                victims.append(entry)
                excess -= max(entry.weight, 1)
            return excess <= 0

        if excess > 0:
            self._ledger.order(enough)
        for entry in victims:
            self._evict(entry, f"{text}, copies go above {EVICT:.0%}")


def available_bytes(*, meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that this process and its children may still take: the machine's or the container's, the smaller."""
    free = 4 << 30
    try:
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass  # not Linux as we know it: a guess
    for most, now in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            free = min(free, int((cgroup / most).read_text()) - int((cgroup / now).read_text()))
        except (OSError, ValueError):
            continue  # "max", or the other version of cgroups
    return max(0, free)
