"""The keys of an issuer, kept current: readings, rotation, failures, and limits on the readings that tokens can
cause."""

import asyncio

import pytest

from mesh.tokens import following as module
from mesh.tokens.following import Busy, Following
from mesh.tokens.locations import File, KeyDocument, LocationError, Remote
from tests.support.tokens import FakeIssuer, IssuerServer, jwks
from tests.support.waiting import until


class FakePlace:
    """A location of keys whose readings end when the test says so."""

    def __init__(self, issuer):
        self.issuer = issuer
        self.readings = 0
        self.go = asyncio.Event()
        self.go.set()
        self.error = None

    async def read(self):
        self.readings += 1
        raw = self.issuer.jwks
        await self.go.wait()
        if self.error:
            raise LocationError(self.error)
        return KeyDocument(raw, self.issuer.url, 0.0)

    def changed(self):
        return None


@pytest.fixture
def issuer():
    return FakeIssuer()


@pytest.fixture
async def place(issuer):
    return FakePlace(issuer)


@pytest.fixture
async def following(place):
    followed = Following(place, pauses=(0.01, 0.02))
    yield followed
    await followed.close()


async def read(following):
    following.look()
    await until(lambda: following._reading is None, why="the reading has ended")


async def test_keys_are_read_at_the_start_and_then_periodically(following, place, issuer, monkeypatch):
    now = [100.0]
    following._clock = lambda: now[0]
    changes = []
    following.changed = lambda: changes.append(following.keys)
    assert following.keys is None
    await read(following)
    assert [key.id for key in following.keys.keys] == [issuer.current]
    for seconds, readings in ((200, 1), (400, 2), (600, 2), (800, 3)):
        now[0] = 100.0 + seconds
        await read(following)
        assert place.readings == readings
    assert len(changes) == 1  # the keys were the same
    issuer.rotate()
    now[0] += 400
    await read(following)
    assert len(changes) == 2


async def test_a_wait_for_newer_keys_ends_with_a_reading_that_began_after_it(following, place, issuer):
    """Calls that come during a reading of the keys wait for the next reading, because their key may have been published
    since the reading began."""
    place.go.clear()
    first = asyncio.create_task(following.newer())
    await until(lambda: place.readings == 1, why="it reads")
    issuer.rotate()
    second = asyncio.create_task(following.newer())
    await until(lambda: following.statistics().waiting == 2, why="both wait")
    place.go.set()
    await first
    await second
    assert place.readings == 2
    assert issuer.current in {key.id for key in following.keys.keys}


async def test_many_waits_share_a_reading(following, place):
    await asyncio.gather(*(following.newer() for _ in range(100)))
    assert place.readings <= 2


async def test_the_number_of_waits_is_limited(following, place, monkeypatch):
    monkeypatch.setattr(module, "MAX_WAITING", 3)
    place.go.clear()
    waits = [asyncio.create_task(following.newer()) for _ in range(3)]
    await until(lambda: following.statistics().waiting == 3, why="all wait")
    with pytest.raises(Busy):
        await following.newer()
    place.go.set()
    await asyncio.gather(*waits)
    assert following.statistics().waiting == 0


async def test_readings_that_bring_nothing_are_ever_further_apart(place):
    now = [0.0]
    followed = Following(place, clock=lambda: now[0], pauses=(1.0, 4.0))
    pauses = []
    for _ in range(6):
        await followed.newer()
        pauses.append(followed._pause)
        now[0] += 10.0
    assert pauses == [1.0, 2.0, 4.0, 4.0, 4.0, 4.0]
    place.issuer.rotate()
    await followed.newer()
    assert followed._pause == 1.0


async def test_the_last_keys_stay_in_force_while_none_can_be_read(following, place):
    await read(following)
    place.error = "https://issuer.example/keys answers 503"
    with pytest.raises(LocationError, match="answers 503"):
        await following.newer()
    found = following.statistics()
    assert (found.keys, found.trouble, found.failures) == (1, place.error, 1)
    place.error = None
    await following.newer()
    assert following.statistics().trouble == ""


