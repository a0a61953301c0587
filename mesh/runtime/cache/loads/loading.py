"""The steps of one load, and how each is undone.

The claim and the pull come first and run concurrently, because one is a round trip to etcd and the other to a store.
Then the model is admitted to memory (`admission`), which may require evictions, and then published (`publication`). The
claim precedes admission, so a pod that does not get the claim has evicted nothing. The answer is sent as soon as the
model can serve.

All copies of a registration have the same content: content whose digest differs from the record's is refused before the
model server sees it, and the very first load writes its digest before it answers (`claims.publish`).

A *reload* brings new content into a pod that has a copy of the old content. The new content is loaded beside the old
copy, as another generation, and replaces it once the new copy is published. Until then, and if the reload fails, the
old copy answers.

After any outcome but success, the former state is restored: key, reservation, slot, files, and the server's memory, in
which nothing of a failed load may remain. This happens before the answer is sent, because the router then asks another
pod, which must not find this pod's claim.
"""

import asyncio
import time
from collections.abc import Coroutine, Mapping
from typing import Any

from mesh.runtime.blame.history import History
from mesh.runtime.cache.books.entries import CacheEntry, EntryState
from mesh.runtime.cache.books.ledger import Ledger
from mesh.runtime.cache.books.space import Space
from mesh.runtime.cache.disk.files import Files
from mesh.runtime.cache.evictions.unloads import Unloads
from mesh.runtime.cache.loads.admission import Admission
from mesh.runtime.cache.loads.fetching import Fetching, NotFetched
from mesh.runtime.cache.loads.outcomes import Failed, Loaded, Outcome, Refused, Want
from mesh.runtime.cache.loads.publication import Publication
from mesh.runtime.presence import verdicts
from mesh.runtime.presence.verdicts import Stale
from mesh.runtime.servers.spi import Size
from mesh.schema.records import ModelRecord
from mesh.statuses import Reason
from mesh.telemetry import logs
from placement import blame
from placement.failures import FailureKind
from placement.footprint import Footprint
from puller.puller import Pulled

log = logs.get(__name__)


