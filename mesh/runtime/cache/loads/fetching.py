"""The fetching of a load's files. If the disk is full, copies are evicted first.

The puller limits the number of concurrent pulls, in total and from each store.
"""

import asyncio
import functools
import time
from collections.abc import Mapping

from mesh.runtime.cache.books.entries import CacheEntry, EntryState
from mesh.runtime.cache.books.ledger import Ledger
from mesh.runtime.cache.books.meters import Meters
from mesh.runtime.cache.disk.files import Files
from mesh.runtime.cache.disk.optimising import Optimising
from mesh.runtime.cache.loads.outcomes import Failed, Refused, Want
from mesh.runtime.cache.loads.rooms import Rooms
from mesh.statuses import Reason
from placement.failures import FailureKind
from puller.errors import Nature, PullError, PullErrorKind
from puller.puller import Pulled
from puller.source import Source

_TIMEOUT = 900.0  # seconds
_ROOM_WAIT = 120.0  # seconds in which a pull may repeatedly lose its room to others


class NotFetched(Exception):
    """A failure to fetch files. `outcome` is the load's outcome."""

    def __init__(self, outcome: Refused | Failed) -> None:
        super().__init__(outcome.text)
        self.outcome = outcome


class Fetching:
    """The fetching of files, in one task for each load."""

    def __init__(self, ledger: Ledger, files: Files, rooms: Rooms, optimising: Optimising, meters: Meters) -> None:
        self._ledger = ledger
        self._files = files
        self._rooms = rooms
        self._optimising = optimising
        self._meters = meters

    async def fetch(self, want: Want, entry: CacheEntry, granted: "asyncio.Future[Mapping[str, int]]") -> Pulled:
        """Fetches the files. If this needs evictions, first waits for `granted`, the end of the claim, whose result is
        the number of copies of possible victims in other pods. Raises NotFetched."""
        place, began = self._rooms.place(), time.monotonic()
        while True:
            try:
                return await self._pull(want, entry)
            except PullError as error:
                if not error.short:
                    raise NotFetched(_outcome(error)) from error
                short = functools.partial(self._files.short, error.needs)
            removing, spares = self._removing, await granted
            refused = await self._rooms.disk(entry, short, removing=removing, place=place, spares=spares)
            if refused is None and time.monotonic() - began > _ROOM_WAIT:
                text = f"for {_ROOM_WAIT:g} s, other loads have taken the room on the pod's disk for the model's files"
                refused = Refused(Reason.NO_ROOM, text)
            if refused is not None:
                raise NotFetched(refused)

    def _removing(self) -> bool:
        return self._files.removing

    async def _pull(self, want: Want, entry: CacheEntry) -> Pulled:
        if entry.state is EntryState.QUEUED:
            self._ledger.enter(entry, EntryState.PULLING)
        began = time.monotonic()
        try:
            async with asyncio.timeout(_TIMEOUT):
                source = Source(want.path, want.key, want.sha256)
                pulled = await self._files.pull(source, into=want.model_id, tag=self._optimising.tag)
        except TimeoutError as error:
            text = f"the model's files did not arrive within {_TIMEOUT:g} s"
            raise PullError(PullErrorKind.TIMEOUT, text) from error
        self._meters.pull_ms.observe((time.monotonic() - began) * 1000)
        return pulled


def _outcome(error: PullError) -> Refused | Failed:
    if error.kind is PullErrorKind.DISK_FULL:
        return Refused(Reason.NOWHERE if error.never else Reason.NO_ROOM, error.text)
    asked_ms = round(1000 * error.retry_after) if error.retry_after else 0
    return Failed(Reason.LOAD_FAILED, error.text, _KINDS[error.nature], asked_ms)


# Bad content has the kind CONTENT, which is retried soon, even if nothing was pulled: another check is cheap, and finds
# a corrected file.
_KINDS = {
    Nature.PASSING: FailureKind.PASSING,
    Nature.NOT_FOUND: FailureKind.NOT_FOUND,
    Nature.FORBIDDEN: FailureKind.FORBIDDEN,
    Nature.CONTENT: FailureKind.CONTENT,
    Nature.POD: FailureKind.PASSING,
}
