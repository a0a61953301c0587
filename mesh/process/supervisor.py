"""A supervisor of one child process: starts it, waits for it, watches it, and restarts it when it dies or hangs.

If the first start fails, `start` raises an error: a retry would repeat the fault, and hide it. After a later death,
another child is started, after the pause that `restarts` chooses. A child that hangs is killed by its `Watch`, by the
rules in `hang`, and then counts as dead.

`run` is a duty of the process (`tasks`), and essential: without it, a death would be permanent. A `Program` and
callbacks say what to run, how to find out that it is ready, and what to do after its death. The event loop calls the
callbacks, which must be quick.
"""

import asyncio
import enum
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from mesh.process import hang, restarts
from mesh.process.child import Process, describe_exit
from mesh.process.tasks import turned
from mesh.process.watcher import Answers, Watch
from mesh.telemetry import logs

log = logs.get(__name__)

_SLICE = 5.0  # seconds of waiting for the child's end between two turns of the duty
_POLL_FIRST, _POLL_MAX = 0.005, 0.05  # seconds between two checks whether the child is ready


class StartFailed(Exception):
    """A failed start. The text comes from `Program.explain`."""


class State(enum.Enum):
    """The state of a supervised child."""

    STARTING = "starting"
    READY = "ready"
    DOWN = "down"  # does not run: it has not been started yet, or is about to be started again
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class ChildLife:
    """The identity of one life of the child."""

    number: int  # from 1
    innocent: bool  # the former life was killed because it had been stopped from outside: the child did not cause that


@dataclass(frozen=True, slots=True)
class Ended:
    """The way in which one process of a child ended."""

    how: str  # for people: "ended with status 1"
    code: int  # its exit status; -N if signal N ended it
    hung: hang.HangVerdict | None  # why the supervisor killed it; None: it did not


@dataclass(frozen=True, slots=True)
class Program:
    """A program that a supervisor keeps running. Times are in seconds."""

    name: str
    spawn: Callable[[ChildLife], Awaitable[Process]]  # may raise OSError
    missing: Callable[[], Awaitable[str]] | None = None
    """A function that returns what the start still waits for, or "" once the program is ready. It may raise
    StartFailed. None means that the program is ready as soon as it runs."""
    ask: Callable[[], Awaitable[bool]] | None = None
    """A function that returns whether the program answers. For a program without a heartbeat, the answers are the signs
    of life."""
    heard: Callable[[], float] | None = None
    """A function that returns the time of the program's last sign of life, for a program with its own kind of signs. If
    it is None, the heartbeat or `ask` is used."""
    policy: restarts.RestartPolicy = restarts.RestartPolicy()  # noqa: RUF009 - frozen
    limits: hang.HangLimits = hang.HangLimits()  # noqa: RUF009 - frozen
    start_timeout: float = 60.0  # until the program is ready
    wait_again: bool = True  # wait at later starts too; otherwise those count as ready when they run
    grace: float = 0.0  # to end, if the program is not ready in time
    explain: Callable[[str, tuple[str, ...]], str] = lambda how, lines: how
    """A function that returns the text of StartFailed, from a clause that says what happened, and the last lines of
    output."""


