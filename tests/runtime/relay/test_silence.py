"""A prediction that never ends in the event loop of a server, which still accepts connections."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio

from mesh.runtime.port.outcomes import HUNG
from mesh.runtime.relay import silence
from mesh.runtime.relay.adapters import choice
from mesh.runtime.relay.carried import Carried
from mesh.runtime.relay.journal import Journal
from mesh.runtime.relay.link import Link
from mesh.runtime.relay.silence import Silence
from mesh.runtime.relay.table import RelayedCopy, Table
from mesh.runtime.sharedmemory.board import Board
from mesh.runtime.sharedmemory.slot import SlotState
from mesh.statuses import Code
from tests.support.fakemlserver import FakeMLServer
from tests.support.waiting import until

HANG = 0.4


class Watched:
    """A stand-in for MLServer whose event loop can be blocked, the link to it, and the watch over it."""

    def __init__(self, server: FakeMLServer) -> None:
        self.server = server
        self.board = Board.private(4)
        self.table = Table(self.board, Journal(None))
        self.link = Link(server.address, self.table, hang_timeout=HANG, max_message=1 << 20)
        ask = choice.question("mlserver", self.link.channel)
        assert ask is not None
        self.silence = Silence(self.link, ask, hang_timeout=HANG, look=0.01, step=0.02)

    def copy(self, slot: int) -> RelayedCopy:
        """Adds a loaded copy with the slot's number as its id."""
        copy = RelayedCopy(str(slot), b"t", self.board.row(slot))
        copy.row.loading(1, time.monotonic_ns())
        copy.row.mark(SlotState.LOADED)
        self.table.copies.add(copy)
        return copy

    def call(self, copy: RelayedCopy, *, deadline: float | None = None, ago: float = 0.0) -> Carried:
        """Begins a call, as the data port does."""
        now = time.monotonic_ns()
        call: Any = SimpleNamespace(deadline=None if deadline is None else time.monotonic() + deadline)
        outcomes: Any = None
        carried = Carried(outcomes, call, copy, (), None, method=0, started_ns=now)
        carried.began_ns = now - int(ago * 1e9)
        copy.row.begin(now, runs=1)
        self.silence.began(carried)
        return carried

    def end(self, carried: Carried, code: int) -> None:
        """Ends a call, as the data port does."""
        self.silence.ended(carried, code)
        carried.copy.row.end(time.monotonic_ns(), runs=1, busy_ns=0, failed=code != 0)

    def running(self) -> list[bool]:
        """Marks the suspects, as the relay does when it ends. Returns for each copy whether the use board shows it as
        running."""
        self.silence.mark(self.table.copies)
        return [self.board.read(int(model_id)).running > 0 for model_id in sorted(self.table.ids())]


@pytest_asyncio.fixture
async def watched(tmp_path: Path) -> AsyncIterator[Watched]:
    """Runs the watch over a server that answers."""
    root = tmp_path / "server" / "models"
    root.mkdir(parents=True)
    async with FakeMLServer(root) as server:
        it = Watched(server)
        await it.link.connected()
        tasks = [asyncio.ensure_future(it.link.run()), asyncio.ensure_future(it.silence.run())]
        await until(lambda: server.asked > 1, why="questions are answered")
        yield it
        server.unblocked.set()
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await it.link.close()


async def _blocked(it: Watched) -> None:
    """Blocks the server, and waits until a question is unanswered."""
    it.server.unblocked.clear()
    before = it.server.asked
    await until(lambda: it.server.asked > before, why="the next question is asked")


async def test_models_whose_calls_began_before_the_silence_are_suspect(watched: Watched, monkeypatch: Any) -> None:
    """The server is given up, and the use board shows the calls from before the silence, even if their callers have
    gone."""
    monkeypatch.setattr(silence, "_OVERTAKING", 0.0)
    stuck, gone, idle, later = (watched.copy(slot) for slot in range(4))
    watched.end(watched.call(idle), Code.OK)
    watched.call(stuck, deadline=0.1, ago=1.0)  # before any question that may be under way
    ended = watched.call(gone, ago=1.0)
    await _blocked(watched)
    watched.end(ended, Code.CANCELLED)
    watched.call(later)
    async with asyncio.timeout(10):
        assert await watched.link.ended == HUNG
    assert "does not end" in watched.link.why
    assert watched.silence.suspects == {stuck, gone}
    assert watched.running() == [True, True, False, False]


async def test_a_call_may_take_until_its_deadline(watched: Watched) -> None:
    """The server is silent during a call that began before the silence, and is not given up. Afterwards it answers
    again."""
    copy = watched.copy(0)
    slow = watched.call(copy, deadline=60.0)
    await _blocked(watched)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(4 * HANG):
            await asyncio.shield(watched.link.ended)
    watched.end(slow, Code.OK)
    watched.server.unblocked.set()
    before = watched.server.asked
    await until(lambda: watched.server.asked > before + 1, why="questions are answered again")
    assert not watched.link.ended.done()


@pytest.mark.parametrize("deadline", [None, 3600.0])
async def test_no_call_may_block_the_server_without_limit(watched: Watched, deadline: float | None) -> None:
    """A call without a deadline, or with a late one, excuses the server's silence for `LONGEST` seconds only."""
    stuck = watched.copy(0)
    watched.call(stuck, deadline=deadline, ago=silence.LONGEST)
    await _blocked(watched)
    async with asyncio.timeout(10):
        assert await watched.link.ended == HUNG
    assert watched.silence.suspects == {stuck}


async def test_a_load_may_take_until_its_time_limit(watched: Watched) -> None:
    """A load that began before the silence excuses the silence until the load ends."""
    with watched.silence.loading(60.0):
        await _blocked(watched)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(4 * HANG):
                await asyncio.shield(watched.link.ended)
    async with asyncio.timeout(10):
        assert await watched.link.ended == HUNG
    assert watched.silence.suspects == set()


async def test_work_that_began_during_the_silence_is_no_excuse(watched: Watched, monkeypatch: Any) -> None:
    """Such loads and calls only wait behind the work that blocks the server."""
    monkeypatch.setattr(silence, "_OVERTAKING", 0.0)
    await _blocked(watched)
    with watched.silence.loading(60.0):
        watched.call(watched.copy(0), deadline=60.0)
        async with asyncio.timeout(10):
            assert await watched.link.ended == HUNG
    assert watched.running() == [False]


async def test_a_server_that_has_ended_is_not_blocked(watched: Watched) -> None:
    """The watch leaves the loss of a connection to the link."""
    watched.call(watched.copy(0))
    await _blocked(watched)
    await watched.server.stop()
    async with asyncio.timeout(10):
        assert await watched.link.ended != HUNG
    assert watched.silence.suspects is None


def test_only_servers_with_one_event_loop_are_asked() -> None:
    """Other kinds of servers run predictions in threads or processes of their own."""
    nothing: Any = None
    assert [choice.question(name, nothing) for name in ("", "triton", "torchserve", "ovms")] == [None] * 4
