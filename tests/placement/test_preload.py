"""Preloads: into free space only, the last used models first, and never ahead of callers."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement import copies, drain
from placement.actions import PlannedPods
from placement.constraints import Constraint, Constraints
from placement.footprint import Footprint
from placement.pod import Candidate
from placement.preload import AHEAD, RESERVE, Idle, has_space, plan

MIB = 1 << 20


def models(count: int, size: int = MIB) -> list[Idle]:
    return [Idle(f"m{index:04}", Footprint(size), idle_ms=1000 * index) for index in range(count)]


def test_the_last_used_come_first_and_as_many_as_have_turns():
    """In an empty mesh, the most recently used models are preloaded first, AHEAD for each loading thread."""
    pods = [Candidate("a", 100 * MIB, loading_threads=2), Candidate("b", 100 * MIB, loading_threads=2)]
    made = plan(reversed(models(50)), pods)
    assert sorted(action.model_id for action in made.actions) == [f"m{i:04}" for i in range(2 * 2 * AHEAD)]


def test_an_eighth_stays_free_and_nothing_is_evicted():
    """Preloads fill a pod to seven eighths, round by round, and evict nothing."""
    pod = Candidate("a", 80 * MIB, loading_threads=4)
    left = models(200)
    for _ in range(50):
        made = plan(left, [pod])
        if not made.actions:
            break
        gone = {action.model_id for action in made.actions}
        left = [one for one in left if one.model_id not in gone]
        pod = replace(pod, used_bytes=pod.used_bytes + len(gone) * MIB)
    assert pod.used_bytes == 70 * MIB
    assert len(left) == 130


def test_callers_do_not_stand_behind_preloads():
    """A pod that is busy with loads gets no preloads, because callers would have to wait behind them."""
    assert plan(models(5), [Candidate("a", 100 * MIB, loads_in_progress=AHEAD)]).actions == ()


def test_a_full_device_is_a_full_pod():
    """A pod with a full device gets no preloads, however much host memory is free."""
    pod = Candidate("g", 100 * MIB, device_capacity_bytes=80 * MIB, device_used_bytes=69 * MIB)
    assert has_space(pod)
    full = replace(pod, device_used_bytes=70 * MIB)
    assert not has_space(full)
    assert plan(models(3), [full]).actions == ()
    busy = Candidate("c", 100 * MIB, used_bytes=10 * MIB, loads_in_progress=1)
    tiny = [Idle("unknown", Footprint(), 1), Idle("small", Footprint(40_000), 2)]
    over = replace(full, device_used_bytes=80 * MIB)
    assert {action.pod for action in plan(tiny, [over, busy]).actions} == {"c"}


def test_free_is_what_the_fuller_memory_has():
    """Each pod counts with the free share of its fuller memory, so a pod with a full device has no free space."""
    gpu = Candidate("g", 100, used_bytes=10, device_capacity_bytes=300, device_used_bytes=300)
    assert PlannedPods([gpu]).free_share == 0
    assert PlannedPods([gpu, Candidate("c", 400, used_bytes=100)]).free_share == pytest.approx(300 / 800)
    assert PlannedPods([replace(gpu, used_bytes=150, device_used_bytes=0)]).free_share == 0
    assert PlannedPods([]).free_share == 0


def test_a_small_one_still_fits_behind_a_large_one():
    """A model that does not fit does not end the round, and a smaller one after it is preloaded."""
    mixed = [Idle("large", Footprint(200 * MIB), 1), Idle("small", Footprint(MIB), 2)]
    assert [action.model_id for action in plan(mixed, [Candidate("a", 100 * MIB)]).actions] == ["small"]


@given(
    sizes=st.lists(st.integers(0, 40), max_size=30),
    pods=st.lists(
        st.builds(
            Candidate,
            name=st.sampled_from("abc"),
            capacity_bytes=st.integers(0, 200),
            used_bytes=st.integers(0, 250),
            loads_in_progress=st.integers(0, 4),
            loading_threads=st.integers(1, 3),
            accepts=st.booleans(),
        ),
        unique_by=lambda pod: pod.name,
        max_size=3,
    ),
)
def test_the_laws_of_a_preload(sizes, pods):
    """Preloads stay within free space less the reserve, and a pod's loads within `AHEAD` per loading thread. They
    contain each model at most once, and do not depend on the order in which models and pods are given."""
    idle = [Idle(f"m{index}", Footprint(size), idle_ms=index) for index, size in enumerate(sizes)]
    made = plan(idle, pods)
    assert plan(idle[::-1], pods[::-1]) == made
    assert len({action.model_id for action in made.actions}) == len(made.actions)
    for pod in pods:
        mine = [action for action in made.actions if action.pod == pod.name]
        taken = sum(sizes[int(action.model_id[1:])] for action in mine)
        if mine:
            assert pod.accepts
            assert pod.used_bytes + taken <= pod.capacity_bytes - pod.capacity_bytes // RESERVE
            assert pod.loads_in_progress + len(mine) <= AHEAD * pod.loading_threads
        assert all(action.idle_ms >= 1 for action in mine)


def test_what_others_need_is_left_to_them():
    """A type that may run anywhere avoids pods that another type needs: in preloads, in loads that replace lost copies,
    and in drains."""
    constraints = Constraints({"large": Constraint(frozenset({"gpu"}))})
    pods = [
        Candidate("cpu", 1000 * MIB, loading_threads=20, labels=frozenset({"cpu"})),
        Candidate("gpu", 1000 * MIB, loading_threads=20, labels=frozenset({"gpu"})),
    ]
    idle = [replace(model, model_type="small") for model in models(40)]
    assert {action.pod for action in plan(idle, pods, constraints=constraints).actions} == {"cpu"}
    lost = [copies.ScaledModel(model.model_id, model.footprint, (), "small", 1000, lost=True) for model in idle]
    assert {action.pod for action in copies.plan(lost, pods, constraints=constraints).actions} == {"cpu"}
    held = [drain.DrainingCopy(model.model_id, model.footprint, 1000, "small") for model in idle]
    leaving = [*pods, Candidate("old", 1000 * MIB, accepts=False, why_not="is leaving", labels=frozenset({"cpu"}))]
    assert {action.pod for action in drain.plan("old", held, leaving, constraints=constraints).actions} == {"cpu"}
