"""The records of virtual models in etcd, changed together with the models that they name.

One transaction writes the vmodel and the reference counts, registers a model if the request describes one, and deletes
models without references. It succeeds only if none of these records has changed since the decision was made. Otherwise
the decision is made again from the current records. Counts therefore stay correct regardless of other writers.

A model that is deleted with its last reference is unregistered immediately, but its copies continue to answer for a
moment: routers that do not know the vmodel's new target yet still send calls to them, and none of these calls may fail.
"""

import asyncio
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from mesh import etcd as etcds
from mesh.etcd import Etcd, KeyValue
from mesh.etcd.ranges import after_prefix
from mesh.process.tasks import Tasks
from mesh.schema import records, vmodels
from mesh.schema.keys import TOMBSTONE, Keys
from mesh.schema.lives import Tombstone
from mesh.schema.records import CopyRecord, ModelRecord
from mesh.statuses import MeshError, Reason
from mesh.telemetry import logs
from placement.copies import UNLIMITED
from placement.vmodels.changes import Change, Models, NamedModel, Refusal, RefusalCause
from placement.vmodels.record import VModelRecord
from router.fencing.tombstones import Tombstones
from router.fencing.withdrawal import Withdrawal
from router.state.differing import DifferentError
from router.state.registry import Registration, Registry, decode

log = logs.get(__name__)

PATIENCE = 10.0
"""Seconds for which a change is retried while others keep changing the same records."""

FAREWELL = 1.0
"""Seconds for which copies of a model that was deleted with its last reference still answer. Routers learn a vmodel's
new target within milliseconds."""

_BATCH = 60  # models in one read: each takes two operations, and etcd allows 128
_PAUSE = 0.02  # longest pause before the second attempt, in seconds; it grows with each attempt

_REASONS = {
    RefusalCause.NOT_FOUND: Reason.UNKNOWN_MODEL,
    RefusalCause.NO_VERSION: Reason.UNKNOWN_VERSION,
    RefusalCause.CONFLICT: Reason.CONFLICT,
    RefusalCause.DIFFERENT: Reason.CONFLICT,
    RefusalCause.PRECONDITION: Reason.PRECONDITION,
    RefusalCause.INVALID: Reason.BAD_REQUEST,
}

Decide = Callable[[VModelRecord | None, Models], Change | Refusal]
"""A function that decides on a change of a vmodel, from the vmodel's record and the named models. It is called again
after each conflict."""


Note = Callable[[str, KeyValue | None, int], None]
"""A function that is called with a vmodel's key at a revision, or with None if the vmodel does not exist."""


@dataclass(frozen=True, slots=True)
class NewModel:
    """The model that a change may register. The same transaction requires `compares` and carries out `ops`."""

    model_id: str
    record: ModelRecord
    compares: Sequence[etcds.Compare]
    ops: Sequence[etcds.Op] = ()


class LingeringCopiesError(Exception):
    """The refusal to register a new model while copies of its id's old registration remain. The caller withdraws these
    copies, or prepares another transaction."""


@dataclass(frozen=True, slots=True)
class ReadModel:
    """A model as read from etcd for a decision."""

    registration: Registration | None
    named: NamedModel
    copies: tuple[KeyValue, ...]


