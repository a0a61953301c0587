"""The fence, which decides who may answer a call: the rows of the table in docs/admin.md, and sequences of events."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement import fence
from placement.fence import SECOND, CallVerdict, Mode, Permission, PodStanding, Said

TTL = 10 * SECOND
START = 1_000 * SECOND


def standing(
    now: float, *, proof: float | None = 0.0, keyed: bool = True, away: bool = True, limit: float | None = None
):
    """Returns the standing of a pod, with times in seconds since the start."""
    return PodStanding(
        now=START + int(now * SECOND),
        ttl=TTL,
        proof=None if proof is None else START + int(proof * SECOND),
        keyed=keyed,
        away=away,
        last_proof=START,
        serve_without_etcd=None if limit is None else int(limit * SECOND),
    )


def verdict(permission: Permission, now: float, said: Said) -> CallVerdict:
    return fence.judge(permission.mode, permission.until, START + int(now * SECOND), said)


@pytest.mark.parametrize("said", Said, ids=lambda said: said.name)
def test_a_fresh_proof_and_a_live_agent_answer_anything(said):
    """The pod's keys exist, so no change that contradicts them can have been acknowledged."""
    assert verdict(fence.permit(standing(3.0)), 3.9, said) is CallVerdict.ANSWER


@pytest.mark.parametrize("said", Said, ids=lambda said: said.name)
def test_a_stopped_agent_silences_its_server_before_its_keys_go(said):
    """A stopped agent's server falls silent before the agent's keys are deleted. With a lease of 10 s that is 8 s after
    the proof, whatever the call says."""
    last = fence.permit(standing(5.9))
    assert verdict(last, 7.99, said) is CallVerdict.ANSWER
    assert verdict(last, 8.0, said) is CallVerdict.NOT_HERE


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        pytest.param(Said.VERIFIED, CallVerdict.ANSWER, id="verified"),
        pytest.param(Said.AWAY, CallVerdict.ANSWER, id="etcd away"),
        pytest.param(Said.NOTHING, CallVerdict.VERIFY_FIRST, id="neither"),
    ],
)
@pytest.mark.parametrize("proof", [0.0, None], ids=["old", "none"])
def test_an_old_proof_and_a_live_agent_ask_for_the_routers_word(said, expected, proof):
    """With an old proof and a live agent, a call is answered only if its router has read the record, or says that etcd
    is unavailable. By default, this has no time limit."""
    for now in (30.0, 86_400.0):
        assert verdict(fence.permit(standing(now, proof=proof)), now + 1, said) is expected


def test_an_old_proof_and_a_stopped_agent_end_a_lease_time_after_the_last_state():
    last = fence.permit(standing(100.0))
    assert verdict(last, 109.9, Said.VERIFIED) is CallVerdict.ANSWER
    assert verdict(last, 109.9, Said.NOTHING) is CallVerdict.VERIFY_FIRST
    assert verdict(last, 110.0, Said.VERIFIED) is CallVerdict.NOT_HERE


def test_serving_without_etcd_ends_where_the_operator_says():
    """Serving without etcd ends exactly when the operator's setting says, although each permission is granted for a
    full lease time."""
    last = fence.permit(standing(55.0, limit=60.0))
    assert verdict(last, 59.9, Said.AWAY) is CallVerdict.ANSWER
    assert verdict(last, 60.0, Said.VERIFIED) is CallVerdict.NOT_HERE
    assert fence.permit(standing(60.0, limit=60.0)).mode is Mode.CLOSED


def test_etcd_away_is_no_excuse_where_the_pod_reaches_etcd():
    """If the pod reaches etcd, a router's claim that etcd is unavailable does not count. For a copy without a key, the
    router must have read the record."""
    for proof in (0.0, None):
        permission = fence.permit(standing(1.0, proof=proof, keyed=False, away=False))
        assert verdict(permission, 1.5, Said.AWAY) is CallVerdict.VERIFY_FIRST
        assert verdict(permission, 1.5, Said.VERIFIED) is CallVerdict.ANSWER


def test_calls_never_find_a_gap_between_two_permissions():
    """When keep-alives are no longer answered, an agent that checks every second renews each permission in time."""
    until = 0
    for tenths in range(400):
        now = tenths / 10
        if tenths % 10 == 0:
            permission = fence.permit(standing(now))
            assert permission.until > START + int(now * SECOND)
            until = permission.until
        assert until > START + int(now * SECOND)


moments = st.integers(0, 40 * SECOND)


@given(
    now=moments,
    proof=st.none() | moments,
    keyed=st.booleans(),
    away=st.booleans(),
    limit=st.none() | moments,
    ttl=st.integers(2, 60).map(lambda seconds: seconds * SECOND),
    later=moments,
    said=st.sampled_from(Said),
)
def test_unproven_answers_need_a_word_and_none_outlives_its_reason(now, proof, keyed, away, limit, ttl, later, said):
    """A call that says nothing about the record is answered only while the keys certainly exist. No permission lasts
    longer than a lease time, or than the operator's limit for serving without etcd."""
    proof = None if proof is None else min(proof, now)
    permission = fence.permit(PodStanding(now, ttl, proof, keyed, away, proof or 0, limit))
    result = fence.judge(permission.mode, permission.until, now + later, said)
    assert permission.why
    if result is not CallVerdict.ANSWER:
        return
    assert later <= ttl
    stands = keyed and proof is not None and now + later < proof + ttl
    assert said is Said.VERIFIED or stands or (said is Said.AWAY and away)
    if limit is not None and not stands:
        assert now + later < (proof or 0) + limit


@pytest.mark.parametrize("seconds", [2, 3, 4, 5, 10, 60])
def test_a_lease_of_any_length_is_proven_as_long_as_it_is_renewed(seconds):
    """A lease of any length is always proven if it is renewed after every third of its length and each answer takes a
    twentieth of it."""
    ttl = seconds * SECOND
    step, until = ttl // 100, 0
    for moment in range(600):
        now = START + moment * step
        if moment * step % fence.pause(ttl) < step:
            proof = START + max(0, (moment - 5) * 3 // 100) * ttl // 3
            permission = fence.permit(PodStanding(now, ttl, proof, True, False, proof, None))
            assert permission.mode is Mode.PROVEN, f"at {moment} % of the lease"
            until = permission.until
        assert now < until
