"""The ledger: what counts as used memory, and which copy is evicted first."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.runtime.cache.books.activity import Activity, active
from mesh.runtime.cache.books.demand import Demand
from mesh.runtime.cache.books.entries import CacheEntry, EntryState
from mesh.runtime.cache.books.ledger import Ledger
from mesh.runtime.cache.evictions.victims import Victims
from mesh.runtime.sharedmemory.slot import SlotState as SlotState
from mesh.runtime.sharedmemory.slot import Use
from placement.footprint import SESSION_BYTES, Footprint
from placement.room import RoomVerdict

MS = 1_000_000


class FakeBoard:
    """A board on which the test sets the use of each slot."""

    def __init__(self) -> None:
        self.uses: dict[int, Use] = {}
        self.reads = 0

    def read(self, slot: int) -> Use:
        self.reads += 1
        return self.uses.get(slot, Use(SlotState.LOADED, 1, 0, 0, 0, 0, 0, 0))

    def use(self, entry: CacheEntry, at_ms: int, *, in_flight: int = 0) -> None:
        assert entry.slot is not None
        calls = self.uses[entry.slot].calls + 1 if entry.slot in self.uses else 1
        self.uses[entry.slot] = Use(SlotState.LOADED, 1, in_flight, 0, at_ms * MS, calls, 0, 0)


class Pod:
    """A ledger with a board, and a clock that the test moves."""

    def __init__(self, capacity: int = 100, slots: int = 64, eviction: str = "lru") -> None:
        self.board = FakeBoard()
        self.now_ms = 1000
        self.ledger = Ledger(capacity, self.board, slots=slots, eviction=eviction, clock=lambda: self.now_ms * MS)
        self.victims = Victims(self.ledger)

    def reserve(self, model_id: str, size: int, *, idle_ms: int = 0, device: int = 0) -> CacheEntry:
        entry = self.ledger.add(model_id, 1, idle_ms=idle_ms)
        self.ledger.weigh(entry, Footprint(size, device))
        return entry

    def load(self, model_id: str, size: int = 10, *, idle_ms: int = 0, device: int = 0) -> CacheEntry:
        entry = self.reserve(model_id, size, idle_ms=idle_ms, device=device)
        assert self.ledger.begin(entry)
        assert self.ledger.take_slot(entry)
        self.ledger.enter(entry, EntryState.LOADING)
        self.ledger.enter(entry, EntryState.LOADED)
        self.now_ms += 1
        return entry

    def order(self) -> list[str]:
        return [entry.model_id for entry in self.ledger.order()]


@pytest.fixture
def pod() -> Pod:
    return Pod()


def test_space_is_promised_from_the_reservation_and_physical_until_really_freed(pod: Pod) -> None:
    """The memory of an unloading copy can be reserved for a new load at once, but that load begins only when the copy
    is gone."""
    old = pod.load("old", 80)
    pod.ledger.enter(old, EntryState.UNLOADING)
    assert (pod.ledger.committed.host_bytes, pod.ledger.physical.host_bytes) == (0, 80)
    new = pod.reserve("new", 50)
    assert (pod.ledger.committed.host_bytes, pod.ledger.physical.host_bytes) == (50, 80)
    assert not pod.ledger.begin(new)
    pod.ledger.remove(old)
    assert pod.ledger.begin(new)
    assert (pod.ledger.committed.host_bytes, pod.ledger.physical.host_bytes) == (50, 50)


def test_a_measured_size_replaces_the_predicted_one(pod: Pod) -> None:
    """The copies may then exceed the capacity, and the ledger reports the excess as negative free memory."""
    entry = pod.load("m", 10)
    pod.ledger.weigh(entry, Footprint(130))
    assert pod.ledger.free.host_bytes == -30
    assert pod.victims.room_for(Footprint(0), keep=("m",)).verdict is RoomVerdict.NO_ROOM


def test_without_a_device_everything_is_host_memory(pod: Pod) -> None:
    pod.load("m", 10, device=30)
    assert (pod.ledger.committed.host_bytes, pod.ledger.committed.device_bytes) == (40, 0)
    assert pod.victims.room_for(Footprint(10, SESSION_BYTES + 60)).verdict is RoomVerdict.EVICT
    assert pod.victims.room_for(Footprint(10, SESSION_BYTES + 50)).verdict is RoomVerdict.FITS


def test_a_device_is_a_memory_of_its_own(pod: Pod) -> None:
    """The ledger accounts for host and device memory separately: neither overflows, and only copies that use a memory
    are evicted to make room in it."""
    pod.ledger.equip(50)
    on_device, on_host = pod.load("on device", 10, device=40), pod.load("on host", 80)
    assert (pod.ledger.committed, pod.ledger.physical) == (Footprint(90, 40), Footprint(90, 40))
    assert pod.ledger.fullness == 0.9
    assert pod.ledger.fits(Footprint(10, 10))
    assert not pod.ledger.fits(Footprint(10, 11))
    assert pod.victims.room_for(Footprint(5, 20)).victims == ("on device",)
    assert pod.victims.room_for(Footprint(30, 10)).victims == ("on host",)
    assert pod.victims.room_for(Footprint(1, 51)).verdict is RoomVerdict.TOO_LARGE
    assert not pod.ledger.holds(Footprint(1, 51))
    waiting = pod.reserve("waiting", 1, device=20)
    assert not pod.ledger.begin(waiting)
    pod.ledger.enter(on_device, EntryState.UNLOADING)
    assert (pod.ledger.free.device_bytes, pod.ledger.physical.device_bytes) == (30, 40)
    assert not pod.ledger.begin(waiting)
    pod.ledger.remove(on_device)
    assert pod.ledger.begin(waiting)
    assert pod.order() == [on_host.model_id]


def test_what_a_server_measures_on_a_device_stands_as_it_is(pod: Pod) -> None:
    """A loaded copy counts as the server measured it, here in host memory alone. The size of a new load that was only
    measured in host memory comes from a pod without a device, so most of it is expected on the device."""
    pod.ledger.equip(SESSION_BYTES + (1 << 20))
    pod.ledger.capacity = Footprint(1 << 20, pod.ledger.capacity.device_bytes)
    pod.load("all on the host", 100_000)
    assert pod.ledger.committed == Footprint(100_000, 0)
    assert not pod.ledger.fits(Footprint(2 << 20))
    assert pod.victims.room_for(Footprint(2 << 20)).verdict is RoomVerdict.TOO_LARGE
    assert pod.victims.room_for(Footprint(1 << 20)).verdict is RoomVerdict.FITS


def test_least_recently_used_goes_first(pod: Pod) -> None:
    a, b, c = pod.load("a"), pod.load("b"), pod.load("c")
    assert pod.order() == ["a", "b", "c"]
    pod.board.use(a, 5000)
    assert pod.order() == ["b", "c", "a"]
    pod.board.use(b, 4000)
    pod.board.use(c, 6000)
    assert pod.order() == ["b", "a", "c"]


def test_a_copy_nobody_has_called_is_as_old_as_it_was_said_to_be(pod: Pod) -> None:
    """Until its first call, a copy keeps the age that its load request gave."""
    pod.load("used")
    preloaded = pod.load("preloaded", idle_ms=3_600_000)
    assert pod.order() == ["preloaded", "used"]
    assert pod.ledger.idle_ms(preloaded) >= 3_600_000
    pod.board.use(preloaded, pod.now_ms)
    assert pod.order() == ["used", "preloaded"]


def test_calls_in_flight_protect(pod: Pod) -> None:
    busy, idle = pod.load("busy", 50), pod.load("idle", 50)
    pod.board.use(busy, 1000, in_flight=1)
    pod.board.use(idle, 2000)
    pod.now_ms = 3000
    room = pod.victims.room_for(Footprint(30))
    assert (room.verdict, room.victims) == (RoomVerdict.EVICT, ("idle",))
    assert pod.victims.room_for(Footprint(60)).verdict is RoomVerdict.NO_ROOM


def test_a_copy_with_a_spare_elsewhere_goes_before_one_of_similar_age(pod: Pod) -> None:
    for name in ("sole", "spare"):
        pod.load(name, 50)
    pod.now_ms = 60_000
    assert pod.victims.room_for(Footprint(10)).victims == ("sole",)
    assert pod.victims.room_for(Footprint(10), spares={"spare": 1}).victims == ("spare",)


def test_two_loads_are_not_promised_the_same_victim(pod: Pod) -> None:
    """The first load's victim is already being evicted when the second load asks."""
    pod.load("a", 50)
    pod.load("b", 50)
    first = pod.victims.room_for(Footprint(50))
    for victim in first.victims:
        pod.ledger.enter(pod.ledger.entries[victim], EntryState.UNLOADING)
    pod.reserve("new1", 50)
    second = pod.victims.room_for(Footprint(50))
    assert first.victims == ("a",)
    assert second.victims == ("b",)


