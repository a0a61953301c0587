"""The mesh in miniature: realistic traces, bounded caches, and no policy better than the clairvoyant one."""

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.policies import NAMES
from placement.simulator import fleet, optimum, traces
from placement.simulator.cluster import Cluster
from placement.simulator.fleet import SimulatedModel
from placement.simulator.run import Setup, hit_rate, load_seconds, run
from tests.support.examples import examples

MIB = 1 << 20


@pytest.mark.parametrize("shape", sorted(traces.SHAPES))
def test_traces_are_in_order_and_the_same_each_time(shape):
    """A trace has the requested number of calls of the fleet's ids, in order and at about the requested rate. Equal
    seeds give equal traces, and different seeds different ones."""
    made = list(traces.SHAPES[shape](500, 20_000, rate=100.0, seed=1))
    assert made == list(traces.SHAPES[shape](500, 20_000, rate=100.0, seed=1))
    assert made != list(traces.SHAPES[shape](500, 20_000, rate=100.0, seed=2))
    assert len(made) == 20_000
    assert all(a <= b for (a, _), (b, _) in itertools.pairwise(made))
    assert {model for _, model in made} <= {f"m{number:03d}" for number in range(500)}
    assert 50 < 20_000 / (made[-1][0] / 1000) < 200


def test_zipf_is_skewed_as_it_should_be():
    """In a Zipf trace, the ratio of two ranks' requests is the ratio of the ranks to the power of alpha."""
    counts = [count for _, count in Counter(model for _, model in traces.zipf(1000, 200_000)).most_common()]
    assert counts[0] / counts[9] == pytest.approx(10**0.9, rel=0.15)
    assert counts[9] / counts[99] == pytest.approx(10**0.9, rel=0.25)


def test_a_scan_calls_every_model():
    """A scan calls every model, including the rare ones that nobody calls otherwise."""
    usual = {model for _, model in traces.zipf(1000, 5000)}
    scanned = {model for _, model in traces.scan(1000, 5000, share=0.5)}
    assert len(usual) < 900
    assert len(scanned) == 1000


def test_azure_is_mostly_idle_models():
    """In the Azure trace, a hundredth of the models takes most of the calls."""
    counts = [count for _, count in Counter(m for _, m in traces.azure(2000, 50_000)).most_common()]
    assert sum(counts[:20]) > 0.5 * sum(counts)


def test_a_day_wanders():
    """In the daily trace, some of the hot models change from one quarter to the next."""
    made = [model for _, model in traces.diurnal(500, 40_000)]
    tops = [{m for m, _ in Counter(made[i : i + 5000]).most_common(50)} for i in (0, 10_000)]
    assert len(tops[0] & tops[1]) < 40


@pytest.mark.parametrize("policy", NAMES)
@given(
    calls=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 11)), min_size=1, max_size=120),
    pods=st.integers(1, 3),
    capacity=st.integers(1, 6),
    more=st.booleans(),
)
def test_the_laws_of_a_simulation(policy, calls, pods, capacity, more):
    """In a simulation every request ends once, no pod exceeds its capacity, the sums agree, and equal inputs give equal
    results."""
    ends = []
    for _ in range(2):
        cluster = Cluster(
            pods=pods,
            capacity_bytes=capacity * MIB,
            policy=policy,
            more_copies=more,
            model=lambda model: SimulatedModel((1 + int(model) % 4) * MIB, 50 + int(model)),
        )
        now = 0
        for pause, model in calls:
            now += pause
            cluster.request(now, str(model))
            for pod in cluster._pods.values():
                assert 0 <= pod.used <= pod.capacity
                assert pod.used == sum(pod.copies.values()) + sum(pod.loading.values())
                assert set(pod.copies) | set(pod.loading) == set(pod.uses)
                assert len(pod.policy) == len(pod.copies)
        counts = cluster.counts
        assert counts.requests == len(calls) == counts.hits + counts.joined + counts.misses + counts.refused
        assert counts.loads >= counts.misses
        too_large = sum(1 for _, model in calls if 1 + model % 4 > capacity)
        assert counts.refused >= too_large
        ends.append(counts)
    assert ends[0] == ends[1]