class Supervisor:
    """The supervisor of one child. Call `start` (optional), then `run`, and in any case `stop`."""

    def __init__(
        self,
        program: Program,
        *,
        on_ready: Callable[[], None] = lambda: None,
        on_death: Callable[[Ended], None] = lambda ended: None,
        on_hung: Callable[[], None] = lambda: None,
        on_given_up: Callable[[str], None] = lambda why: None,
        on_turn: Callable[[], None] = lambda: None,
    ) -> None:
        """Makes a supervisor. It calls `on_ready` whenever the child is ready, `on_death` at each unwanted end,
        `on_hung` before it kills a child that hangs, `on_turn` every few seconds of a life, and `on_given_up` with the
        reason why it will not start the child again."""
        self.program = program
        self.state = State.DOWN
        self.child: Process | None = None
        self.starts = self.deaths = 0
        self._on_ready = on_ready
        self._on_death = on_death
        self._on_hung = on_hung
        self._on_given_up = on_given_up
        self._on_turn = on_turn
        self._lives = restarts.Restarts(program.policy)
        self._watch: Watch | None = None
        self._answers: Answers | None = None
        self._spawning = asyncio.Lock()
        self._leaving = False

    @property
    def pid(self) -> int | None:
        """The running child's process id, or None if no child runs."""
        return self.child.pid if self.child is not None and self.child.returncode is None else None

    @property
    def trouble(self) -> str | None:
        """The reason not to rely on the running child now, or None if it is healthy."""
        return self._watch.trouble if self._watch is not None and self.state is State.READY else None

    async def start(self) -> None:
        """Starts the child for the first time, and waits until it is ready. Raises StartFailed. `start` may then be
        called again."""
        try:
            await self._launch(self.program.missing)
        except StartFailed:
            self._lives.ended(time.monotonic())
            raise

    async def run(self) -> None:
        """Keeps the child running. Returns only if the child is given up."""
        again = self.program.missing if self.program.wait_again else None
        while True:
            if self.state is State.READY:
                ended = await self._until_dead()
                await self._unless_leaving()
                self._died(ended)
                why = ended.how
            else:
                try:
                    await self._launch(again)
                    if self.starts > 1:
                        log.info("process runs again", process_name=self.program.name, pid=self.pid, life=self.starts)
                    continue
                except StartFailed as error:
                    await self._unless_leaving()
                    why = str(error)
                    log.error("process does not start", process_name=self.program.name, why=why)
            decided = self._lives.ended(time.monotonic(), luck=random.random())
            if isinstance(decided, restarts.GivenUp):
                log.error(
                    ("process is given up and not started again"),
                    process_name=self.program.name,
                    why=why,
                    tries=decided.tries,
                )
                self._on_given_up(why)
                return
            if decided.row > 1:
                pause = round(decided.pause, 1)
                log.warning("process keeps dying", process_name=self.program.name, times=decided.row, pause_s=pause)
            await asyncio.sleep(decided.pause)

    def leave(self) -> None:
        """Notes that the child is expected to end from now on. The caller limits the time that the end may take."""
        self._leaving = True
        self.state = State.STOPPED
        self._unwatch()

    async def stop(self, grace: float) -> None:
        """Asks the child to end, and kills it after `grace` seconds. May be called at any time, more than once."""
        self.leave()
        async with self._spawning:
            pass
        if self.child is not None and self.child.returncode is None:
            await self.child.terminate(grace)

    def kill(self) -> None:
        """Kills the child. `run` then handles its end like any other death."""
        if self.child is not None:
            self.child.kill()

    async def _launch(self, missing: Callable[[], Awaitable[str]] | None) -> None:
        """Starts a child, and waits until it is ready. If the start fails, ends the child and raises StartFailed."""
        program = self.program
        turned()
        await self._unless_leaving()
        self._lives.began(time.monotonic())
        async with self._spawning:
            self.state = State.DOWN if self.starts else State.STARTING
            hung = self._watch.hung if self._watch is not None else None
            self._unwatch()
            self.starts += 1
            try:
                child = await program.spawn(ChildLife(self.starts, innocent=hung is not None and hung.stopped))
            except OSError as error:  # out of processes, memory or descriptors, which passes
                raise StartFailed(program.explain(f"cannot be started: {error.strerror or error}", ())) from error
            self.child = child
            if not self._leaving:
                self._watch_over(child)
        await self._unless_leaving()
        if missing is not None:
            try:
                await self._until_ready(child, missing)
            except StartFailed:
                await child.terminate(program.grace)
                raise
        await self._unless_leaving()
        self._lives.ready(time.monotonic())
        self.state = State.READY
        self._on_ready()

    async def _until_ready(self, child: Process, missing: Callable[[], Awaitable[str]]) -> None:
        last, timeout = "nothing known", self.program.start_timeout

        async def looking() -> None:
            nonlocal last
            pause = _POLL_FIRST
            while last := await missing():
                turned()
                await asyncio.sleep(pause)
                pause = min(pause * 1.5, _POLL_MAX)

        died, ready = asyncio.ensure_future(child.wait()), asyncio.ensure_future(looking())
        try:
            await asyncio.wait({died, ready}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if ready.done():
                ready.result()
            elif died.done():
                raise StartFailed(self.program.explain(self._ended(died.result()).how, child.tail))
            else:
                raise StartFailed(self.program.explain(f"is not ready after {timeout:g} s: {last}", child.tail))
        finally:
            died.cancel()
            ready.cancel()
            await asyncio.wait({died, ready})

    async def _until_dead(self) -> Ended:
        assert self.child is not None
        while True:
            turned()
            try:
                return self._ended(await self.child.wait(_SLICE))
            except TimeoutError:
                self._on_turn()
                if self._watch is not None and self._watch.failed is not None:
                    raise RuntimeError(f"{self.program.name} is no longer watched") from self._watch.failed

    def _ended(self, code: int) -> Ended:
        hung = self._watch.hung if self._watch is not None else None
        return Ended(describe_exit(code) if hung is None else hung.why, code, hung)

    def _died(self, ended: Ended) -> None:
        self.state = State.DOWN
        self.deaths += 1
        log.error("process died", process_name=self.program.name, how=ended.how, life=self.starts)
        self._on_death(ended)

    async def _unless_leaving(self) -> None:
        """Waits until cancelled if the child is expected to end. Otherwise returns immediately."""
        if self._leaving:
            await asyncio.Event().wait()

    def _watch_over(self, child: Process) -> None:
        program = self.program
        if program.ask is not None:
            self._answers = Answers(program.ask, name=program.name)
        heard = program.heard or (child.heard if self._answers is None else self._answers.last)
        self._watch = Watch(child, heard, limits=program.limits, on_hung=lambda _: self._on_hung())

    def _unwatch(self) -> None:
        if self._watch is not None:
            self._watch.close()
        if self._answers is not None:
            self._answers.close()
            self._answers = None