class VModelStore:
    """The vmodel store of one process."""

    def __init__(
        self,
        *,
        etcd: Etcd,
        keys: Keys,
        registry: Registry,
        withdrawal: Withdrawal,
        tombstones: Tombstones,
        note: Note = lambda *_: None,
    ) -> None:
        """Makes a store. `note` is called with each record that was read or written, before the feed reports it. Thus a
        call that follows a request in the same process goes to the model that the request's reply named."""
        self._etcd = etcd
        self._keys = keys
        self._registry = registry
        self._withdrawal = withdrawal
        self._tombstones = tombstones
        self._note = note
        self._tasks = Tasks()

    async def read(self, vmodel_id: str) -> VModelRecord | None:
        """Returns a vmodel's current record from etcd, or None if there is no such vmodel. Raises MeshError: INTERNAL
        if the record cannot be decoded, REGISTRY_AWAY."""
        found = await self._etcd.txn([], [etcds.get_op(self._keys.vmodel(vmodel_id))])
        kv = next(iter(etcds.found(found.responses[0])), None)
        self._note(vmodel_id, kv, found.revision)
        return self._decode(vmodel_id, kv)

    async def page(self, *, prefix: str, after: str, limit: int) -> tuple[list[tuple[str, VModelRecord]], str | None]:
        """Returns at most `limit` vmodels whose id begins with `prefix` and comes after `after`, and leaves out records
        that cannot be decoded. Also returns the `after` of the next page, or None if this is the last one."""
        first = self._keys.vmodels + prefix.encode()
        start = max(first, self._keys.vmodels + after.encode() + b"\0") if after else first
        end = after_prefix(first)
        if start >= end:
            return [], None
        page = await self._etcd.page(start, end, limit=limit)
        found = []
        for kv in page.kvs:
            try:
                found.append((kv.key[len(self._keys.vmodels) :].decode(), vmodels.decode(kv.value)))
            except ValueError as error:
                log.warning("a vmodel record in etcd cannot be read", key=kv.key, error=str(error))
        last = page.kvs[-1].key[len(self._keys.vmodels) :].decode("utf-8", "replace") if page.kvs else None
        return found, last if page.more else None

    async def change(
        self,
        vmodel_id: str,
        decide: Decide,
        *,
        names: Iterable[str] = (),
        new: NewModel | None = None,
        repeatable: bool = True,
        deletes: bool = False,
    ) -> tuple[Change, Models]:
        """Changes a vmodel. Returns the change that was written, and the models as they were before.

        `names` are models that the decision needs besides those that the vmodel names. `repeatable` means that the
        decision may be made again after a write that etcd has not confirmed. `deletes` means that the vmodel is to be
        deleted: of records that cannot be read, the decision then gets what is left, and models with such a record
        count as not registered. Raises the refusal as a MeshError, LingeringCopiesError, UNAVAILABLE if others keep
        changing the same records, REGISTRY_AWAY, INTERNAL if a record cannot be read.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + PATIENCE
        wanted = set(names) | ({new.model_id} if new is not None else set())
        attempt = 0
        while True:
            kv, known = await self._look(vmodel_id, wanted, deletes=deletes)
            before = self._decode(vmodel_id, kv, deletes=deletes)
            if new is not None:
                known[new.model_id] = _compared(known[new.model_id], new.record)
            models = {model: read.named for model, read in known.items()}
            decided = decide(before, models)
            if isinstance(decided, Refusal):
                raise _refused(decided, known, new)
            if decided.nothing:
                return decided, models
            unsettled: etcds.EtcdUnavailable | None = None
            try:
                if await self._write(vmodel_id, kv, decided, known, new):
                    return decided, models
            except etcds.EtcdUnavailable as error:
                if not (error.ambiguous and repeatable):
                    raise
                unsettled = error
            if decided.created and new is not None and (known[new.model_id].copies or new.ops):
                raise LingeringCopiesError
            wanted |= before.names() if before is not None else set()
            attempt += 1
            if loop.time() > deadline:
                text = f"the records of vmodel {vmodel_id} and its models keep changing: try again"
                raise unsettled or MeshError(Reason.UNAVAILABLE, text, retry_after=1.0)
            await asyncio.sleep(random.uniform(0, _PAUSE * attempt))

    async def close(self) -> None:
        """Stops the withdrawals in progress. Pods notice the deletions themselves, and the leader removes the
        tombstones."""
        await self._tasks.close()

    # --- reads ---

    async def _look(
        self, vmodel_id: str, wanted: Iterable[str], *, deletes: bool
    ) -> tuple[KeyValue | None, dict[str, ReadModel]]:
        """Reads a vmodel, the models that it names, and the models in `wanted`."""
        kv, known = await self._read(vmodel_id, sorted(wanted)[:_BATCH], deletes=deletes)
        record = self._decode(vmodel_id, kv, deletes=deletes)
        more = sorted((set(wanted) | (record.names() if record is not None else set())) - known.keys())
        for start in range(0, len(more), _BATCH):
            _, found = await self._read(vmodel_id, more[start : start + _BATCH], deletes=deletes)
            known |= found
        return kv, known

    async def _read(
        self, vmodel_id: str, models: Sequence[str], *, deletes: bool
    ) -> tuple[KeyValue | None, dict[str, ReadModel]]:
        ops = [etcds.get_op(self._keys.vmodel(vmodel_id))]
        for model in models:
            copies = self._keys.copies(model)
            ops += [etcds.get_op(self._keys.model(model)), etcds.get_range_op(copies, after_prefix(copies))]
        responses = (await self._etcd.txn([], ops)).responses
        known = {}
        for model, record, copies_found in zip(models, responses[1::2], responses[2::2], strict=True):
            known[model] = self._model(model, etcds.found(record), etcds.found(copies_found), deletes=deletes)
        return next(iter(etcds.found(responses[0])), None), known

    def _model(
        self, model_id: str, found: Sequence[KeyValue], copies: tuple[KeyValue, ...], *, deletes: bool
    ) -> ReadModel:
        if not found:
            return ReadModel(None, NamedModel(registered=False), copies)
        try:
            registration = decode(model_id, found[0])
        except MeshError:
            if not deletes:
                raise
            return ReadModel(None, NamedModel(registered=False), copies)
        states = [state for kv in copies if (state := self._state(kv, registration.created))]
        record = registration.record
        loaded = states.count(records.LOADED)
        return ReadModel(registration, NamedModel(True, record.refs, record.auto_delete, len(states), loaded), copies)

    def _state(self, kv: KeyValue, created: int) -> str:
        """Returns the state of a copy of the registration, or "" for a copy of another registration, a tombstone, or an
        unreadable record."""
        if self._keys.copy_of(kv.key)[1] == TOMBSTONE:
            return ""
        try:
            copy = CopyRecord.decode(kv.value)
        except ValueError as error:
            log.warning("a record in etcd cannot be read", key=kv.key, error=str(error))
            return ""
        return copy.state if copy.create_revision == created else ""

    def _decode(self, vmodel_id: str, kv: KeyValue | None, *, deletes: bool = False) -> VModelRecord | None:
        if kv is None:
            return None
        try:
            return vmodels.decode(kv.value)
        except ValueError as error:
            log.warning("a vmodel record in etcd cannot be read", vmodel=vmodel_id, error=str(error))
            if deletes:
                return vmodels.salvaged(kv.value)
            text = f"the record of vmodel {vmodel_id} in etcd cannot be read ({error})"
            raise MeshError(Reason.INTERNAL, f"{text}: delete the vmodel, and set it again") from error

    # --- writes ---

    async def _write(
        self,
        vmodel_id: str,
        kv: KeyValue | None,
        change: Change,
        known: dict[str, ReadModel],
        new: NewModel | None,
    ) -> bool:
        """Writes a change. Returns False if a record on which the change is based has changed."""
        keys = self._keys
        key = keys.vmodel(vmodel_id)
        compares = [etcds.modified(key, 0 if kv is None else kv.mod_revision)]
        ops = [etcds.delete_op(key) if change.after is None else etcds.put_op(key, vmodels.encode(change.after))]
        used_ms = self._used_ms(change, known)
        written: dict[str, ModelRecord] = {}
        for model, refs in change.refs.items():
            if model == change.created:
                assert new is not None
                record = new.record
                compares += [etcds.absent(keys.model(model)), *new.compares]
                ops += new.ops
                if record.limits != UNLIMITED:
                    ops.append(etcds.put_op(keys.want(model), b""))
            else:
                registration = known[model].registration
                assert registration is not None
                record = registration.record
                compares.append(etcds.modified(keys.model(model), registration.modified))
            if used_ms and change.after is not None and model == change.after.target:
                record = replace(
                    record, last_used_ms=used_ms if model == change.created else max(used_ms, record.last_used_ms)
                )
            written[model] = replace(record, refs=refs)
            ops.append(etcds.put_op(keys.model(model), written[model].encode()))
        for model in change.deleted:
            registration = known[model].registration
            assert registration is not None
            compares.append(etcds.modified(keys.model(model), registration.modified))
            ops += [etcds.delete_op(one) for one in (keys.model(model), keys.want(model), keys.reload(model))]
            ops.append(etcds.put_op(keys.tombstone(model), Tombstone.of(registration.record).encode()))
        result = await self._etcd.txn(compares, ops)
        if not result.succeeded:
            return False
        now = None
        if change.after is not None:
            now = KeyValue(key, vmodels.encode(change.after), 0, result.revision, 0, 0)
        self._note(vmodel_id, now, result.revision)
        for model, record in written.items():
            former = known[model].registration
            created = result.revision if former is None else former.created
            self._registry.remember(Registration(model, record, created, result.revision))
        for model in change.deleted:
            self._registry.forget(model)
            log.info("a model is unregistered with its last reference", model=model, vmodel=vmodel_id)
            wait = FAREWELL if change.after is not None else 0.0
            self._tasks.start(self._withdraw(model, known[model], wait), f"withdraw {model}")
        return True

    @staticmethod
    def _used_ms(change: Change, known: dict[str, ReadModel]) -> int:
        """Returns the time at which the replaced model was last used, or 0 if no model is replaced. The target gets
        this time, for the order of evictions."""
        if change.before is None or change.after is None or change.before.target == change.after.target:
            return 0
        active = known.get(change.before.active)
        return active.registration.record.last_used_ms if active is not None and active.registration else 0

    async def _withdraw(self, model_id: str, read: ReadModel, wait: float) -> None:
        assert read.registration is not None
        await asyncio.sleep(wait)
        try:
            await self._withdrawal.withdraw(
                model_id, read.copies, "it has no references any more", created=read.registration.created
            )
            await self._tombstones.resolve(model_id)
        except etcds.EtcdError as error:
            log.info("a tombstone is left to the leader: etcd is unavailable", model=model_id, why=error.detail)


def _refused(refusal: Refusal, known: dict[str, ReadModel], new: NewModel | None) -> MeshError:
    if refusal.cause is RefusalCause.DIFFERENT and new is not None:
        registration = known[new.model_id].registration
        assert registration is not None
        return DifferentError(new.model_id, registration.record, new.record)
    return MeshError(_REASONS[refusal.cause], refusal.text)


def _compared(read: ReadModel, record: ModelRecord) -> ReadModel:
    """Returns the model for the decision, compared with the attributes that a request names."""
    if read.registration is None:
        return read
    return replace(read, named=replace(read.named, differs=not read.registration.record.same_registration(record)))
