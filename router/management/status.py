"""The status of a model with its copies, and pages of all registered models."""

from collections.abc import Callable
from dataclasses import dataclass

from mesh import etcd as etcds
from mesh.etcd import Etcd
from mesh.etcd.ranges import after_prefix
from mesh.schema import records
from mesh.schema.keys import Keys
from mesh.schema.modelstatus import ModelStatus
from mesh.schema.records import CopyRecord, ModelRecord, Reload
from mesh.statuses import not_unicode
from mesh.telemetry import logs
from router.loads.coldstart import ColdStart
from router.management.requests import check_id
from router.state.registry import Registration, decode
from router.state.view import View

log = logs.get(__name__)

MAX_PAGE = 1000
"""Largest number of models, or of vmodels, in one page."""


@dataclass(frozen=True, slots=True)
class CopyInfo:
    """One copy, or one failed load."""

    pod: str
    status: ModelStatus  # LOADED, LOADING, LOADING_FAILED
    time_ms: int  # epoch: when it entered this status, by its pod's clock
    bytes: int = 0
    generation: int = 0  # of the registration's content
    digest: str = ""  # hex, of the content it was loaded from


@dataclass(frozen=True, slots=True)
class StatusInfo:
    """The status of a model."""

    status: ModelStatus
    errors: tuple[str, ...] = ()  # newest first
    copies: tuple[CopyInfo, ...] = ()  # newest first
    record: ModelRecord | None = None
    created: bool = False  # by this call
    reload: Reload | None = None  # set while its copies move to new content
    notes: tuple[str, ...] = ()  # what prevents a load, although nothing has failed


@dataclass(frozen=True, slots=True)
class Page:
    """A page of the registered models, ordered by id."""

    models: list[tuple[str, ModelRecord]]
    next: str | None  # the `after` of the next page


@dataclass(frozen=True, slots=True)
class Seen:
    """A model's record and copies, as read from etcd at one revision."""

    registration: Registration | None
    copies: dict[str, CopyRecord]  # by pod
    revision: int
    reload: Reload | None = None


