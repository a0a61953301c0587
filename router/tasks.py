"""Background tasks that are held, whose failures are logged, and that end with their owner.

What the process cannot do without is *essential*: its end, however it comes, is told to `on_lost`, which ends the
process with that reason. A process that follows nothing any more, or starts no workers, only looks alive.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from mesh.telemetry import logs

log = logs.get(__name__)


class Tasks:
    """A set of running tasks. asyncio itself holds them only weakly."""

    __slots__ = ("_awaited", "_on_lost", "_tasks")

    def __init__(
        self, on_lost: Callable[[str], None] | None = None, *, awaited: tuple[type[Exception], ...] = ()
    ) -> None:
        """`on_lost` gets why an essential task ended, once for each. `awaited`: errors that somebody awaits these tasks
        for, and hears of; they are not logged."""
        self._awaited = awaited
        self._on_lost = on_lost
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Starts it. An exception out of it is logged, once."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def essential(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Starts what must never end. Only `close` ends it in silence."""
        task = self.spawn(work, name)
        task.add_done_callback(self._lost)
        return task

    def _lost(self, task: asyncio.Task[Any]) -> None:
        if task.cancelled() or self._on_lost is None:
            return
        error = task.exception()
        how = "ended" if error is None else f"failed: {type(error).__name__}: {error}"
        self._on_lost(f"{task.get_name()}, which this process cannot do without, {how}")

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if not isinstance(error, self._awaited):
            log.error("background task failed", task=task.get_name(), exc_info=error)

    def __len__(self) -> int:
        return len(self._tasks)

    async def close(self) -> None:
        """Cancels all of them and waits until they have ended."""
        while self._tasks:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
