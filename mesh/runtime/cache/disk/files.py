"""The pulled files of this pod's models: one folder for each model. A folder's removal never overlaps the model's next
pull.

The puller fetches and removes files immediately when it is asked to. But a model may be loaded again while a thread is
still removing the files of its previous copy. A pull here therefore first waits for that removal.
"""

import asyncio

from mesh.options.values import format_bytes
from mesh.process.tasks import Tasks
from mesh.telemetry import logs
from puller.puller import Pulled, Puller
from puller.source import Source

log = logs.get(__name__)

_LONG = 10.0  # seconds after which a pull is logged, and between two such lines


class Files:
    """A puller, and the removals in progress."""

    def __init__(self, puller: Puller) -> None:
        self._puller = puller
        self._removals: dict[str, asyncio.Task[None]] = {}
        self._doomed: set[str] = set()
        self._tasks = Tasks()

    async def pull(self, source: Source, *, into: str, tag: str = "") -> Pulled:
        """Fetches a model's files, and their optimised form with the given tag, if one is kept. Raises PullError."""
        while (removal := self._removals.get(into)) is not None:
            await asyncio.wait({removal})
        return await self._puller.pull(source, into=into, tag=tag)

    def short(self, needs: int) -> int:
        """Returns the number of bytes of files in use that must be removed from the disk before `needs` bytes fit."""
        return self._puller.short(needs)

    async def made(self, into: str, size: int) -> None:
        """Counts files of `size` bytes that the model server's side has made of a model's files, until these are
        removed."""
        await self._puller.made(into, size)

    @property
    def removing(self) -> bool:
        """True while pulled files are being removed, or are about to be, so that the disk will have more room."""
        return bool(self._removals or self._doomed)

    def doom(self, into: str) -> None:
        """Announces that a model's pulled files will be removed, for a load that first has to undo other steps."""
        self._doomed.add(into)

    async def remove(self, into: str) -> None:
        """Removes the pulled files. Continues even if the caller is cancelled."""
        await asyncio.wait({self.discard(into)})

    def discard(self, into: str) -> "asyncio.Task[None]":
        """Removes the pulled files in the background. Returns the task that removes them."""
        removal = self._removals.get(into)
        if removal is None:
            removal = self._removals[into] = self._tasks.start(self._remove(into), f"remove files of {into}")
        return removal

    async def _remove(self, into: str) -> None:
        try:
            await self._puller.remove(into)
        except OSError as error:
            log.warning("the files of a model could not be removed", model=into, error=str(error))
        finally:
            del self._removals[into]
            self._doomed.discard(into)

    async def watch(self) -> None:
        """Logs each long pull periodically, until cancelled."""
        while True:
            await asyncio.sleep(_LONG)
            for into, pull in self._puller.statistics().progress.items():
                if pull.seconds >= _LONG:
                    log.info(
                        "pulling",
                        model=into,
                        done=format_bytes(pull.done_bytes),
                        of=format_bytes(pull.total_bytes) if pull.total_bytes is not None else "?",
                        rate=f"{format_bytes(pull.bytes_per_second)}/s",
                        s=round(pull.seconds),
                    )

    async def close(self) -> None:
        """Waits at most 2 s for removals to finish, and closes the puller."""
        await self._tasks.settle(2.0)
        await self._tasks.close()
        await self._puller.close()
