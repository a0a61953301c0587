"""The number of copies: it grows soon and shrinks slowly. A plan never floods the mesh, and equal meshes get equal
plans."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.actions import ActionKind, Plan
from placement.constraints import Constraint, Constraints
from placement.copies import CopyLimits, ReportedCopy, ScaledModel, ScalingSettings, plan, wanted
from placement.footprint import Footprint
from placement.pod import Candidate

MIB = 1 << 20
GIB = 1 << 30
PODS = [Candidate(name, GIB, used_bytes=GIB * 6 // 10, zone=name, oldest_idle_ms=60_000) for name in "abcd"]
FULL = [replace(pod, used_bytes=GIB) for pod in PODS]
MEAN = ScalingSettings(plenty=2.0)  # no model gets a second copy just because there is room


def model(*copies: ReportedCopy, name: str = "m", **changes) -> ScaledModel:
    return ScaledModel(**{"model_id": name, "footprint": Footprint(MIB), "copies": copies, **changes})


def loads(made: Plan) -> list[tuple[str, str]]:
    return [(action.model_id, action.pod) for action in made.actions if action.kind is ActionKind.LOAD]


def unloads(made: Plan) -> list[tuple[str, str]]:
    return [(action.model_id, action.pod) for action in made.actions if action.kind is ActionKind.UNLOAD]


def carried_out(models: list[ScaledModel], made: Plan, *, loaded: bool) -> list[ScaledModel]:
    """Returns the mesh after the plan, with the planned loads in progress or done."""
    result = []
    for one in models:
        mine = [action for action in made.actions if action.model_id == one.model_id]
        gone = {action.pod for action in mine if action.kind is ActionKind.UNLOAD}
        come = [action.pod for action in mine if action.kind is ActionKind.LOAD]
        copies = [copy for copy in one.copies if copy.pod not in gone]
        copies += [ReportedCopy(pod, loaded=loaded) for pod in come if pod not in {copy.pod for copy in copies}]
        result.append(replace(one, copies=tuple(copies)))
    return result


@pytest.mark.parametrize(
    "copy",
    [
        pytest.param(ReportedCopy("a", rate=2001), id="rate"),
        pytest.param(ReportedCopy("a", in_flight=17), id="concurrency"),
        pytest.param(ReportedCopy("a", queue_ms=80, age_ms=20_000), id="queue"),
    ],
)
def test_a_model_that_proves_hot_gets_its_second_copy_at_once(copy):
    """A hot model gets its second copy in the first plan that sees its load, with the reason. It gets no third copy
    while the second loads."""
    made = plan([model(copy)], PODS, settings=MEAN)
    assert len(loads(made)) == 1
    assert loads(made)[0][1] != "a"
    assert "call" in made.actions[0].why
    after = carried_out([model(copy)], made, loaded=False)
    assert plan(after, PODS, settings=MEAN).actions == ()


def test_a_quiet_model_keeps_one_copy():
    assert plan([model(ReportedCopy("a", rate=1999, in_flight=16))], PODS, settings=MEAN).actions == ()


def test_many_copies_at_once_for_a_very_hot_model():
    """The model's rate asks for five copies, but only four pods may hold it, so each of the other three pods gets
    one."""
    made = plan([model(ReportedCopy("a", rate=9_000))], PODS)
    assert sorted(pod for _, pod in loads(made)) == ["b", "c", "d"]
    assert [action.expected_copies for action in made.actions] == [1, 2, 3]


def test_a_second_copy_where_there_is_plenty_of_room():
    """A regularly used model gets a second copy if there is plenty of room, but not in a full mesh."""
    regular = model(ReportedCopy("a", rate=60))
    assert len(loads(plan([regular], PODS))) == 1
    assert plan([regular], FULL).actions == ()


def test_minimum_maximum_and_pinned():
    """A minimum is kept even if the model has no copy and others must be evicted for it. A maximum limits even a model
    with a high rate. A pin means at least one copy."""
    assert len(loads(plan([model(limits=CopyLimits(minimum=2), idle_ms=10**9)], FULL))) == 2
    assert len(loads(plan([model(limits=CopyLimits(pinned=True), idle_ms=10**9)], FULL))) == 1
    assert plan([model(ReportedCopy("a", rate=9000), limits=CopyLimits(maximum=1))], PODS).actions == ()
    over = model(*(ReportedCopy(pod, rate=index) for index, pod in enumerate("abc")), limits=CopyLimits(maximum=1))
    assert unloads(plan([over], PODS)) == [("m", "a"), ("m", "b")]


def test_limits_of_a_model_stand_over_those_of_its_type():
    """A model's own limits override those of its type, even if they contradict the type's other bound. Invalid limits
    are refused."""
    of_type = CopyLimits(minimum=2, maximum=3, pinned=True)
    assert CopyLimits().over(of_type) == of_type
    assert CopyLimits(maximum=1).over(of_type) == CopyLimits(1, 1, True)
    assert CopyLimits(minimum=5, pinned=False).over(of_type) == CopyLimits(5, 5, False)
    with pytest.raises(ValueError, match="3 or more, not 2"):
        CopyLimits(minimum=3, maximum=2)
    with pytest.raises(ValueError, match="0 or more, not"):
        CopyLimits(minimum=-1)


def test_a_copy_too_many_goes_slowly():
    """A surplus copy is unloaded only if room is scarce and the peak load of the last minutes permits it. It stays if
    any of the model's copies is new, has a queue or has many calls in flight."""
    calm = [ReportedCopy(pod, rate=100, peak_rate=800, age_ms=10**6) for pod in "abc"]
    assert unloads(plan([model(*calm)], FULL)) == [("m", "a")]
    assert plan([model(*calm)], PODS, settings=MEAN).actions == ()
    for changes in ({"age_ms": 1000}, {"peak_rate": 2000}, {"queue_ms": 60}, {"in_flight": 30}):
        copies = [replace(calm[0], **changes), *calm[1:]]
        assert unloads(plan([model(*copies)], FULL)) == []


