"""This pod's writes to models' records: sizes, load times, failures, and deaths of the model server.

All pods write to the same records, so each write is a compare-and-set that keeps unknown fields, and has no effect if
the id has been registered again. Only a load that failed waits for its write: the model's status must show the failure
as soon as the caller gets the error.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any

from mesh.etcd import Etcd, EtcdError, KeyValue
from mesh.process.tasks import Tasks
from mesh.schema.keys import Keys
from mesh.schema.records import Failure, ModelRecord
from mesh.telemetry import logs
from placement import blame
from placement.failures import FailureKind
from placement.footprint import Footprint

log = logs.get(__name__)

FAILURE_EXPIRY_MS = 15 * 60 * 1000
"""Time after which a recorded failure expires, in milliseconds: ModelMesh's value."""

PATIENCE = 3.0
"""Seconds for which a failed load waits for its record to be written. The write then continues in the background."""

_SIZE_SHARE = 0.10  # sizes that differ by less count as equal
_LOAD_SHARE, _LOAD_MS = 0.5, 50  # load times vary with the load of the machine
_AT_ONCE = 8  # concurrent writes: a burst of cold starts must not become a burst of transactions
_LINGER = 0.1  # seconds before a success is written, so that the calls that waited for the load run first
_ATTEMPTS = 5
_PAUSE = 2.0  # seconds, growing
_TEXT = 2000  # characters kept of a text


@dataclass(frozen=True, slots=True)
class Took:
    """The cost of a load."""

    footprint: Footprint  # as measured
    load_ms: int  # including pull and waiting


@dataclass(frozen=True, slots=True)
class HistoryStatistics:
    """The numbers of writes to records."""

    pending: int
    written: int  # so far
    given_up: int  # so far


