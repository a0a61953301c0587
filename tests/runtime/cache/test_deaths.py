"""The clean-up after the death of the model server: models to blame, and state to remove."""

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from mesh.runtime.cache.books.space import Space
from mesh.runtime.cache.deaths import Deaths
from mesh.runtime.cache.loads.outcomes import Loaded, Refused
from mesh.runtime.servers.endings import Death
from mesh.runtime.sharedmemory.board import Board
from placement.blame import UNKNOWN
from placement.suspects import EndCause
from tests.runtime.pod_of_fakes import FakePod
from tests.support.waiting import until


@pytest.fixture
async def pod() -> AsyncIterator[FakePod]:
    async with FakePod() as running:
        yield running


@pytest.fixture
def board() -> Iterator[Board]:
    made = Board.private(64)
    made.attach(1)
    yield made
    made.close()


async def test_who_was_at_work_is_named_and_all_is_gone(pod: FakePod, board: Board) -> None:
    """After the server's death, models that were running are blamed and idle ones are not. Ledger, keys and files are
    cleared."""
    await pod.fill("idle", "busy", size=100_000)
    pod.busy("busy")
    pod.cache.deaths.happened(Death("was killed by SIGSEGV", EndCause.CRASH), board.at_work)
    ((named, text),) = pod.history.deaths
    assert named == "busy"
    assert text.startswith("the model server was killed by SIGSEGV while it was running this model")
    assert not pod.ledger.entries
    assert not pod.keys.keys
    assert not pod.files.present
    assert pod.ledger.committed.total_bytes == pod.ledger.physical.total_bytes == 0
    assert pod.meters.server_deaths.value == 1


@pytest.mark.parametrize("cause", [EndCause.HANG, EndCause.EXIT, EndCause.MEMORY])
async def test_no_request_of_a_foreign_server_is_named(pod: FakePod, board: Board, cause: EndCause) -> None:
    """The relay's board shows no requests, so none is blamed: neither in the text nor by a digest."""
    files, presence, history = pod.files, pod.keys, pod.history
    deaths = Deaths(
        pod.ledger, pod.unloads, Space(), pod.meters, files=files, presence=presence, history=history, foreign=True
    )
    await pod.fill("idle", "busy", size=100_000)
    pod.busy("busy")
    deaths.happened(Death("does not answer", cause), board.at_work)
    assert history.deaths == [("busy", "the model server does not answer while it was running this model")]
    assert history.requests == [(UNKNOWN,)]


async def test_a_death_from_outside_is_held_against_nobody(pod: FakePod, board: Board) -> None:
    await pod.fill("busy", size=100_000)
    pod.busy("busy")
    pod.cache.deaths.happened(Death("was stopped, and killed for it", EndCause.STOPPED), board.at_work)
    assert not pod.history.deaths
    assert not pod.ledger.entries


async def test_a_load_that_waits_for_room_survives_the_servers_death(pod: FakePod, board: Board) -> None:
    """After the server's death, a load that was waiting for room succeeds, and a load that was in the server fails and
    leaves nothing behind."""
    held = pod.server.hold("load", "inside")
    inside = asyncio.create_task(pod.load("inside", 900_000))
    await pod.asked("load", "inside")
    waiting = asyncio.create_task(pod.load("waiting", 900_000))
    await until(lambda: pod.cache.rooms.statistics().waiting, why="the load waits for room")
    pod.server.lives += 1
    pod.cache.deaths.happened(Death("was killed", EndCause.KILLED), board.at_work)
    held.set()
    assert isinstance(await waiting, Loaded)
    assert isinstance(await inside, Refused)
    assert pod.resident == {"waiting"}