def test_slots_come_back_and_run_out() -> None:
    pod = Pod(slots=2)
    a = pod.load("a")
    pod.load("b")
    third = pod.reserve("c", 1)
    assert not pod.ledger.take_slot(third)
    pod.ledger.remove(a)
    assert pod.ledger.take_slot(third)
    assert third.slot == 0


def test_what_is_gone_is_not_in_the_order(pod: Pod) -> None:
    """The eviction order leaves out a copy that is being unloaded. If its model is loaded again, the new copy comes
    last."""
    a = pod.load("a")
    pod.load("b")
    pod.ledger.enter(a, EntryState.UNLOADING)
    assert pod.order() == ["b"]
    pod.ledger.remove(a)
    pod.load("a")
    assert pod.order() == ["b", "a"]


def test_finding_a_victim_does_not_read_the_whole_board() -> None:
    """Reading the slots of thousands of copies would add milliseconds to a cold start."""
    pod = Pod(capacity=10_000, slots=4096)
    for number in range(1000):
        pod.load(str(number), 10, idle_ms=1)
    pod.board.reads = 0
    assert pod.victims.room_for(Footprint(10)).victims == ("0",)
    assert pod.board.reads <= 16


def test_nothing_is_asked_about_where_it_fits_anyway(pod: Pod) -> None:
    pod.load("a", 60)
    assert pod.victims.candidates(Footprint(40)) == []
    assert pod.victims.candidates(Footprint(41)) == ["a"]


