"""The model server as a child: started, waited for, watched, and started again when it dies.

It is a process of its own so that a model that crashes it takes neither the agent nor its knowledge along. A death is
told to `on_death` before anything else is done, while the use board still says what was loading and running. Then
another one is started, at once the first time, and after a growing pause while it keeps dying young. One that does not
even start, again and again, is given up: what it lacks, a GPU that has gone, say, comes back with a new pod, or not.

A server that hangs is treated as one that has died, and killed first (`mesh.process.watcher`). It is seen by its
heartbeat on the board, which its event loop writes every second, so looking costs nothing. One that was stopped from
outside (SIGSTOP) is replaced like any other, and said to be so: no model is the cause of that.

How it ended is told as far as it can be (`placement.suspects.Cause`): a crash with its thread, which Python's fault
handler writes; a SIGKILL is for memory where the kernel has counted one more such kill, and from outside where not.
"""

import asyncio
import contextlib
import enum
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mesh import process
from mesh.host.oomkills import oom_kills
from mesh.runtime.servers.spi import Spi, SpiError, Status
from mesh.runtime.sharedmemory.board import Board
from mesh.telemetry import logs
from placement.suspects import Cause

log = logs.get(__name__)

PAUSE_FIRST, PAUSE_MAX = 0.5, 30.0  # seconds; the first restart of a server that had lived has none
STEADY = 60.0
"""Seconds that a server must have lived for its death to count as a first one."""

GIVE_UP = 10
"""Starts in vain, one after the other, until it is given up: after some two minutes."""

START_TIMEOUT = 120.0
"""Seconds from its start until it is ready: onnxruntime from a cold disk, a GPU that wakes up."""

_LEAST_SILENCE = 3.0  # seconds; its loop beats once a second
_STATUS_TIMEOUT = 10.0
_OOM_LOOK = 5.0  # seconds between two looks at how often the kernel has killed for memory
_CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGBUS, signal.SIGILL}
_CRASHED_IN = "Current thread 0x"  # a line of Python's fault handler, at each of those signals
_POLL_FIRST, _POLL_MAX = 0.005, 0.05  # seconds between two looks for its socket


class ServerFailed(Exception):
    """The server cannot be started. The text has its last lines."""


class State(enum.Enum):
    """How the server is."""

    STARTING = "starting"
    READY = "ready"
    DOWN = "down"  # died, and is waited for or started again
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Plan:
    """How to start it. `argv` is without the socket, which differs in each life: a server's plan may be replaced
    between two."""

    argv: tuple[str, ...]
    run_dir: Path
    hang_timeout: float  # seconds of silence after which it is killed


@dataclass(frozen=True, slots=True)
class Death:
    """How a server ended."""

    how: str  # for people: "ended with status 1"
    cause: Cause
    thread: int = 0  # that crashed, as `threading.get_ident` gives it there; 0: not known


