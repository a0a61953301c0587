"""The books of this pod's memory: bytes by model, reserved and in use, and the order in which copies would be evicted.

The ledger keeps two sums. *Committed* memory belongs to everything that is here or will be: copies, and loads from the
moment their room is reserved. It excludes copies being unloaded, whose space is already reserved for a load. *Physical*
memory is what the server uses or may use now: for copies, for loads that have begun, and for copies being unloaded
until they are really gone. Decisions use the committed sum (`victims`). A load begins only when it fits into the
physical sum. Thus memory is never reserved twice, and every reservation fits once the unloads are done.

There are two kinds of memory: the host's and, in a pod that has one, a device's. Both sums are kept for each kind, and
neither may overflow. In a pod without a device, the memory that a model needs on a device in other pods counts as host
memory.

An eviction policy (`placement.policies`) orders the copies: by default least recently used first, according to the use
board, which sees every call. Reading a slot takes microseconds, and a pod has thousands of slots, so a policy reads
only the slots of copies that it considers. The ledger neither waits nor does I/O, and it makes no decisions.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from mesh.runtime.cache.books.entries import CacheEntry, EntryState
from mesh.runtime.sharedmemory.slot import Use
from placement.account import Factor
from placement.footprint import NOTHING, Footprint, total
from placement.policies import Policy, named


class Uses(Protocol):
    """The use board, as the ledger reads it."""

    def read(self, slot: int) -> Use:
        """Returns the use of a slot."""


@dataclass(frozen=True, slots=True)
class LedgerStatistics:
    """The ledger in numbers."""

    copies: int  # loaded
    loading: int  # loads in progress, waiting ones included
    unloading: int


class Ledger:
    """The ledger of one pod.

    A model has one entry at most, except during a reload of its content. Then a second entry is kept aside: first the
    new one while it is loaded, then the old one until it is gone.
    """

    def __init__(
        self,
        capacity_bytes: int,
        uses: Uses,
        *,
        slots: int,
        eviction: str = "lru",
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """Makes an empty ledger. `eviction` is the name of a policy. Raises ValueError for an unknown policy."""
        self.capacity = Footprint(capacity_bytes)
        self.committed = NOTHING  # everything that is here or will be
        self.physical = NOTHING  # everything that the server's memory may hold
        self.entries: dict[str, CacheEntry] = {}
        self.factor = Factor()  # of sizes on the books; stays 1 beside our own server
        self.unloads = 0  # unloads begun so far
        self._uses = uses
        self._clock = clock
        self._slots = deque(range(slots))  # free slots; first in, first out, so that a late write hits no fresh copy
        self._counts = dict.fromkeys(EntryState, 0)
        self.policy: Policy[str] = named(eviction, self._uses_of)  # of the loaded copies

    def resize(self, capacity_bytes: int) -> None:
        """Sets the host's memory for models, as the model server reports it. Call it before the first load."""
        self.capacity = Footprint(capacity_bytes, self.capacity.device_bytes)

    def equip(self, device_capacity_bytes: int) -> None:
        """Adds a device with this much memory for models. Call it before the first load."""
        self.capacity = Footprint(self.capacity.host_bytes, device_capacity_bytes)

    # --- an entry's life ---

    def add(self, model_id: str, revision: int, *, idle_ms: int = 0, aside: bool = False) -> CacheEntry:
        """Adds an entry for a load that begins. With `aside`, keeps the entry aside, because the model has a copy that
        the load is to replace. Raises ValueError if the model has this entry already."""
        entry = CacheEntry(model_id, revision, idle_ms=idle_ms, now_ns=self._clock(), aside=aside)
        if entry.key in self.entries:
            raise ValueError(f"{model_id!r} is already in the ledger: {self.entries[entry.key]!r}")
        self.entries[entry.key] = entry
        self._counts[entry.state] += 1
        return entry

    def aside_of(self, model_id: str) -> CacheEntry | None:
        """Returns the entry that is kept aside for the model, or None if it has none."""
        return self.entries.get(model_id + "\0")

    def swap(self, entry: CacheEntry) -> CacheEntry | None:
        """Makes an entry that is kept aside the main entry of its model. Returns the previous main entry, which is then
        kept aside."""
        del self.entries[entry.key]
        former = self.entries.pop(entry.model_id, None)
        if former is not None:
            if former.state is EntryState.LOADED:
                self.policy.remove(former.key)
            former.aside = True
            self.entries[former.key] = former
            if former.state is EntryState.LOADED:
                self.policy.add(former.key, size=former.weight, cost=float(former.load_ms))
        entry.aside = False
        self.entries[entry.key] = entry
        return former

    def enter(self, entry: CacheEntry, state: EntryState, *, evicted: bool = False) -> None:
        """Sets the state of an entry. UNLOADING makes the entry's space available, LOADED adds the entry to the order
        of eviction.

        `evicted` is True if the copy is evicted; some policies learn from evictions.
        """
        if entry.state is EntryState.LOADED:
            self.policy.remove(entry.key, evicted_at=self._clock() if evicted else None)
        self._count(entry, -1)
        self._counts[entry.state] -= 1
        entry.state = state
        entry.since_ns = self._clock()
        self.unloads += state is EntryState.UNLOADING
        self._counts[state] += 1
        self._count(entry, +1)
        if state is EntryState.LOADED:
            entry.loaded_ns = entry.since_ns
            self.policy.add(entry.key, size=entry.weight, cost=float(entry.load_ms))

    def weigh(self, entry: CacheEntry, size: Footprint) -> None:
        """Sets the size of an entry. Reserves room, or replaces a reservation with the size that was measured here."""
        self._count(entry, -1)
        entry.footprint = size if self.has_device else Footprint(size.total_bytes)
        self._count(entry, +1)
        if entry.state is EntryState.LOADED:
            self.policy.resize(entry.key, size=entry.weight, cost=float(entry.load_ms))

    def counted(self, entry: CacheEntry) -> Footprint:
        """Returns the memory with which a model of known size is counted: its size times the factor, but not more than
        the pod's capacity unless the size itself is more."""
        size = entry.size if self.has_device else Footprint(entry.size.total_bytes)
        scaled = self.factor.scaled(size, guessed=entry.guessed, least_bytes=entry.least_bytes)
        most = max(size.host_bytes, self.capacity.host_bytes)
        return Footprint(min(scaled.host_bytes, most), scaled.device_bytes)

    def recount(self) -> None:
        """Counts all loaded copies again after the factor has changed. O(n)."""
        for entry in list(self.entries.values()):
            if entry.state is EntryState.LOADED and entry.size.total_bytes:
                counted = self.counted(entry)
                if counted != entry.footprint:
                    self.weigh(entry, counted)

    def begin(self, entry: CacheEntry) -> bool:
        """Takes the entry's space from the physical memory if enough is free now. Returns False if not."""
        if not entry.begun:
            if not (self.physical + entry.footprint).within(self.capacity):
                return False
            self._count(entry, -1)
            entry.begun = True
            self._count(entry, +1)
        return True

    def give_back(self, entry: CacheEntry) -> None:
        """Cancels the reservation of a load that has not reached the server, or has left the server."""
        if entry.slot is not None:
            self._slots.append(entry.slot)
            entry.slot = None
        self._count(entry, -1)
        entry.begun = False
        entry.footprint = entry.size = NOTHING

    def promised(self) -> Footprint:
        """Returns the reservations of loads that have not reached the server. O(n)."""
        return total(entry.footprint for entry in self.entries.values() if entry.state is EntryState.WAITING)

    def take_slot(self, entry: CacheEntry) -> bool:
        """Assigns a slot of the use board to an entry. Returns False if all slots are taken."""
        if entry.slot is None and self._slots:
            entry.slot = self._slots.popleft()
        return entry.slot is not None

    def remove(self, entry: CacheEntry) -> None:
        """Removes an entry once nothing of its model is left, and frees its slot."""
        if self.entries.get(entry.key) is not entry:
            return
        if entry.state is EntryState.LOADED:
            self.policy.remove(entry.key)
        self._count(entry, -1)
        del self.entries[entry.key]
        self._counts[entry.state] -= 1
        if entry.slot is not None:
            self._slots.append(entry.slot)

    def _count(self, entry: CacheEntry, sign: int) -> None:
        if entry not in self:  # its server has died, so late news about it changes no sum
            return
        change = entry.footprint if sign > 0 else NOTHING - entry.footprint
        if entry.state is not EntryState.UNLOADING:
            self.committed += change
        if entry.physical:
            self.physical += change

    # --- questions ---

    def __contains__(self, entry: CacheEntry) -> bool:
        return self.entries.get(entry.key) is entry

    @property
    def has_device(self) -> bool:
        """True if this pod keeps models on a device."""
        return self.capacity.device_bytes > 0

    @property
    def free(self) -> Footprint:
        """The memory that is not committed. It is negative if sizes were estimated too small."""
        return self.capacity - self.committed

    @property
    def accounted_bytes(self) -> int:
        """The bytes of host memory that copies and loads under way need by their sizes, without the factor. O(n)."""
        return sum(entry.measured.host_bytes for entry in self.entries.values() if entry.physical)

    @property
    def fullness(self) -> float:
        """The share of memory that is committed, of the host's or the device's memory, whichever is fuller."""
        return self.committed.share_of(self.capacity)

    def fits(self, size: Footprint) -> bool:
        """Returns whether this much memory is free, of both kinds."""
        return size.on(device=self.has_device).within(self.free)

    def holds(self, size: Footprint) -> bool:
        """Returns whether a copy of this size would fit into the empty pod."""
        return size.within(self.capacity)

    def count(self, state: EntryState) -> int:
        """Returns the number of entries in that state."""
        return self._counts[state]

    def use(self, entry: CacheEntry) -> Use | None:
        """Returns the use of an entry, from the board, or None if the entry has no slot."""
        return None if entry.slot is None else self._uses.read(entry.slot)

    def idle_ms(self, entry: CacheEntry) -> int:
        """Returns the time since the last use of an entry, in milliseconds: since the start or end of a call. Before
        the copy's first call, the load counts as a use, and the idle time that its request named is added."""
        return max(0, (self._clock() - self._last_use_ns(entry)) // 1_000_000)

    def used(self, entry: CacheEntry) -> bool:
        """Returns whether a call has begun since the entry was loaded."""
        use = self.use(entry)
        return use is not None and bool(use.calls or use.in_flight)

    def asked_ms(self, entry: CacheEntry) -> int:
        """Returns the time since the load in progress was requested, in milliseconds."""
        return max(0, (self._clock() - entry.loaded_ns) // 1_000_000)

    def age(self, entry: CacheEntry) -> float:
        """Returns the time for which the entry has been in its present state, in seconds."""
        return (self._clock() - entry.since_ns) / 1e9

    def order(self, enough: Callable[[CacheEntry], bool] = lambda entry: False) -> list[CacheEntry]:
        """Returns the loaded copies in the order of eviction, up to and including the first one for which `enough`
        returns True."""
        return [self.entries[key] for key in self.policy.walk(lambda key: enough(self.entries[key]))]

    def first(self) -> CacheEntry | None:
        """Returns the copy that would be evicted next, or None if no copy may be evicted."""
        order = self.order(lambda entry: not entry.pinned)
        return order[-1] if order and not order[-1].pinned else None

    def under_way(self) -> Iterator[CacheEntry]:
        """Yields the loads that have not ended."""
        return (
            entry for entry in self.entries.values() if entry.state not in (EntryState.LOADED, EntryState.UNLOADING)
        )

    def now_ns(self) -> int:
        """Returns the time on the ledger's clock, in nanoseconds."""
        return self._clock()

    def statistics(self) -> LedgerStatistics:
        """Returns the ledger in numbers."""
        loaded, unloading = self._counts[EntryState.LOADED], self._counts[EntryState.UNLOADING]
        return LedgerStatistics(
            copies=loaded,
            loading=len(self.entries) - loaded - unloading,
            unloading=unloading,
        )

    def _last_use_ns(self, entry: CacheEntry) -> int:
        use = self.use(entry)
        if use is None or not (use.calls or use.in_flight):
            return entry.loaded_ns - entry.idle_ms * 1_000_000
        return use.last_use_ns

    def _uses_of(self, model_id: str) -> tuple[int, int]:
        """Returns the time of the last use, in nanoseconds, and the number of calls of a model, for the policy."""
        entry = self.entries[model_id]
        use = self.use(entry)
        return self._last_use_ns(entry), use.calls if use is not None else 0