actions = st.lists(
    st.one_of(
        st.tuples(st.just("load"), st.sampled_from("abcdef"), st.integers(0, 60)),
        st.tuples(st.just("use"), st.sampled_from("abcdef"), st.integers(0, 2)),
        st.tuples(st.just("go"), st.sampled_from("abcdef"), st.just(0)),
        st.tuples(st.just("gone"), st.sampled_from("abcdef"), st.just(0)),
        st.tuples(st.just("weigh"), st.sampled_from("abcdef"), st.integers(0, 150)),
    ),
    max_size=40,
)


@given(actions)
def test_the_sums_are_those_of_the_entries(steps: list[tuple[str, str, int]]) -> None:
    """After any sequence of operations, the ledger's sums equal those of its copies, and the eviction order agrees with
    the board. A load begins only if it fits."""
    pod = Pod()
    ledger = pod.ledger
    for what, name, number in steps:
        pod.now_ms += 1
        entry = ledger.entries.get(name)
        if what == "load" and entry is None:
            entry = pod.reserve(name, number)
            if ledger.begin(entry):
                assert ledger.physical.host_bytes <= max(
                    100, sum(e.weight for e in ledger.entries.values() if e is not entry)
                )
                ledger.take_slot(entry)
                ledger.enter(entry, EntryState.LOADING)
                ledger.enter(entry, EntryState.LOADED)
        elif what == "use" and entry is not None and entry.slot is not None:
            pod.board.use(entry, pod.now_ms, in_flight=number)
        elif what == "go" and entry is not None and entry.state is EntryState.LOADED:
            ledger.enter(entry, EntryState.UNLOADING)
        elif what == "gone" and entry is not None:
            if entry.slot is not None:
                pod.board.uses.pop(entry.slot, None)
            ledger.remove(entry)
        elif what == "weigh" and entry is not None:
            ledger.weigh(entry, Footprint(number))
        entries = ledger.entries.values()
        assert ledger.committed.host_bytes == sum(e.weight for e in entries if e.state is not EntryState.UNLOADING)
        assert ledger.physical.host_bytes == sum(e.weight for e in entries if e.physical)
        loaded = [e for e in entries if e.state is EntryState.LOADED]
        assert sorted(pod.order()) == sorted(e.model_id for e in loaded)
        idle = [ledger.idle_ms(e) for e in ledger.order()]
        assert idle == sorted(idle, reverse=True)
        assert ledger.count(EntryState.LOADED) == len(loaded)


def test_a_pinned_copy_is_never_a_victim(pod: Pod) -> None:
    """A pinned copy is not evicted although it is the least recently used one. Once unpinned, it is evicted first."""
    pinned = pod.load("pinned", 50)
    pinned.pinned = True
    pod.load("other", 50)
    assert pod.ledger.first() is pod.ledger.entries["other"]
    assert pod.victims.room_for(Footprint(50)).victims == ("other",)
    assert pod.victims.room_for(Footprint(60)).verdict is RoomVerdict.NO_ROOM
    pinned.pinned = False
    assert pod.victims.room_for(Footprint(60)).victims == ("pinned", "other")


def test_the_policy_decides_which_model_is_evicted() -> None:
    """With `gdsf`, a model that loads quickly is evicted before one that loads slowly, although it was loaded later. An
    unknown policy is an error."""
    pod = Pod(eviction="gdsf")
    for name, load_ms in (("slow", 1000), ("quick", 10)):
        entry = pod.reserve(name, 50)
        entry.load_ms = load_ms
        pod.ledger.take_slot(entry)
        pod.ledger.enter(entry, EntryState.LOADED)
        pod.now_ms += 5000
    assert pod.victims.room_for(Footprint(50)).victims == ("quick",)
    with pytest.raises(ValueError, match="lfu"):
        Pod(eviction="lfu")