@settings(max_examples=examples(50))
@given(st.lists(st.integers(0, 15), min_size=1, max_size=200), st.integers(1, 8))
def test_no_policy_beats_the_clairvoyant_one(models, capacity):
    """With equal sizes and instant loads, no policy hits more often than Belady's, which knows the future."""
    calls = [(number * 10_000, str(model)) for number, model in enumerate(models)]
    model = fleet.equal(MIB)
    bound = optimum.clairvoyant([m for _, m in calls], capacity * MIB, model)
    assert bound.requests == len(models) == bound.hits + bound.misses
    for policy in NAMES:
        result = run(calls, len(calls), Setup(1, capacity * MIB, policy), model)
        assert result.counts.hits <= bound.hits
        assert result.counts.joined == 0


def test_the_clairvoyant_counts_from_where_it_is_told():
    """If only later requests are compared, the clairvoyant policy leaves out the first requests, which fill the
    cache."""
    counts = optimum.clairvoyant(["a", "b", "a", "b", "c"], 2 * MIB, fleet.equal(MIB), since=2)
    assert (counts.requests, counts.hits, counts.misses) == (3, 2, 1)


@pytest.mark.long
def test_several_pods_hit_nearly_as_often_as_one_of_their_size():
    """With single copies, Zipf 0.9 and room for a tenth of the models, eight pods hit at most two points less often
    than one pod of their total size."""
    model = fleet.lognormal()
    made = list(traces.zipf(5000, 40_000))
    room = sum(model(f"m{number:04d}").bytes for number in range(5000)) // 10
    one, many = (run(made, len(made), Setup(pods, room // pods, threads=32 // pods), model) for pods in (1, 8))
    assert hit_rate(one.warm) > 0.4
    assert hit_rate(many.warm) > hit_rate(one.warm) - 0.02
    assert load_seconds(many.warm) < 1.1 * load_seconds(one.warm)


@pytest.mark.parametrize(("pods", "slack"), [(1, 0), (3, 2)], ids=["one", "three"])
@pytest.mark.parametrize("pause", [5_000, 60_000], ids=["quickly", "slowly"])
def test_of_more_than_fits_the_most_recent_stay(pods, slack, pause):
    """If more models are called than fit, one pod keeps exactly the most recent ones. Several pods evict independently,
    and the pod of a load is drawn among those whose oldest copies are about equally old. Averaged over 20 fleets, they
    keep at least the most recent eight models per pod, of ten that fit; ModelMesh has the same bound."""
    kept = []
    for fleet_number in range(20):
        cluster = Cluster(pods=pods, capacity_bytes=10 * MIB, model=fleet.equal(MIB))
        calls = [f"{fleet_number}-{number}" for number in range(30 * pods)]
        for number, name in enumerate(calls):
            cluster.request(number * pause, name)
        cluster.request(len(calls) * pause, calls[-1])  # by then the last one is loaded
        resident = {name for pod in cluster._pods.values() for name in pod.copies}
        assert len(resident) == 10 * pods
        kept.append(next(number for number, name in enumerate(reversed(calls)) if name not in resident))
    assert sum(kept) / len(kept) >= (10 - slack) * pods


def test_a_probation_queue_keeps_the_hot_set_through_a_scan():
    model = fleet.equal(MIB)
    made = list(traces.scan(500, 12_000, share=0.3))
    plain, queued = (run(made, len(made), Setup(1, 50 * MIB, policy, threads=64), model) for policy in NAMES[::2])
    assert hit_rate(queued.counts) > hit_rate(plain.counts) + 0.02


def test_more_copies_are_made_of_what_is_hot():
    hot = [(number, "hot") for number in range(0, 60_000, 10)]
    cold = [(number, f"c{number % 7}") for number in range(0, 60_000, 500)]
    made = sorted(hot + cold)
    result = run(made, len(made), Setup(3, 20 * MIB, more_copies=True), fleet.equal(MIB))
    assert result.resident > 8
    assert run(made, len(made), Setup(3, 20 * MIB), fleet.equal(MIB)).resident == 8


def test_a_trace_that_goes_back_in_time_is_refused():
    with pytest.raises(ValueError, match="request 2"):
        run([(5, "a"), (4, "a")], 2, Setup(1, MIB), fleet.equal(MIB))
