"""The watch over a child process. A child that hangs is killed. Its owner then starts another, as after any death.

A child gives signs of life by its heartbeat. For a third-party program, which has no heartbeat, the answers to requests
are the signs of life (`Answers`). Twice a second, the watcher looks at these signs and at the child's state in /proc,
and `hang` decides.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

from mesh.process import hang, proc
from mesh.process.heartbeat import PERIOD
from mesh.process.tasks import turned
from mesh.telemetry import logs

log = logs.get(__name__)

HUNG_HELP = "Processes that hung and were replaced."
"""Help text of the metric `mesh_hung_processes`, which several kinds of processes have."""

STOPPED_BEFORE = "MESH_STOPPED_BEFORE"
"""Environment variable of a process whose predecessor was killed because a signal or a debugger had stopped it. No
model is to blame for such a death."""

_FRESH = 3 * PERIOD  # seconds; a child heard this recently needs no closer look


class Watched(Protocol):
    """The part of a child that a watch needs: `mesh.process.Process`."""

    name: str
    pid: int

    @property
    def returncode(self) -> int | None:
        """The exit status, or None while the child runs."""

    def kill(self) -> None:
        """Kills the child and everything in its session."""


class Watch:
    """A watch over one life of a child, from the watch's creation until the child has ended or `close` is called.

    `heard` returns the time of the child's last sign of life, in seconds of the monotonic clock, or 0 if there was
    none. `on_hung` is called once, before the child is killed.
    """

    def __init__(
        self,
        child: Watched,
        heard: Callable[[], float],
        *,
        limits: hang.HangLimits = hang.HangLimits(),  # noqa: B008 - frozen
        on_hung: Callable[[hang.HangVerdict], None] | None = None,
    ) -> None:
        self.verdict = hang.WELL
        self._child = child
        self._heard = heard
        self._hang = hang.Hang(limits)
        self._on_hung = on_hung
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"watch {child.name}")

    @property
    def hung(self) -> hang.HangVerdict | None:
        """The reason why this watch killed the child, or None if it did not."""
        return self.verdict if self.verdict.doing is hang.ProcessState.HUNG else None

    @property
    def trouble(self) -> str | None:
        """The reason not to rely on this child now, or None if it is healthy."""
        return None if self.verdict.doing is hang.ProcessState.WELL else f"{self._child.name} {self.verdict.why}"

    @property
    def failed(self) -> BaseException | None:
        """The error that ended the watch, or None. Such an error is a bug in Mesh."""
        return self._task.exception() if self._task.done() and not self._task.cancelled() else None

    def close(self) -> None:
        """Ends the watch; the verdict stays."""
        self._task.cancel()

    async def _run(self) -> None:
        child, limits = self._child, self._hang.limits
        while child.returncode is None:
            turned()  # the child's owner waits for its end, however long it lives
            before = self.verdict
            try:
                self.verdict = verdict = self._hang.look(self._look())
            except Exception:  # a bug of Mesh must not end the watch
                log.exception("observing a process failed", process_name=child.name, pid=child.pid)
                await asyncio.sleep(limits.interval)
                continue
            if verdict.doing is hang.ProcessState.HUNG:
                log.error("process hangs, replacing it", process_name=child.name, pid=child.pid, why=verdict.why)
                try:
                    if self._on_hung is not None:
                        self._on_hung(verdict)
                finally:
                    child.kill()
                return
            if verdict.doing is hang.ProcessState.SUSPECT and before.doing is hang.ProcessState.WELL:
                log.warning("process may hang", process_name=child.name, pid=child.pid, why=verdict.why)
            await asyncio.sleep(limits.interval)

    def _look(self) -> hang.Observation:
        heard = self._heard()
        now = time.monotonic()
        seen = proc.stat(self._child.pid)
        # The threads are examined only if it matters: a server may have a hundred.
        runnable = now - heard > _FRESH and proc.runnable(self._child.pid)
        if seen is None:
            # Counts for nothing: the child has just ended, or /proc does not show it.
            return hang.Observation(now, "", 0.0, True, heard)
        return hang.Observation(now, seen.state, seen.cpu, runnable, heard)


class Answers:
    """Signs of life of a program without a heartbeat: requests are sent to it, and each answer counts as a sign of
    life."""

    def __init__(self, ask: Callable[[], Awaitable[bool]], *, name: str, interval: float = 1.0) -> None:
        """Starts to send requests with `ask`, which must have its own time limit, and must return True for any
        answer."""
        self._ask = ask
        self._interval = interval
        self._last = 0.0
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"ask {name}")

    def last(self) -> float:
        """Returns the time of the last answer, in seconds of the monotonic clock, or 0 before the first."""
        return self._last

    def close(self) -> None:
        """Stops sending requests."""
        self._task.cancel()

    async def _run(self) -> None:
        while True:
            try:
                answered = await self._ask()
            except Exception:
                log.exception("asking a process for a sign of life failed")
                answered = False
            if answered:
                self._last = time.monotonic()
            await asyncio.sleep(self._interval)
