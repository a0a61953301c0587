"""Failed loads: remembered, bounded, expired, and not blamed on the wrong side."""

from hypothesis import given
from hypothesis import strategies as st

from placement.choice import Verdict, choose
from placement.failures import EXPIRY_MS, MAX_FAILURES, MODELS, RETRY_MS, UNWELL, Failures
from placement.pod import Pod

PODS = ["a", "b", "c", "d", "e"]


def test_a_failure_keeps_the_model_away_until_it_expires():
    """The pod is excluded with the loader's text, others are not; afterwards it may be tried again."""
    failures = Failures()
    failures.failed("m", "a", 1000, "no such file")
    assert failures.excluded("m", 3000) == {"a": "failed to load it 2 s ago: no such file"}
    assert failures.excluded("other", 3000) == {}
    assert failures.excluded("m", 1000 + EXPIRY_MS) == {}
    assert failures.statistics().models == 0


def test_retried_elsewhere_up_to_a_bound():
    """Of five pods, a model that fails everywhere is tried in three; then its newest error is the answer."""
    failures = Failures()
    pods = [Pod(name, 100) for name in PODS]
    tried = []
    while failures.exhausted("m", len(tried), PODS) is None:
        choice = choose("m", 1, pods, excluded=failures.excluded("m", len(tried)))
        assert choice.pod is not None
        tried.append(choice.pod)
        failures.failed("m", choice.pod, len(tried), f"error {len(tried)}")
    assert len(tried) == len(set(tried)) == MAX_FAILURES
    assert failures.exhausted("m", 10, PODS).why == f"error {MAX_FAILURES}"


def test_fewer_pods_than_the_bound():
    """In a mesh of two pods both are tried, and then there is none to choose."""
    failures = Failures()
    for pod in "ab":
        failures.failed("m", pod, 0, "no")
    choice = choose("m", 1, [Pod("a", 9), Pod("b", 9)], excluded=failures.excluded("m", 1))
    assert choice.verdict is Verdict.NO_PODS


def test_a_pod_where_everything_fails_is_not_the_models_fault():
    """It gets no more loads, and what failed there does not count towards a model's bound."""
    failures = Failures()
    for number in range(UNWELL):
        failures.failed(f"m{number}", "a", number, "disk is broken")
    assert "last 4 models" in failures.avoided(PODS, 10)["a"]
    failures.failed("m0", "b", 5, "own fault")
    failures.failed("m0", "c", 6, "own fault")
    assert failures.exhausted("m0", 10, PODS) is None
    failures.failed("m0", "d", 7, "own fault")
    assert failures.exhausted("m0", 10, PODS) is not None


def test_one_bad_model_does_not_make_a_pod_unwell():
    """However often it fails there."""
    failures = Failures()
    for now in range(50):
        failures.failed("bad", "a", now, "no")
    assert failures.unwell(PODS, 50) == {}


def test_an_unwell_pod_is_tried_now_and_then_and_forgiven_at_once():
    """One load after a pause; a success makes it a pod like others."""
    failures = Failures()
    for number in range(UNWELL):
        failures.failed(f"m{number}", "a", 0, "no")
    assert "a" in failures.avoided(PODS, RETRY_MS - 1)
    assert "a" not in failures.avoided(PODS, RETRY_MS)
    failures.tried("a", RETRY_MS)
    assert "a" in failures.avoided(PODS, RETRY_MS + 1)
    failures.loaded("m9", "a")
    assert failures.avoided(PODS, RETRY_MS + 2) == {}


def test_where_all_pods_fail_none_is_unwell():
    """Then it is the store or the models; some pod must go on being asked."""
    failures = Failures()
    for pod in PODS:
        for number in range(UNWELL):
            failures.failed(f"m{number}", pod, 0, "the store is away")
    assert failures.unwell(PODS, 1) == {}
    assert set(failures.unwell([*PODS, "new"], 1)) == set(PODS)


def test_what_is_gone_is_forgotten():
    """A pod that starts anew, a model that is registered anew."""
    failures = Failures()
    failures.failed("m", "a", 0, "no")
    failures.failed("n", "a", 0, "no")
    failures.forget_model("m")
    assert failures.of("m", 1) == ()
    failures.forget_pod("a")
    assert failures.of("n", 1) == ()
    assert failures.statistics().pods == 0


def test_memory_is_bounded():
    """A storm of failing models leaves no more than some of them."""
    failures = Failures()
    for number in range(MODELS + 500):
        failures.failed(f"m{number}", "a", number, "no")
    assert failures.statistics().models == MODELS


@given(st.lists(st.tuples(st.sampled_from("mno"), st.sampled_from("abc"), st.integers(0, EXPIRY_MS)), max_size=20))
def test_newest_first_one_a_pod_none_expired(events):
    """Whatever happens in whatever order of pods."""
    failures = Failures()
    now = 0
    for model, pod, pause in events:
        now += pause
        failures.failed(model, pod, now, "no")
    for model in "mno":
        found = failures.of(model, now)
        assert len({failure.pod for failure in found}) == len(found)
        assert [f.at_ms for f in found] == sorted((f.at_ms for f in found), reverse=True)
        assert all(now - failure.at_ms < EXPIRY_MS for failure in found)
        assert set(failures.excluded(model, now)) == {failure.pod for failure in found}
