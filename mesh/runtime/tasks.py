"""Background tasks of the agent: held until they end, their failures logged, all ended together."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from mesh.telemetry import logs

log = logs.get(__name__)


class Tasks:
    """Holds tasks, because the event loop does so only weakly."""

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._held)

    def start(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Runs it in the background."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._held.add(task)
        task.add_done_callback(self._done)
        return task

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
