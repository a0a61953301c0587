"""The model server as a child process: started, watched, and restarted when it dies.

The server is a separate process so that the agent, with all its state, survives a model that crashes the server. After
a death, `on_death` is called first, while the use board still shows what was loading and running. Then the server is
restarted: immediately the first time, and after a growing pause while servers keep dying soon after their start. After
repeated failures to start, the server is given up, because a missing resource, such as a GPU, may come back with a new
pod.

A server that hangs is killed and then treated as dead (`mesh.process.watcher`). Its event loop writes a heartbeat to
the board every second, so a check costs nothing. A server that a signal has stopped (SIGSTOP) is replaced like any
other that hangs, but reported as stopped, because no model is the cause.

The cause of an end is reported as far as it is known (`placement.suspects.EndCause`). A crash is reported with its
thread, which Python's fault handler writes. A SIGKILL counts as sent from outside if the kernel's count of kills for
lack of memory has not changed. If the count has grown or is unknown, it counts as a lack of memory.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from mesh import process
from mesh.host import heap, processes
from mesh.host.oomkills import oom_kills
from mesh.process.restarts import RestartPolicy
from mesh.process.supervisor import ChildLife, Ended, Program, StartFailed, State, Supervisor
from mesh.process.tasks import Tasks
from mesh.runtime import duties
from mesh.runtime.port.outcomes import GONE, HUNG
from mesh.runtime.servers.endings import Death, death_of
from mesh.runtime.servers.foreign import ForeignServer, pass_on
from mesh.runtime.servers.spi import Spi, SpiError, Status
from mesh.runtime.sharedmemory.board import Board
from mesh.telemetry import logs
from placement.suspects import EndCause

log = logs.get(__name__)

PAUSE_FIRST, PAUSE_MAX = 0.5, 30.0  # seconds; the first restart of a steady server has none
STEADY = 60.0
"""Seconds after which a server's death counts as a first one again."""

GIVE_UP = 10
"""Number of consecutive failed starts after which the server is given up. They take about two minutes."""

START_TIMEOUT = 120.0
"""Time limit from start to readiness, in seconds. It allows for loading ONNX Runtime from a cold disk, and for a GPU
that has to wake up."""

_LEAST_SILENCE = 3.0  # seconds; its loop beats once a second
_STATUS_TIMEOUT = 10.0
_CRASHED_IN = "Current thread 0x"  # a line of Python's fault handler, at each of those signals


class ServerFailed(Exception):
    """A failed start of the server. The text contains the server's last lines of output, if there are any."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The command and settings for the next start of a server, which may change between two lives. `argv` lacks the
    path of the SPI's socket, which is different at each start."""

    argv: tuple[str, ...]
    run_dir: Path
    hang_timeout: float  # seconds of silence after which it is killed
    relays: bool = False  # the models are in another process, which survives the death of this one
    name: str = "model-server"
    pass_fds: tuple[int, ...] = ()  # descriptors that it inherits


