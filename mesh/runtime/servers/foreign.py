"""A foreign model server as a child of this pod: that of `--server-command`, or one that Mesh has installed.

The server is a child of the agent, not of the relay, so that it keeps its models if the relay dies and is restarted.
This module only keeps the server running. The relay finds out whether the server is ready, answers, or was restarted,
as for a server that others start. If the relay reports that the server does not answer, this module kills it.
"""

import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from mesh import process
from mesh.host.oomkills import oom_kills
from mesh.process.restarts import RestartPolicy
from mesh.process.supervisor import ChildLife, Ended, Program, Supervisor
from mesh.process.tasks import Tasks
from mesh.runtime import duties
from mesh.runtime.servers.endings import Death, death_of
from mesh.telemetry import logs
from placement.suspects import EndCause

log = logs.get(__name__)

_POLICY = RestartPolicy(first=0.5, longest=30.0, steady=60.0, at_once=1, spread=0.0)
_SOCKET, _PORT, _MODELS = "{socket}", "{port}", "{models}"


class BadCommand(ValueError):
    """A command that cannot be run. The text says why."""


def words_of(command: str, *, address: str, run_dir: Path, models: Path | None = None) -> tuple[tuple[str, ...], str]:
    """Returns the words of a command, and the address of the server that it starts, in gRPC's notation.

    `{socket}` stands for the path of a unix socket of this pod, `{port}` for a free port on loopback, `{models}` for
    the folder of the server's models. Without one of the first two, the server listens on `address`. Raises
    BadCommand.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise BadCommand(f"cannot be read: {error}") from error
    if models is not None:
        words = [word.replace(_MODELS, str(models)) for word in words]
    if not words:
        raise BadCommand("names no program")
    if any(_SOCKET in word for word in words):
        path = run_dir / "server.sock"
        return tuple(word.replace(_SOCKET, str(path)) for word in words), f"unix:{path}"
    if any(_PORT in word for word in words):
        port = process.free_port("127.0.0.1")
        return tuple(word.replace(_PORT, str(port)) for word in words), f"127.0.0.1:{port}"
    if not address:
        raise BadCommand("does not say where the server listens: use {socket} or {port} in it, or add --server ADDRESS")
    return tuple(words), address


class ForeignServer:
    """The process of a foreign server."""

    def __init__(
        self,
        words: tuple[str, ...],
        *,
        on_given_up: Callable[[str], None],
        folder: Path | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """Makes a server that is not started yet. `words` is its command, which runs in `folder`. `variables` are added
        to this process's environment. `on_given_up` is called with the reason why the server will not be started
        again."""
        self._words = words
        self._folder = folder
        self._variables = variables
        self._last: Ended | None = None
        self._kills = (0, 0)  # the kernel's kills for lack of memory, before and after the last end
        self._hung = False  # killed here, because the relay got no answer
        self._supervisor = Supervisor(
            # It has no heartbeat. The relay notices when it hangs, so only a server that was stopped is killed here.
            Program(
                "server-command",
                self._spawn,
                heard=time.monotonic,
                policy=_POLICY,
                explain=lambda how, lines: f"the model server {how}",
            ),
            on_death=self._died,
            on_given_up=on_given_up,
            on_turn=self._count_kills,
        )
        self._tasks = Tasks(on_given_up)

    @property
    def pid(self) -> int:
        """The process id of the running server, or 0 if none runs."""
        return self._supervisor.pid or 0

    async def start(self) -> None:
        """Starts the server. Raises StartFailed, whose text names the model server."""
        self._count_kills()
        await self._supervisor.start()
        self._tasks.run(duties.FOREIGN_SERVER, self._supervisor.run)
        log.info("model server started", pid=self.pid, command=self._words[0])

    async def stop(self, grace: float) -> None:
        """Asks the server to end, and kills it after `grace` seconds."""
        await self._supervisor.stop(grace)
        await self._tasks.close()

    def ended(self, *, hung: bool) -> Death:
        """Returns the end of the server. Call this method once the relay has found out that the server has ended or
        hangs. Kills a server that hangs."""
        if hung:
            self._hung = True
            self._supervisor.kill()
            return Death("did not answer and was killed", EndCause.HANG)
        if self._last is None:
            return Death("has lost its models", EndCause.REPLACED)
        last, self._last = self._last, None
        return death_of(last, crashed_in=0, kills=self._kills)

    async def _spawn(self, life: ChildLife) -> process.Process:
        env = None if self._variables is None else {**os.environ, **self._variables}
        return await process.spawn(self._words, name="server-command", on_line=pass_on, cwd=self._folder, env=env)

    def _died(self, ended: Ended) -> None:
        self._kills = (self._kills[1], oom_kills())
        self._last = None if self._hung else ended
        self._hung = False

    def _count_kills(self) -> None:
        self._kills = (self._kills[1], oom_kills())


def pass_on(line: str) -> None:
    """Passes a line of the server's output on to this process's standard error."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
