"""What is in this pod's memory and what is about to be: bytes by model, and the order in which copies would go.

Two sums are kept. *Committed* is everything that is here or will be: copies, loads from the moment their room is
reserved. What is being unloaded is not in it, because its space is promised to somebody already. *Physical* is what the
server's memory holds or may hold at this moment: copies, loads that have begun, and whatever is being unloaded until it
is really gone. Decisions are made on the first (`victims`), and a load begins only when it fits into the second; so
memory is never promised twice, and everything that was promised fits once the unloads are done.

Memory is of two kinds, the host's and, where the pod has one, a device's. Both sums are kept of each, and neither may
overflow. Where there is no device, what a model is known to keep on one elsewhere counts as host memory.

The order in which copies go is an eviction policy's (`placement.policies`), by default least recently used first, by
the use board, which sees every call. Reading a slot costs microseconds and a pod holds thousands, so a policy reads it
only of those that come up. Nothing here waits, does I/O or decides.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from mesh.runtime.cache.books.entries import Entry, State
from mesh.runtime.sharedmemory.slot import Use
from placement.footprint import NOTHING, Footprint, total
from placement.policies import Policy, named


class Uses(Protocol):
    """The use board, as far as it is read here."""

    def read(self, slot: int) -> Use:
        """One slot."""


@dataclass(frozen=True, slots=True)
class LedgerStatistics:
    """The ledger in numbers."""

    copies: int  # loaded
    loading: int  # loads in progress, whatever they wait for
    unloading: int


class Ledger:
    """See the module's text. At most one entry a model; while its content is reloaded, one more that stands aside:
    first the new one, while it is loaded, then the old one, until it is gone."""

    def __init__(
        self,
        capacity_bytes: int,
        uses: Uses,
        *,
        slots: int,
        eviction: str = "lru",
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """`eviction` names the policy. Raises ValueError for one that there is not."""
        self.capacity = Footprint(capacity_bytes)
        self.committed = NOTHING  # what is here or will be
        self.physical = NOTHING  # what the server's memory may hold
        self.entries: dict[str, Entry] = {}
        self._uses = uses
        self._clock = clock
        self._slots = deque(range(slots))  # free ones; first in, first out, so that a late write hits no fresh copy
        self._counts = dict.fromkeys(State, 0)
        self.policy: Policy[str] = named(eviction, self._uses_of)  # of the loaded ones

    def equip(self, device_capacity_bytes: int) -> None:
        """The pod has a device, with so much memory for models. Before the first load."""
        self.capacity = Footprint(self.capacity.host_bytes, device_capacity_bytes)

    # --- an entry's life ---

    def add(self, model_id: str, revision: int, *, idle_ms: int = 0, aside: bool = False) -> Entry:
        """A load begins, `aside` of the copy that is here. There must be no such entry of that id."""
        entry = Entry(model_id, revision, idle_ms=idle_ms, now_ns=self._clock(), aside=aside)
        if entry.key in self.entries:
            raise ValueError(f"{model_id!r} is in the ledger already: {self.entries[entry.key]!r}")
        self.entries[entry.key] = entry
        self._counts[entry.state] += 1
        return entry

    def aside_of(self, model_id: str) -> Entry | None:
        """Returns the entry that stands aside of that model's."""
        return self.entries.get(model_id + "\0")

    def swap(self, entry: Entry) -> Entry | None:
        """Makes an entry that stands aside the one of its id. Returns the former, which stands aside now."""
        del self.entries[entry.key]
        former = self.entries.pop(entry.model_id, None)
        if former is not None:
            if former.state is State.LOADED:
                self.policy.remove(former.key)
            former.aside = True
            self.entries[former.key] = former
            if former.state is State.LOADED:
                self.policy.add(former.key, size=former.weight, cost=float(former.load_ms))
        entry.aside = False
        self.entries[entry.key] = entry
        return former

    def enter(self, entry: Entry, state: State, *, evicted: bool = False) -> None:
        """Moves it on. UNLOADING gives its space to whoever comes next, LOADED puts it into the order of use.

        `evicted`: it makes way for another, which some policies learn from."""
        if entry.state is State.LOADED:
            self.policy.remove(entry.key, evicted_at=self._clock() if evicted else None)
        self._count(entry, -1)
        self._counts[entry.state] -= 1
        entry.state = state
        entry.since_ns = self._clock()
        self._counts[state] += 1
        self._count(entry, +1)
        if state is State.LOADED:
            entry.loaded_ns = entry.since_ns
            self.policy.add(entry.key, size=entry.weight, cost=float(entry.load_ms))

    def weigh(self, entry: Entry, size: Footprint) -> None:
        """Sets its size: reserves room, or corrects what was reserved by what was measured here."""
        self._count(entry, -1)
        entry.footprint = size if self.has_device else Footprint(size.total_bytes)
        self._count(entry, +1)
        if entry.state is State.LOADED:
            self.policy.resize(entry.key, size=entry.weight, cost=float(entry.load_ms))

    def begin(self, entry: Entry) -> bool:
        """Whether there is space in memory for it now; from then on it takes that space."""
        if not entry.begun:
            if not (self.physical + entry.footprint).within(self.capacity):
                return False
            self._count(entry, -1)
            entry.begun = True
            self._count(entry, +1)
        return True

    def give_back(self, entry: Entry) -> None:
        """Takes back what was reserved for a load that has not reached the server, or has left it."""
        if entry.slot is not None:
            self._slots.append(entry.slot)
            entry.slot = None
        self._count(entry, -1)
        entry.begun = False
        entry.footprint = NOTHING

    def promised(self) -> Footprint:
        """What is reserved for loads that have not reached the server. O(n)."""
        return total(entry.footprint for entry in self.entries.values() if entry.state is State.WAITING)

    def take_slot(self, entry: Entry) -> bool:
        """Gives it a slot of the use board; False: all are taken."""
        if entry.slot is None and self._slots:
            entry.slot = self._slots.popleft()
        return entry.slot is not None

    def remove(self, entry: Entry) -> None:
        """Nothing of it is left; its slot goes to somebody else."""
        if self.entries.get(entry.key) is not entry:
            return
        if entry.state is State.LOADED:
            self.policy.remove(entry.key)
        self._count(entry, -1)
        del self.entries[entry.key]
        self._counts[entry.state] -= 1
        if entry.slot is not None:
            self._slots.append(entry.slot)

    def _count(self, entry: Entry, sign: int) -> None:
        if entry not in self:  # its server has died; what is still told of it changes no sum
            return
        change = entry.footprint if sign > 0 else NOTHING - entry.footprint
        if entry.state is not State.UNLOADING:
            self.committed += change
        if entry.physical:
            self.physical += change

    # --- questions ---

    def __contains__(self, entry: Entry) -> bool:
        return self.entries.get(entry.key) is entry

    @property
    def has_device(self) -> bool:
        """Whether models are kept on a device here."""
        return self.capacity.device_bytes > 0

    @property
    def free(self) -> Footprint:
        """What nobody has been promised; negative where sizes were predicted too small."""
        return self.capacity - self.committed

    @property
    def fullness(self) -> float:
        """The share of the fuller memory that is taken."""
        return self.committed.share_of(self.capacity)

    def fits(self, size: Footprint) -> bool:
        """Whether so much is free, in both memories."""
        return size.on(device=self.has_device).within(self.free)

    def holds(self, size: Footprint) -> bool:
        """Whether a copy that takes so much here would fit if nothing else were here."""
        return size.within(self.capacity)

    def count(self, state: State) -> int:
        """How many are in that state."""
        return self._counts[state]

    def use(self, entry: Entry) -> Use | None:
        """What the board says of it."""
        return None if entry.slot is None else self._uses.read(entry.slot)

    def idle_ms(self, entry: Entry) -> int:
        """Since its last use: a call that was begun or ended, or its load."""
        return max(0, (self._clock() - self._last_use_ns(entry)) // 1_000_000)

    def used(self, entry: Entry) -> bool:
        """Whether a call of it was begun since its load."""
        use = self.use(entry)
        return use is not None and bool(use.calls or use.in_flight)

    def asked_ms(self, entry: Entry) -> int:
        """Since the load that is under way was asked for."""
        return max(0, (self._clock() - entry.loaded_ns) // 1_000_000)

    def age(self, entry: Entry) -> float:
        """Seconds since its state was entered."""
        return (self._clock() - entry.since_ns) / 1e9

    def order(self, enough: Callable[[Entry], bool] = lambda entry: False) -> list[Entry]:
        """The loaded copies in the order in which they would go, up to the first for which `enough` is true."""
        return [self.entries[key] for key in self.policy.walk(lambda key: enough(self.entries[key]))]

    def first(self) -> Entry | None:
        """The copy that would go first, of those that may go at all."""
        order = self.order(lambda entry: not entry.pinned)
        return order[-1] if order and not order[-1].pinned else None

    def under_way(self) -> Iterator[Entry]:
        """Loads that have not ended."""
        return (entry for entry in self.entries.values() if entry.state not in (State.LOADED, State.UNLOADING))

    def now_ns(self) -> int:
        """Of the clock that its times are of."""
        return self._clock()

    def statistics(self) -> LedgerStatistics:
        """The ledger in numbers."""
        loaded, unloading = self._counts[State.LOADED], self._counts[State.UNLOADING]
        return LedgerStatistics(
            copies=loaded,
            loading=len(self.entries) - loaded - unloading,
            unloading=unloading,
        )

    def _last_use_ns(self, entry: Entry) -> int:
        use = self.use(entry)
        if use is None or not (use.calls or use.in_flight):
            return entry.loaded_ns - entry.idle_ms * 1_000_000
        return use.last_use_ns

    def _uses_of(self, model_id: str) -> tuple[int, int]:
        """For the policy: last use in nanoseconds, and calls."""
        entry = self.entries[model_id]
        use = self.use(entry)
        return self._last_use_ns(entry), use.calls if use is not None else 0
