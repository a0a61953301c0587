"""Tokens of service accounts, against a fake Kubernetes API: reviewed by the API, or verified with the cluster's
keys."""

import asyncio

import pytest

from mesh.certificates.secret import Cluster
from mesh.statuses import MeshError, Reason
from mesh.tokens.kubernetes import Reviewer
from mesh.tokens.settings import TokenSettings
from router.access import assembly, reviewed
from router.access.credentials import Unsettled
from router.access.tokens import Tokens
from tests.support.access import guard_of
from tests.support.kubeapi import KubeApi
from tests.support.tokens import FakeIssuer
from tests.support.waiting import until

GROUPS = {"group:system:serviceaccounts", "group:system:serviceaccounts:team-a"}


@pytest.fixture
async def api(tmp_path):
    async with KubeApi(tmp_path / "kube") as api:
        yield api


def source_of(api, how, audiences=("mesh",)):
    settings = TokenSettings(
        kubernetes=how,
        kubernetes_audiences=audiences,
        kubernetes_api=api.url,
        kubernetes_account=str(api.account),
    )
    (source,) = assembly.sources(settings)
    return source


@pytest.fixture
async def source(api):
    source = source_of(api, "review")
    yield source
    await source._reviews.close()


@pytest.fixture
async def guard(source):
    return guard_of("required", {}, {}, others=[Tokens([source])], wall=source._wall)


def bearer(token):
    return [(b"authorization", b"Bearer " + token.encode())]


async def refused(guard, token, reason=Reason.UNAUTHENTICATED):
    with pytest.raises(MeshError) as raised:
        await guard.identified(bearer(token))
    assert raised.value.reason is reason, raised.value
    return raised.value.text


@pytest.mark.parametrize("how", ["review", "keys"])
async def test_a_service_account_is_known_by_its_token(api, how):
    guard = guard_of("required", {}, {}, others=[Tokens([source_of(api, how)])])
    token = api.account_token("ci")
    with pytest.raises(Unsettled):
        guard.known(bearer(token))
    found = await guard.identified(bearer(token))
    assert found.name == "serviceaccount:team-a:ci"
    assert found.subjects >= GROUPS
    assert guard.known(bearer(token)) is found


@pytest.mark.parametrize("how", ["review", "keys"])
async def test_tokens_that_are_not_for_the_mesh_are_refused(api, how):
    guard = guard_of("required", {}, {}, others=[Tokens([source_of(api, how)])])
    assert "request one for the audience mesh" in await refused(guard, api.account_token("ci", aud="vault"))
    assert "expired" in await refused(guard, api.account_token("ci", lifetime=-100))
    forged = FakeIssuer(api.issuer.url).token("system:serviceaccount:team-a:ci", headers={"kid": api.issuer.current})
    assert await refused(guard, forged)
    assert "does not accept" in await refused(guard, api.issuer.token("anna"))


@pytest.mark.parametrize("how", ["review", "keys"])
async def test_tokens_for_the_api_server_itself_are_accepted_where_configured(api, how):
    guard = guard_of("required", {}, {}, others=[Tokens([source_of(api, how, ())])])
    token = api.account_token("ci", aud=[api.issuer.url])
    assert (await guard.identified(bearer(token))).name == "serviceaccount:team-a:ci"
    assert await refused(guard, api.account_token("ci"))


async def test_certainly_wrong_tokens_are_not_reviewed(guard, api):
    await refused(guard, api.account_token("ci", aud="vault"))
    await refused(guard, api.account_token("ci", lifetime=-100))
    assert api.reviews == 0


async def test_many_calls_with_one_token_share_a_review(guard, api):
    token = api.account_token("ci")
    found = await asyncio.gather(*(guard.identified(bearer(token)) for _ in range(50)))
    assert len(set(map(id, found))) == 1
    assert api.reviews == 1


async def test_a_verdict_is_renewed_behind_the_calls(guard, source, api):
    now = [source._wall()]
    guard._wall = source._wall = lambda: now[0]
    token = api.account_token("ci")
    first = await guard.identified(bearer(token))
    now[0] += reviewed.FRESH - 1
    assert guard.known(bearer(token)) is first
    assert api.reviews == 1
    now[0] += 2
    assert guard.known(bearer(token)) is first  # without a wait
    await until(lambda: api.reviews == 2 and not source._asked, why="it was reviewed again")
    assert guard.known(bearer(token)) is first


async def test_the_token_of_a_deleted_account_is_refused_after_its_next_review(guard, source, api):
    now = [source._wall()]
    guard._wall = source._wall = lambda: now[0]
    token = api.account_token("ci")
    await guard.identified(bearer(token))
    api.deleted.add("system:serviceaccount:team-a:ci")
    now[0] += reviewed.FRESH + 1
    guard.known(bearer(token))
    await until(lambda: not guard._principals, why="the caller is forgotten")
    assert "deleted" in await refused(guard, token)


async def test_the_last_verdict_holds_for_a_while_when_kubernetes_does_not_answer(guard, source, api):
    now = [source._wall()]
    guard._wall = source._wall = lambda: now[0]
    token, other = api.account_token("ci"), api.account_token("other")
    await guard.identified(bearer(token))
    api.failures = [503] * 100
    assert "cannot ask Kubernetes" in await refused(guard, other, Reason.UNAVAILABLE)
    for _ in range(9):
        now[0] += reviewed.FRESH + 5
        assert guard.known(bearer(token)).name == "serviceaccount:team-a:ci"
        await until(lambda: not source._asked, why="the review has ended")
    assert "answers a TokenReview with 503" in source.statistics()["trouble"]
    now[0] += reviewed.FRESH
    await refused(guard, token, Reason.UNAVAILABLE)
    api.failures = []
    assert (await guard.identified(bearer(token))).name == "serviceaccount:team-a:ci"
    assert source.statistics()["trouble"] == ""


async def test_a_missing_right_to_review_is_named_in_the_statistics(guard, source, api):
    api.may_review = False
    await refused(guard, api.account_token("ci"), Reason.UNAVAILABLE)
    assert "system:auth-delegator" in source.statistics()["trouble"]


async def test_the_pods_own_token_is_read_for_each_review(guard, api):
    """The pod's own token is read from its file for each review, because Kubernetes replaces it every hour."""
    await guard.identified(bearer(api.account_token("a")))
    (api.account / "token").write_text("another.token.of.kubernetes")
    assert (await guard.identified(bearer(api.account_token("b")))).name == "serviceaccount:team-a:b"


async def test_refused_tokens_do_not_flood_kubernetes(guard, source, api, monkeypatch):
    source.failures = reviewed.Failures(0.0, 5.0)
    for number in range(5):
        await refused(guard, FakeIssuer(api.issuer.url).token(f"system:serviceaccount:a:x{number}"))
    assert api.reviews == 5
    await refused(guard, FakeIssuer(api.issuer.url).token("system:serviceaccount:a:y"), Reason.OVERLOADED)
    assert api.reviews == 5


async def test_a_server_that_ignores_audiences_is_not_believed(api, monkeypatch):
    """A review without the requested audience is not accepted. Kubernetes demands that clients check the audiences in
    the answer."""
    reviewer = Reviewer(Cluster(api.url, api.account), ("mesh",))
    review = reviewer._judged(201, b'{"status": {"authenticated": true, "user": {"username": "u"}}}')
    assert not review.authenticated
    assert "audience" in review.error
