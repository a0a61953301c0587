"""The drain of a pod: its copies are loaded elsewhere and then unloaded, the most recently used first, without a
gap."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from placement.actions import ActionKind
from placement.drain import RECENT_MS, WIDTH, DrainingCopy, plan
from placement.footprint import Footprint
from placement.pod import Candidate

MIB = 1 << 20
PODS = [Candidate("gone", 100 * MIB, accepts=False), Candidate("b", 100 * MIB), Candidate("c", 100 * MIB)]


def held(count: int, **changes) -> list[DrainingCopy]:
    return [
        replace(DrainingCopy(f"m{index:02}", Footprint(MIB), idle_ms=1000 * index), **changes) for index in range(count)
    ]


def test_an_only_copy_is_loaded_elsewhere_before_it_is_unloaded():
    """The only copy of a recently used model is first loaded in another pod, and unloaded only when that is done."""
    (copy,) = held(1)
    (load,) = plan("gone", [copy], PODS).actions
    assert (load.kind, load.pod != "gone") == (ActionKind.LOAD, True)
    loading = replace(copy, loading_in=(load.pod,))
    assert plan("gone", [loading], PODS).actions == ()
    loaded = replace(copy, loaded_in=(load.pod,))
    (unload,) = plan("gone", [loaded], PODS).actions
    assert (unload.kind, unload.pod) == (ActionKind.UNLOAD, "gone")


def test_a_copy_stays_while_a_router_may_not_know_of_the_other_one():
    """A copy that is loaded elsewhere is unloaded only when all routers know of the other copy."""
    (copy,) = held(1, loaded_in=("b",), settled=False)
    assert plan("gone", [copy], PODS).actions == ()
    (unload,) = plan("gone", [replace(copy, settled=True)], PODS).actions
    assert unload.kind == ActionKind.UNLOAD


def test_the_most_recently_used_first_and_not_all_at_once():
    """A drain moves the most recently used copies first, because there may not be time for all. It does not move all at
    once."""
    made = plan("gone", held(50)[::-1], PODS)
    assert [action.model_id for action in made.actions] == [f"m{i:02}" for i in range(WIDTH)]
    assert made.put_off == 50 - WIDTH


def test_unused_copies_are_unloaded_last_and_not_replaced():
    """Unused copies are unloaded last, without a replacement, when everything else has moved."""
    stale = held(2, idle_ms=RECENT_MS + 1)
    moving = [*held(1, model_id="used"), *stale]
    assert [action.kind for action in plan("gone", moving, PODS).actions] == [ActionKind.LOAD]
    assert [action.kind for action in plan("gone", stale, PODS).actions] == [ActionKind.UNLOAD] * 2


def test_what_has_no_room_elsewhere_stays():
    """A copy stays, with a reason, if no other pod has room: a drain does not evict more recently used copies."""
    full = [PODS[0], Candidate("b", MIB, used_bytes=MIB, oldest_idle_ms=10)]
    made = plan("gone", held(1, idle_ms=500), full)
    assert made.actions == ()
    assert "used within" in made.unmet[0].why


@given(
    ages=st.lists(st.integers(0, 2 * RECENT_MS), max_size=40),
    width=st.integers(1, 8),
    seconds=st.integers(0, 40),
)
def test_a_drain_ends_without_a_gap(ages, width, seconds):
    """A drain, carried out round by round, moves at most `width` copies at a time. Each recently used copy is loaded
    elsewhere before it is unloaded."""
    left = {f"m{index}": DrainingCopy(f"m{index}", Footprint(1), age) for index, age in enumerate(ages)}
    for _ in range(200):
        made = plan("gone", list(left.values()), PODS, width=width)
        assert plan("gone", list(left.values())[::-1], PODS, width=width) == made
        if not made.actions and not any(copy.loading_in for copy in left.values()):
            break
        for action in made.actions:
            copy = left[action.model_id]
            if action.kind is ActionKind.LOAD:
                left[action.model_id] = replace(copy, loading_in=(action.pod,))
            else:
                assert copy.loaded_in or copy.idle_ms > RECENT_MS
                del left[action.model_id]
        loading = [copy for copy in left.values() if copy.loading_in]
        assert len(loading) <= width
        for copy in loading:
            left[copy.model_id] = replace(copy, loaded_in=copy.loading_in, loading_in=())
    assert not left
