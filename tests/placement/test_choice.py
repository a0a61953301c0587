"""The choice of the pod that loads a model: refusals, preferences, and no herding on outdated views."""

import math
import os
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.choice import ChoiceVerdict, IneligibilityCause, choose
from placement.constraints import Constraint
from placement.footprint import SESSION_BYTES, Footprint
from placement.pod import Candidate

GIB = 2**30
MIB = 2**20


def a_pod(name: str = "a", **changes) -> Candidate:
    return Candidate(**{"name": name, "capacity_bytes": GIB, **changes})


def full(name: str, oldest_idle_ms: int, **changes) -> Candidate:
    return a_pod(name, used_bytes=GIB, copies=10, oldest_idle_ms=oldest_idle_ms, **changes)


pods = st.lists(
    st.builds(
        Candidate,
        name=st.sampled_from("abcdefgh"),
        capacity_bytes=st.integers(0, 100),
        used_bytes=st.integers(0, 120),
        copies=st.integers(0, 5),
        oldest_idle_ms=st.integers(0, 1000),
        loads_in_progress=st.integers(0, 20),
        loading_threads=st.integers(0, 4),
        rate=st.integers(0, 5000),
        accepts=st.booleans(),
    ),
    unique_by=lambda pod: pod.name,
    max_size=8,
)
exclusions = st.dictionaries(st.sampled_from("abcdefgh"), st.just("failed there"), max_size=4)


@given(pods=pods, size=st.integers(0, 150), excluded=exclusions, idle_ms=st.integers(0, 1200))
def test_every_choice_is_allowed_and_every_pod_is_accounted_for(pods, size, excluded, idle_ms):
    """Each ranked pod may hold the model, and has room or can evict older copies. Each pod is either ranked or refused,
    and the order in which pods are given does not matter."""
    choice = choose("m", size, pods, excluded=excluded, idle_ms=idle_ms)
    by_name = {pod.name: pod for pod in pods}
    assert sorted([r.pod for r in choice.ranking] + [r.pod for r in choice.refused]) == sorted(by_name)
    for ranked in choice.ranking:
        pod = by_name[ranked.pod]
        assert pod.accepts
        assert pod.name not in excluded
        assert size <= pod.capacity_bytes
        assert size <= pod.free_bytes or idle_ms <= pod.oldest_idle_ms
    assert [r.bucket for r in choice.ranking] == sorted(r.bucket for r in choice.ranking)
    assert choice.pod == (choice.ranking[0].pod if choice.ranking else None)
    assert (choice.verdict is ChoiceVerdict.CHOSEN) == bool(choice.ranking)
    assert (choice.verdict is ChoiceVerdict.NOWHERE) == (bool(pods) and all(size > pod.capacity_bytes for pod in pods))
    assert choice.why
    assert choose("m", size, list(reversed(pods)), excluded=excluded, idle_ms=idle_ms).ranking == choice.ranking


@given(pods=pods, size=st.integers(0, 150))
def test_a_waiting_caller_is_refused_only_for_what_the_text_says(pods, size):
    """A load with a waiting caller (idle_ms 0) is never refused for its age. It is refused only if no pod both accepts
    loads and is large enough."""
    choice = choose("m", size, pods)
    assert (choice.verdict is ChoiceVerdict.CHOSEN) == any(pod.accepts and size <= pod.capacity_bytes for pod in pods)
    assert choice.verdict is not ChoiceVerdict.NO_ROOM


def test_no_pods_at_all():
    choice = choose("m", 1, [])
    assert choice.verdict is ChoiceVerdict.NO_PODS
    assert choice.why == "there is no runtime pod"


def test_larger_than_every_pod_is_nowhere_even_if_one_is_leaving():
    """A model larger than every pod fits nowhere. A draining pod makes no difference, because waiting does not help."""
    choice = choose("m", 2 * GIB, [a_pod("a"), a_pod("b", accepts=False, why_not="is leaving")])
    assert choice.verdict is ChoiceVerdict.NOWHERE
    assert {refused.cause for refused in choice.refused} == {IneligibilityCause.TOO_SMALL}
    assert "2.0 GiB" in choice.why
    assert "1.0 GiB" in choice.why


def test_large_enough_but_leaving_is_worth_a_retry():
    choice = choose("m", GIB, [a_pod("a", capacity_bytes=MIB), a_pod("b", accepts=False, why_not="is leaving")])
    assert choice.verdict is ChoiceVerdict.NO_PODS
    assert "b is leaving" in choice.why


