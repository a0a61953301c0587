"""What is in this pod's memory and what is about to be: bytes by model, and who makes way for whom.

Two sums are kept. *Committed* is everything that is here or will be: copies, loads from the moment their room is
reserved. What is being unloaded is not in it, because its space is promised to somebody already. *Physical* is what the
server's memory holds or may hold at this moment: copies, loads that have begun, and whatever is being unloaded until it
is really gone. Decisions are made on the first, and a load begins only when it fits into the second; so memory is never
promised twice, and everything that was promised fits once the unloads are done.

Memory is of two kinds, the host's and, where the pod has one, a device's. Both sums are kept of each, and neither may
overflow. Where there is no device, what a model is known to keep on one elsewhere counts as host memory.

The order in which copies go is an eviction policy's (`placement.policies`), by default least recently used first, by
the use board, which sees every call. Reading a slot costs microseconds and a pod holds thousands, so a policy reads it
only of those that come up. Nothing here waits or does I/O; whoever calls carries the decisions out.
"""

import enum
import itertools
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from mesh.runtime.sharedmemory import board
from placement import room
from placement.footprint import Footprint
from placement.policies import Policy, named
from placement.replay import Question

QUESTIONS = 256
"""How many of the latest are kept, a kilobyte or two each."""


NOTHING = Footprint()


class State(enum.Enum):
    """How far an entry is; the values are those of `CopyState.state`."""

    QUEUED = "queued"
    PULLING = "pulling"
    WAITING = "waiting"  # for space, or for its turn
    LOADING = "loading"
    LOADED = "loaded"
    UNLOADING = "unloading"


_PHYSICAL = frozenset({State.LOADING, State.LOADED, State.UNLOADING})


class Uses(Protocol):
    """The use board, as far as it is read here."""

    def read(self, slot: int) -> board.Use:
        """One slot."""


class Entry:
    """One model in this pod. Changed by its ledger only, except what others note in it: `load_ms`, `usual_ms`,
    `disk_bytes`, `suspect`, `model_type`, `reason`, `pinned`, `generation`, `digest`, `blamed`, the rates."""

    __slots__ = (
        "aside",
        "begun",
        "blamed",
        "device_bytes",
        "digest",
        "disk_bytes",
        "generation",
        "host_bytes",
        "idle_ms",
        "load_ms",
        "loaded_ns",
        "model_id",
        "model_type",
        "peak_rate",
        "pinned",
        "queue_ms",
        "rate",
        "reason",
        "revision",
        "since_ns",
        "slot",
        "state",
        "suspect",
        "usual_ms",
    )

    def __init__(self, model_id: str, revision: int, *, idle_ms: int, now_ns: int, aside: bool = False) -> None:
        self.model_id = model_id
        self.revision = revision  # create revision of the registration that it is a copy of
        self.generation = 0  # of that registration's content
        self.digest = ""  # hex, of what it was loaded from
        self.aside = aside  # another generation of the same registration is the copy of that id here
        self.idle_ms = idle_ms  # since the model's last use, when its load was asked for; 0: a caller waits
        self.state = State.QUEUED
        self.since_ns = now_ns  # when the state was entered
        self.loaded_ns = now_ns  # until then: when it was asked for; counts as its last use until it is called
        self.begun = False  # whether it counts as physical, though perhaps still waiting for its turn
        self.host_bytes = 0  # predicted, then measured; 0 until room is reserved
        self.device_bytes = 0
        self.disk_bytes = 0  # of its files, once they are here
        self.slot: int | None = None
        self.load_ms = 0
        self.usual_ms = 0  # what a load of it took before, pull and waiting included; 0: unknown
        self.blamed = False  # servers have died in calls of it
        self.suspect = False  # at work when its server died
        self.model_type = ""
        self.reason = ""  # why it was loaded here
        self.pinned = False  # is never a victim
        self.rate = self.peak_rate = 0  # calls a minute (`activity`)
        self.queue_ms = 0  # that its calls wait before they run, lately

    @property
    def key(self) -> str:
        """Under which it stands in the ledger. No id holds a NUL."""
        return self.model_id + "\0" if self.aside else self.model_id

    @property
    def footprint(self) -> Footprint:
        """What it takes in each memory."""
        return Footprint(self.host_bytes, self.device_bytes)

    @property
    def weight(self) -> int:
        """Bytes in both memories."""
        return self.host_bytes + self.device_bytes

    @property
    def physical(self) -> bool:
        """Whether the server's memory may hold it."""
        return self.begun or self.state in _PHYSICAL

    def __repr__(self) -> str:
        return f"<Entry {self.model_id!r} of {self.revision}: {self.state.value}, {self.footprint}>"


