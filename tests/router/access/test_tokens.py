"""Tokens of an OIDC issuer as credentials: rotation without a refused call, caches, limits on invalid tokens."""

import asyncio
import time

import pytest

from mesh.access.verbs import Verb
from mesh.statuses import MeshError, Reason
from mesh.tokens.settings import TokenSettings
from router.access import assembly
from router.access import tokens as module
from router.access.credentials import Unsettled
from router.access.tokens import Tokens
from tests.support.access import guard_of
from tests.support.tokens import AUDIENCE, FakeIssuer, IssuerServer
from tests.support.waiting import until

CI = "mesh_" + "c" * 43
GRANTS = {
    "anna": ("infer", ["fraud"], ["user:anna"]),
    "team": ("infer", ["churn/*"], ["group:team-a"]),
    "ci": ("admin", ["*"], ["key:ci"]),
}


class Clock:
    """A wall clock that a test sets."""

    def __init__(self):
        self.now = time.time()

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def issuer():
    return FakeIssuer()


@pytest.fixture
def file(tmp_path, issuer):
    path = tmp_path / "jwks.json"
    path.write_bytes(issuer.jwks)
    return path


@pytest.fixture
async def tokens(issuer, file, clock):
    settings = TokenSettings(issuer=issuer.url, audiences=(AUDIENCE,), keys=str(file))
    (source,) = assembly.sources(settings, wall=clock)
    source.following._pauses = (0.001, 0.002)
    return Tokens([source])


@pytest.fixture
async def guard(tokens, clock):
    guard = guard_of("required", {"ci": CI}, GRANTS, others=[tokens], wall=clock)
    guard.look()
    await until(lambda: tokens.sources[0].following.keys, why="the keys are read")
    return guard


def bearer(token):
    return [(b"authorization", b"Bearer " + token.encode())]


async def refused(guard, token, reason=Reason.UNAUTHENTICATED):
    with pytest.raises(MeshError) as raised:
        await guard.identified(bearer(token))
    assert raised.value.reason is reason, raised.value
    assert token not in raised.value.text
    return raised.value.text


async def test_a_user_is_known_by_the_token_and_may_what_user_and_groups_may(guard, issuer):
    anna = guard.known(bearer(issuer.token("anna", groups=["team-a"])))
    assert anna.name == "user:anna"
    for name, allowed in (("fraud", True), ("churn/1", True), ("other", False)):
        assert guard.ruling(anna, Verb.INFER, name).allowed is allowed
    assert guard.known(bearer(CI)).name == "key:ci"


async def test_a_known_token_is_not_verified_again(guard, tokens, issuer, monkeypatch):
    token = issuer.token()
    anna = guard.known(bearer(token))
    monkeypatch.setattr(tokens, "identify", None)
    assert guard.known(bearer(token)) is anna


async def test_a_token_ends_at_its_time_even_if_it_is_remembered(guard, issuer, clock):
    token = issuer.token(lifetime=100)
    assert guard.known(bearer(token)).name == "user:anna"
    clock.now += 159  # within the skew
    assert guard.known(bearer(token)).name == "user:anna"
    clock.now += 2
    assert "expired 6" in await refused(guard, token)


@pytest.mark.parametrize("minutes", [-5, 5])
async def test_a_clock_five_minutes_off_is_a_clear_error(guard, issuer, clock, minutes):
    token = issuer.token(lifetime=200)
    clock.now += 60 * minutes
    text = await refused(guard, token)
    assert "by this router's clock" in text
    assert ("in the future" in text) is (minutes < 0)


async def test_a_token_with_a_new_key_waits_until_the_key_is_read(guard, issuer, file):
    """In a rotation, the issuer publishes the new key together with the first token that it signs. A call with such a
    token waits until the router has read the key."""
    former = issuer.token()
    assert guard.known(bearer(former)).name == "user:anna"
    issuer.rotate()
    file.write_bytes(issuer.jwks)
    with pytest.raises(Unsettled):
        guard.known(bearer(issuer.token("bob")))
    found = await asyncio.gather(*(guard.identified(bearer(issuer.token(f"user-{at}"))) for at in range(50)))
    assert {one.name for one in found} == {f"user:user-{at}" for at in range(50)}
    assert guard.known(bearer(former)).name == "user:anna"


async def test_tokens_of_a_key_that_is_not_published_any_more_are_refused(guard, issuer, file):
    token = issuer.token()
    assert guard.known(bearer(token)).name == "user:anna"
    issuer.rotate(forget=True)
    file.write_bytes(issuer.jwks)
    guard.look()
    await until(lambda: not guard._principals, why="remembered callers are forgotten")
    assert "has no key" in await refused(guard, token)