class ServerProcess:
    """See the module's text. Callbacks come from the event loop and must be quick."""

    plan: Plan
    """How it is started: as `start` was given it, or as it was replaced since."""

    def __init__(
        self,
        board: Board,
        *,
        on_death: Callable[[Death], None],
        on_ready: Callable[[], None],
        on_given_up: Callable[[str], None],
        on_hung: Callable[[], None] = lambda: None,
        on_line: Callable[[str], None] | None = None,
    ) -> None:
        """`on_death` gets how it ended. `on_ready` is called at each start, the first included,
        `on_given_up` gets why no other one will be started, `on_hung` is called before one that hangs is killed."""
        self._board = board
        self._on_death = on_death
        self._on_ready = on_ready
        self._on_given_up = on_given_up
        self._hung = on_hung
        self._pass_on = on_line or _pass_on
        self._crashed_in = 0  # thread, as the fault handler of this life has told
        self._oom_kills = 0  # of this machine, as of the last look; -1: not told
        self._child: process.Process | None = None
        self._watch: process.Watch | None = None
        self._task: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._dead = asyncio.Event()  # replaced at each death
        self._ended_for: tuple[str, Cause] | None = None  # why we have ended it ourselves
        self.state = State.STARTING
        self.spi: Spi | None = None
        self.status: Status | None = None  # as it said when it became ready
        self.lives = 0
        self.deaths = 0
        self.why_down = ""
        self._down_since = 0.0  # monotonic; 0: it is not down

    @property
    def pid(self) -> int:
        """Of the running server; 0: none."""
        return self._child.pid if self._child is not None and self._child.returncode is None else 0

    @property
    def resident_bytes(self) -> int:
        """Private memory of the running server: files that it maps are not its own. 0: none runs."""
        return _private_bytes(self.pid)

    @property
    def trouble(self) -> str | None:
        """Why the running server is not to be counted on at the moment; None: nothing is known."""
        return self._watch.trouble if self._watch is not None and self.state is State.READY else None

    @property
    def down_for(self) -> float:
        """For how many seconds a server that has served has been down; 0: it is not."""
        return time.monotonic() - self._down_since if self._down_since else 0.0

    async def start(self, plan: Plan) -> Status:
        """Starts it for the first time. Raises ServerFailed with its last lines; it may be called again then."""
        began = time.monotonic()
        self.plan = plan
        status = await self._launch()
        self._task = asyncio.get_running_loop().create_task(self._mind(), name="model server")
        self._task.add_done_callback(self._mind_ended)
        log.info("model server is ready", pid=self.pid, version=status.version, s=round(time.monotonic() - began, 2))
        return status

    async def stop(self, grace: float) -> None:
        """Ends it: asked first, killed after `grace` seconds."""
        self.state = State.STOPPED
        self._ready.clear()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        if self._watch is not None:
            self._watch.close()
        if self._child is not None:
            await self._child.terminate(grace)
        if self.spi is not None:
            await self.spi.close()

    def kill(self, why: str) -> None:
        """Ends it at once; what follows is as after any death."""
        if self._child is not None and self._child.returncode is None:
            self._ended_for = why, Cause.REPLACED
            self._child.kill()

    async def replace(self, why: str, grace: float) -> None:
        """Ends it in order: it takes no more calls and has `grace` seconds to answer those in flight. What follows is
        as after any death."""
        if self._child is not None and self._child.returncode is None:
            self._ended_for = why, Cause.REPLACED
            await self._child.terminate(grace)

    async def ready(self, timeout: float) -> Spi | None:
        """The connection to a server that is ready; None after `timeout` seconds without one."""
        try:
            async with asyncio.timeout(timeout):
                await self._ready.wait()
        except TimeoutError:
            return None
        return self.spi

    async def died(self, life: int, timeout: float) -> bool:
        """Whether that life has ended, or does within `timeout` seconds; `on_death` has been called then."""
        if self.lives == life and self.state is State.READY:
            try:
                async with asyncio.timeout(timeout):
                    await self._dead.wait()
            except TimeoutError:
                return False
        return True

    # --- one life ---

    async def _launch(self) -> Status:
        """One start, until it is ready."""
        self.lives += 1
        self._ended_for, self._crashed_in, self._oom_kills = None, 0, oom_kills()
        socket = self.plan.run_dir / f"spi-{self.lives}"
        child = await process.spawn([*self.plan.argv, "--spi", str(socket)], name="model-server", on_line=self._on_line)
        self._child = child
        if self._watch is not None:
            self._watch.close()
        # Until it is ready, START_TIMEOUT bounds its silence.
        limits = process.Limits(silent=max(self.plan.hang_timeout, _LEAST_SILENCE), start=START_TIMEOUT)
        self._watch = process.Watch(child, self._heard, limits=limits, on_hung=self._on_hung)
        spi = Spi(socket)
        try:
            async with asyncio.timeout(START_TIMEOUT):
                status = await self._until_ready(child, spi)
        except BaseException as error:
            await spi.close()
            child.kill()
            if isinstance(error, TimeoutError):
                raise ServerFailed(f"the model server was not ready after {START_TIMEOUT:g} s") from error
            raise
        self.spi, self.status = spi, status
        self.state, self.why_down, self._down_since = State.READY, "", 0.0
        self._ready.set()
        self._on_ready()
        return status

    async def _until_ready(self, child: process.Process, spi: Spi) -> Status:
        pause = _POLL_FIRST
        while True:
            if child.returncode is not None:
                await child.wait(5.0)
                last = "; ".join(line.strip() for line in child.tail[-5:])
                hung = self._watch.hung if self._watch is not None else None
                how = hung.why if hung is not None else process.describe_exit(child.returncode)
                raise ServerFailed(f"the model server {how}: {last}")
            if spi.listening:
                try:
                    status = await spi.status(timeout=_STATUS_TIMEOUT)
                except SpiError as error:
                    if not error.lost:
                        log.info("model server does not say how it is", why=error.text)
                else:
                    if status.failing:
                        raise ServerFailed("the model server says that it is failing")
                    if status.ready:
                        return status
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, _POLL_MAX)

    async def _mind(self) -> None:
        failed = 0
        while True:
            assert self._child is not None
            began = time.monotonic()
            self._died(await self._until_dead(self._child))
            failed = 0 if time.monotonic() - began > STEADY else failed + 1
            in_vain = 0
            while in_vain < GIVE_UP:
                if failed > 1:
                    pause = min(PAUSE_FIRST * 2 ** min(failed - 2, 16), PAUSE_MAX)
                    log.warning("model server keeps dying", deaths=self.deaths, pause=pause)
                    await asyncio.sleep(pause)
                try:
                    await self._launch()
                    log.info("model server is ready again", pid=self.pid, life=self.lives)
                    break
                except (ServerFailed, OSError) as error:
                    failed = max(failed, 1) + 1
                    in_vain += 1
                    self.why_down = str(error)
                    log.error("model server does not start", why=str(error), tries=in_vain)
            else:
                log.error("model server is given up", why=self.why_down)
                self._on_given_up(f"the model server does not start any more: {self.why_down}")
                return

    def _mind_ended(self, task: asyncio.Task[None]) -> None:
        """Nobody would start the server again: that must not go unnoticed."""
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the model server is minded no more", exc_info=error)
            self._on_given_up(f"nothing looks after the model server any more: {error!r}")

    async def _until_dead(self, child: process.Process) -> Death:
        """Waits for the end of a ready server."""
        while True:
            try:
                code = await child.wait(_OOM_LOOK)
                break
            except TimeoutError:
                self._oom_kills = oom_kills()
        how = process.describe_exit(code)
        hung = self._watch.hung if self._watch is not None else None
        if hung is not None:
            return Death(f"{hung.why} and was killed", Cause.STOPPED if hung.stopped else Cause.HANG)
        if self._ended_for is not None:
            return Death(*self._ended_for)
        if code >= 0:
            return Death(how, Cause.EXIT)
        if -code in _CRASHES:
            return Death(f"was {how}", Cause.CRASH, self._crashed_in)
        if -code != signal.SIGKILL:
            return Death(f"was {how}", Cause.KILLED)
        kills = oom_kills()
        if kills == self._oom_kills >= 0:
            return Death(f"was {how} from outside", Cause.KILLED)
        return Death(f"was {how}{', as the machine had no memory left' if kills >= 0 else ''}", Cause.MEMORY)

    def _on_line(self, line: str) -> None:
        if line.startswith(_CRASHED_IN):
            with contextlib.suppress(ValueError):
                self._crashed_in = int(line[len(_CRASHED_IN) :].split()[0], 16)
        self._pass_on(line)

    def _heard(self) -> float:
        """When the server's event loop last turned, in seconds of the monotonic clock; 0 where it has not said yet."""
        return self._board.beat_ns / 1e9

    def _on_hung(self, _: process.Verdict) -> None:
        self._hung()

    def _died(self, death: Death) -> None:
        self.state = State.DOWN
        self.why_down = f"the model server {death.how}"
        self._down_since = time.monotonic()
        self.deaths += 1
        self._ready.clear()
        spi, self.spi = self.spi, None
        log.error("model server died", how=death.how, life=self.lives)
        if spi is not None:
            self._closing = asyncio.get_running_loop().create_task(spi.close(), name="close spi")
        try:
            self._on_death(death)
        finally:
            self._board.reset()
            dead, self._dead = self._dead, asyncio.Event()
            dead.set()

    _closing: asyncio.Task[None] | None = None


def _private_bytes(pid: int) -> int:
    """Resident memory of a process that is not of a file; 0 where there is no such process."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as statm:
            _, total, shared, *_ = statm.read().split()
    except (OSError, ValueError):
        return 0
    return (int(total) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def _pass_on(line: str) -> None:
    """Its lines are log lines in our own format already."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
