"""Registration, change and unregistration of models.

Behaviour and texts are ModelMesh's wherever clients can observe them.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from mesh import etcd as etcds
from mesh.etcd import Etcd
from mesh.schema.keys import Keys
from mesh.schema.modelstatus import ModelStatus
from mesh.schema.records import ModelRecord, Reload
from mesh.statuses import MeshError, Reason
from mesh.telemetry import logs
from placement.copies import CopyLimits
from router.fencing.removal import MISSING, Removal
from router.fencing.withdrawal import ROUNDS, Withdrawal, changed_all_the_time
from router.management.creation import Creation, Fate
from router.management.loading import Loading
from router.management.requests import Item, Register, check_id, record_of
from router.management.status import Reporter, StatusInfo
from router.state.registry import Registry

log = logs.get(__name__)


class Registrar:
    """The registrar of one worker. `wall` returns milliseconds since the epoch."""

    def __init__(
        self,
        *,
        etcd: Etcd,
        keys: Keys,
        registry: Registry,
        creation: Creation,
        withdrawal: Withdrawal,
        loading: Loading,
        status: Reporter,
        wall: Callable[[], int],
    ) -> None:
        self._etcd = etcd
        self._keys = keys
        self._registry = registry
        self._creation = creation
        self._withdrawal = withdrawal
        self._removal = Removal(etcd=etcd, keys=keys, registry=registry, withdrawal=withdrawal)
        self._loading = loading
        self._status = status
        self._wall = wall

    async def register(self, request: Register) -> StatusInfo:
        """Registers a model. Has no effect if the model is already registered with the same attributes. Succeeds even
        if the requested load fails.

        Raises MeshError: BAD_REQUEST, CONFLICT if the id is registered with other attributes, FORMER_LIFE if pods may
        still answer for the id's former registration, OVERLOADED, REGISTRY_AWAY.
        """
        model_id, load_now = request.item.model_id, request.load_now
        record = record_of(request.item, now_ms=self._wall(), load_now=load_now, last_used_ms=request.last_used_ms)
        registration, created = await self._creation.create(model_id, record)
        if not created and not load_now:
            await self._loading.touch(registration, record.last_used_ms)
        if load_now:
            idle_ms = max(0, self._wall() - max(record.last_used_ms, registration.record.last_used_ms))
            return replace(await self._loading.load(model_id, idle_ms=idle_ms, sync=request.sync), created=created)
        if created:
            return StatusInfo(ModelStatus.NOT_LOADED, record=record, created=True, notes=self._status.notes(record))
        return await self._status.of(model_id)

    async def register_many(self, items: Sequence[Item]) -> list[Fate]:
        """Registers many models. Returns the outcome of each. Never raises."""
        now_ms = self._wall()
        records: list[ModelRecord | MeshError] = []
        for item in items:
            try:
                records.append(record_of(item, now_ms=now_ms))
            except MeshError as error:
                records.append(error)
        return await self._creation.create_many(items, records)

    async def unregister(self, model_id: str) -> bool:
        """Deletes a registration and has its copies withdrawn. Returns False if there was no registration. Raises
        BAD_REQUEST for an id that is not valid, and the errors of `Withdrawal.unregister`."""
        check_id(model_id)
        return await self._withdrawal.unregister(model_id)

    async def unregister_many(self, model_ids: Sequence[str]) -> list[Fate]:
        """Unregisters many models. Returns the outcome of each: None, MISSING, or the error. Never raises."""
        bad: dict[str, MeshError] = {}
        for model_id in model_ids:
            try:
                check_id(model_id)
            except MeshError as error:
                bad[model_id] = error
        done = await self._removal.unregister(dict.fromkeys(one for one in model_ids if one not in bad))
        fates: list[Fate] = []
        for model_id in model_ids:
            fate = bad.get(model_id) or done[model_id]
            fates.append(fate)
            if fate is None:
                done[model_id] = MISSING  # named twice
        return fates

    async def release(self, model_id: str) -> StatusInfo:
        """Removes blames and failed loads from a model's record, so that the model may be loaded again. Returns its
        status. Raises BAD_REQUEST, UNKNOWN_MODEL, REGISTRY_AWAY."""
        check_id(model_id)
        found = await self._registry.change(
            model_id,
            lambda record: record.absolved() if record != record.absolved() else None,
        )
        if found is None:
            raise MeshError(Reason.UNKNOWN_MODEL, f"model {model_id} is not registered")
        return await self._status.of(model_id)

    async def reload(self, model_id: str) -> StatusInfo:
        """Asks the leader to replace all copies of a model with copies of the content now at its path
        (`leader.reloading`).

        Returns the status without waiting for the leader. Old and new copies answer until all are replaced. Raises
        BAD_REQUEST, UNKNOWN_MODEL, PRECONDITION if the registration itself names a digest, UNAVAILABLE if the record
        keeps changing, REGISTRY_AWAY.
        """
        check_id(model_id)
        key = self._keys.model(model_id)
        for _ in range(ROUNDS):
            registration = await self._registry.read(model_id, fresh=True)
            if registration is None:
                raise MeshError(Reason.UNKNOWN_MODEL, f"model {model_id} is not registered")
            if registration.record.sha256:
                text = (
                    f"model {model_id} is registered with the sha256 of its file, so other content is never loaded "
                    "for it: register the new file, under another id or after unregistering this one"
                )
                raise MeshError(Reason.PRECONDITION, text)
            record = registration.record.reloaded()
            result = await self._etcd.txn(
                [etcds.modified(key, registration.modified)],
                [
                    etcds.put_op(key, record.encode()),
                    etcds.put_op(self._keys.reload(model_id), Reload(record.generation).encode()),
                ],
            )
            if result.succeeded:
                self._registry.forget(model_id)
                log.info("a reload of a model was requested", model=model_id, generation=record.generation)
                return await self._status.of(model_id)
        raise changed_all_the_time(model_id)

    async def set_limits(self, model_id: str, change: Callable[[CopyLimits], CopyLimits]) -> StatusInfo:
        """Changes the limits of a model's copies, and returns its status. Raises BAD_REQUEST, UNKNOWN_MODEL,
        REGISTRY_AWAY, and the errors of `change`."""
        check_id(model_id)

        def changed(record: ModelRecord) -> ModelRecord | None:
            limits = change(record.limits)
            return None if limits == record.limits else replace(record, limits=limits)

        # First, so that the leader knows of all limits in force; it removes the key if they are not set after all.
        await self._etcd.put(self._keys.want(model_id), b"")
        found = await self._registry.change(model_id, changed)
        if found is None:
            raise MeshError(Reason.UNKNOWN_MODEL, f"model {model_id} is not registered")
        return await self._status.of(model_id)
