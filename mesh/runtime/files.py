"""The pulled files of this pod's models: one folder a model, and never a removal that hits the next pull.

The puller fetches and removes whenever it is told; a model may be loaded again while the files of its former copy are
still being removed, in a thread. So here whoever pulls waits for that removal first.
"""

import asyncio

from mesh.runtime.tasks import Tasks
from mesh.telemetry import logs
from puller.puller import Pulled, Puller
from puller.source import Source

log = logs.get(__name__)


class Files:
    """A puller, and the removals under way."""

    def __init__(self, puller: Puller) -> None:
        self._puller = puller
        self._removals: dict[str, asyncio.Task[None]] = {}
        self._tasks = Tasks()

    async def pull(self, source: Source, *, into: str) -> Pulled:
        """Fetches a model. Raises PullError."""
        while (removal := self._removals.get(into)) is not None:
            await asyncio.wait({removal})
        return await self._puller.pull(source, into=into)

    async def remove(self, into: str) -> None:
        """Removes what was pulled; goes on if the caller is cancelled."""
        await asyncio.wait({self.discard(into)})

    def discard(self, into: str) -> "asyncio.Task[None]":
        """Removes it in the background."""
        removal = self._removals.get(into)
        if removal is None:
            removal = self._removals[into] = self._tasks.start(self._remove(into), f"remove files of {into}")
        return removal

    async def _remove(self, into: str) -> None:
        try:
            await self._puller.remove(into)
        except OSError as error:
            log.warning("files of a model were not removed", model=into, error=str(error))
        finally:
            del self._removals[into]

    async def close(self) -> None:
        """Lets removals finish for a moment, and closes the puller."""
        await self._tasks.settle(2.0)
        await self._tasks.close()
        await self._puller.close()
