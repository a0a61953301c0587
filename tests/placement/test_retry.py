"""The fate of a call whose attempt brought no answer: the table of outcomes, and laws that always hold."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement import retry
from placement.fence import Said
from placement.retry import BACKOFF, KILLER, MAX_TRIES, SETTLE, Beyond, Decision, End, Trouble, Try

NOTHING_RAN = (Trouble.NOT_HERE, Trouble.VERIFY_FIRST, Trouble.UNREACHED, Trouble.BUSY)


def one(trouble, **more):
    """Returns a call after its first attempt. Unless `more` says otherwise, the call may be sent again."""
    known = {"tries": 1, "safe": True, "repeated": False, "kept": True, "said": Said.NOTHING, "others": True}
    return Try(trouble=trouble, **(known | more))


TABLE = {
    "not here": (one(Trouble.NOT_HERE), {"forget": True}),
    "not here, unsafe": (one(Trouble.NOT_HERE, safe=False), {"forget": True}),
    "not here, not kept": (one(Trouble.NOT_HERE, kept=False), {"forget": True, "end": End.UNKEPT}),
    "not here again": (one(Trouble.NOT_HERE, tries=2), {"forget": True, "pause": BACKOFF}),
    "not here for the fourth time": (one(Trouble.NOT_HERE, tries=4), {"forget": True, "pause": 4 * BACKOFF}),
    "not here again, little time left": (
        one(Trouble.NOT_HERE, tries=2, remaining=BACKOFF),
        {"forget": True, "pause": BACKOFF / 2},
    ),
    "not here again, no time left": (one(Trouble.NOT_HERE, tries=2, remaining=-1.0), {"forget": True}),
    "not here once more": (one(Trouble.NOT_HERE, tries=MAX_TRIES), {"forget": True, "end": End.EXHAUSTED}),
    "not here after a loss": (one(Trouble.NOT_HERE, repeated=True), {"forget": True}),
    "verify first": (one(Trouble.VERIFY_FIRST), {"verify": True}),
    "verify first, unsafe": (one(Trouble.VERIFY_FIRST, safe=False), {"verify": True}),
    "verify first, alone": (one(Trouble.VERIFY_FIRST, others=False), {"verify": True}),
    "verify first, not kept": (one(Trouble.VERIFY_FIRST, kept=False), {"end": End.UNKEPT}),
    "verify first once more": (one(Trouble.VERIFY_FIRST, tries=MAX_TRIES), {"end": End.EXHAUSTED}),
    "verified, and verify first": (one(Trouble.VERIFY_FIRST, said=Said.VERIFIED), {"forget": True}),
    "away, and verify first": (one(Trouble.VERIFY_FIRST, said=Said.AWAY), {"avoid": True}),
    "away, and verify first, alone": (
        one(Trouble.VERIFY_FIRST, said=Said.AWAY, others=False),
        {"verify": True, "insist": True},
    ),
    "unreached": (one(Trouble.UNREACHED), {"avoid": True}),
    "unreached, unsafe": (one(Trouble.UNREACHED, safe=False), {"avoid": True}),
    "unreached, alone": (one(Trouble.UNREACHED, others=False), {"avoid": True}),
    "unreached again": (one(Trouble.UNREACHED, tries=2), {"avoid": True, "pause": BACKOFF}),
    "unreached once more": (one(Trouble.UNREACHED, tries=MAX_TRIES), {"end": End.EXHAUSTED}),
    "busy": (one(Trouble.BUSY), {"avoid": True}),
    "busy again": (one(Trouble.BUSY, tries=2), {"avoid": True}),
    "busy, alone": (one(Trouble.BUSY, others=False), {"avoid": True, "end": End.BUSY}),
    "lost": (one(Trouble.LOST, deaths=1), {"avoid": True, "pause": SETTLE}),
    "lost, alone": (one(Trouble.LOST, deaths=1, others=False), {"avoid": True, "pause": SETTLE}),
    "lost, unsafe": (one(Trouble.LOST, deaths=1, safe=False), {"end": End.LOST}),
    "lost twice": (one(Trouble.LOST, deaths=1, repeated=True), {"end": End.LOST}),
    "lost, not kept": (one(Trouble.LOST, deaths=1, kept=False), {"end": End.LOST}),
    "lost by a killer": (one(Trouble.LOST, deaths=KILLER), {"end": End.LOST}),
    "lost once more": (one(Trouble.LOST, deaths=1, tries=MAX_TRIES), {"end": End.LOST}),
    "lost, no time left": (one(Trouble.LOST, deaths=1, remaining=SETTLE), {"end": End.LOST}),
    "lost, time left": (one(Trouble.LOST, deaths=1, remaining=2 * SETTLE), {"avoid": True, "pause": SETTLE}),
    "broken": (one(Trouble.BROKEN, deaths=1), {"end": End.LOST}),
}


@pytest.mark.parametrize(("tried", "follows"), TABLE.values(), ids=TABLE)
def test_the_table(tried, follows):
    decision = retry.decide(tried)
    assert decision == Decision(why=decision.why, **follows)
    assert decision.why


tries = st.builds(
    Try,
    trouble=st.sampled_from(Trouble),
    tries=st.integers(1, MAX_TRIES + 2),
    safe=st.booleans(),
    repeated=st.booleans(),
    kept=st.booleans(),
    said=st.sampled_from(Said),
    others=st.booleans(),
    deaths=st.integers(0, 5),
    remaining=st.none() | st.floats(0, 10),
)


@given(tries)
def test_what_may_have_run_is_sent_again_only_where_that_does_no_harm(tried):
    """A call that may have run is sent again at most once, and only if its method is safe, its model is not known to
    kill servers, and its deadline leaves time. It is not sent again after a reply has begun."""
    decision = retry.decide(tried)
    if decision.end is None and tried.trouble not in NOTHING_RAN:
        assert tried.trouble is Trouble.LOST
        assert tried.safe
        assert not tried.repeated
        assert tried.deaths < KILLER
        assert decision.pause == SETTLE
        assert tried.remaining is None or tried.remaining > SETTLE


@given(tries)
def test_nothing_is_sent_that_is_not_at_hand_nor_more_often_than_may_be(tried):
    decision = retry.decide(tried)
    if decision.end is None:
        assert tried.kept
        assert tried.tries < MAX_TRIES


@given(tries)
def test_what_follows_makes_sense(tried):
    """The next step is another copy, the same copy verified, or the end. The method's safety matters only if the call
    may have run, and a copy is forgotten only on its pod's word."""
    decision = retry.decide(tried)
    assert decision.why
    if decision.end is not None:
        assert (decision.verify, decision.insist, decision.pause) == (False, False, 0.0)
    else:
        assert decision.forget + decision.avoid + decision.verify == 1
    assert decision.verify or not decision.insist
    if tried.trouble in NOTHING_RAN:
        flipped = Try(**({name: getattr(tried, name) for name in Try.__slots__} | {"safe": not tried.safe}))
        assert retry.decide(flipped) == decision
    if decision.forget:
        assert tried.trouble in (Trouble.NOT_HERE, Trouble.VERIFY_FIRST)


