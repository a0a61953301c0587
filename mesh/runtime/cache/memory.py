"""The memory of the model server, and of its device, as the system sees them, against what the ledger believes.

Sizes are measured when a model is loaded, and a model may take more later: a first call with a large input, an arena
that grows. So the server's private resident memory is watched, whatever the ledger says.

How much it may be. A full cache is the normal state, so the process must have room beyond its capacity for itself, for
calls at work and for what malloc cannot give back; `limit` is all of that together, and the hard limit of the process.
The shares are of that limit: above 90 % the least recently used copies go, one after the other as long as it helps;
above 95 % loads are refused too. At 100 % an allocation fails in whoever asks for it, and the server goes on.
(90 % of the capacity itself, as the design has it, would evict from every cache that is merely full.)

A device is watched in the same way: sessions take workspace there as they are called, and others may use it too. Its
limit is all of its memory, the shares are higher, and the capacity is told apart: `device_capacity` leaves as much as
calls may need.
"""

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

from mesh.host import cgroups, machine
from mesh.runtime.cache.ledger import Entry, Ledger, State
from mesh.settings import format_bytes
from mesh.telemetry import logs
from placement.footprint import SESSION_BYTES

log = logs.get(__name__)

EVICT, REFUSE = 0.90, 0.95
DEVICE_EVICT, DEVICE_REFUSE = 0.95, 0.98
DEVICE_SHARE = 0.85  # of the device's free memory, for models, where the operator names no capacity
HEADROOM_SHARE = 0.25
HEADROOM_LEAST = 512 << 20
"""The server itself takes about 100 MB; the data port alone may hold 256 MiB of inputs."""

INTERVAL = 1.0
"""Seconds between two looks: freed memory is given back within 0.3 s of an unload, so the next look sees it."""

AUTO_LEAST = 64 << 20
"""The least that the automatic capacity is, in bytes: a pod with less memory than that takes does not start."""

AUTO_SHARE = 0.75  # of the memory at hand, where the operator names no capacity


def limit(capacity_bytes: int) -> int:
    """What the server's process may take in all."""
    return capacity_bytes + max(int(capacity_bytes * HEADROOM_SHARE), HEADROOM_LEAST)


def auto_limit(available_bytes: int) -> int:
    """The same with the automatic capacity: in a small container less, or the container would be killed first."""
    return min(limit(auto_capacity(available_bytes)), int(available_bytes * AUTO_SHARE))


def auto_capacity(available_bytes: int) -> int:
    """The capacity whose limit is a good part of the memory at hand; at least 64 MiB."""
    whole = int(available_bytes * AUTO_SHARE)
    capacity = int(whole / (1 + HEADROOM_SHARE))
    if capacity * HEADROOM_SHARE < HEADROOM_LEAST:
        capacity = whole - HEADROOM_LEAST
    return max(AUTO_LEAST, capacity)


def device_capacity(wanted: int, used: int, total: int) -> int:
    """Bytes for models on a device of `total` bytes, of which `used` are in use before any model. `wanted` 0: a good
    part of the rest. Raises ValueError where that much is not there, or not enough for one model, below the share at
    which copies go again."""
    free = max(0, int(total * DEVICE_EVICT) - used)
    if wanted > free:
        text = f"{format_bytes(wanted)} are asked for models, of the device's {format_bytes(total)}"
        raise ValueError(f"{text} only {format_bytes(free)} are free")
    if free < SESSION_BYTES:
        text = f"{format_bytes(used)} of the device's {format_bytes(total)} are in use by others, and no model fits"
        raise ValueError(f"{text} into the rest: free it, or use --device cpu")
    return wanted or int(free * DEVICE_SHARE)


class MemoryWatch:
    """Looks every second. `used` gives the bytes, 0 where there is no server; `evict` lets a copy go."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        limit_bytes: int,
        used: Callable[[], int],
        evict: Callable[[Entry, str], None],
        device: bool = False,
    ) -> None:
        """`device`: it is a device's memory that is watched. A limit of 0 watches nothing."""
        self.limit_bytes = limit_bytes
        self.refusal = ""  # why no loads are taken; empty: they are
        self._ledger = ledger
        self._used = used
        self._evict = evict
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
                excess -= max(entry.device_bytes if self._device else entry.host_bytes, 1)
            return excess <= 0

        # A device's figure may be as old as the pause between two looks: the next may not tell yet of what has gone.
        self._acted = excess > 0 and not (self._device and self._acted)
        if self._acted:
            self._ledger.order(enough)
        for entry in victims:
            self._evict(entry, f"{text}, copies go above {evict:.0%}")

    def _leaving(self) -> int:
        leaving = [entry for entry in self._ledger.entries.values() if entry.state is State.UNLOADING]
        return sum(entry.device_bytes if self._device else entry.host_bytes for entry in leaving)


def available_bytes(*, meminfo: Path = machine.MEMINFO, cgroup: Path = cgroups.ROOT) -> int:
    """Memory that this process and its children may still take: the machine's or the container's, the smaller."""
    known = machine.memory_bytes("MemAvailable", meminfo)
    free = 4 << 30 if known is None else known  # a guess, where nobody knows
    container = container_bytes(cgroup=cgroup)
    return max(0, free if container is None else min(free, container))


def container_bytes(*, cgroup: Path = cgroups.ROOT) -> int | None:
    """Memory that the container may still take; None where it has no limit of its own."""
    for folder, most, now, files in (
        (cgroup, "memory.max", "memory.current", ("active_file", "inactive_file")),
        (
            cgroup / "memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            ("total_active_file", "total_inactive_file"),
        ),
    ):
        try:
            maximum, used = int((folder / most).read_text()), int((folder / now).read_text())
        except (OSError, ValueError):
            continue  # "max", or the other version of cgroups
        if maximum >= cgroups.NO_LIMIT:
            continue
        with contextlib.suppress(OSError, ValueError):  # files in memory count as used, and make way
            told = dict(line.split(maxsplit=1) for line in (folder / "memory.stat").read_text().splitlines())
            used -= sum(int(told.get(name, 0)) for name in files)
        return max(0, maximum - used)
    return None