class History:
    """Writes to records for one pod, in the background."""

    def __init__(
        self,
        etcd: Etcd,
        keys: Keys,
        *,
        pod: str,
        secrets: Callable[[], str] = lambda: "",
        clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        """Makes a history without writes. `secrets` returns the version of the storage secret with which this pod
        pulls."""
        self._etcd = etcd
        self._keys = keys
        self._pod = pod
        self._secrets = secrets
        self._clock_ms = clock_ms
        self._tasks = Tasks()
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._deaths: dict[str, asyncio.Task[None]] = {}  # being written, by model
        self._written = self._given_up = 0

    def first(self, record: ModelRecord, digest: str, took: Took) -> ModelRecord:
        """Returns the record with the results of the first load of its content: the digest that all copies must have,
        and the cost of the load. Leaves out this pod's failure. The caller writes the record when it publishes the
        copy."""
        failures = tuple(failure for failure in record.failures if failure.pod != self._pod)
        return replace(
            record,
            digest=digest,
            digest_ms=self._clock_ms(),
            host_bytes=took.footprint.host_bytes,
            device_bytes=took.footprint.device_bytes,
            load_ms=took.load_ms,
            failures=failures,
            changed="",
            changed_ms=0,
        )

    def loaded(self, model_id: str, revision: int, known: ModelRecord, took: Took) -> None:
        """Records the cost of a load, and removes this pod's failure and the mark of changed content, in the
        background. Writes nothing if there is nothing to remove and the cost is similar to that in `known`, the record
        at the beginning of the load."""
        size, load_ms = took.footprint, took.load_ms

        def change(record: ModelRecord) -> ModelRecord:
            failures = tuple(failure for failure in record.failures if failure.pod != self._pod)
            if not (
                _differs(record.host_bytes, size.host_bytes)
                or _differs(record.device_bytes, size.device_bytes)
                or abs(record.load_ms - load_ms) > max(_LOAD_MS, _LOAD_SHARE * record.load_ms)
                or not record.load_ms
                or len(failures) != len(record.failures)
                or record.changed
            ):
                return record
            return replace(
                record,
                host_bytes=size.host_bytes,
                device_bytes=size.device_bytes,
                load_ms=load_ms,
                failures=failures,
                changed="",
                changed_ms=0,
            )

        if change(known) is not known:
            self._tasks.start(self._later(model_id, revision, change), f"remember {model_id}")

    async def measured(self, model_id: str, revision: int, footprint: Footprint) -> None:
        """Records the measured size of a model for which the pod had no room. Returns once the size is written, or
        after `PATIENCE` seconds. A router whose load was refused because of the size then asks no other pod that is too
        small."""

        def change(record: ModelRecord) -> ModelRecord:
            return replace(record, host_bytes=footprint.host_bytes, device_bytes=footprint.device_bytes)

        await self._patiently(self._write(model_id, revision, change), f"size of {model_id}")

    def known(self, record: ModelRecord) -> Failure | None:
        """Returns the recorded failure of this pod, or None if it has none or the failure has expired."""
        recent = record.recent_failures(self._clock_ms(), FAILURE_EXPIRY_MS)
        return next((failure for failure in recent if failure.pod == self._pod), None)

    async def failed(
        self, model_id: str, revision: int, text: str, kind: FailureKind, *, asked_ms: int = 0, digest: str = ""
    ) -> None:
        """Records a failed load. `asked_ms` is the time that the store asked clients to wait, and `digest` identifies
        the files that cannot be loaded. Returns once the failure is written, or after `PATIENCE` seconds, and then
        waits as long for a death of the same model that is still being written (`killed`)."""
        failure = Failure(
            self._pod,
            self._clock_ms(),
            text[:_TEXT],
            kind,
            asked_ms=asked_ms,
            digest=digest,
            secrets=self._secrets(),
        )

        def change(record: ModelRecord) -> ModelRecord:
            return record.with_failure(failure, self._clock_ms(), FAILURE_EXPIRY_MS)

        await self._patiently(self._write(model_id, revision, change), f"failure of {model_id}")
        if (death := self._deaths.get(model_id)) is not None:
            await asyncio.wait({death}, timeout=PATIENCE)

    async def changed(self, model_id: str, revision: int, digest: str) -> None:
        """Records that a load found content that differs from the registration's. No pod counts as failed, because each
        pod would find the same content. Returns once the record is written, or after `PATIENCE` seconds."""

        def change(record: ModelRecord) -> ModelRecord:
            if record.digest in ("", digest):
                return record
            return replace(record, changed=digest, changed_ms=self._clock_ms())

        await self._patiently(self._write(model_id, revision, change), f"changed content of {model_id}")

    def killed(
        self, model_id: str, revision: int, text: str, *, sure: bool = False, digests: tuple[str, ...] = ()
    ) -> None:
        """Adds a blame to the model's record, in the background: a server died while it worked on the model, or cannot
        end the model's load.

        If a failure is recorded next, `failed` waits for this write, so that a caller who gets the failure also finds
        the blame in the record. `sure` means that nothing else can be the cause. `digests` identify the requests that
        the model was running.
        """
        # A unique line, so that each death counts once even if the outcome of a write is unknown.
        now = self._clock_ms()
        line = f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(now / 1000))} {self._pod}: {text[:_TEXT]}"
        one = blame.Blame(self._pod, now, line, sure, digests[: blame.DIGESTS])

        def change(record: ModelRecord) -> ModelRecord:
            return record.with_blame(one, line)

        task = self._tasks.start(self._write(model_id, revision, change), f"death with {model_id}")
        self._deaths[model_id] = task
        task.add_done_callback(lambda done: self._deaths.get(model_id) is done and self._deaths.pop(model_id))

    async def _patiently(self, work: Coroutine[Any, Any, None], name: str) -> None:
        await asyncio.wait({self._tasks.start(work, name)}, timeout=PATIENCE)

    async def _later(self, model_id: str, revision: int, change: Callable[[ModelRecord], ModelRecord]) -> None:
        await asyncio.sleep(_LINGER)
        await self._write(model_id, revision, change)

    async def _write(self, model_id: str, revision: int, change: Callable[[ModelRecord], ModelRecord]) -> None:
        def decide(kv: KeyValue | None) -> bytes | None:
            if kv is None or kv.create_revision != revision:
                return None if kv is None else kv.value  # another registration, which this pod must not change
            before = ModelRecord.decode(kv.value)
            after = change(before)
            return kv.value if after == before else after.encode()

        for attempt in range(1, _ATTEMPTS + 1):
            try:
                async with self._turns:
                    await self._etcd.update(self._keys.model(model_id), decide)
                self._written += 1
                return
            except ValueError as error:
                log.warning("the record of a model cannot be read", model=model_id, error=str(error))
                return
            except EtcdError as error:
                if attempt == _ATTEMPTS:
                    self._given_up += 1
                    log.warning("the record of a model was not written", model=model_id, error=error.detail)
                    return
                await asyncio.sleep(_PAUSE * attempt)

    async def close(self, timeout: float = 1.0) -> None:
        """Waits at most `timeout` seconds for pending writes, then cancels the rest."""
        await self._tasks.settle(timeout)
        await self._tasks.close()

    def statistics(self) -> HistoryStatistics:
        """Returns the numbers of writes."""
        return HistoryStatistics(len(self._tasks), self._written, self._given_up)


def _differs(before: int, now: int) -> bool:
    return abs(now - before) > _SIZE_SHARE * before
