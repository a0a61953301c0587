"""Background tasks of the agent: held until they end, their failures logged, all ended together."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from mesh.telemetry import logs

log = logs.get(__name__)


class Tasks:
    """Holds tasks, because the event loop does so only weakly."""

    __slots__ = ("_held", "_on_lost")

    def __init__(self, on_lost: Callable[[str], None] | None = None) -> None:
        """`on_lost` gets why an essential task ended."""
        self._on_lost = on_lost
        self._held: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._held)

    def start(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Runs it in the background."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._held.add(task)
        task.add_done_callback(self._done)
        return task

    def essential(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Runs what must never end: `on_lost` is told where it does. Only `close` ends it in silence."""
        task = self.start(work, name)
        task.add_done_callback(self._lost)
        return task

    def _lost(self, task: asyncio.Task[Any]) -> None:
        if task.cancelled() or self._on_lost is None:
            return
        error = task.exception()
        how = "ended" if error is None else f"failed: {type(error).__name__}: {error}"
        self._on_lost(f"{task.get_name()}, which this process cannot do without, {how}")

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._held.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a background task failed", task=task.get_name(), exc_info=error)

    async def settle(self, timeout: float) -> None:
        """Waits until all that run now have ended, `timeout` seconds at most; they go on if they have not."""
        if self._held:
            await asyncio.wait(set(self._held), timeout=timeout)

    async def close(self) -> None:
        """Cancels all of them and waits until they have ended."""
        while self._held:
            tasks = set(self._held)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
