"""The notes about each thread's work in the server, which another process reads after the server's death."""

import asyncio
import threading

import numpy as np
import pytest

from mesh.runtime.sharedmemory import atwork
from mesh.runtime.sharedmemory.board import Board
from mesh.wire import framing, requestdigest
from tests.runtime.server.conftest import ONE
from tests.support import models
from tests.support.onnxserver import OnnxServer, request
from tests.support.waiting import until


@pytest.fixture
def boards(tmp_path):
    """The boards of a server and its agent, mapped from the same file."""
    created = Board.create(tmp_path / "board", 4)
    opened = Board.open(tmp_path / "board")
    opened.attach(1)
    yield opened, created
    opened.close()
    created.close()


def test_threads_are_noted_while_they_are_at_work(boards):
    """Threads at work are listed with their slot and request, or without a request if they load. Finished threads are
    not listed."""
    server, agent = boards
    frame = framing.pack(request("m", x=ONE))
    entries = []

    def work() -> None:
        entries.append(server.at_work.begin(1, frame))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    load = server.at_work.begin(3)
    assert agent.at_work.threads() == [
        atwork.ThreadWork(1, thread.ident, requestdigest.digest(frame)),
        atwork.ThreadWork(3, threading.get_ident(), b""),
    ]
    server.at_work.end(load)
    assert [doing.slot for doing in agent.at_work.threads()] == [1]
    server.at_work.end(entries[0])
    assert agent.at_work.threads() == []


def test_more_threads_than_there_is_room_for_work_unseen(boards):
    """Threads beyond the number of rows work without a note. All rows are free again when the threads finish."""
    server, agent = boards
    entries = [server.at_work.begin(0) for _ in range(atwork.THREADS + 2)]
    assert entries[-2:] == [-1, -1]
    for entry in entries:
        server.at_work.end(entry)
    assert agent.at_work.threads() == []
    assert server.at_work.begin(2) >= 0


@pytest.mark.parametrize("size", [0, 100, 65_531, 65_532, 300_000])
def test_the_loop_leaves_its_last_request(boards, size):
    """The loop's last request stays on the board, whatever its length, even after a longer one. The next life of the
    server begins without one."""
    server, agent = boards
    server.at_work.inline(framing.pack(b"x" * 100_000))
    frame = framing.pack(request("m", x=np.zeros(size, bool)))
    server.at_work.inline(frame)
    assert agent.at_work.loop() == atwork.Last(threading.get_ident(), requestdigest.digest(frame))
    server.attach(2)
    assert agent.at_work.loop().digest == requestdigest.digest(framing.pack(b""))


def test_the_board_counts_calls_in_flight_of_its_slots_alone(boards):
    """The board's count of calls in flight covers its slots, and not the data stored after them."""
    server, agent = boards
    server.row(0).begin(1)
    server.at_work.inline(b"\xff" * 70_000)
    server.at_work.begin(2)
    assert agent.in_flight == 1
    assert [slot for slot, _ in agent.uses()] == []


async def test_a_real_crash_is_found_in_the_thread_that_caused_it(tmp_path):
    """A real crash, caused by an integer division overflow, is traced to its thread or to the event loop while other
    threads run and load."""
    bad = {"a": np.array([-(2**31)] * 3, np.int32), "b": np.array([-1] * 3, np.int32)}
    good = {"a": np.array([8] * 3, np.int32), "b": np.array([2] * 3, np.int32)}
    async with OnnxServer(tmp_path, "--load-timeout", "30") as server:
        for inline in (False, True):
            await server.load("divide", models.divide(), slot=0, revision=1)
            await server.load("busy", models.slow(), slot=1, revision=2)
            running = asyncio.create_task(
                server.infer("busy", revision=2, timeout=30, iterations=np.array([1 << 60], np.int64))
            )
            loading = asyncio.create_task(server.load("endless", models.endless_loop(), slot=2, revision=3))
            await server.running(1)
            await until(lambda: len(server.board.at_work.threads()) == 2, why="one loads and one runs")
            if inline:  # a size that was never seen runs in a thread
                assert (await server.infer("divide", revision=1, **good)).code == 0
            call = asyncio.create_task(server.infer("divide", revision=1, **bad))
            assert await asyncio.wait_for(server.process.wait(), 30) == -8
            crashed = int(server.log().rpartition("Current thread 0x")[2].split()[0], 16)
            at_work = server.board.at_work
            digest = requestdigest.digest(framing.pack(request("divide", **bad)))
            if inline:
                assert at_work.loop() == atwork.Last(crashed, digest)
            assert [one for one in at_work.threads() if one.slot == 0] == (
                [] if inline else [atwork.ThreadWork(0, crashed, digest)]
            )
            assert server.board.read(0).running == 1
            await asyncio.gather(call, running, loading, return_exceptions=True)
            await server.disconnect()
            await server.start()