async def test_rotation_over_http_refuses_no_call(clock):
    """No call is refused during three rotations over HTTP. Each call has a token that was just issued."""
    issuer = FakeIssuer()
    async with IssuerServer(issuer) as server:
        (source,) = assembly.sources(TokenSettings(issuer=issuer.url, audiences=(AUDIENCE,)))
        source.following._pauses = (0.01, 0.02)
        guard = guard_of("required", {}, {}, others=[Tokens([source])], wall=clock)
        for turn in range(3):
            for number in range(20):
                name = f"u{turn}-{number}"
                assert (await guard.identified(bearer(issuer.token(name)))).name == f"user:{name}"
            issuer.rotate(forget=turn == 1)
        assert len(server.requests) < 12


async def test_an_issuer_that_cannot_be_reached_is_not_the_callers_fault():
    issuer = FakeIssuer("http://127.0.0.1:1")
    (source,) = assembly.sources(TokenSettings(issuer=issuer.url, audiences=(AUDIENCE,)))
    guard = guard_of("required", {"ci": CI}, {}, others=[Tokens([source])])
    assert "the router's log says why" in await refused(guard, issuer.token(), Reason.UNAVAILABLE)
    assert guard.unknown == 0
    assert guard.known(bearer(CI)).name == "key:ci"


async def test_a_token_of_another_issuer_is_refused_without_verification(guard, monkeypatch):
    monkeypatch.setattr("mesh.tokens.verification.verify", None)
    assert "of the issuer 'https://other.example', which this mesh does not accept" in await refused(
        guard, FakeIssuer("https://other.example").token()
    )


async def test_no_part_of_a_token_is_in_an_error_or_in_the_log(guard, issuer, capsys, caplog):
    for token in (
        FakeIssuer().token(),
        issuer.token(aud="other"),
        issuer.token(lifetime=-500),
        issuer.token()[:-9] + "AAAAAAAAA",
        "eyJh.eyJh.eyJh",
    ):
        text = await refused(guard, token)
        for part in (*token.split("."), token[-20:]):
            assert part not in text
            assert part not in caplog.text
    output = capsys.readouterr()
    assert "eyJ" not in output.out + output.err


# -- limits


async def test_an_invalid_token_is_verified_once_in_a_while(guard, tokens, issuer, monkeypatch):
    token = issuer.token()[:-9] + "AAAAAAAAA"
    first = await refused(guard, token)
    monkeypatch.setattr("mesh.tokens.verification.verify", None)
    for _ in range(1000):
        assert await refused(guard, token) == first
    assert guard.unknown == 1001


async def test_garbage_is_refused_unverified_once_too_much_has_failed(guard, tokens, issuer, monkeypatch):
    """After too many failures, tokens of unknown callers are refused for a while. Known callers are still accepted."""
    now = [0.0]
    tokens.failures = module.Failures(10.0, 20.0, clock=lambda: now[0])
    known = issuer.token()
    guard.known(bearer(known))
    for number in range(20):
        await refused(guard, issuer.token(f"u{number}")[:-9] + "AAAAAAAAA")
    monkeypatch.setattr("mesh.tokens.verification.read", None)
    for number in range(50):
        text = await refused(guard, f"eyJ{number}.e30.AAAA", Reason.OVERLOADED)
        assert "too many were invalid" in text
    assert tokens.failures.refused == 50
    assert guard.known(bearer(known)).name == "user:anna"
    assert guard.known(bearer(CI)).name == "key:ci"
    monkeypatch.undo()
    now[0] = 0.1
    assert guard.known(bearer(issuer.token("bob"))).name == "user:bob"


async def test_unknown_keys_cause_few_readings():
    """However many tokens name unknown keys, the router reads the keys only as often as its pauses allow. For a while,
    a token that was refused for its key causes no further read."""
    issuer, other = FakeIssuer(), FakeIssuer()
    async with IssuerServer(issuer) as server:
        (source,) = assembly.sources(TokenSettings(issuer=issuer.url, audiences=(AUDIENCE,)))
        source.following._pauses = (0.01, 0.02)
        guard = guard_of("required", {}, {}, others=[Tokens([source])])
        other.url = issuer.url
        made = [other.token(f"u{at}", headers={"kid": f"kid-{at}"}) for at in range(100)]
        assert all("has no key" in text for text in await asyncio.gather(*(refused(guard, token) for token in made)))
        assert server.requests.count("/keys") <= 3
        server.requests.clear()
        for token in made:
            assert "has no key" in await refused(guard, token)
        assert not server.requests


async def test_the_memory_of_remembered_callers_is_bounded(guard, issuer, monkeypatch):
    monkeypatch.setattr("router.access.guard._MAX_BYTES", 10_000)
    for number in range(40):
        guard.known(bearer(issuer.token("anna", note="x" * 700 + str(number))))
        assert sum(len(key) for key in guard._principals) <= 11_500


def test_a_source_for_kubernetes_needs_a_cluster(monkeypatch):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ValueError, match="only in a pod of Kubernetes"):
        assembly.sources(TokenSettings(kubernetes="review"))
