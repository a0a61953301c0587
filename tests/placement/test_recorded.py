"""Failures in records: timed by the observer's clock, and void once the secret has changed."""

from hypothesis import given
from hypothesis import strategies as st

from mesh.schema.records import Failure as Entry
from placement.failures import Failure, FailureKind
from placement.recorded import on_clock


def test_ages_are_kept_and_clocks_are_not():
    entry = Entry("a", 1_000_000, "no", FailureKind.PASSING, since_ms=999_000, asked_ms=5)
    (failure,) = on_clock([entry], secrets={}, now_ms=50_000, wall_ms=1_003_000)
    assert failure == Failure("a", 47_000, "no", FailureKind.PASSING, 46_000, 5, 1_000_000)


def test_a_clock_that_is_ahead_makes_no_failure_of_the_future():
    (failure,) = on_clock([Entry("a", 1_009_000, "no")], secrets={}, now_ms=50_000, wall_ms=1_003_000)
    assert (failure.at_ms, failure.began_ms) == (50_000, 50_000)


def test_what_failed_with_another_secret_is_void():
    """A failure with another version of the secret is void. If its pod is unknown, the failure stays, because the pod's
    version is unknown too."""
    entries = [Entry(pod, 0, "no", secrets="old") for pod in ("same", "changed", "unknown")]
    found = on_clock(entries, secrets={"same": "old", "changed": "new"}, now_ms=0, wall_ms=0)
    assert [failure.pod for failure in found] == ["same", "unknown"]


@given(st.integers(0, 10**13), st.integers(0, 10**13), st.integers(0, 10**13), st.integers(0, 10**9))
def test_whatever_clocks_say_a_failure_is_past_and_its_series_began_before_it(at_ms, since_ms, wall_ms, now_ms):
    (failure,) = on_clock([Entry("a", at_ms, "no", since_ms=since_ms)], secrets={}, now_ms=now_ms, wall_ms=wall_ms)
    assert failure.began_ms <= failure.at_ms <= now_ms
