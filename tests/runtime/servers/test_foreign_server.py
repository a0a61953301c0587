"""A foreign model server as a child process, which has no heartbeat."""

import sys
from dataclasses import replace

from mesh.process.hang import HangLimits
from mesh.runtime.servers.foreign import ForeignServer
from tests.support.waiting import until


async def test_a_server_that_says_nothing_is_left_alone() -> None:
    """A foreign server gives no signs of life to the agent, so its silence is no reason to replace it."""
    lost: list[str] = []
    server = ForeignServer((sys.executable, "-c", "import signal; signal.pause()"), on_given_up=lost.append)
    program = server._supervisor.program
    assert program.heard is not None
    looks = 0

    def heard() -> float:
        nonlocal looks
        looks += 1
        assert program.heard is not None
        return program.heard()

    limits = HangLimits(silent=0.1, start=0.1, interval=0.01, suspect=0.05)
    server._supervisor.program = replace(program, heard=heard, limits=limits)
    await server.start()
    try:
        pid = server.pid
        await until(lambda: looks > 60, why="it was looked at for longer than the limits")
        assert server.pid == pid
        assert server._supervisor.trouble is None
        assert not lost
    finally:
        await server.stop(1.0)