async def test_a_set_without_usable_keys_is_a_failure_that_keeps_the_last_keys(following, place):
    await read(following)

    class Empty(FakeIssuer):
        jwks = jwks({"kty": "oct", "k": "AAAA"})

    place.issuer = Empty()
    with pytest.raises(LocationError, match="none of its 1 keys"):
        await following.newer()
    assert following.statistics().keys == 1


# -- files


async def test_a_file_is_read_again_when_it_changes(tmp_path, issuer):
    path = tmp_path / "jwks.json"
    path.write_bytes(issuer.jwks)
    followed = Following(File(path), pauses=(100.0, 100.0))
    await read(followed)
    issuer.rotate(forget=True)
    path.write_bytes(issuer.jwks)
    await followed.newer()  # at once: a changed file needs no pause
    readings = followed.statistics().readings
    await followed.newer()  # at once: the file has not changed
    assert followed.statistics().readings == readings
    assert [key.id for key in followed.keys.keys] == [issuer.current]
    path.unlink()
    await read(followed)
    assert "No such file" in followed.statistics().trouble
    assert followed.statistics().keys == 1


# -- over HTTP


async def published(issuer, **more):
    return await Remote(issuer.url, **more).read()


async def test_keys_are_found_by_discovery_and_the_clocks_are_compared(issuer):
    async with IssuerServer(issuer) as server:
        place = Remote(issuer.url, wall=lambda: 4_000_000_000.0)
        found = await place.read()
        assert found.raw == issuer.jwks
        assert found.ahead is not None
        assert found.ahead > 1e9
        await place.read()
        assert server.requests == ["/.well-known/openid-configuration", "/keys", "/keys"]
        assert (await published(issuer, keys=f"{issuer.url}/keys")).raw == issuer.jwks


async def test_discovery_is_repeated_after_a_failure(issuer):
    async with IssuerServer(issuer) as server:
        place = Remote(issuer.url)
        await place.read()
        server.fail = 404
        with pytest.raises(LocationError, match="/keys answers 404"):
            await place.read()
        server.fail = 0
        await place.read()
        assert server.requests.count("/.well-known/openid-configuration") == 2


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"fail": 500}, "answers 500"),
        ({"fail": 302}, "answers 302"),
        ({"body": b"x" * 300_000}, "exceeds the limit of 256 KiB"),
    ],
)
async def test_a_bad_answer_is_a_failure(issuer, change, why):
    async with IssuerServer(issuer) as server:
        for name, value in change.items():
            setattr(server, name, value)
        with pytest.raises(LocationError, match=why):
            await published(issuer)


async def test_a_discovery_document_about_another_issuer_is_refused(issuer):
    async with IssuerServer(issuer):
        place = Remote(f"{issuer.url}/")
        with pytest.raises(LocationError, match="about another issuer"):
            await place.read()


async def test_keys_are_not_read_over_plain_http_from_elsewhere(issuer):
    async with IssuerServer(issuer) as server:
        server.keys_at = "http://issuer.example/keys"
        with pytest.raises(LocationError, match="read over plain http only"):
            await published(issuer)


async def test_a_server_that_does_not_answer_is_a_failure_in_time(issuer, monkeypatch):
    monkeypatch.setattr("mesh.tokens.locations.TIMEOUT", 0.05)
    server = await asyncio.start_server(lambda *_: asyncio.Event().wait(), "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with pytest.raises(LocationError, match=r"has not answered within 0\.05 s"):
            await Remote(url).read()
    with pytest.raises(LocationError, match="cannot be reached"):
        await Remote(url).read()


async def test_a_missing_file_of_authorities_is_a_failure(issuer, tmp_path):
    with pytest.raises(LocationError, match="cannot be read: No such file"):
        await published(issuer, ca=tmp_path / "ca.pem")