class ServerProcess:
    """The model server's process. Callbacks run in the event loop and must be quick."""

    plan: Plan
    """The plan given to `start`, or its replacement since."""

    def __init__(
        self,
        board: Board,
        *,
        on_death: Callable[[Death], None],
        on_ready: Callable[[], None],
        on_given_up: Callable[[str], None],
        on_hung: Callable[[], None] = lambda: None,
        on_line: Callable[[str], None] | None = None,
        foreign: ForeignServer | None = None,
    ) -> None:
        """Makes a server that is not started yet.

        `on_death` is called with the end of a server. If this process is a relay, that is the server behind it, and the
        relay's own end is not reported. `on_ready` is called whenever the server has become ready, `on_given_up` with
        the reason why no other server will be started, and `on_hung` before a process that hangs is killed. `foreign`
        is the server behind a relay, if it is this pod's child too.
        """
        self._board = board
        self._on_death = on_death
        self._on_ready = on_ready
        self._on_given_up = on_given_up
        self._pass_on = on_line or pass_on
        self._foreign = foreign
        self._crashed_in = 0  # thread named by the fault handler of this life
        self._oom_kills = 0  # kills for memory on this machine, at the last look; -1: unknown
        self._supervisor = Supervisor(
            Program(
                "model-server",
                self._spawn,
                missing=self._missing,
                heard=self._heard,
                policy=RestartPolicy(
                    first=PAUSE_FIRST, longest=PAUSE_MAX, steady=STEADY, at_once=1, give_up=GIVE_UP, spread=0.0
                ),
                start_timeout=START_TIMEOUT,
                explain=self._explain,
            ),
            on_ready=self._started,
            on_death=self._ended,
            on_hung=on_hung,
            on_given_up=lambda why: on_given_up(f"{GIVE_UP} starts in a row have failed: {why}"),
            on_turn=self._count_kills,
        )
        self._tasks = Tasks(on_given_up)
        self._ready = asyncio.Event()
        self._dead = asyncio.Event()  # replaced at each death
        self._ended_for: tuple[str, EndCause] | None = None  # why the agent ended it
        self._opening: Spi | None = None  # the connection to a life that is not ready yet
        self.state = State.STARTING
        self.spi: Spi | None = None
        self.status: Status | None = None  # the server's, when it became ready
        self.why_down = ""
        self._down_since = 0.0  # monotonic; 0: it is not down

    @property
    def lives(self) -> int:
        """The number of servers started so far."""
        return self._supervisor.starts

    @property
    def deaths(self) -> int:
        """The number of deaths of this process after it was ready."""
        return self._supervisor.deaths

    @property
    def pid(self) -> int:
        """The process id of the running server, or 0 if none runs."""
        return self._supervisor.pid or 0

    @property
    def resident_bytes(self) -> int:
        """The private memory of the running server in bytes, without mapped files, or 0 if none runs."""
        return processes.private_bytes(self.pid)

    @property
    def serves(self) -> bool:
        """True if the server is ready."""
        return self.state is State.READY

    @property
    def trouble(self) -> str | None:
        """The reason why the running server is unreliable at present, or None if it is reliable."""
        return self._supervisor.trouble if self.state is State.READY else None

    @property
    def down_for(self) -> float:
        """The seconds for which a server that was ready before has been down, or 0 if it is up."""
        return time.monotonic() - self._down_since if self._down_since else 0.0

    async def start(self, plan: Plan) -> Status:
        """Starts the server for the first time, and waits until it is ready. Raises ServerFailed with the server's last
        lines; the method may then be called again."""
        began = time.monotonic()
        self.plan = plan
        # Until it is ready, START_TIMEOUT limits its silence.
        limits = process.HangLimits(silent=max(plan.hang_timeout, _LEAST_SILENCE), start=START_TIMEOUT)
        self._supervisor.program = replace(self._supervisor.program, limits=limits)
        try:
            await self._supervisor.start()
        except StartFailed as error:
            raise ServerFailed(str(error)) from error
        assert self.status is not None
        self._tasks.run(duties.SERVER, self._supervisor.run)
        seconds = round(time.monotonic() - began, 2)
        log.info("model server is ready", pid=self.pid, version=self.status.version, s=seconds)
        return self.status

    async def stop(self, grace: float) -> None:
        """Asks the server to end, and kills it after `grace` seconds."""
        self.state = State.STOPPED
        self._ready.clear()
        await self._supervisor.stop(grace)
        await self._tasks.close()
        for spi in filter(None, (self.spi, self._opening)):
            await spi.close()

    def kill(self, why: str) -> None:
        """Kills the server immediately, if it runs. The death is then handled like any other, with the reason `why`,
        but no model is suspected of causing it."""
        if self.pid:
            self._ended_for = why, EndCause.REPLACED
            self._supervisor.kill()

    async def replace(self, why: str, grace: float) -> None:
        """Ends the server in order, if it runs: it accepts no more calls, and gets `grace` seconds to answer those in
        flight. The end is then handled like any other death, with the reason `why`, but no model is suspected."""
        child = self._supervisor.child
        if child is not None and child.returncode is None:
            self._ended_for = why, EndCause.REPLACED
            await child.terminate(grace)

    async def ready(self, timeout: float) -> Spi | None:
        """Waits for a ready server and returns a connection to it. Returns None after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self._ready.wait()
        except TimeoutError:
            return None
        return self.spi

    async def died(self, life: int, timeout: float) -> bool:
        """Returns whether the life number `life` of this process has ended, or ends within `timeout` seconds. If its
        models are lost, `on_death` has then been called."""
        if self.lives == life and self.state is State.READY:
            try:
                async with asyncio.timeout(timeout):
                    await self._dead.wait()
            except TimeoutError:
                return False
        return True

    # --- one life ---

    async def _spawn(self, life: ChildLife) -> process.Process:
        self._ended_for, self._crashed_in, self._oom_kills = None, 0, oom_kills()
        socket = self.plan.run_dir / f"spi-{life.number}"
        if self._opening is not None:  # of a failed start
            self._tasks.start(self._opening.close(), "close spi")
        self._opening = Spi(socket)
        argv = [*self.plan.argv, "--spi", str(socket)]
        return await process.spawn(
            argv,
            name=self.plan.name,
            pass_fds=self.plan.pass_fds,
            on_line=self._on_line,
            env=heap.joining(os.environ),
        )

    async def _missing(self) -> str:
        assert self._opening is not None
        if not self._opening.listening:
            return "it does not listen"
        try:
            status = await self._opening.status(timeout=_STATUS_TIMEOUT)
        except SpiError as error:
            if not error.lost:
                log.info("model server does not report its status", why=error.text)
            return error.text
        if status.failing:
            self.why_down = "the model server reports that it is failing; its log has the cause"
            raise StartFailed(self.why_down)
        if not status.ready:
            return "it reports that it is not ready"
        self.status = status
        return ""

    def _explain(self, how: str, lines: tuple[str, ...]) -> str:
        self.why_down = f"{'the relay to the model server' if self.plan.relays else 'the model server'} {how}"
        if last := "; ".join(line.strip() for line in lines[-5:]):
            self.why_down += f": {last}"
        return self.why_down

    def _started(self) -> None:
        self.spi, self._opening = self._opening, None
        self.state, self.why_down, self._down_since = State.READY, "", 0.0
        self._ready.set()
        self._on_ready()

    def _count_kills(self) -> None:
        self._oom_kills = oom_kills()

    def _death(self, ended: Ended) -> Death:
        if ended.hung is None and self._ended_for is not None:
            return Death(*self._ended_for)
        return death_of(ended, crashed_in=self._crashed_in, kills=(self._oom_kills, oom_kills()))

    def _on_line(self, line: str) -> None:
        if line.startswith(_CRASHED_IN):
            with contextlib.suppress(ValueError):
                self._crashed_in = int(line[len(_CRASHED_IN) :].split()[0], 16)
        self._pass_on(line)

    def _heard(self) -> float:
        """Returns the time of the last heartbeat of the server's event loop, in seconds of the monotonic clock, or 0
        before the first."""
        return self._board.beat_ns / 1e9

    def _ended(self, ended: Ended) -> None:
        """Cleans up after the end of a ready server, or of the relay to one."""
        if not self.plan.relays:
            self._died(self._death(ended))
        elif ended.code in (GONE, HUNG):
            self._died(self._death_behind(ended.code))
        else:
            log.warning("relay died; the model server keeps its models", how=ended.how)
            self._down(f"the relay to the model server {ended.how}")
            self._wake()

    def _death_behind(self, status: int) -> Death:
        """Returns the end of the foreign server behind a relay."""
        if self._foreign is not None:
            return self._foreign.ended(hung=status == HUNG)
        return Death("does not answer", EndCause.HANG) if status == HUNG else Death("has ended", EndCause.EXIT)

    def _died(self, death: Death) -> None:
        log.warning("model server died", how=death.how, cause=death.cause.value)
        self._down(f"the model server {death.how}")
        try:
            self._on_death(death)
        finally:
            self._board.reset()
            self._wake()

    def _down(self, why: str) -> None:
        self.state = State.DOWN
        self.why_down = why
        self._down_since = time.monotonic()
        self._ready.clear()
        spi, self.spi = self.spi, None
        if spi is not None:
            self._tasks.start(spi.close(), "close spi")

    def _wake(self) -> None:
        dead, self._dead = self._dead, asyncio.Event()
        dead.set()
