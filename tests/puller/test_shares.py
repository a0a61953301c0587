"""Stores that hang, drip or are slow, and pulls from other stores that must not wait for them."""

import asyncio
import threading
from pathlib import Path

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from puller import floor, retry
from puller.errors import PullError, PullErrorKind
from puller.http_client import HttpPolicy
from puller.limits import PullLimits
from puller.local import THREADS, LocalProvider
from puller.puller import Puller
from puller.shares import Shares
from puller.source import Source
from tests.support.liars import File, liars, unique
from tests.support.once import ONCE
from tests.support.waiting import until

MANY = 40


class Turns:
    """Tasks that wait for turns of the shares, and hold them until told to give them back."""

    def __init__(self, shares: Shares) -> None:
        self.shares = shares
        self.held: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def ask(self, store: str) -> "asyncio.Task[None]":
        async def take() -> None:
            await self.shares.acquire(store)
            self.held.append(store)

        task = asyncio.create_task(take())
        self.tasks.append(task)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return task

    async def give(self, store: str) -> None:
        self.held.remove(store)
        self.shares.release(store)
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def end(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


async def test_a_store_that_keeps_its_turns_leaves_others_theirs():
    """A store that never gives back its turns does not take those of others, however many requests it has. Neither does
    a second or third such store."""
    turns = Turns(Shares(total=8, each=6, least=2, most=20))
    for store in ("hangs", "too", "as well"):
        for _ in range(30):
            await turns.ask(store)
    assert (turns.held.count("hangs"), turns.held.count("too"), turns.held.count("as well")) == (6, 2, 2)
    for number in range(5):
        task = await turns.ask("good")
        assert task.done(), f"turn {number} waits"
        await turns.give("good")
    await turns.end()


async def test_turns_are_given_in_order_and_to_no_cancelled_waiter():
    """Turns are given in order. A cancelled waiter takes none, even if it is cancelled at the moment when it gets its
    turn."""
    turns = Turns(Shares(total=1, each=1, least=1, most=1))
    await turns.ask("a")
    first, second, third = [await turns.ask("a") for _ in range(3)]
    first.cancel()
    turns.held.clear()
    turns.shares.release("a")  # the release gives the turn to the second waiter, which is cancelled before it runs
    second.cancel()
    await until(third.done)
    assert turns.held == ["a"]
    assert (turns.shares.taken, turns.shares.waiting) == (1, 0)
    await turns.end()


@given(st.lists(st.tuples(st.sampled_from(["ask", "give", "leave"]), st.integers(0, 3)), max_size=60))
def test_shares_hold_whatever_happens(steps):
    """Shares never exceed their limits, no waiter is left without an available turn, and all turns are given back,
    whatever happens."""

    async def run() -> None:
        turns = Turns(Shares(total=4, each=3, least=1, most=6))
        for what, number in steps:
            store = f"s{number}"
            if what == "ask":
                await turns.ask(store)
            elif what == "give" and store in turns.held:
                await turns.give(store)
            elif what == "leave" and (waiting := [task for task in turns.tasks if not task.done()]):
                waiting[number % len(waiting)].cancel()
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            held = turns.held
            assert turns.shares.taken == len(held) <= 6
            assert all(held.count(one) <= 3 for one in held)
            waits = set(turns.shares._waiting.values())
            assert not [one for one in waits if held.count(one) < 3 and len(held) < 4]
            assert not [one for one in waits if not held.count(one) and len(held) < 6]
        await turns.end()
        for store in list(turns.held):
            await turns.give(store)
        assert (turns.shares.taken, turns.shares.waiting) == (0, 0)

    asyncio.run(run())


@pytest.fixture
async def stores():
    async with liars(2) as made:
        yield made


def a_puller(tmp_path: Path, **policy: float) -> Puller:
    root = tmp_path / "root"
    root.mkdir(exist_ok=True)
    http = HttpPolicy(allow_private=True, **{"connect_timeout": 5, "read_timeout": 30, **policy})
    puller = Puller(
        directory=tmp_path / "models",
        file_roots=[root],
        http=http,
        retries=ONCE,
        limits=PullLimits(connections=8),
    )
    puller.sweep()
    return puller


async def hang(request: web.BaseRequest) -> web.StreamResponse:
    await asyncio.Event().wait()
    raise AssertionError


async def drip(request: web.BaseRequest) -> web.StreamResponse:
    """Sends a byte at a time forever, often enough to avoid the timeout between two bytes."""
    response = web.StreamResponse()
    response.content_length = 10**6
    await response.prepare(request)
    while True:
        await response.write(b"x")
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("how", [hang, drip])
async def test_others_load_while_a_store_hangs_or_drips(tmp_path, stores, how):
    """Models of another store and local models load as usual while forty models are requested from a store that hangs
    or drips."""
    bad, good = stores
    bad.answer = how
    good.files["/www/m"] = File(unique(100_000))
    puller = a_puller(tmp_path)
    pulls = [
        asyncio.create_task(puller.pull(Source(f"{bad.origin}/www/{number}"), into=f"bad{number}"))
        for number in range(MANY)
    ]
    await until(lambda: puller.statistics().in_progress == MANY and puller.statistics().limits.connections >= 6)
    for number in range(5):
        pulled = await puller.pull(Source(f"{good.origin}/www/m"), into=f"good{number}")
        assert pulled.path.read_bytes() == good.files["/www/m"].content
        (tmp_path / "root" / "m").write_bytes(b"local")
        assert (await puller.pull(Source(f"{tmp_path}/root/m"), into="local")).path.read_bytes() == b"local"
    assert not any(pull.done() for pull in pulls)
    for pull in pulls:
        pull.cancel()
    await asyncio.gather(*pulls, return_exceptions=True)
    assert puller.statistics().limits.connections == 0
    await puller.close()


@pytest.mark.parametrize("place", ["/www/m", "/s3/b/m", "/hub/o/r/m"])
async def test_a_store_that_drips_is_given_up(tmp_path, stores, place):
    """A store that drips is given up, even if each byte arrives before the timeout and earlier bytes arrived fast."""
    store = stores[0]
    store.files[place] = File(unique(10**6))
    answer = store.answer

    async def dripping(request: web.BaseRequest) -> web.StreamResponse:
        if request.method != "GET" or "/api/" in request.path:
            return await answer(request)
        response = web.StreamResponse(headers={"ETag": '"same"', "Last-Modified": "Wed, 01 Jan 2020 00:00:00 GMT"})
        response.content_length = 10**6
        await response.prepare(request)
        await response.write(bytes(2000))
        while True:
            await response.write(b"x")
            await asyncio.sleep(0.01)

    store.answer = dripping
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    endpoint = f'"endpoint_url": "{store.origin}{"/s3" if "s3" in place else "/hub"}"'
    (secrets / "mine").write_text(
        f'{{"type": "s3", {endpoint}, "access_key_id": "a", "secret_access_key": "b"}}'
        if "s3" in place
        else f'{{"type": "hf", {endpoint}}}'
    )
    puller = Puller(
        directory=tmp_path / "models",
        http=HttpPolicy(allow_private=True, connect_timeout=0.3, read_timeout=0.3),
        secrets=secrets,
        retries=retry.RetryPolicy(attempts=3, first_pause=0.01),
    )
    puller.sweep()
    _, kind, *rest = place.split("/")
    path = {"www": f"{store.origin}{place}", "s3": f"s3://{'/'.join(rest)}", "hub": f"hf://{'/'.join(rest)}"}[kind]
    key = "" if kind == "www" else '{"storage_key": "mine"}'
    with pytest.raises(PullError) as caught:
        await puller.pull(Source(path, key), into="m")
    assert caught.value.kind is PullErrorKind.SLOW
    assert "tried 3 times" in caught.value.text
    await puller.close()


async def test_a_head_that_drips_is_given_up(tmp_path):
    """A response whose header drips is given up, even if each byte arrives before the timeout."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            writer.write(b"HTTP/1.1 200 OK\r\nX: ")
            while True:
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(0.01)
        except ConnectionError:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    puller = a_puller(tmp_path, connect_timeout=0.2, read_timeout=0.2)
    with pytest.raises(PullError) as caught:
        await puller.pull(Source(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/m"), into="m")
    assert caught.value.kind is PullErrorKind.TIMEOUT
    await puller.close()
    server.close()


async def test_only_waiting_counts_against_a_store():
    """Only time spent waiting for a store counts against the store. Bytes that arrived at once may be processed
    slowly."""
    now = [0.0]

    async def pieces():
        for _ in range(100):
            now[0] += 0.001
            yield b"x"

    async for _ in floor.kept(pieces(), shown="x", window=1.0, clock=lambda: now[0]):
        now[0] += 100.0

    async def drops():
        while True:
            now[0] += 0.1
            yield b"x"

    with pytest.raises(PullError, match="10 bytes in 1 s"):
        async for _ in floor.kept(drops(), shown="x", window=1.0, clock=lambda: now[0]):
            pass


@pytest.mark.parametrize("volumes", [False, True], ids=["roots", "volumes"])
async def test_a_mount_that_hangs_leaves_the_others_alone(tmp_path, monkeypatch, volumes):
    """A mount that hangs and blocks all of its threads affects no other mount. Pulls from it give up, and it works
    again once it no longer hangs."""
    top = tmp_path / "top"
    for name in ("stalled", "works"):
        (top / name).mkdir(parents=True)
        (top / name / "m").write_bytes(name.encode())
    provider = LocalProvider(
        [] if volumes else [top / "stalled", top / "works"], volumes=top if volumes else None, patience=1.0
    )
    stuck = threading.Event()
    original = provider._list

    def listed(stop, path, *more):
        if "/stalled/" in path:
            stuck.wait(60)
        return original(stop, path, *more)

    monkeypatch.setattr(provider, "_list", listed)
    policy = ONCE
    puller = Puller(directory=tmp_path / "models", providers={"file": provider}, retries=policy)
    puller.sweep()
    pulls = [
        asyncio.create_task(puller.pull(Source(f"{top}/stalled/m"), into=f"{number}")) for number in range(THREADS * 2)
    ]
    await until(lambda: puller.statistics().in_progress == THREADS * 2)
    assert (await puller.pull(Source(f"{top}/works/m"), into="w")).path.read_bytes() == b"works"
    for outcome in await asyncio.gather(*pulls, return_exceptions=True):
        assert isinstance(outcome, PullError)
        assert outcome.kind is PullErrorKind.TIMEOUT
    stuck.set()
    assert (await puller.pull(Source(f"{top}/stalled/m"), into="h")).path.read_bytes() == b"stalled"
    await puller.close()


async def test_claims_that_do_not_exist_cost_no_threads(tmp_path):
    """Claims that do not exist, which registrations may invent, start no threads."""
    puller = Puller(directory=tmp_path / "models", volumes=tmp_path / "volumes", retries=ONCE)
    (tmp_path / "volumes").mkdir()
    puller.sweep()
    for number in range(30):
        with pytest.raises(PullError):
            await puller.pull(Source(f"pvc://claim{number}/m"), into="m")
    assert len(puller._providers["file"]._executors) == 1
    await puller.close()
