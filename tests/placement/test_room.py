"""The choice of victims: enough or none, none in use, none needlessly, the stalest first."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.footprint import Footprint
from placement.room import SPARE, Need, ResidentCopy, RoomDecision, RoomVerdict, make_room

helds = st.lists(
    st.builds(
        ResidentCopy,
        key=st.text("abcdefghijklmnop", min_size=1, max_size=2),
        bytes=st.integers(0, 40),
        idle_ms=st.integers(0, 1000),
        in_flight=st.integers(0, 1),
        busy_reason=st.sampled_from(["", "", "", "loading"]),
        other_copies=st.integers(0, 2),
    ),
    unique_by=lambda held: held.key,
    max_size=12,
)


@given(need=st.integers(0, 120), free=st.integers(-30, 60), held=helds, idle_ms=st.integers(0, 1000))
def test_all_or_nothing_and_nothing_needless(need, free, held, idle_ms):
    """Victims free enough memory, are not busy, were not used more recently than the new model, and none of them is
    superfluous. If there are no such victims, nothing is evicted."""
    capacity = 100
    room = make_room(Need.of_host(need, free, capacity), held, idle_ms=idle_ms)
    by_key = {copy.key: copy for copy in held}
    victims = [by_key[key] for key in room.victims]
    assert len(set(room.victims)) == len(victims)
    assert bool(victims) == (room.verdict is RoomVerdict.EVICT)
    assert room.freed.host_bytes == sum(copy.bytes for copy in victims)
    for copy in victims:
        assert not copy.in_flight
        assert not copy.busy_reason
        assert copy.idle_ms >= idle_ms
    may_go = [c for c in held if not c.in_flight and not c.busy_reason and c.idle_ms >= idle_ms]
    match room.verdict:
        case RoomVerdict.TOO_LARGE:
            assert need > capacity
        case RoomVerdict.FITS:
            assert need <= free
        case RoomVerdict.EVICT:
            assert free < need <= free + room.freed.host_bytes
            for copy in victims:
                assert free + room.freed.host_bytes - copy.bytes < need, "a victim was superfluous"
        case RoomVerdict.NO_ROOM:
            assert free + sum(copy.bytes for copy in may_go) < need <= capacity
    assert room.why
    assert make_room(Need.of_host(need, free, capacity), list(reversed(held)), idle_ms=idle_ms) == room


@given(helds, st.integers(1, 60))
def test_a_spared_copy_is_never_staler_than_a_victim_of_its_size(held, need):
    """A copy that stays has not been idle for longer than a victim of its size, if both models have other copies or
    neither has."""
    room = make_room(Need.of_host(need, 0, 100), held)
    if room.verdict is not RoomVerdict.EVICT:
        return
    by_key = {copy.key: copy for copy in held}
    spared = [c for c in held if c.key not in room.victims and not c.in_flight and not c.busy_reason]
    for key, copy in itertools.product(room.victims, spared):
        victim = by_key[key]
        if victim.bytes == copy.bytes and bool(victim.other_copies) == bool(copy.other_copies):
            assert victim.idle_ms >= copy.idle_ms


def test_oldest_first():
    held = [ResidentCopy("young", 10, 1_000), ResidentCopy("oldest", 10, 3_000), ResidentCopy("old", 10, 2_000)]
    assert make_room(Need.of_host(15, 0, 100), held).victims == ("oldest", "old")


def test_a_large_victim_spares_the_small_ones_before_it():
    """An older copy stays if a larger victim after it frees enough by itself."""
    held = [ResidentCopy("tiny", 1, 9_000), ResidentCopy("large", 50, 5_000)]
    assert make_room(Need.of_host(40, 0, 100), held).victims == ("large",)


@pytest.mark.parametrize(
    ("spare_idle", "sole_idle", "victim"),
    [
        pytest.param(1_000, 1_000 * SPARE - 1, "spare", id="similar-age"),
        pytest.param(1_000, 1_000 * SPARE + 1, "sole", id="sole-copy-much-staler"),
        pytest.param(0, 0, "spare", id="both-just-used"),
    ],
)
def test_a_copy_with_another_elsewhere_goes_first_within_reason(spare_idle, sole_idle, victim):
    """A copy whose model has another copy elsewhere counts as SPARE times as old, not as infinitely old."""
    held = [ResidentCopy("sole", 10, sole_idle), ResidentCopy("spare", 10, spare_idle, other_copies=1)]
    assert make_room(Need.of_host(10, 0, 100), held).victims == (victim,)


def test_older_than_everything_in_a_full_cache_has_no_room():
    """A load without a caller does not evict more recently used copies from a full cache, but one with a caller
    does."""
    held = [ResidentCopy("a", 50, 1_000), ResidentCopy("b", 50, 2_000)]
    refused = make_room(Need.of_host(10, 0, 100), held, idle_ms=2_001)
    assert refused.verdict is RoomVerdict.NO_ROOM
    assert "100 B were used more recently" in refused.why
    assert make_room(Need.of_host(10, 0, 100), held, idle_ms=2_000).victims == ("b",)
    assert make_room(Need.of_host(10, 0, 100), held).victims == ("b",)


def test_busy_bytes_are_named_in_the_refusal():
    """If eviction of the copies that are not in use would not free enough, nothing is evicted, and the refusal says how
    many bytes are busy."""
    held = [ResidentCopy("a", 60, 1_000, in_flight=1), ResidentCopy("b", 40, 9_000)]
    room = make_room(Need.of_host(50, 0, 100), held)
    assert room.verdict is RoomVerdict.NO_ROOM
    assert room.victims == ()
    assert "60 B are busy" in room.why


def test_what_fits_reads_nothing():
    """A load that fits into free space, or can never fit, does not need the list of copies, which is costly to read."""

    def explosive():
        raise AssertionError("read")
        yield

    assert make_room(Need.of_host(10, 10, 100), explosive()).verdict is RoomVerdict.FITS
    assert make_room(Need.of_host(101, 10, 100), explosive()).verdict is RoomVerdict.TOO_LARGE


def test_an_overcommitted_cache_is_repaired():
    """A cache with negative free space, because a size was estimated too small, evicts the stalest copies until it
    fits."""
    held = [ResidentCopy("a", 30, 1_000), ResidentCopy("b", 30, 2_000), ResidentCopy("c", 30, 3_000)]
    assert make_room(Need.of_host(0, -40, 100), held).victims == ("c", "b")


def test_no_ping_pong():
    """Seven models are called in turn with room for four. Each load evicts the least recently used copy."""
    cache: dict[str, int] = {}  # model -> time of use
    for now in range(1, 60):
        model = f"m{now % 7}"
        if model not in cache:
            held = [ResidentCopy(key, 25, now - used) for key, used in cache.items()]
            for victim in make_room(Need.of_host(25, 100 - 25 * len(cache), 100), held).victims:
                assert cache[victim] == min(cache.values())
                del cache[victim]
        cache[model] = now
        assert len(cache) <= 4


def test_a_copy_whose_caller_has_not_come_yet_goes_last():
    """A copy that no call has reached yet is evicted last, even by a policy that ranks new copies low."""
    held = [ResidentCopy("new", 10, 0, standing=(0, 0.0), fresh=True), ResidentCopy("old", 10, 500, standing=(1, 9.0))]
    assert make_room(Need.of_host(10, 0, 100), held).victims == ("old",)
    assert make_room(Need.of_host(20, 0, 100), held).victims == ("old", "new")


@pytest.mark.parametrize(
    ("held", "passes"),
    [
        pytest.param([ResidentCopy("a", 60, 0, in_flight=1), ResidentCopy("b", 40, 0)], True, id="a-call-ends"),
        pytest.param(
            [ResidentCopy("a", 60, 0, busy_reason="loading"), ResidentCopy("b", 40, 0)], True, id="a-load-ends"
        ),
        pytest.param([ResidentCopy("a", 60, 0, busy_reason="pinned"), ResidentCopy("b", 40, 0)], False, id="pinned"),
        pytest.param([ResidentCopy("a", 60, 0, in_flight=1, busy_reason="pinned")], False, id="pinned-and-called"),
        pytest.param([ResidentCopy("a", 40, 0, in_flight=1)], False, id="not-enough-even-then"),
    ],
)
def test_whether_waiting_helps_is_told(held, passes):
    """A load that finds no room should wait if enough memory will be free once calls and loads have ended."""
    room = make_room(Need.of_host(50, 0, 100), held)
    assert (room.verdict, room.passes) == (RoomVerdict.NO_ROOM, passes)


def test_what_was_used_more_recently_is_not_waited_for():
    """A load without a caller does not wait for a more recently used copy to finish its call, because it may not evict
    that copy afterwards either."""
    assert not make_room(Need.of_host(50, 0, 100), [ResidentCopy("a", 60, 0, in_flight=1)], idle_ms=1000).passes


def test_a_victim_whose_caller_is_on_its_way_is_told():
    held = [ResidentCopy("new", 10, 0, fresh=True), ResidentCopy("old", 10, 500)]
    assert not make_room(Need.of_host(10, 0, 100), held).hasty
    assert make_room(Need.of_host(20, 0, 100), held).hasty


def test_the_policy_decides_the_order():
    """If copies are given with a standing, the standing overrides their ages."""
    held = [ResidentCopy("older", 10, 900, standing=(1, 5.0)), ResidentCopy("cheaper", 10, 100, standing=(1, 2.0))]
    assert make_room(Need.of_host(10, 0, 100), held).victims == ("cheaper",)


def test_room_is_found_in_both_memories_or_not_at_all():
    """Copies that free none of the scarce memory stay. If either memory lacks room, nothing is evicted, and the refusal
    names that memory."""
    held = [ResidentCopy("host only", 10, 9_000), ResidentCopy("device", 1, 5_000, device_bytes=10)]

    def make(host: int, device: int) -> RoomDecision:
        return make_room(Need(Footprint(host, device), Footprint(), Footprint(100, 50)), held)

    assert make(0, 10).victims == ("device",)
    room = make(5, 10)
    assert room.victims == ("host only", "device")
    assert room.freed == Footprint(11, 10)
    assert make(5, 11).verdict is RoomVerdict.NO_ROOM
    assert "device memory" in make(5, 11).why
    assert make(0, 51).verdict is RoomVerdict.TOO_LARGE


@given(
    need=st.tuples(st.integers(0, 60), st.integers(0, 60)),
    free=st.tuples(st.integers(-20, 40), st.integers(-20, 40)),
    held=st.lists(
        st.builds(
            ResidentCopy,
            key=st.text("abcdefghijklmnop", min_size=1, max_size=2),
            bytes=st.integers(0, 20),
            idle_ms=st.integers(0, 1000),
            in_flight=st.integers(0, 1),
            device_bytes=st.integers(0, 20),
            fresh=st.booleans(),
        ),
        unique_by=lambda held: held.key,
        max_size=10,
    ),
)
def test_two_memories_all_or_nothing(need, free, held):
    """The contract of the choice holds in both memories at once: enough is freed, and no victim is superfluous or in
    use."""
    room = make_room(Need(Footprint(*need), Footprint(*free), Footprint(100, 100)), held)
    victims = [copy for copy in held if copy.key in room.victims]
    host, device = sum(v.bytes for v in victims), sum(v.device_bytes for v in victims)
    assert room.freed == Footprint(host, device)
    assert not any(copy.in_flight for copy in victims)
    if room.verdict is RoomVerdict.EVICT:
        assert need[0] <= free[0] + host
        assert need[1] <= free[1] + device
        for copy in victims:
            left = (free[0] + host - copy.bytes, free[1] + device - copy.device_bytes)
            assert left[0] < need[0] or left[1] < need[1]
    else:
        assert not victims
    if room.verdict is RoomVerdict.NO_ROOM:
        may_go = [copy for copy in held if not copy.in_flight]
        assert (
            free[0] + sum(c.bytes for c in may_go) < need[0] or free[1] + sum(c.device_bytes for c in may_go) < need[1]
        )
