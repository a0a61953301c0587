"""Blame for deaths of servers: what leads to a quarantine, which requests are refused, and when evidence expires."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.blame import (
    EXPIRY_MS,
    REFUSED_MS,
    REQUESTS,
    UNKNOWN,
    Blame,
    alive,
    exhausted,
    on_probation,
    quarantine,
    refused,
)

NOW = 1_800_000_000_000
GIB = 1 << 30


def load(pod: str = "a", ago: int = 0, *, sure: bool = False) -> Blame:
    return Blame(pod, NOW - ago, "died", sure)


def call(*digests: str, pod: str = "a", ago: int = 0, sure: bool = True) -> Blame:
    return Blame(pod, NOW - ago, "died", sure, digests)


@pytest.mark.parametrize(
    ("blames", "guilty"),
    [
        pytest.param([], False, id="none"),
        pytest.param([load()], False, id="one"),
        pytest.param([load("a"), load("b")], True, id="two-pods"),
        pytest.param([load("a"), load("a"), load("a")], False, id="one-pod-where-others-were-at-work"),
        pytest.param([load("a", sure=True), load("a", sure=True)], True, id="one-pod-and-nothing-else"),
        pytest.param([load("a", EXPIRY_MS), load("b")], False, id="one-has-expired"),
        pytest.param([call("1"), call("1"), call("1"), call("1")], False, id="the-same-request"),
        pytest.param([call("1"), call("2")], False, id="two-requests"),
        pytest.param([call("1"), call("2"), call("3")], True, id="three-requests"),
        pytest.param([call("1"), call("2"), call("3", sure=False)], False, id="the-third-may-be-anothers"),
        pytest.param([call("1", "2", "3", "4", sure=False)], False, id="many-requests-in-one-death"),
        pytest.param(
            [call(str(n), pod="ab"[n % 2], sure=False) for n in range(3)], True, id="three-of-two-pods-that-may-be"
        ),
        pytest.param([call("1", ago=EXPIRY_MS), call("2"), call("3")], False, id="a-request-that-has-expired"),
        pytest.param([load(), call("1")], False, id="a-load-and-a-call"),
        pytest.param([call(UNKNOWN), call(UNKNOWN)], False, id="two-unknown-requests"),
        pytest.param([call(UNKNOWN)] * 3, True, id="three-unknown-requests"),
        pytest.param([call(UNKNOWN, sure=False)] * 3, False, id="three-that-may-be-anothers"),
        pytest.param([call(UNKNOWN, pod=pod, sure=False) for pod in "aab"], True, id="three-of-two-pods-unknown"),
        pytest.param([load(), call(UNKNOWN, pod="b")], False, id="a-load-and-an-unknown-request"),
    ],
)
def test_what_adds_up_to_a_quarantine(blames, guilty):
    assert bool(quarantine(blames, NOW)) is guilty


def test_a_request_is_refused_for_ten_minutes():
    """A request that certainly killed a server is refused for ten minutes."""
    blames = [call("1", ago=1), call("2", ago=REFUSED_MS), call("3", "4"), call("5", sure=False), load(sure=True)]
    assert refused(blames, NOW) == {"1"}


def test_a_model_is_on_probation_while_a_load_of_it_may_have_killed_a_server():
    assert on_probation([load()], NOW)
    assert not on_probation([call("1"), load(ago=EXPIRY_MS)], NOW)


@pytest.mark.parametrize(
    ("left", "fallen", "ran_out"),
    [
        pytest.param(3 * GIB, 0, False, id="plenty"),
        pytest.param(3 * GIB, GIB // 2, False, id="plenty-and-falling"),
        pytest.param(GIB, GIB, True, id="falling-fast"),
        pytest.param(GIB // 8, 0, True, id="nothing-left"),
        pytest.param(2 * GIB, -GIB, False, id="growing"),
    ],
)
def test_whether_a_pod_that_was_killed_whole_had_run_out_of_memory(left, fallen, ran_out):
    assert exhausted(left, fallen, 4 * GIB) is ran_out


@given(
    st.lists(
        st.builds(
            Blame,
            st.sampled_from("abc"),
            st.integers(NOW - 2 * EXPIRY_MS, NOW),
            st.just("died"),
            st.booleans(),
            st.lists(st.sampled_from("12345"), max_size=3, unique=True).map(tuple),
        ),
        max_size=8,
    )
)
def test_no_model_is_quarantined_by_one_death_or_by_old_ones(blames):
    """A quarantine takes two deaths during loads or three during calls, in two pods unless a death was certainly the
    model's fault. Expired evidence changes nothing."""
    recent = alive(blames, NOW)
    assert quarantine(blames, NOW) == quarantine(recent, NOW)
    assert refused(blames, NOW) <= {digest for blame in recent for digest in blame.digests}
    if quarantine(blames, NOW):
        loads = [blame for blame in recent if not blame.digests]
        calls = [blame for blame in recent if blame.digests]
        assert len(loads) >= 2 or len(calls) >= REQUESTS
        assert len({blame.pod for blame in recent}) >= 2 or any(blame.sure for blame in recent)


@given(st.integers(1, 200), st.sampled_from("ab"))
def test_a_busy_model_is_never_quarantined_for_one_pods_deaths(deaths, pod):
    """The model runs at each death of the pod's servers, but other models run at the same time, and the request differs
    at each death."""
    blames = [call(str(number), pod=pod, ago=number, sure=False) for number in range(deaths)]
    assert not quarantine(blames, NOW)
    assert not refused(blames, NOW)
