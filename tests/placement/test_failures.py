"""Failed loads: their pauses by kind, bounds and expiry, and whether the pod or the model is at fault."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.choice import ChoiceVerdict, choose
from placement.failures import (
    EXPIRY_MS,
    FIRST_PAUSE_MS,
    LONGEST_PAUSE_MS,
    MAX_FAILURES,
    MODELS,
    MOST_ASKED_MS,
    RETRY_MS,
    UNHEALTHY,
    WITNESS_MS,
    Failure,
    FailureKind,
    Failures,
    hint,
    pause_ms,
)
from placement.pod import Candidate

PODS = ["a", "b", "c", "d", "e"]
SOON = [kind for kind in FailureKind if kind is not FailureKind.LASTING]


def excluded(failures: Failures, model_id: str, now_ms: int) -> dict[str, str]:
    return dict(failures.standing(model_id, PODS, now_ms).excluded)


# --- kinds ---


def test_a_failure_of_unknown_cause_holds_until_it_expires():
    """A failure of unknown cause excludes its pod, with the loader's text, until it expires. Other pods may be tried
    meanwhile, and this pod afterwards."""
    failures = Failures()
    failures.failed("m", "a", 1000, "no such file")
    assert excluded(failures, "m", 3000) == {"a": "failed to load it 2 s ago: no such file"}
    assert excluded(failures, "other", 3000) == {}
    assert excluded(failures, "m", 1000 + EXPIRY_MS) == {}


@pytest.mark.parametrize("kind", SOON)
def test_other_kinds_are_tried_again_from_a_second_on(kind):
    """A failure of another kind is retried after a second at first, and later about every half minute."""
    failures = Failures()
    now, tries = 0, 0
    while now < 10 * 60_000:
        assert failures.standing("m", PODS, now).excluded == {}
        failures.failed("m", "a", now, "no", kind=kind)
        tries += 1
        assert excluded(failures, "m", now + FIRST_PAUSE_MS - 1) != {}
        now += failures.standing("m", PODS, now).retry_ms
    assert 20 <= tries <= 30


def test_a_store_that_was_away_for_twelve_seconds():
    """A store that was away for 12 s is asked at 0, 1, 2, 4, 8 and 16 s, so callers are served 4 s after its return."""
    failures = Failures()
    tried = [0]
    while tried[-1] < 12_000:
        failures.failed("m", "a", tried[-1], "503", kind=FailureKind.PASSING)
        tried.append(tried[-1] + failures.standing("m", PODS, tried[-1]).retry_ms)
    assert tried == [0, 1000, 2000, 4000, 8000, 16_000]


def test_a_store_that_asks_to_be_left_alone_is_asked_by_no_pod():
    """If a store demands a pause, no pod asks it before the pause is over, and callers are told how long to wait. A
    demand beyond MOST_ASKED_MS is cut."""
    failures = Failures()
    failures.failed("m", "a", 0, "too many requests", kind=FailureKind.PASSING, asked_ms=5000)
    standing = failures.standing("m", PODS, 1000)
    assert standing.answer is not None
    assert standing.answer.why == "too many requests"
    assert standing.retry_ms == 4000
    assert failures.standing("m", PODS, 5000).answer is None
    assert pause_ms(FailureKind.PASSING, 0, 10**9) == MOST_ASKED_MS


@given(
    kind=st.sampled_from(SOON),
    outage=st.integers(0, 3_600_000),
    took=st.integers(0, 3000),
    pods=st.lists(st.sampled_from(PODS), min_size=1, max_size=5, unique=True),
)
@settings(deadline=None)
def test_what_has_passed_is_served_again_after_at_most_as_long_again(kind, outage, took, pods):
    """After an outage, the next try comes after at most as long again as the outage lasted (or a second, if that is
    longer), and after half a minute at most. The number of tries during the outage is bounded."""
    failures = Failures()
    now = tries = 0
    while now <= outage:
        tried: list[str] = []
        while True:
            standing = failures.standing("m", pods, now, tried=tried)
            left = [pod for pod in pods if pod not in standing.excluded]
            if standing.answer is not None or not left:
                break
            now += took
            failures.failed("m", left[0], now, "no", kind=kind)
            tried.append(left[0])
            tries += 1
        assert tried, "a pause ends with a try"
        now += max(1, standing.retry_ms)
    last = now - max(1, standing.retry_ms)
    assert now - last <= max(FIRST_PAUSE_MS, min(LONGEST_PAUSE_MS, last))
    assert tries <= 3 * (14 + outage // LONGEST_PAUSE_MS)


@given(st.text(max_size=40))
def test_a_kind_of_another_version_is_a_lasting_one(name):
    """If another version reports a failure of an unknown kind, it counts as lasting. Otherwise every call would try
    again."""
    kind = FailureKind.named(name)
    assert kind is FailureKind.LASTING or kind.value == name


def test_the_way_out_is_named():
    assert "12 s" in hint("m", FailureKind.PASSING, 12_000)
    assert "`mesh release m`" in hint("m", FailureKind.CONTENT, 1)
    assert len(hint("m" * 5000, FailureKind.CONTENT, 1)) < 500, "the hint quotes a bounded part of the text"


# --- pods ---


def test_retried_elsewhere_up_to_a_bound():
    """A model that fails everywhere is tried in three of five pods. After that, its newest error is the answer."""
    failures = Failures()
    pods = [Candidate(name, 100) for name in PODS]
    tried = []
    while (standing := failures.standing("m", PODS, len(tried))).answer is None:
        choice = choose("m", 1, pods, excluded=standing.excluded)
        assert choice.pod is not None
        tried.append(choice.pod)
        failures.failed("m", choice.pod, len(tried), f"error {len(tried)}")
    assert len(tried) == len(set(tried)) == MAX_FAILURES
    assert standing.answer.why == f"error {MAX_FAILURES}"
    assert standing.pods == tuple(reversed(tried))


def test_fewer_pods_than_the_bound():
    """In a mesh of two pods, a failing model is tried in both. After that, there is no pod left to choose."""
    failures = Failures()
    for pod in "ab":
        failures.failed("m", pod, 0, "no")
    standing = failures.standing("m", "ab", 1)
    assert standing.answer is None
    assert standing.newest is not None
    choice = choose("m", 1, [Candidate("a", 9), Candidate("b", 9)], excluded=standing.excluded)
    assert choice.verdict is ChoiceVerdict.NO_PODS


def test_slow_failures_end_all_the_same():
    """Callers do not try a pod twice, even if a load takes longer to fail than the pause lasts."""
    failures = Failures()
    failures.failed("m", "a", 0, "no", kind=FailureKind.PASSING)
    failures.failed("m", "b", 10_000, "no", kind=FailureKind.PASSING)
    assert excluded(failures, "m", 20_000) == {}
    assert failures.standing("m", PODS, 20_000, tried=("a", "b")).excluded.keys() == {"a", "b"}
    failures.failed("m", "c", 20_000, "no", kind=FailureKind.PASSING)
    standing = failures.standing("m", PODS, 20_000, tried=("a", "b", "c"))
    assert standing.answer is not None


def unhealthy(failures: Failures, pod: str = "a", now_ms: int = 0) -> None:
    """Makes a pod unhealthy: several models fail there and load in pod `e`."""
    for number in range(UNHEALTHY):
        failures.failed(f"m{number}", pod, now_ms + number, "disk is broken")
        failures.loaded(f"m{number}", "e", now_ms + number)


def test_a_pod_where_everything_fails_is_not_the_models_fault():
    """A pod in which all loads fail gets no more loads, and its failures do not count among the tries of a model."""
    failures = Failures()
    unhealthy(failures)
    assert "4 models that loaded elsewhere" in failures.avoided(PODS, 10)["a"]
    failures.failed("m0", "b", 5, "own fault")
    failures.failed("m0", "c", 6, "own fault")
    assert failures.standing("m0", PODS, 10).answer is None
    failures.failed("m0", "d", 7, "own fault")
    assert failures.standing("m0", PODS, 10).answer is not None


@pytest.mark.parametrize("models", [1, 50])
def test_broken_models_do_not_make_a_pod_unhealthy(models):
    failures = Failures()
    for now in range(100):
        for pod in PODS[:MAX_FAILURES]:
            failures.failed(f"bad{now % models}", pod, now, "no")
    assert failures.unhealthy(PODS, 100) == {}


def test_a_copy_elsewhere_is_evidence_at_once():
    """If a load fails in one pod while its model serves in another, that is immediate evidence against the first
    pod."""
    failures = Failures()
    for number in range(UNHEALTHY):
        failures.failed(f"m{number}", "a", number, "no", elsewhere=True)
    assert failures.unhealthy(PODS, 10).keys() == {"a"}


@pytest.mark.parametrize("elsewhere", [False, True], ids=["loads afterwards", "is loaded"])
def test_what_a_pods_own_rules_forbid_is_no_evidence_against_it(elsewhere):
    """A pod that allows no code, for example, refuses models that other pods load. The pod still counts as healthy."""
    failures = Failures()
    for number in range(2 * UNHEALTHY):
        failures.failed(f"m{number}", "a", number, "no code here", kind=FailureKind.RULES, elsewhere=elsewhere)
        failures.loaded(f"m{number}", "b", number)
    assert failures.unhealthy(PODS, 100) == {}


def test_what_loads_elsewhere_later_says_nothing():
    """A later success in another pod is no evidence against the first pod. In between, the file may have been added or
    the store repaired."""
    failures = Failures()
    for number in range(2 * UNHEALTHY):
        failures.failed(f"m{number}", "a", 0, "not found", kind=FailureKind.NOT_FOUND)
        failures.loaded(f"m{number}", "b", WITNESS_MS)
    assert failures.unhealthy(PODS, WITNESS_MS) == {}


@given(
    events=st.lists(
        st.tuples(st.booleans(), st.integers(0, 11), st.permutations(PODS), st.integers(0, 20_000)), max_size=60
    )
)
def test_no_pod_is_unhealthy_because_models_are_broken(events):
    """Some models fail wherever they are tried, and good models load between them, in any order."""
    failures = Failures()
    now = 0
    for good, number, pods, pause in events:
        now += pause
        if good:
            failures.loaded(f"good{number}", pods[0], now)
        else:
            for pod in pods[:MAX_FAILURES]:
                failures.failed(f"bad{number}", pod, now, "no")
        assert failures.avoided(PODS, now) == {}


@pytest.mark.long
@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from(PODS[1:])), min_size=200, max_size=200))
def test_a_broken_pod_is_found_out_and_left_alone(draws):
    """A pod in which every load fails, while all models load elsewhere, gets at most four loads."""
    failures = Failures()
    fails = 0
    for now, (number, pod) in enumerate(draws):
        if "a" not in failures.avoided(PODS, now) and "a" not in excluded(failures, f"m{number}", now):
            failures.failed(f"m{number}", "a", now, "no device")
            fails += 1
        failures.loaded(f"m{number}", pod, now)
    assert fails <= UNHEALTHY


def test_an_unhealthy_pod_is_tried_now_and_then_and_forgiven_at_once():
    """After a pause, an unhealthy pod gets one load. If that load succeeds, the pod counts as healthy again."""
    failures = Failures()
    unhealthy(failures)
    assert "a" in failures.avoided(PODS, RETRY_MS - 1)
    assert "a" not in failures.avoided(PODS, RETRY_MS + UNHEALTHY)
    failures.tried("a", RETRY_MS + UNHEALTHY)
    assert "a" in failures.avoided(PODS, RETRY_MS + UNHEALTHY + 1)
    failures.loaded("m9", "a", RETRY_MS + UNHEALTHY + 1)
    assert failures.avoided(PODS, RETRY_MS + UNHEALTHY + 2) == {}


def test_where_all_pods_fail_none_is_unhealthy():
    """If loads fail in all pods, none counts as unhealthy, because some pod must still be asked."""
    failures = Failures()
    for pod in PODS:
        for number in range(UNHEALTHY):
            failures.failed(f"m{number}", pod, 0, "no", elsewhere=True)
    assert failures.unhealthy(PODS, 1) == {}
    assert set(failures.unhealthy([*PODS, "new"], 1)) == set(PODS)


# --- what is forgotten ---


def test_what_a_pod_that_is_gone_has_failed_is_forgotten():
    """The failures of a missing pod are forgotten. After its restart the pod may be healthy, and its models are worth
    another try."""
    failures = Failures()
    unhealthy(failures)
    for pod in "ab":
        failures.failed("n", pod, 0, "no")
    failures.forget_pod("a")
    assert excluded(failures, "n", 1).keys() == {"b"}
    assert failures.avoided(PODS, 1) == {}
    failures.forget_pod("b")
    assert failures.statistics().models == failures.statistics().pods == 0


def test_the_record_decides_what_is_remembered():
    """The record of a model decides which of its failures are remembered. A release in the record forgets them, and
    failures seen by other routers count. The time of a failure known to both is the router's own."""
    failures = Failures()
    theirs = Failure("b", 0, "theirs", FailureKind.PASSING, 0, 0, 77)

    def held(now_ms: int, created: int = 7) -> dict[str, str]:
        return dict(failures.standing("m", PODS, now_ms, created=created).excluded)

    failures.failed("m", "a", 5, "own", created=7)
    failures.recall("m", 7, [theirs])
    assert held(6).keys() == {"b"}
    failures.failed("m", "b", 900, "again", created=7, kind=FailureKind.PASSING)
    failures.recall("m", 7, [theirs])
    assert held(1000) == {"b": "failed to load it 100 ms ago: theirs"}
    failures.recall("m", 7, [Failure("b", 980, "new", FailureKind.PASSING, 0, 0, 78)])
    assert held(1000) == {"b": "failed to load it 20 ms ago: new"}
    assert held(1000, created=8) == {}, "the failures are of another registration"
    failures.recall("m", 8, [theirs])
    assert held(1, created=8).keys() == {"b"}
    assert held(1000, created=8) == {}, "the record of this registration counts"
    failures.recall("m", 8, [])
    assert failures.statistics().models == 0


def test_memory_is_bounded():
    failures = Failures()
    for number in range(MODELS + 500):
        failures.failed(f"m{number}", "a", number, "no")
    assert failures.statistics().models == MODELS


@given(st.lists(st.tuples(st.sampled_from("mno"), st.sampled_from("abc"), st.integers(0, EXPIRY_MS)), max_size=20))
def test_one_a_pod_none_expired(events):
    """In any order of events, a model has at most one failure per pod and no expired one."""
    failures = Failures()
    now = 0
    last: dict[tuple[str, str], int] = {}
    for model, pod, pause in events:
        now += pause
        failures.failed(model, pod, now, "no")
        last[model, pod] = now
    for model in "mno":
        alive = {pod: at for (of, pod), at in last.items() if of == model and now - at < EXPIRY_MS}
        assert excluded(failures, model, now).keys() == alive.keys()
        assert list(failures.standing(model, PODS, now).pods) == sorted(alive, key=lambda pod: -alive[pod]) or len(
            set(alive.values())
        ) < len(alive)
