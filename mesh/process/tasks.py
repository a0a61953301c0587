"""The background tasks of a process: referenced while they run, logged when they fail, and ended together.

A long-lived task is a *duty*, a row in the process's table of duties. The row says what the process lacks without the
duty, and whether the duty is *essential* or *expendable*. A process whose essential duty has ended only looks alive:
for example, it no longer follows changes, or starts no workers. The end of an essential duty, for any reason, therefore
ends the process with that reason, and its parent, or Kubernetes, starts it again. An expendable duty that fails is
logged and started again after a growing pause.

A duty may also hang, because it awaits an event that never comes. A duty that runs periodically therefore reports each
turn of its loop (`turned`). If an essential duty reports none for its `turns` seconds, it counts as ended. Silence is
counted as for processes (`hang`): time in which this process was stopped or delayed does not count. A loop that waits
for events has no limit.
"""

import asyncio
import contextvars
import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from mesh.process import hang, restarts
from mesh.telemetry import logs

log = logs.get(__name__)

AGAIN = restarts.RestartPolicy(first=1.0, longest=60.0, steady=300.0)
"""The pauses before an expendable duty that failed is started again."""

_AGAIN = 1.0  # seconds
_LOOK = 1.0  # seconds between two checks whether the duties' loops turn


@dataclass(frozen=True, slots=True)
class Duty:
    """A long-lived task of a process: a row in the process's table of duties."""

    name: str
    without: str  # what the process lacks without it
    essential: bool = True
    turns: float = 0.0  # seconds within which its loop must turn; 0: it waits for events, however long


class _Pulse:
    """The time of a duty's last turn, by the monotonic clock."""

    __slots__ = ("last",)

    def __init__(self) -> None:
        self.last = time.monotonic()


_pulse: contextvars.ContextVar[_Pulse | None] = contextvars.ContextVar("pulse", default=None)


def turned() -> None:
    """Notes that the loop of the running duty has turned. Does nothing outside a duty."""
    if (pulse := _pulse.get()) is not None:
        pulse.last = time.monotonic()


class _Standing:
    """A running duty whose loop is checked."""

    __slots__ = ("hang", "pulse", "task", "turns")

    def __init__(self, task: "asyncio.Task[None]", pulse: _Pulse, turns: float) -> None:
        self.task = task
        self.pulse = pulse
        self.turns = turns
        self.hang = hang.Hang(hang.HangLimits(silent=turns, suspect=turns, interval=_LOOK))

    def hangs(self, now: float) -> bool:
        verdict = self.hang.look(hang.Observation(now, "S", 0.0, False, self.pulse.last))
        return verdict.doing is hang.ProcessState.HUNG


class Tasks:
    """A set of running tasks. asyncio itself keeps only weak references to them."""

    __slots__ = ("_awaited", "_closing", "_duties", "_held", "_on_lost", "_timer")

    def __init__(
        self, on_lost: Callable[[str], None] | None = None, *, awaited: tuple[type[Exception], ...] = ()
    ) -> None:
        """Makes an empty set. `on_lost` is called with the reason whenever an essential duty ends or hangs. `awaited`
        lists errors that are not logged, because the code that awaits the tasks receives them."""
        self._awaited = awaited
        self._on_lost = on_lost
        self._held: set[asyncio.Task[Any]] = set()
        self._duties: list[_Standing] = []  # duties whose loops are checked
        self._timer: asyncio.TimerHandle | None = None
        self._closing = False

    def __len__(self) -> int:
        return len(self._held)

    def start(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Starts a task that ends by itself. An exception that leaves the task is logged, unless it is among the
        `awaited` errors."""
        return self._hold(asyncio.get_running_loop().create_task(work, name=name))

    def run(self, duty: Duty, work: Callable[[], Coroutine[Any, Any, None]], which: str = "") -> asyncio.Task[None]:
        """Starts a duty. `which` distinguishes several duties of one kind. If an essential duty ends or hangs before
        `close`, `on_lost` gets the reason; an expendable one is started again after each failure."""
        pulse = _Pulse()
        context = contextvars.copy_context()
        context.run(_pulse.set, pulse)
        name = f"{duty.name} {which}".rstrip()
        coroutine = work() if duty.essential else self._again(name, work)
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(coroutine, name=name, context=context)
        if duty.essential:
            task.add_done_callback(self._essential_ended)
        if duty.turns and duty.essential:
            self._duties.append(_Standing(task, pulse, duty.turns))
            if self._timer is None:
                self._look()
        return self._hold(task)

    async def settle(self, timeout: float) -> None:
        """Waits at most `timeout` seconds until all current tasks have ended. Tasks that have not ended continue."""
        if self._held:
            await asyncio.wait(set(self._held), timeout=timeout)

    async def close(self) -> None:
        """Cancels all tasks and waits until they have ended."""
        self._closing = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        try:
            while self._held:
                tasks = set(self._held)
                for task in tasks:
                    task.cancel()
                # Repeated: `wait_for` of Python 3.11 loses a cancellation that arrives together with its result.
                await asyncio.wait(tasks, timeout=_AGAIN)
        finally:
            self._closing = False

    def _hold(self, task: asyncio.Task[Any]) -> asyncio.Task[Any]:
        self._held.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._held.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if not isinstance(error, self._awaited):
            log.error("background task failed", task=task.get_name(), exc_info=error)

    def _essential_ended(self, task: asyncio.Task[None]) -> None:
        if self._closing:
            return
        if task.cancelled():
            how = "was cancelled"
        else:
            error = task.exception()
            how = "ended" if error is None else f"failed: {type(error).__name__}: {error}"
        self._lose(task, how)

    def _lose(self, task: "asyncio.Task[None]", how: str) -> None:
        self._duties = [standing for standing in self._duties if standing.task is not task]
        if self._on_lost is not None:
            self._on_lost(f"the task '{task.get_name()}', which this process cannot do without, {how}")

    async def _again(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Runs an expendable duty until it returns, and starts it again whenever it fails."""
        lives = restarts.Restarts(AGAIN)
        while True:
            lives.began(time.monotonic())
            lives.ready(time.monotonic())
            try:
                return await work()
            except Exception:
                decided = lives.ended(time.monotonic(), luck=random.random())
                assert isinstance(decided, restarts.Again)  # restarts without a limit never give up
                log.exception("background task failed and is started again", task=name, pause_s=round(decided.pause, 1))
                await asyncio.sleep(decided.pause)

    def _look(self) -> None:
        now = time.monotonic()
        for standing in list(self._duties):
            if standing.hangs(now):
                self._lose(standing.task, f"hangs: it should turn at least every {standing.turns:g} s")
        self._timer = asyncio.get_running_loop().call_later(_LOOK, self._look) if self._duties else None