@dataclass(frozen=True, slots=True)
class LedgerStatistics:
    """The ledger in numbers."""

    capacity: Footprint
    committed: Footprint
    physical: Footprint
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
        self.capacity_bytes = capacity_bytes
        self.entries: dict[str, Entry] = {}
        self.device_capacity_bytes = 0
        self.committed_bytes = self.committed_device_bytes = 0
        self.physical_bytes = self.physical_device_bytes = 0
        self._uses = uses
        self._clock = clock
        self._slots = deque(range(slots))  # free ones; first in, first out, so that a late write hits no fresh copy
        self._counts = dict.fromkeys(State, 0)
        self.questions: deque[tuple[Question, room.Room]] = deque(maxlen=QUESTIONS)  # for room, the latest
        self._policy: Policy[str] = named(eviction, self._uses_of)  # of the loaded ones

    def equip(self, device_capacity_bytes: int) -> None:
        """The pod has a device, with so much memory for models. Before the first load."""
        self.device_capacity_bytes = device_capacity_bytes

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
                self._policy.remove(former.key)
            former.aside = True
            self.entries[former.key] = former
            if former.state is State.LOADED:
                self._policy.add(former.key, size=former.weight, cost=float(former.load_ms))
        entry.aside = False
        self.entries[entry.key] = entry
        return former

    def enter(self, entry: Entry, state: State, *, evicted: bool = False) -> None:
        """Moves it on. UNLOADING gives its space to whoever comes next, LOADED puts it into the order of use.

        `evicted`: it makes way for another, which some policies learn from."""
        if entry.state is State.LOADED:
            self._policy.remove(entry.key, evicted_at=self._clock() if evicted else None)
        self._count(entry, -1)
        self._counts[entry.state] -= 1
        entry.state = state
        entry.since_ns = self._clock()
        self._counts[state] += 1
        self._count(entry, +1)
        if state is State.LOADED:
            entry.loaded_ns = entry.since_ns
            self._policy.add(entry.key, size=entry.weight, cost=float(entry.load_ms))

    def weigh(self, entry: Entry, host_bytes: int, device_bytes: int = 0) -> None:
        """Sets its size: reserves room, or corrects what was reserved by what was measured here."""
        if not self.has_device:
            host_bytes, device_bytes = host_bytes + device_bytes, 0
        self._count(entry, -1)
        entry.host_bytes, entry.device_bytes = host_bytes, device_bytes
        self._count(entry, +1)
        if entry.state is State.LOADED:
            self._policy.resize(entry.key, size=entry.weight, cost=float(entry.load_ms))

    def begin(self, entry: Entry) -> bool:
        """Whether there is space in memory for it now; from then on it takes that space."""
        if not entry.begun:
            if self.physical_bytes + entry.host_bytes > self.capacity_bytes:
                return False
            if self.physical_device_bytes + entry.device_bytes > self.device_capacity_bytes:
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
        entry.host_bytes = entry.device_bytes = 0

    def promised(self) -> Footprint:
        """What is reserved for loads that have not reached the server. O(n)."""
        waiting = [entry for entry in self.entries.values() if entry.state is State.WAITING]
        return Footprint(sum(entry.host_bytes for entry in waiting), sum(entry.device_bytes for entry in waiting))

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
            self._policy.remove(entry.key)
        self._count(entry, -1)
        del self.entries[entry.key]
        self._counts[entry.state] -= 1
        if entry.slot is not None:
            self._slots.append(entry.slot)

    def _count(self, entry: Entry, sign: int) -> None:
        if entry not in self:  # its server has died; what is still told of it changes no sum
            return
        host, device = sign * entry.host_bytes, sign * entry.device_bytes
        if entry.state is not State.UNLOADING:
            self.committed_bytes += host
            self.committed_device_bytes += device
        if entry.physical:
            self.physical_bytes += host
            self.physical_device_bytes += device

    # --- questions ---

    def __contains__(self, entry: Entry) -> bool:
        return self.entries.get(entry.key) is entry

    @property
    def has_device(self) -> bool:
        """Whether models are kept on a device here."""
        return self.device_capacity_bytes > 0

    @property
    def capacity(self) -> Footprint:
        """Of both memories."""
        return Footprint(self.capacity_bytes, self.device_capacity_bytes)

    @property
    def committed(self) -> Footprint:
        """What is here or will be, in both memories."""
        return Footprint(self.committed_bytes, self.committed_device_bytes)

    @property
    def free_bytes(self) -> int:
        """What nobody has been promised of host memory; negative where sizes were predicted too small."""
        return self.capacity_bytes - self.committed_bytes

    @property
    def free_device_bytes(self) -> int:
        """The same of the device's memory."""
        return self.device_capacity_bytes - self.committed_device_bytes

    @property
    def fullness(self) -> float:
        """The share of the fuller memory that is taken."""
        return self.committed.share_of(self.capacity)

    def fits(self, size: Footprint) -> bool:
        """Whether so much is free, in both memories."""
        need = size.on(device=self.has_device)
        return need.host_bytes <= self.free_bytes and need.device_bytes <= self.free_device_bytes

    def holds(self, size: Footprint) -> bool:
        """Whether a copy that takes so much here would fit if nothing else were here."""
        return size.host_bytes <= self.capacity_bytes and size.device_bytes <= self.device_capacity_bytes

    def count(self, state: State) -> int:
        """How many are in that state."""
        return self._counts[state]

    def use(self, entry: Entry) -> board.Use | None:
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
        return [self.entries[key] for key in self._policy.walk(lambda key: enough(self.entries[key]))]

    def first(self) -> Entry | None:
        """The copy that would go first, of those that may go at all."""
        order = self.order(lambda entry: not entry.pinned)
        return order[-1] if order and not order[-1].pinned else None

    def candidates(self, need: Footprint) -> list[str]:
        """Whose other copies are worth knowing before room is made for that much: nobody's, where it fits anyway."""
        if self.fits(need):
            return []
        count = itertools.count(1)
        return [entry.model_id for entry in self.order(lambda entry: next(count) >= room.CANDIDATES)]

    def room_for(
        self,
        need: Footprint,
        *,
        idle_ms: int = 0,
        spares: Mapping[str, int] | None = None,
        keep: Collection[str] = (),
        for_whom: str = "",
        growing: Collection[str] | None = None,
    ) -> room.Room:
        """Who makes way for so much more. `spares`: copies elsewhere, of those that were asked about. `keep` are
        never taken.

        `growing`, where the question is for one that is in memory already: the keys of all such loads that wait. It may
        take what is promised to others, and what the others in memory hold does not come to rest before they have got
        their own."""
        besides = NOTHING if growing is None else self.promised()
        free = Footprint(self.free_bytes + besides.host_bytes, self.free_device_bytes + besides.device_bytes)
        need = need.on(device=self.has_device)
        busy = [
            room.Held(
                entry.model_id,
                entry.host_bytes,
                0,
                busy_reason="growing" if growing and entry.key in growing else "loading",
                device_bytes=entry.device_bytes,
            )
            for entry in self._under_way()
            if entry.weight and entry.key not in keep and (growing is None or entry.state is not State.WAITING)
        ]
        looked: list[room.Held] = []
        found = room.search(
            need.host_bytes,
            free.host_bytes,
            self.capacity_bytes,
            self._policy,
            self._look(spares, keep),
            idle_ms=idle_ms,
            spares=spares,
            busy=busy,
            on_looked=looked.extend,
            need_device_bytes=need.device_bytes,
            free_device_bytes=free.device_bytes,
            capacity_device_bytes=self.device_capacity_bytes,
        )
        if found.verdict is not room.RoomVerdict.FITS:
            question = Question(
                for_whom,
                need.host_bytes,
                free.host_bytes,
                self.capacity_bytes,
                idle_ms,
                tuple(looked),
                need.device_bytes,
                free.device_bytes,
                self.device_capacity_bytes,
            )
            self.questions.append((question, found))
        return found

    def disk_room_for(
        self,
        short_bytes: int,
        *,
        idle_ms: int = 0,
        spares: Mapping[str, int] | None = None,
        for_whom: str = "",
        without: Collection[str] = (),
    ) -> room.Room:
        """Who makes way so that so many bytes of files may go from the disk: by the same rules as in memory.

        A pull under way may be what is in the way, with as much as it will; `without` are the keys of those that have
        none of the disk, because they wait for it."""
        look = self._look(spares, (for_whom,))

        def on_disk(model_id: str) -> room.Held:
            return replace(look(model_id), bytes=self.entries[model_id].disk_bytes, device_bytes=0)

        all_bytes = sum(entry.disk_bytes for entry in self.entries.values())
        busy = [
            room.Held(entry.model_id, entry.disk_bytes or short_bytes, 0, busy_reason=entry.state.value)
            for entry in self.entries.values()
            if entry.state is not State.LOADED
            and (entry.disk_bytes or (entry.state is State.PULLING and entry.key not in without))
        ]
        looked: list[room.Held] = []
        found = room.search(
            short_bytes,
            0,
            max(short_bytes, all_bytes),
            self._policy,
            on_disk,
            idle_ms=idle_ms,
            spares=spares,
            busy=busy,
            on_looked=looked.extend,
        )
        self.questions.append(
            (Question(for_whom, short_bytes, 0, max(short_bytes, all_bytes), idle_ms, tuple(looked)), found)
        )
        return found

    def leaving_disk_bytes(self, promised: Collection[str]) -> int:
        """Bytes of files that will have gone from the disk in a moment, with copies that have just begun to be
        unloaded, but for those that are `promised` to somebody, by key."""
        return sum(
            entry.disk_bytes
            for entry in self.entries.values()
            if entry.state is State.UNLOADING and entry.key not in promised and self.age(entry) < room.FRESH_MS / 1000
        )

    def _under_way(self) -> Iterator[Entry]:
        """Loads that have not ended."""
        return (entry for entry in self.entries.values() if entry.state not in (State.LOADED, State.UNLOADING))

    def _look(self, spares: Mapping[str, int] | None, keep: Collection[str]) -> Callable[[str], room.Held]:
        """How a copy is at this moment."""
        now = self._clock()

        def look(model_id: str) -> room.Held:
            entry = self.entries[model_id]
            use = self.use(entry)
            others = spares.get(model_id, 0) if spares else 0
            idle = self.idle_ms(entry)
            awaited = not entry.idle_ms and (use is None or not use.calls)  # the caller that it was loaded for
            return room.Held(
                model_id,
                entry.host_bytes,
                idle,
                device_bytes=entry.device_bytes,
                in_flight=use.in_flight if use else 0,
                busy_reason="kept" if model_id in keep else "pinned" if entry.pinned else "",
                other_copies=others,
                standing=self._policy.standing(model_id, now=now, spare=others > 0),
                fresh=awaited and now - entry.loaded_ns < room.FRESH_MS * 1_000_000,
            )

        return look

    def statistics(self) -> LedgerStatistics:
        """The ledger in numbers."""
        loaded, unloading = self._counts[State.LOADED], self._counts[State.UNLOADING]
        return LedgerStatistics(
            capacity=self.capacity,
            committed=self.committed,
            physical=Footprint(self.physical_bytes, self.physical_device_bytes),
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