class Reporter:
    """The reporter of one worker. `wall` returns milliseconds since the epoch. A failed load is reported for
    `failure_expiry` seconds."""

    def __init__(
        self,
        *,
        etcd: Etcd,
        keys: Keys,
        view: View,
        coldstart: ColdStart,
        failure_expiry: float,
        wall: Callable[[], int],
    ) -> None:
        self._etcd = etcd
        self._keys = keys
        self._view = view
        self._coldstart = coldstart
        self._failure_expiry_ms = int(failure_expiry * 1000)
        self._wall = wall

    async def of(self, model_id: str) -> StatusInfo:
        """Returns a model's status. Neither loads the model nor counts as a use. Raises BAD_REQUEST, INTERNAL if the
        model's record cannot be decoded, REGISTRY_AWAY."""
        check_id(model_id)
        seen = await self.look(model_id)
        return StatusInfo(ModelStatus.NOT_FOUND) if seen.registration is None else self.info(seen.registration, seen)

    async def look(self, model_id: str) -> Seen:
        """Reads a model's record and copies from etcd at one revision. Raises INTERNAL if the model's record cannot be
        decoded, REGISTRY_AWAY."""
        key, copies = self._keys.model(model_id), self._keys.copies(model_id)
        result = await self._etcd.txn(
            [],
            [
                etcds.get_op(key),
                etcds.get_range_op(copies, self._keys.tombstone(model_id)),
                etcds.get_op(self._keys.reload(model_id)),
            ],
        )
        registered, moves = etcds.found(result.responses[0]), etcds.found(result.responses[2])
        reload = None
        published = {}
        for kv in etcds.found(result.responses[1]):
            try:
                published[self._keys.copy_of(kv.key)[1]] = CopyRecord.decode(kv.value)
            except ValueError as error:
                log.warning("a record in etcd cannot be read", key=kv.key, error=str(error))
        for kv in moves:
            try:
                reload = Reload.decode(kv.value)
            except ValueError as error:
                log.warning("a record in etcd cannot be read", key=kv.key, error=str(error))
        return Seen(decode(model_id, registered[0]) if registered else None, published, result.revision, reload)

    def info(self, registration: Registration, seen: Seen) -> StatusInfo:
        """Returns the status of a model that was read with `look`."""
        record, now = registration.record, self._wall()
        current = {pod: copy for pod, copy in seen.copies.items() if copy.create_revision == registration.created}
        newer = self._view.revision > seen.revision  # the watch was faster than the read
        for copy in self._view.known(registration.model_id):
            # Suspect pods are called although etcd has lost them, and an agent's answer is newer than its key.
            if (newer or copy.suspect or copy.answered) and copy.record.create_revision == registration.created:
                current[copy.pod.name] = copy.record
        failures = record.recent_failures(now, self._failure_expiry_ms)
        infos = [
            CopyInfo(
                pod,
                ModelStatus.LOADED if copy.state == records.LOADED else ModelStatus.LOADING,
                copy.since_ms or now - copy.age_ms,  # the key holds the time, and may not be there yet
                copy.host_bytes + copy.device_bytes,
                copy.generation,
                copy.digest,
            )
            for pod, copy in current.items()
        ]
        if any(info.status is ModelStatus.LOADED for info in infos):
            status = ModelStatus.LOADED
        elif infos or self._coldstart.loading(registration.model_id):
            status = ModelStatus.LOADING
        elif (
            failures
            or record.quarantined
            or self._changed(record)
            or self._coldstart.choosing.nowhere(registration.model_id, record)
        ):
            status = ModelStatus.LOADING_FAILED
        else:
            return StatusInfo(ModelStatus.NOT_LOADED, record=record, reload=seen.reload, notes=self.notes(record))
        infos += [CopyInfo(failure.pod, ModelStatus.LOADING_FAILED, failure.at_ms) for failure in failures]
        infos.sort(key=lambda info: -info.time_ms)
        errors = self.errors(record)
        if status is ModelStatus.LOADING_FAILED and (
            nowhere := self._coldstart.choosing.nowhere(registration.model_id, record)
        ):
            errors = (nowhere, *errors)
        return StatusInfo(status, errors, tuple(infos), record, reload=seen.reload)

    def notes(self, record: ModelRecord) -> tuple[str, ...]:
        """Returns the reasons that prevent a load of the model now, although no load has failed."""
        untaken = self.untaken(record.type)
        return (untaken,) if untaken else ()

    def untaken(self, model_type: str) -> str:
        """Returns the reason why no pod accepts models of that type, or "" if a pod does or there is no pod."""
        return self._coldstart.choosing.untaken(model_type)

    def errors(self, record: ModelRecord) -> tuple[str, ...]:
        """Returns the reasons why a model is not loaded, or not loaded in some pod: the failures in its record that
        have not expired."""
        failures = record.recent_failures(self._wall(), self._failure_expiry_ms)
        errors = tuple(failure.text for failure in failures if failure.text)
        if self._changed(record):
            errors = (record.contradiction(record.changed), *errors)
        if record.quarantined:
            errors = (*(f"quarantined, a server died of it: {text}" for text in record.killed), *errors)
        return errors

    def _changed(self, record: ModelRecord) -> bool:
        """Returns whether a recent load found content that differs from the registration's."""
        return bool(record.changed) and self._wall() - record.changed_ms < self._failure_expiry_ms

    async def page(self, *, prefix: str = "", after: str = "", limit: int = 100) -> Page:
        """Returns at most `limit` registered models, and at most MAX_PAGE, whose id begins with `prefix` and comes
        after `after`. Leaves out records that cannot be decoded. Raises BAD_REQUEST, REGISTRY_AWAY."""
        limit = max(1, min(limit, MAX_PAGE))
        try:
            first = self._keys.registry + prefix.encode()
            start = max(first, self._keys.registry + after.encode() + b"\0") if after else first
        except UnicodeEncodeError as error:
            raise not_unicode("prefix or after") from error
        end = after_prefix(first)
        if start >= end:
            return Page([], None)
        page = await self._etcd.page(start, end, limit=limit)
        models = []
        for kv in page.kvs:
            try:
                models.append((self._keys.model_of(kv.key), ModelRecord.decode(kv.value)))
            except ValueError as error:
                log.warning("a model record in etcd cannot be read", key=kv.key, error=str(error))
        last = page.kvs[-1].key[len(self._keys.registry) :].decode("utf-8", "replace") if page.kvs else None
        return Page(models, last if page.more else None)
