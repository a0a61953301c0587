"""One child process of a local mesh: started, waited for, started again when it dies or hangs, taken down.

Before it was ready for the first time its death is a failure of the start, told with its last lines: starting it again
would repeat what is wrong and hide it. Afterwards its death is an event: it is started again, at once the first time
and after a growing pause when it keeps dying.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from mesh import process
from mesh.local import lines
from mesh.local.settings import UpError
from mesh.telemetry import logs

log = logs.get(__name__)

FIRST_PAUSE = 0.2
LONGEST_PAUSE = 15.0
STEADY = 30.0
"""Seconds that a child must have lived for its next death to count as the first."""

POLL = 0.05
TAIL = 15
"""Last lines of a child that failed to start, shown with the failure."""


@dataclass(frozen=True, slots=True)
class Part:
    """What to run. `argv` is asked anew for each start, because ports may differ."""

    name: str
    argv: Callable[[], Sequence[str]]
    ready: Callable[[], Awaitable[str]]  # an empty text, or what is still missing
    grace: float  # seconds to end in, before it is killed
    ask: Callable[[], Awaitable[bool]] | None = None  # whether it answers; None: it has a heartbeat of ours


@dataclass(frozen=True, slots=True)
class ChildStatistics:
    """How a child is."""

    name: str
    pid: int | None  # None: not running
    starts: int


class Child:
    """Minds one part. `on_line` gets its name and every line of its output."""

    def __init__(
        self,
        part: Part,
        on_line: Callable[[str, str], None],
        *,
        spawn: Callable[..., Awaitable[process.Process]] | None = None,
    ) -> None:
        self.part = part
        self.starts = 0
        self._on_line = on_line
        self._spawn = spawn or process.spawn
        self._running: process.Process | None = None
        self._watch: process.Watch | None = None
        self._answers: process.Answers | None = None
        self._minder: asyncio.Task[None] | None = None
        self._stopping = False

    def statistics(self) -> ChildStatistics:
        """Its process, and how often it was started."""
        running = self._running
        return ChildStatistics(
            self.part.name, running.pid if running and running.returncode is None else None, self.starts
        )

    async def start(self, timeout: float) -> None:
        """Starts it and waits until it is ready. Raises UpError with its last lines where that does not come."""
        began = time.monotonic()
        log.info("starting", part=self.part.name)
        await self._launch()
        assert self._running is not None
        missing = "nothing known"
        while True:
            if self._running.returncode is not None:
                await self._running.wait(5.0)  # its last lines
                raise UpError(self._failed(self._how(self._running.returncode)))
            missing = await self.part.ready()
            if not missing:
                break
            if time.monotonic() - began > timeout:
                raise UpError(self._failed(f"is not ready after {timeout:g} s: {missing}"))
            await asyncio.sleep(POLL)
        log.info("ready", part=self.part.name, seconds=round(time.monotonic() - began, 1))
        self._minder = asyncio.get_running_loop().create_task(self._mind(), name=f"mind {self.part.name}")

    async def minded(self) -> None:
        """Returns, or raises, when the child is minded no more. Only `stop` should make it do so."""
        assert self._minder is not None
        await asyncio.shield(self._minder)

    def leave(self) -> None:
        """From now on its end is wanted, and bounded by its grace."""
        self._stopping = True
        self._unwatch()

    async def stop(self) -> None:
        """Ends it, killing it where it does not within its grace. Safe to call at any time, more than once."""
        self.leave()
        if self._minder is not None:
            self._minder.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._minder
            self._minder = None
        if self._running is not None and self._running.returncode is None:
            await self._running.terminate(self.part.grace)
            log.info("stopped", part=self.part.name)

    def kill(self) -> None:
        """Ends it at once."""
        self.leave()
        if self._running is not None:
            self._running.kill()

    async def _launch(self) -> None:
        name, ask = self.part.name, self.part.ask
        # An agent blames the models that were at work when it was killed. One that was stopped from outside must not.
        innocent = self._watch is not None and self._watch.hung is not None and self._watch.hung.stopped
        self.starts += 1
        try:
            running = await self._spawn(
                list(self.part.argv()),
                name=name,
                on_line=lambda line: self._on_line(name, line),
                env={**os.environ, process.STOPPED_BEFORE: "1"} if innocent else None,
                beats=ask is None,
            )
        except OSError as error:
            raise UpError(f"{name} cannot be started: {error}") from error
        self._running = running
        self._unwatch()
        if ask is not None:
            self._answers = process.Answers(ask, name=name)
        heard = running.heard if self._answers is None else self._answers.last
        self._watch = process.Watch(running, heard)

    def _unwatch(self) -> None:
        if self._watch is not None:
            self._watch.close()
        if self._answers is not None:
            self._answers.close()
            self._answers = None

    async def _mind(self) -> None:
        pause = FIRST_PAUSE
        while True:
            assert self._running is not None
            began = time.monotonic()
            returncode = await self._running.wait()
            if self._stopping:
                return
            if time.monotonic() - began > STEADY:
                pause = FIRST_PAUSE
            log.warning("died, starting it again", part=self.part.name, how=self._how(returncode), pause_s=pause)
            await asyncio.sleep(pause)
            pause = min(pause * 3, LONGEST_PAUSE)
            try:
                await self._launch()
            except UpError as error:  # out of processes, out of memory: as if it had died at once
                log.error("cannot be started", part=self.part.name, error=str(error))

    def _how(self, returncode: int) -> str:
        hung = self._watch.hung if self._watch is not None else None
        return process.describe_exit(returncode) if hung is None else hung.why

    def _failed(self, how: str) -> str:
        assert self._running is not None
        rows: list[str] = []
        for line in self._running.tail:
            data = lines.parse(line)
            rows += [line] if data is None else lines.readable(data, name=self.part.name)
        shown = [f"    {row}" for row in rows[-TAIL:]]
        return "\n".join([f"{self.part.name} {how}", *(["its last lines:", *shown] if shown else [])])