@given(
    st.lists(st.tuples(st.sampled_from(Trouble), st.sampled_from(Said), st.booleans(), st.integers(1, 3))),
    st.booleans(),
    st.floats(0, 5),
)
def test_every_call_ends(troubles, safe, deadline):
    """Every call ends after at most `MAX_TRIES` attempts, whatever goes wrong in whatever order. A call that may have
    run is repeated at most once."""
    repeated, elapsed, ran = False, 0.0, 0
    endless = itertools.chain(troubles, itertools.repeat((Trouble.NOT_HERE, Said.NOTHING, True, 1)))
    for number, (trouble, said, others, deaths) in enumerate(endless, start=1):
        ran += trouble in (Trouble.LOST, Trouble.BROKEN)
        decision = retry.decide(
            one(
                trouble,
                tries=number,
                said=said,
                others=others,
                deaths=deaths,
                safe=safe,
                repeated=repeated,
                remaining=deadline - elapsed,
            )
        )
        if decision.end is not None:
            assert number <= MAX_TRIES
            break
        repeated |= trouble is Trouble.LOST
        elapsed += decision.pause
        assert elapsed < max(deadline, SETTLE)
    assert ran <= (2 if safe else 1)


@pytest.mark.parametrize(
    ("elsewhere", "unary", "waiting", "turn"),
    [
        (True, True, 0, Beyond.ELSEWHERE),
        (True, True, 9, Beyond.ELSEWHERE),
        (True, False, 0, Beyond.ELSEWHERE),
        (False, True, 0, Beyond.WAIT),
        (False, True, 1, Beyond.WAIT),
        (False, True, 2, Beyond.REFUSE),
        (False, False, 0, Beyond.REFUSE),
    ],
)
def test_a_call_beyond_its_models_share_goes_elsewhere_or_waits_where_it_may(elsewhere, unary, waiting, turn):
    assert retry.beyond_share(elsewhere=elsewhere, unary=unary, waiting=waiting, most=2) is turn