def test_exclusions_are_named_with_their_reasons():
    choice = choose("m", 1, [a_pod("a")], excluded={"a": "failed to load it 3 s ago"})
    assert choice.verdict is ChoiceVerdict.NO_PODS
    assert choice.refused[0].cause is IneligibilityCause.EXCLUDED
    assert "a failed to load it 3 s ago" in choice.why


def test_older_than_everything_in_full_pods_has_no_room():
    """A preload of a model that has long been unused evicts no models that were used more recently."""
    pods = [full("a", 60_000), full("b", 90_000)]
    choice = choose("m", MIB, pods, idle_ms=100_000)
    assert choice.verdict is ChoiceVerdict.NO_ROOM
    assert "60 s" in choice.why
    assert choose("m", MIB, pods, idle_ms=80_000).pod == "b"
    assert choose("m", MIB, pods).verdict is ChoiceVerdict.CHOSEN


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        pytest.param(a_pod("x", used_bytes=GIB - MIB), full("x", 10**9), id="free-space-before-eviction"),
        pytest.param(full("x", 120_000), full("x", 30_000), id="stale-cache-before-fresh"),
        pytest.param(full("x", 30_000, rate=10**6), full("x", 0), id="stale-cache-before-everything-in-use"),
        pytest.param(a_pod("x"), a_pod("x", loads_in_progress=1), id="idle-threads-before-queue"),
        pytest.param(a_pod("x", rate=700), a_pod("x", rate=5000), id="calm-before-busy"),
        pytest.param(
            a_pod("x", loads_in_progress=6, loading_threads=8), a_pod("x", loads_in_progress=4), id="queue-per-thread"
        ),
    ],
)
def test_what_is_preferred_is_preferred_for_every_model(better, worse):
    """A pod of a better kind is chosen regardless of the draw and of the pods' names."""
    for names in (("a", "b"), ("b", "a")):
        pair = [Candidate(**{**_fields(pod), "name": name}) for pod, name in zip((better, worse), names, strict=True)]
        assert {choose(f"m{i}", MIB, pair).pod for i in range(50)} == {names[0]}


def _fields(pod: Candidate) -> dict:
    return {name: getattr(pod, name) for name in Candidate.__slots__}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(full("a", 63_000), full("b", 65_000), id="ages"),
        pytest.param(a_pod("a", rate=0), a_pod("b", rate=600), id="quiet-rates"),
        pytest.param(a_pod("a", rate=4000), a_pod("b", rate=7000), id="rates"),
        pytest.param(a_pod("a", loads_in_progress=3, loading_threads=4), a_pod("b", loading_threads=4), id="queues"),
    ],
)
def test_small_differences_do_not_decide(one, other):
    """Two pods share the models if their figures differ by no more than an outdated view would explain."""
    counts = Counter(choose(f"m{i}", MIB, [one, other]).pod for i in range(400))
    assert 120 < counts["a"] < 280


@pytest.mark.parametrize("count", [2, 5, 8, 20])
def test_no_herd_among_equal_pods_on_one_stale_view(count):
    """1,000 models chosen on one unchanged view spread evenly over equal pods, to within five standard deviations of a
    fair draw."""
    pods = [a_pod(f"pod-{i}") for i in range(count)]
    counts = Counter(choose(f"customer-{i}", MIB, pods).pod for i in range(1000))
    fair = 1000 / count
    tolerance = 5 * math.sqrt(fair * (1 - 1 / count))
    assert all(abs(counts[pod.name] - fair) < tolerance for pod in pods)


