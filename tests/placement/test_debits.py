"""Debits: a load counts from the moment it is sent until the pod's own figures contain it, or until the debit
expires."""

from hypothesis import given
from hypothesis import strategies as st

from placement.choice import choose
from placement.debits import EXPIRY_MS, SETTLE_MS, Debits
from placement.footprint import Footprint
from placement.pod import Candidate


def test_a_sent_load_counts_as_bytes_a_copy_and_a_load_in_progress():
    """A pod to which a load was sent looks as it will once it has published the load. Other pods look as before."""
    debits = Debits()
    pods = [Candidate("a", 100, used_bytes=10, copies=1), Candidate("b", 100)]
    debits.sent("a", 30, now_ms=0, key="m1")
    a, b = debits.apply(pods, now_ms=1)
    assert (a.used_bytes, a.copies, a.loads_in_progress) == (40, 2, 1)
    assert b is pods[1]


def test_the_end_of_a_load():
    """The bytes of a finished load count until its pod publishes again. Those of a failed load are free at once, and
    unknown keys are ignored."""
    debits = Debits()
    pod = Candidate("a", 100)
    debits.sent("a", 30, 0, "m1")
    debits.sent("a", 50, 0, "m2")
    debits.done("m1")
    debits.done("m2", loaded=False)
    debits.done("never sent")
    (seen,) = debits.apply([pod], 1)
    assert (seen.used_bytes, seen.loads_in_progress) == (30, 0)


def test_what_was_measured_replaces_what_was_guessed():
    debits = Debits()
    pod = Candidate("a", 100, device_capacity_bytes=100)
    debits.sent("a", 0, 0, "m1")
    debits.apply([pod], 1)
    debits.done("m1", measured=Footprint(40, 10))
    (seen,) = debits.apply([pod], 2)
    assert (seen.used_bytes, seen.device_used_bytes) == (40, 10)


def test_a_publication_settles_only_what_it_can_contain():
    """A load that was sent just before a publication arrived may not be in that publication."""
    debits = Debits()
    debits.sent("a", 1, 0, "old")
    debits.sent("b", 2, 0, "elsewhere")
    debits.sent("a", 4, SETTLE_MS, "new")
    debits.published("a", SETTLE_MS + 1)
    a, b = debits.apply([Candidate("a", 100), Candidate("b", 100)], SETTLE_MS + 1)
    assert (a.used_bytes, b.used_bytes) == (4, 2)


def test_the_same_key_sent_again_moves():
    """A load that is retried on another pod takes its debit along."""
    debits = Debits()
    debits.sent("a", 10, 0, "m")
    debits.sent("b", 10, 5, "m")
    a, b = debits.apply([Candidate("a", 100), Candidate("b", 100)], 6)
    assert (a.used_bytes, b.used_bytes) == (0, 10)


def test_a_pod_that_goes_takes_its_debits_along():
    debits = Debits()
    debits.sent("a", 10, 0, "m")
    debits.forget("a")
    assert debits.statistics().debits == 0


def test_debits_keep_an_observer_from_overfilling_what_it_sees():
    """Twenty loads are sent on one stale view of two pods with room for ten each, and none is sent to a full pod."""
    debits = Debits()
    pods = [Candidate("a", 100), Candidate("b", 100)]
    for i in range(20):
        choice = choose(f"m{i}", 10, debits.apply(pods, i))
        assert not choice.ranking[0].evicts
        debits.sent(choice.pod, 10, i, f"m{i}")
        debits.done(f"m{i}")
    assert [pod.free_bytes for pod in debits.apply(pods, 20)] == [0, 0]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 50), st.integers(0, 5_000), st.integers(0, 6))))
def test_nothing_outlives_its_expiry(steps):
    """After the debits have expired, the view is the published one again, even if loads were never answered."""
    debits = Debits()
    now = 0
    for pod, size, pause, key in steps:
        now += pause
        debits.sent(pod, size, now, key)
    pods = [Candidate("a", 100), Candidate("b", 100)]
    assert debits.apply(pods, now + EXPIRY_MS) == pods
    assert debits.statistics().debits == 0