def test_rates_rise_within_seconds_and_peaks_are_remembered(pod: Pod) -> None:
    """Rates are in calls per minute. A loaded copy without calls that is no longer young is active only if it is
    pinned."""
    now = 0.0
    busy, quiet = pod.load("busy"), pod.load("quiet")
    pod.now_ms += 61_000  # after that the copies are no longer young, a change that would be published too
    activity = Activity(pod.ledger, clock=lambda: now)
    for _ in range(3):
        now += 3
        for _ in range(300):
            pod.board.use(busy, pod.now_ms)
        activity.look()
    assert 5000 < busy.rate <= 6000
    assert active(pod.ledger, busy)
    assert not active(pod.ledger, quiet)
    for _ in range(20):
        now += 3
        activity.look()
    assert busy.rate == 0
    assert busy.peak_rate > 4000
    quiet.pinned = True
    assert active(pod.ledger, quiet)


def test_how_long_calls_wait_follows_from_how_many_do(pod: Pod) -> None:
    """The waiting time is estimated from the queue: at ten answers a second, thirty waiting calls wait three seconds.
    Running calls do not count."""
    now = 0.0
    entry = pod.load("slow")
    activity = Activity(pod.ledger, clock=lambda: now)
    pod.board.uses[entry.slot] = replace(pod.board.read(entry.slot), in_flight=32, running=2)
    for _ in range(6):
        now += 3
        use = pod.board.read(entry.slot)
        pod.board.uses[entry.slot] = replace(use, calls=use.calls + 30)
        activity.look()
    assert 2900 < entry.queue_ms <= 3000
    pod.board.uses[entry.slot] = replace(pod.board.read(entry.slot), in_flight=2, running=2)
    for _ in range(12):
        now += 3
        activity.look()
    assert entry.queue_ms <= 1


def a_demand(pod: Pod, window: float = 60.0) -> Demand:
    return Demand(pod.ledger, window=window, clock=lambda: pod.now_ms / 1000)


def evict(pod: Pod, demand: Demand, entry: CacheEntry) -> None:
    demand.made_way(entry)
    pod.ledger.enter(entry, EntryState.UNLOADING, evicted=True)
    pod.ledger.remove(entry)


def test_demand_is_what_was_called_lately() -> None:
    """Only copies that were called recently, or are pinned, count in the demand. Other copies may fill a pod without
    adding to it."""
    pod = Pod(capacity=100)
    demand = a_demand(pod)
    old = pod.load("old", 60)
    pod.load("preloaded", 10, idle_ms=3_600_000)
    pod.now_ms += 61_000
    new = pod.load("new", 30)
    assert demand.pods() == 0.3
    pod.board.use(old, pod.now_ms)
    assert demand.pods() == 0.9
    pod.now_ms += 61_000
    assert demand.pods() == 0.0
    new.pinned = True
    assert demand.pods() == 0.3, "pinned copies count in the demand"


def test_demand_is_what_made_way_though_it_was_called_lately() -> None:
    """When models in use evict each other, the demand exceeds the pod's memory."""
    pod = Pod(capacity=100)
    demand = a_demand(pod)
    evict(pod, demand, pod.load("a", 80))
    b = pod.load("b", 80)
    assert demand.pods() == 1.6
    evict(pod, demand, b)
    pod.load("a", 80)
    assert demand.pods() == 1.6, "each model counts once, loaded here or not"
    pod.now_ms += 61_000
    assert demand.pods() == 0.0


def test_demand_knows_how_idle_was_what_made_way() -> None:
    """The eviction of an idle model adds nothing to the demand."""
    pod = Pod(capacity=100)
    demand = a_demand(pod)
    entry = pod.load("a", 80)
    pod.now_ms += 61_000
    evict(pod, demand, entry)
    assert demand.pods() == 0.0


def test_demand_counts_loads_under_way() -> None:
    """Loads under way add to the demand, because callers wait for them. Copies that are being unloaded do not."""
    pod = Pod(capacity=100)
    demand = a_demand(pod)
    pod.reserve("coming", 50)
    going = pod.load("going", 20)
    pod.ledger.enter(going, EntryState.UNLOADING)
    assert demand.pods() == 0.5


def test_demand_is_of_the_memory_that_is_shorter() -> None:
    """In a pod with a device, the demand is computed from the scarcer of its two memories."""
    pod = Pod(capacity=100)
    pod.ledger.equip(40)
    demand = a_demand(pod)
    pod.ledger.weigh(pod.ledger.add("a", 1), Footprint(30, 20))
    assert demand.pods() == 0.5
    pod.ledger.weigh(pod.ledger.add("b", 1), Footprint(60))
    assert demand.pods() == 0.9