class Loading:
    """The steps from an entry in the ledger to the outcome of its load."""

    def __init__(
        self,
        ledger: Ledger,
        publication: Publication,
        fetching: Fetching,
        admission: Admission,
        unloads: Unloads,
        space: Space,
        *,
        files: Files,
        history: History,
    ) -> None:
        self._ledger = ledger
        self._publication = publication
        self._fetching = fetching
        self._admission = admission
        self._unloads = unloads
        self._space = space
        self._files = files
        self._history = history

    async def run(self, want: Want, entry: CacheEntry) -> Outcome:
        """Runs one load, and returns its outcome. Undoes the load's steps first if the model was not loaded, or if
        cancelled."""
        began = time.monotonic()
        loop = asyncio.get_running_loop()
        granted: asyncio.Future[Mapping[str, int]] = loop.create_future()
        pull = loop.create_task(self._fetching.fetch(want, entry, granted), name=f"pull {want.model_id}")
        outcome: Outcome | None = None
        try:
            outcome = await self._steps(want, entry, pull, granted, began)
        except NotFetched as error:
            outcome = error.outcome
        finally:
            if not isinstance(outcome, Loaded):
                await _to_its_end(self._undo(want, entry, pull))
        await self._remember(want, entry, outcome)
        return outcome

    async def _steps(
        self,
        want: Want,
        entry: CacheEntry,
        pull: "asyncio.Task[Pulled]",
        granted: "asyncio.Future[Mapping[str, int]]",
        began: float,
    ) -> Outcome:
        verdict = await self._publication.claim(want, entry)
        if isinstance(verdict, verdicts.Away):
            return Refused(Reason.REGISTRY_AWAY, f"the pod cannot reserve the load in etcd: {verdict.why}")
        if not isinstance(verdict, verdicts.Claimed):
            return verdict
        record = verdict.record
        entry.usual_ms = record.load_ms
        entry.generation = record.generation
        entry.blamed = any(one.known for one in record.blames)
        if record.quarantined:
            return Refused(Reason.QUARANTINED, record.quarantine(want.model_id))
        former = self._ledger.entries.get(want.model_id)
        if entry.aside and former is not None and former.generation >= record.generation:
            return Stale()  # the registry does not have the generation that the request names

        if not want.footprint.total_bytes:  # the router's record may be older than its size
            want = want.of_size(Footprint(record.host_bytes, record.device_bytes))
            if want.footprint.total_bytes and (refused := self._admission.too_large(want)) is not None:
                return refused
        granted.set_result(verdict.spares)
        pulled = await pull
        entry.digest, entry.disk_bytes = pulled.digest, pulled.bytes
        if record.digest and entry.digest and record.digest != entry.digest:
            return Failed(Reason.CONTENT_CHANGED, record.contradiction(entry.digest))
        if (failed := self._unchanged(record, pulled)) is not None:
            return failed
        apart = blame.on_probation(record.blames, _wall_ms())
        size = await self._admission.admit(want, entry, pulled, spares=verdict.spares, apart=apart)
        if not isinstance(size, Size):
            return size
        if size.disk_bytes:
            entry.disk_bytes += size.disk_bytes
            await self._files.made(want.model_id, size.disk_bytes)
        if size.note:
            log.warning("model loaded with a note", model=want.model_id, note=size.note)
            entry.reason = f"{entry.reason}; {size.note}" if entry.reason else size.note
        entry.load_ms = max(1, round((time.monotonic() - began) * 1000))
        return await self._publication.conclude(want, entry, verdict)

    def _unchanged(self, record: ModelRecord, pulled: Pulled) -> Failed | None:
        """Returns the recorded failure if a load of the same files has recently failed here, because it would fail
        again."""
        known = self._history.known(record)
        if known is None or not known.digest or known.digest != pulled.digest:
            return None
        reason = Reason.NO_ROOM if known.kind is FailureKind.MEMORY else Reason.LOAD_FAILED
        return Failed(reason, known.text, known.kind, digest=known.digest, again=True)

    async def _undo(self, want: Want, entry: CacheEntry, pull: "asyncio.Task[Pulled]") -> None:
        """Removes all traces of a load that did not become a copy."""
        pull.cancel()
        await asyncio.wait({pull})
        if not pull.cancelled():
            pull.exception()  # already reported, or no longer of interest
        if entry in self._ledger and entry.state in (EntryState.LOADING, EntryState.LOADED):
            self._unloads.start(entry, "its load failed")
            await self._unloads.silent(want.model_id)
            return
        self._ledger.remove(entry)
        shared = entry.aside and want.model_id in self._ledger.entries  # the other generation removes the files
        if not shared:
            self._files.doom(want.model_id)
        self._space.freed()
        if not entry.aside:
            await self._publication.withdraw(want)
        if not shared:
            await self._files.remove(want.model_id)

    async def _remember(self, want: Want, entry: CacheEntry, outcome: Outcome) -> None:
        """Writes a failed load into the model's record, if other pods should know about the failure."""
        history = self._history
        if isinstance(outcome, Failed) and outcome.reason is Reason.CONTENT_CHANGED:
            await history.changed(want.model_id, want.revision, entry.digest)
        elif isinstance(outcome, Failed) and not outcome.again:
            text, kind = outcome.text, outcome.kind
            digest, asked_ms = outcome.digest, outcome.asked_ms
            await history.failed(want.model_id, want.revision, text, kind, asked_ms=asked_ms, digest=digest)
        elif isinstance(outcome, Refused) and outcome.needs is not None:
            await history.measured(want.model_id, want.revision, outcome.needs)


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Awaits `work` to its end even if cancelled meanwhile. The cancellation takes effect afterwards.

    A load that has lost its claim undoes its steps, and may be withdrawn at the same moment. If the withdrawal stopped
    it halfway, the load's entry would stay in the ledger, and tasks that wait for the entry's removal would wait
    without end.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
    task.result()
    if cancelled is not None:
        raise cancelled


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000
