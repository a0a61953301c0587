"""The model server as a child process: reports of its start and its end."""

import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from mesh import process
from mesh.host import oomkills as tally
from mesh.process.supervisor import Ended
from mesh.runtime.servers import serverprocess
from mesh.runtime.servers.commandline import OnnxLine
from mesh.runtime.servers.serverprocess import Plan, ServerFailed, ServerProcess
from mesh.runtime.sharedmemory.board import Board
from placement.suspects import EndCause
from tests.support.waiting import until


@pytest.mark.parametrize(
    ("end", "cause", "how"),
    [
        pytest.param(
            "os.kill(os.getpid(), signal.SIGKILL)", EndCause.KILLED, "was killed by SIGKILL from outside", id="kill"
        ),
        pytest.param("os.kill(os.getpid(), signal.SIGTERM)", EndCause.KILLED, "was killed by SIGTERM", id="term"),
        pytest.param("os.abort()", EndCause.CRASH, "was killed by SIGABRT", id="abort"),
        pytest.param("os._exit(3)", EndCause.EXIT, "ended with status 3", id="exit"),
    ],
)
async def test_how_a_server_ended_is_told(tmp_path: Path, end: str, cause: EndCause, how: str) -> None:
    """The report of a server's end names the signal or exit status, and the thread that crashed, if any."""
    code = f"import faulthandler, os, signal; faulthandler.enable(); {end}"
    deaths: list[serverprocess.Death] = []
    server = a_server(Board.create(tmp_path / "b", 4), on_death=deaths.append)
    child = await process.spawn([sys.executable, "-c", code], name="x", on_line=server._on_line)
    server._oom_kills = tally.oom_kills()
    status = await child.wait()
    death = server._death(Ended(process.describe_exit(status), status, None))
    assert (death.cause, death.how) == (cause, how)
    assert bool(death.thread) is (cause is EndCause.CRASH)


@pytest.mark.parametrize(
    ("before", "after", "cause"), [(1, 2, EndCause.MEMORY), (-1, -1, EndCause.MEMORY), (7, 7, EndCause.KILLED)]
)
async def test_a_kill_is_for_memory_where_the_kernel_counts_one_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int, after: int, cause: EndCause
) -> None:
    """A kill is attributed to memory if the kernel's count of out-of-memory kills has risen, or if the kernel has no
    such count."""
    server = a_server(Board.create(tmp_path / "b", 4), on_death=print)
    monkeypatch.setattr(serverprocess, "oom_kills", lambda: after)
    server._oom_kills = before
    assert server._death(Ended("was killed by SIGKILL", -signal.SIGKILL, None)).cause is cause


async def test_a_server_that_does_not_start_is_told_with_its_last_words(tmp_path: Path) -> None:
    board = Board.create(tmp_path / "board", 4)
    plan = Plan((sys.executable, "-c", "print('no such device'); raise SystemExit(3)"), tmp_path, 1.0)
    deaths: list[serverprocess.Death] = []
    server = a_server(board, on_death=deaths.append)
    with pytest.raises(ServerFailed, match=r"ended with status 3.*no such device"):
        await server.start(plan)
    assert await server.ready(0.0) is None
    await server.stop(0.0)
    assert not deaths


async def test_a_server_that_starts_no_more_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server has served before. Then its program fails to start three times, and the last error is reported."""
    monkeypatch.setattr(serverprocess, "PAUSE_FIRST", 0.001)
    monkeypatch.setattr(serverprocess, "GIVE_UP", 3)
    board = Board.create(tmp_path / "board", 4, incarnation="life")
    line = OnnxLine(
        module="mesh.runtime.server",
        data=f"127.0.0.1:{process.free_port('127.0.0.1')}",
        incarnation="life",
        board=tmp_path / "board",
        capacity=1 << 30,
        threads=1,
        load_timeout=10.0,
        load_concurrency=1,
        device="cpu",
        max_message=1 << 20,
        max_body_bytes=1 << 28,
        internal_tls=None,
        memory_limit=0,
        log_format="json",
        log_level="info",
    )
    given_up: list[str] = []
    server = a_server(board, on_given_up=given_up.append)
    await server.start(Plan(line.argv(), tmp_path, 5.0))
    assert server.down_for == 0
    try:
        server.plan = Plan((sys.executable, "-c", "raise SystemExit('no such device')"), tmp_path, 1.0)
        server.kill("the test wants it")
        await until(lambda: given_up, why="the server is given up")
        assert "no such device" in given_up[0]
        assert (server.lives, server.deaths) == (1 + 3, 1)
        assert "no such device" in server.why_down
        assert server.down_for > 0
    finally:
        await server.stop(1.0)


def a_server(board: Board, **callbacks: Any) -> ServerProcess:
    silent: dict[str, Any] = {"on_death": str, "on_ready": int, "on_given_up": str, "on_line": str}
    return ServerProcess(board, **{**silent, **callbacks})