def test_the_last_but_one_goes_when_unused_for_long():
    """The last copy but one is unloaded once its model has been unused for a tenth of the idle time of the stalest copy
    in the pods. The last copy stays."""
    pods = [replace(pod, oldest_idle_ms=10**6) for pod in FULL]
    pair = (ReportedCopy("a", age_ms=10**7), ReportedCopy("b", age_ms=10**7))
    assert plan([model(*pair, idle_ms=99_000)], pods).actions == ()
    assert len(unloads(plan([model(*pair, idle_ms=101_000)], pods))) == 1
    assert plan([model(pair[0], idle_ms=10**9)], pods).actions == ()


@given(
    rates=st.lists(st.integers(0, 4000), min_size=1, max_size=4),
    in_flight=st.integers(0, 40),
    scale=st.sampled_from([PODS, FULL]),
)
def test_what_made_a_copy_never_unmakes_it(rates, in_flight, scale):
    """After a plan that adds a copy, the next plan unloads none if the same load continues, spread over all copies."""
    before = [model(*(ReportedCopy(pod, rate=rate, age_ms=10**7) for pod, rate in zip("abcd", rates, strict=False)))]
    before = [replace(m, copies=(replace(m.copies[0], in_flight=in_flight), *m.copies[1:])) for m in before]
    made = plan(before, scale)
    if not loads(made):
        return
    (after,) = carried_out(before, made, loaded=True)
    each = sum(rates) // len(after.copies)
    spread = tuple(
        ReportedCopy(c.pod, rate=each, peak_rate=each, age_ms=10**7, in_flight=in_flight // len(after.copies))
        for c in after.copies
    )
    assert unloads(plan([replace(after, copies=spread)], FULL)) == []


def test_a_copy_on_a_pod_that_its_type_may_no_longer_use_is_moved():
    """A copy on a pod that its type may no longer use is first loaded elsewhere. It is unloaded only when that load is
    done."""
    pods = [replace(pod, labels=frozenset({"gpu"} if pod.name in "cd" else set())) for pod in PODS]
    constraints = Constraints({"net": Constraint(frozenset({"gpu"}))})
    one = model(ReportedCopy("a", rate=5), model_type="net")
    first = plan([one], pods, constraints=constraints)
    assert [pod in "cd" for _, pod in loads(first)] == [True]
    assert unloads(first) == []
    (loading,) = carried_out([one], first, loaded=False)
    assert plan([loading], pods, constraints=constraints).actions == ()
    (loaded,) = carried_out([one], first, loaded=True)
    assert unloads(plan([loaded], pods, constraints=constraints)) == [("m", "a")]
    nowhere = plan([one], PODS, constraints=constraints)
    assert nowhere.actions == ()


def test_what_was_lost_with_a_pod_comes_back():
    """Copies lost with a pod are loaded again if they were used recently, even in place of copies that have been idle
    for longer. Others are not loaded."""
    assert len(loads(plan([model(lost=True, idle_ms=50_000)], FULL))) == 1
    assert plan([model(lost=True, idle_ms=4_000_000)], PODS).actions == ()
    refused = plan([model(lost=True, idle_ms=70_000)], FULL)
    assert refused.actions == ()
    assert "lost with its pod" in refused.unmet[0].why


def test_only_a_share_of_the_mesh_moves_at_a_time():
    """A plan for 300 lost models requests as many as fit the bound. The next ones follow once those are loaded."""
    models = [model(name=f"m{i:03}", lost=True, idle_ms=i, footprint=Footprint(10 * MIB)) for i in range(300)]
    made = plan(models, PODS)
    assert len(made.actions) == 20  # 20 loads are 5 % of 4 GiB
    assert made.put_off == 280
    assert [action.model_id for action in made.actions] == [f"m{i:03}" for i in range(20)]
    under_way = carried_out(models, made, loaded=False)
    assert loads(plan(under_way, PODS)) == []
    done = carried_out(models, made, loaded=True)
    assert loads(plan(done, PODS))[0][0] == "m020"


def test_one_that_is_larger_than_the_bound_moves_alone():
    giant = model(lost=True, footprint=Footprint(GIB // 3))
    assert len(loads(plan([giant], PODS))) == 1


def test_avoided_pods_get_nothing():
    """An unhealthy pod gets no copies, and the plan gives that reason."""
    made = plan([model(lost=True)], PODS[:2], avoided={"a": "fails everything", "b": "fails everything"})
    assert made.actions == ()
    assert "fails everything" in made.unmet[0].why


copies_ = st.builds(
    ReportedCopy,
    pod=st.sampled_from("abcdx"),
    loaded=st.booleans(),
    rate=st.integers(0, 9000),
    peak_rate=st.integers(0, 9000),
    in_flight=st.integers(0, 60),
    queue_ms=st.integers(0, 100),
    age_ms=st.sampled_from([0, 20_000, 10**6]),
)
models_ = st.lists(
    st.builds(
        ScaledModel,
        model_id=st.sampled_from([f"m{i}" for i in range(8)]),
        footprint=st.builds(Footprint, st.integers(0, 200 * MIB)),
        copies=st.lists(copies_, max_size=4, unique_by=lambda copy: copy.pod).map(tuple),
        model_type=st.sampled_from(["", "net"]),
        idle_ms=st.integers(0, 10**7),
        limits=st.builds(CopyLimits, st.sampled_from([None, 0, 1, 2]), st.sampled_from([None, 2, 3]), st.booleans()),
        lost=st.booleans(),
    ),
    unique_by=lambda model: model.model_id,
    max_size=8,
)
pods_ = st.lists(
    st.builds(
        Candidate,
        name=st.sampled_from("abcd"),
        capacity_bytes=st.integers(1, GIB),
        used_bytes=st.integers(0, GIB),
        oldest_idle_ms=st.integers(0, 10**7),
        labels=st.sampled_from([frozenset[str](), frozenset({"gpu"})]),
        zone=st.sampled_from(["", "x", "y"]),
        accepts=st.booleans(),
    ),
    unique_by=lambda pod: pod.name,
    max_size=4,
)


@given(models=models_, pods=pods_)
def test_the_laws_of_a_plan(models, pods):
    """A plan is bounded and deterministic, and respects maxima and constraints. It never unloads the last loaded copy,
    and requests no load twice."""
    constraints = Constraints({"net": Constraint(frozenset({"gpu"}))})
    made = plan(models, pods, constraints=constraints)
    assert plan(models[::-1], pods[::-1], constraints=constraints) == made
    by_name, by_id = {pod.name: pod for pod in pods}, {m.model_id: m for m in models}
    assert len(made.actions) <= 64
    for action in made.actions:
        assert action.why
        one = by_id[action.model_id]
        if action.kind is ActionKind.LOAD:
            pod = by_name[action.pod]
            assert pod.accepts
            assert constraints.allows(one.model_type, pod.labels)
            assert action.pod not in {copy.pod for copy in one.copies}
    after = carried_out(models, made, loaded=False)
    for one, then in zip(models, after, strict=True):
        if one.limits.maximum is not None:
            # Copies on pods that are no longer allowed do not count: they stay until others have replaced them.
            where = {pod.name for pod in pods if constraints.allows(one.model_type, pod.labels)}
            before = [c for c in one.copies if c.pod in where]
            assert len([c for c in then.copies if c.pod in where]) <= max(one.limits.maximum, len(before))
        if any(copy.loaded for copy in one.copies):
            assert any(copy.loaded for copy in then.copies)
    # A leader that carries the plan out and sees its loads under way requests none of them again.
    again = plan(after, pods, constraints=constraints)
    assert not set(loads(made)) & set(loads(again))


def test_the_reason_names_what_decided():
    assert wanted(model(ReportedCopy("a", rate=5000, in_flight=20)), 9, 0.0).why == "5000 calls a minute"
    assert wanted(model(ReportedCopy("a", rate=5000)), 2, 0.0).why.endswith("2 pods may hold it")
    assert wanted(model(), 2, 0.0).copies == 0