def test_the_draw_is_weighted_by_free_space():
    """A pod with three times the free space gets about three times the models."""
    pods = [a_pod("a", used_bytes=GIB * 3 // 4), a_pod("b", used_bytes=GIB // 4)]
    counts = Counter(choose(f"m{i}", MIB, pods).pod for i in range(1000))
    assert 2.3 < counts["b"] / counts["a"] < 3.9


def test_a_new_pod_takes_only_its_share():
    """A new pod takes its share of models from the old pods, and no model moves between the old pods."""
    pods = [a_pod(f"pod-{i}") for i in range(7)]
    before = {f"m{i}": choose(f"m{i}", MIB, pods).pod for i in range(500)}
    after = {model: choose(model, MIB, [*pods, a_pod("new")]).pod for model in before}
    moved = [model for model in before if before[model] != after[model]]
    assert {after[model] for model in moved} == {"new"}
    assert len(moved) < 500 / 8 * 1.8


def test_routers_in_other_processes_choose_the_same():
    """Routers in different processes choose alike, because the draw does not use Python's salted hash()."""
    code = (
        "from placement.choice import choose; from placement.pod import Candidate\n"
        "pods = [Candidate(f'pod-{i}', 100) for i in range(9)]\n"
        "print(*[choose(f'm{i}', 1, pods).pod for i in range(40)])"
    )
    answers = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(answers) == 1
    assert len(set(answers.pop().split())) == 9


def test_ids_with_odd_characters_can_be_drawn():
    """The draw accepts an id that is not valid Unicode, because the registry decides which ids are valid."""
    assert choose("\ud800 / \0", 1, [a_pod()]).pod == "a"


GPU = Constraint(required=frozenset({"gpu"}))
LIKES_GPU = Constraint(preferred=frozenset({"gpu"}))


def gpu_pod(name: str, **changes) -> Candidate:
    return a_pod(name, labels=frozenset({"gpu"}), device_capacity_bytes=GIB, **changes)


@given(
    pods=st.lists(
        st.builds(
            Candidate,
            name=st.sampled_from("abcdefgh"),
            capacity_bytes=st.integers(0, 100),
            used_bytes=st.integers(0, 120),
            oldest_idle_ms=st.integers(0, 1000),
            labels=st.frozensets(st.sampled_from(["gpu", "eu"])),
            zone=st.sampled_from(["", "x", "y", "z"]),
            accepts=st.booleans(),
            device_capacity_bytes=st.sampled_from([0, 0, SESSION_BYTES + 50]),
            device_used_bytes=st.integers(0, SESSION_BYTES + 60) | st.integers(0, 60),
            outgoing=st.booleans(),
            on_disk=st.booleans(),
        ),
        unique_by=lambda pod: pod.name,
        max_size=8,
    ),
    size=st.builds(Footprint, st.integers(0, 120), st.just(0) | st.integers(SESSION_BYTES, SESSION_BYTES + 60)),
    constraint=st.builds(
        Constraint, st.frozensets(st.sampled_from(["gpu", "eu"])), st.frozensets(st.sampled_from(["gpu", "eu"]))
    ),
    zones=st.lists(st.sampled_from(["", "x", "y"]), max_size=3),
    idle_ms=st.integers(0, 1200),
)
def test_the_whole_contract_of_a_choice(pods, size, constraint, zones, idle_ms):
    """The chosen pod may hold the model. An outgoing pod is chosen only if all ranked pods are outgoing. A pod in a
    zone that has a copy is chosen only if no ranked pod is in another zone; for a pod that stays, outgoing ones do not
    count."""
    choice = choose("m", size, pods, constraint=constraint, zones=zones, idle_ms=idle_ms)
    by_name = {pod.name: pod for pod in pods}
    may_hold = [
        pod
        for pod in pods
        if constraint.required <= pod.labels
        and size.on(device=pod.has_device).host_bytes <= pod.capacity_bytes
        and size.on(device=pod.has_device).device_bytes <= pod.device_capacity_bytes
    ]
    assert (choice.verdict is ChoiceVerdict.NOWHERE) == (bool(pods) and not may_hold)
    if idle_ms == 0:  # a caller waits: any pod that may hold the model and accepts loads will do
        assert (choice.verdict is ChoiceVerdict.CHOSEN) == any(pod.accepts for pod in may_hold)
    assert {ranked.pod for ranked in choice.ranking} <= {pod.name for pod in may_hold if pod.accepts}
    assert choice.why
    if choice.pod is not None:
        chosen = by_name[choice.pod]
        ranked = [by_name[r.pod] for r in choice.ranking]
        assert not chosen.outgoing or all(pod.outgoing for pod in ranked)
        alike = [pod for pod in ranked if pod.outgoing == chosen.outgoing]
        if chosen.zone and chosen.zone in zones:
            assert all(pod.zone in zones and pod.zone for pod in alike)
    assert choose("m", size, pods[::-1], constraint=constraint, zones=zones, idle_ms=idle_ms).ranking == choice.ranking


def test_a_required_label_is_never_traded_for_room():
    """A full pod with the label is chosen before an empty one without it. If no pod has the label, the model is refused
    for good."""
    choice = choose("m", MIB, [full("a", 1000, labels=frozenset({"gpu"})), a_pod("b")], constraint=GPU)
    assert choice.pod == "a"
    assert choice.refused[0].cause is IneligibilityCause.NOT_ALLOWED
    nowhere = choose("m", MIB, [a_pod("b"), a_pod("c", accepts=False)], constraint=GPU)
    assert nowhere.verdict is ChoiceVerdict.NOWHERE
    assert "b lacks the label gpu, which the model's type requires" in nowhere.why


def test_a_device_is_preferred_and_done_without():
    """A type that prefers GPUs gets a pod whose device has room, otherwise a CPU pod that can hold its weights in host
    memory, and only then a pod with a full device."""
    size = Footprint(10 * MIB, 500 * MIB)
    assert choose("m", size, [gpu_pod("g"), a_pod("c")], constraint=LIKES_GPU).pod == "g"
    busy = gpu_pod("g", device_used_bytes=GIB, copies=3, oldest_idle_ms=0)
    assert choose("m", size, [busy, a_pod("c")], constraint=LIKES_GPU).pod == "c"
    small = a_pod("c", capacity_bytes=400 * MIB)
    assert choose("m", size, [busy, small], constraint=LIKES_GPU).pod == "g"
    assert choose("m", size, [busy, a_pod("c")], constraint=GPU).pod == "g"


def test_device_memory_is_a_capacity_of_its_own():
    """Free host memory does not make room on the device."""
    size = Footprint(MIB, 2 * GIB)
    choice = choose("m", size, [gpu_pod("g")])
    assert choice.verdict is ChoiceVerdict.NOWHERE
    assert "2.0 GiB of device memory" in choice.why
    ranked = choose("m", Footprint(MIB, GIB), [gpu_pod("g", device_used_bytes=MIB)]).ranking[0]
    assert ranked.evicts


def test_a_model_known_from_cpu_pods_has_its_weights_on_a_device():
    """A model known from CPU pods is expected to have its weights on a device. A full device evicts copies for it
    although host memory is free, and a pod with a small device does not get it."""
    size = Footprint(500 * MIB)
    assert choose("m", size, [gpu_pod("g", device_used_bytes=GIB)]).ranking[0].evicts
    assert not choose("m", size, [gpu_pod("g", used_bytes=GIB - MIB)]).ranking[0].evicts
    assert choose("m", Footprint(2 * GIB), [gpu_pod("g", capacity_bytes=4 * GIB)]).verdict is ChoiceVerdict.NOWHERE
    tiny = [gpu_pod("g", device_used_bytes=GIB - MIB), full("c", 10**8)]
    assert choose("m", Footprint(1000), tiny).pod == "c", "no session fits onto the device, however small the model"


def test_gpu_pods_are_drawn_by_their_devices():
    """The pod with four times the device memory of the other one, and equal host memory, gets about four of five
    models."""
    pods = [
        gpu_pod("large"),
        a_pod("small", labels=frozenset({"gpu"}), device_capacity_bytes=GIB // 4),
    ]
    drawn = Counter(choose(f"m{number}", Footprint(MIB, MIB), pods).pod for number in range(2000))
    assert 0.75 < drawn["large"] / 2000 < 0.85


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        pytest.param(full("x", 10, zone="y"), a_pod("x", zone="z"), id="another-zone-before-free-space"),
        pytest.param(full("x", 10), a_pod("x", outgoing=True), id="staying-before-outgoing"),
        pytest.param(a_pod("x", on_disk=True), a_pod("x"), id="files-on-disk"),
        pytest.param(
            full("x", 400_000, labels=frozenset({"gpu"})), full("x", 500_000), id="preferred-and-about-as-stale"
        ),
        pytest.param(
            full("x", 900_000), full("x", 100_000, labels=frozenset({"gpu"})), id="preferred-but-full-of-fresh-copies"
        ),
        pytest.param(a_pod("x", loads_in_progress=0), a_pod("x", loads_in_progress=2, on_disk=True), id="queue-first"),
    ],
)
def test_what_kind_of_place_is_preferred(better, worse):
    for names in (("a", "b"), ("b", "a")):
        pair = [Candidate(**{**_fields(pod), "name": name}) for pod, name in zip((better, worse), names, strict=True)]
        found = {choose(f"m{i}", MIB, pair, constraint=LIKES_GPU, zones=["z"]).pod for i in range(30)}
        assert found == {names[0]}


def test_pods_without_a_zone_share_no_zone():
    pods = [a_pod("a"), a_pod("b", loads_in_progress=5)]
    assert choose("m", MIB, pods, zones=["", ""]).pod == "a"


def test_remarks_are_in_the_sentence():
    """The text of a choice says what it is based on: preference, disk, zone, rollout."""
    pod = a_pod("a", labels=frozenset({"gpu"}), on_disk=True, zone="z", outgoing=True)
    why = choose("m", MIB, [pod], constraint=LIKES_GPU, zones=["z"]).why
    for text in ("preferred by the model's type", "files on disk", "1 copy in its zone", "rollout"):
        assert text in why
