"""Creation, change, deletion and status of virtual models.

Semantics and texts match ModelMesh's wherever clients can observe them. `placement.vmodels` decides what a
request changes, `router.vmodels.store` writes it, and the leader carries out moves (`router.leader.transitions`). A
request waits for the move only if it is `sync`.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace

from mesh import etcd as etcds
from mesh.schema.keys import Keys
from mesh.schema.modelstatus import ModelStatus, VModelStatus
from mesh.statuses import MeshError, Reason, not_unicode
from mesh.telemetry import logs
from placement.vmodels import changes
from placement.vmodels.changes import Change, Models, Refusal
from placement.vmodels.record import VModelRecord
from router.fencing.withdrawal import changed_all_the_time
from router.management.creation import Creation
from router.management.loading import Loading
from router.management.requests import MoveVModel, check_move, record_of
from router.management.status import MAX_PAGE, Reporter, StatusInfo
from router.state.registry import Registry
from router.vmodels.store import LingeringCopiesError, NewModel, VModelStore

log = logs.get(__name__)

MAX_WAITS = 1000
"""Maximum number of one worker's requests that wait for moves."""

_LOOK = 1.0  # seconds between two reads of a vmodel that a request waits for, if the feed reports no change
_WAIT_FOR_WAY = 10.0  # seconds for copies of a former registration of the target's id to be withdrawn

Listen = Callable[[Callable[[str], None]], None]
"""A function that registers a listener, which is called with the id of each vmodel that is created, changed or
deleted."""


@dataclass(frozen=True, slots=True)
class VModelInfo:
    """The status of a vmodel."""

    vmodel_id: str
    record: VModelRecord | None  # None: it does not exist, or has another owner
    active: StatusInfo
    target: StatusInfo | None = None  # while it moves
    created: bool = False  # by this request

    @property
    def status(self) -> VModelStatus:
        """The status in the API's terms: a move whose target could not be loaded counts as failed, although it is
        retried."""
        if self.record is None:
            return VModelStatus.NOT_FOUND
        if not self.record.moving:
            return VModelStatus.DEFINED
        return VModelStatus.TRANSITION_FAILED if self.record.failed else VModelStatus.TRANSITIONING


@dataclass(frozen=True, slots=True)
class VModelPage:
    """A page of the vmodels, ordered by id."""

    vmodels: list[tuple[str, VModelRecord]]
    next: str | None  # the `after` of the next page


class VModels:
    """The operations on vmodels in one worker. `wall` returns milliseconds since the epoch. `default_owner` owns
    vmodels that are created without an owner."""

    def __init__(
        self,
        *,
        store: VModelStore,
        keys: Keys,
        registry: Registry,
        creation: Creation,
        loading: Loading,
        status: Reporter,
        listen: Listen,
        wall: Callable[[], int],
        default_owner: str = "",
    ) -> None:
        self._store = store
        self._keys = keys
        self._registry = registry
        self._creation = creation
        self._loading = loading
        self._status = status
        self._wall = wall
        self._default_owner = default_owner
        self._waiting: dict[str, set[asyncio.Event]] = {}  # by vmodel: the requests that wait for it
        listen(self._on_change)

    async def set(self, request: MoveVModel, permit: Callable[[str], None] = lambda _: None) -> VModelInfo:
        """Creates or changes a vmodel. If the target cannot be loaded, returns a status and raises no error. `permit`
        is called with a new target before the change is written, and raises MeshError if the caller may not choose this
        target.

        Raises BAD_REQUEST; UNKNOWN_MODEL for a target, a version or, with `update_only`, a vmodel that does not exist;
        CONFLICT for another owner, or a target that is registered with other attributes; PRECONDITION for an
        unexpected target; DEADLINE if the move takes longer than the request waits; OVERLOADED, REGISTRY_AWAY.
        """
        check_move(request)
        if request.sync and sum(map(len, self._waiting.values())) >= MAX_WAITS:
            text = (
                f"{MAX_WAITS} requests are already waiting for moves in this worker: send the request without "
                "sync, or later"
            )
            raise MeshError(Reason.OVERLOADED, text, retry_after=5.0)
        change, models = await self._change(request, permit)
        after = change.after
        assert after is not None  # it was set
        await self._load(request, change, models)
        if after.moving and request.sync:
            await self._moved(request.vmodel_id, after.target, request.wait)
        info = await self._read(request.vmodel_id, None if request.sync else after)
        return replace(info, created=change.before is None)

    async def delete(self, vmodel_id: str, owner: str = "") -> bool:
        """Deletes a vmodel, even one whose record cannot be read. Returns False if it has another owner or does not
        exist. Raises REGISTRY_AWAY."""

        def decide(before: VModelRecord | None, models: Models) -> Change:
            return changes.delete_vmodel(before, models, owner)

        change, _ = await self._store.change(vmodel_id, decide, deletes=True)
        if not change.nothing:
            log.info("a vmodel is deleted", vmodel=vmodel_id)
        return not change.nothing

    async def status(self, vmodel_id: str, owner: str = "") -> VModelInfo:
        """Returns a vmodel's status. If it has another owner, the status is NOT_FOUND. Raises REGISTRY_AWAY."""
        return await self._read(vmodel_id, None, owner)

    async def page(self, *, prefix: str = "", after: str = "", limit: int = 100) -> VModelPage:
        """Returns at most `limit` vmodels, and at most MAX_PAGE, whose id begins with `prefix` and comes after `after`.
        Raises BAD_REQUEST, REGISTRY_AWAY."""
        try:
            found, more = await self._store.page(prefix=prefix, after=after, limit=max(1, min(limit, MAX_PAGE)))
        except UnicodeEncodeError as error:
            raise not_unicode("prefix or after") from error
        return VModelPage(found, more)

    async def close(self) -> None:
        """Stops the withdrawals in progress. The leader completes them."""
        await self._store.close()

    # --- writes ---

    async def _change(self, request: MoveVModel, permit: Callable[[str], None]) -> tuple[Change, Models]:
        """Writes the change that a request makes. If the request describes its target, registers the target in the same
        write."""
        wanted = replace(request.change, default_owner=self._default_owner, create=request.item is not None)
        new = None
        if (item := request.item) is not None:
            record = record_of(item, now_ms=self._wall(), load_now=request.load_now)
            record = replace(record, auto_delete=request.auto_delete)
            new = NewModel(item.model_id, record, [etcds.absent_prefix(self._keys.copies(item.model_id))])
        mirror = wanted.mirror
        names = {wanted.target, *(wanted.weights or ()), mirror.target if mirror is not None else ""} - {""}

        def decide(before: VModelRecord | None, models: Models) -> Change | Refusal:
            change = changes.set_vmodel(request.vmodel_id, before, models, wanted)
            if isinstance(change, Change) and change.after is not None:
                target = change.after.target
                if before is None or before.target != target:
                    permit(target)
            return change

        loop = asyncio.get_running_loop()
        deadline = loop.time() + _WAIT_FOR_WAY
        while True:
            try:
                change, models = await self._store.change(
                    request.vmodel_id,
                    decide,
                    names=names,
                    new=new,
                    repeatable=not wanted.back,
                )
            except LingeringCopiesError:
                assert new is not None
                if loop.time() > deadline:
                    raise changed_all_the_time(new.model_id) from None
                compares, ops = await self._creation.make_way(new.model_id, new.record)
                new = replace(new, compares=compares, ops=ops)
                continue
            if not change.nothing and change.after is not None:
                record_ = change.after
                log.info("a vmodel is set", vmodel=request.vmodel_id, active=record_.active, target=record_.target)
            return change, models

    async def _load(self, request: MoveVModel, change: Change, models: Models) -> None:
        """Begins the loads that the leader does not begin: those of a target that is active already, and of the models
        of a split."""
        after, before = change.after, change.before
        assert after is not None
        served = before is not None and before.active in models and models[before.active].copies > 0
        if not (request.load_now or served):
            return
        wanted = [] if after.moving else [after.active]
        if request.change.weights:
            wanted += [model for model, weight in after.more.weights.items() if weight and model not in wanted]

        async def load(model_id: str) -> None:
            registration = await self._registry.read(model_id)
            if registration is None:
                return
            idle_ms = max(0, self._wall() - registration.record.last_used_ms)
            try:
                await self._loading.load(model_id, idle_ms=idle_ms, sync=request.sync)
            except MeshError as error:
                log.info("a vmodel's model is not loaded", vmodel=request.vmodel_id, model=model_id, why=error.text)

        await asyncio.gather(*(load(model_id) for model_id in wanted if model_id != after.target or not after.moving))

    # --- waits ---

    async def _moved(self, vmodel_id: str, target: str, wait: float) -> None:
        """Waits until the vmodel has moved to a target, the move has failed, the target has changed, or the vmodel is
        deleted."""
        event = asyncio.Event()
        self._waiting.setdefault(vmodel_id, set()).add(event)
        try:
            async with asyncio.timeout(wait):
                while True:
                    event.clear()
                    try:
                        record = await self._store.read(vmodel_id)
                    except etcds.EtcdUnavailable:
                        await asyncio.sleep(_LOOK)  # the move may continue meanwhile
                        continue
                    if record is None or record.target != target or not record.moving or record.failed:
                        return
                    try:
                        async with asyncio.timeout(_LOOK):
                            await event.wait()
                    except TimeoutError:
                        pass
        except TimeoutError as error:
            text = f"vmodel {vmodel_id} has not moved to model {target} within {wait:g} s; the move continues"
            raise MeshError(Reason.DEADLINE, text) from error
        finally:
            waiting = self._waiting[vmodel_id]
            waiting.discard(event)
            if not waiting:
                del self._waiting[vmodel_id]

    def _on_change(self, vmodel_id: str) -> None:
        for event in self._waiting.get(vmodel_id, ()):
            event.set()

    # --- reads ---

    async def _read(self, vmodel_id: str, record: VModelRecord | None, owner: str = "") -> VModelInfo:
        """Returns the status of a vmodel. `record` is the record that was just written. If it is None, the record is
        read."""
        record = await self._store.read(vmodel_id) if record is None else record
        active = StatusInfo(ModelStatus.NOT_FOUND)
        for _ in range(2):  # between the reads the vmodel may have moved, and its former model been deleted
            if record is None or (owner and owner != record.owner):
                return VModelInfo(vmodel_id, None, StatusInfo(ModelStatus.NOT_FOUND))
            active = await self._status.of(record.active)
            if active.status is not ModelStatus.NOT_FOUND:
                break
            record = await self._store.read(vmodel_id)
        if record is None:
            return VModelInfo(vmodel_id, None, active)
        return VModelInfo(vmodel_id, record, active, await self._target(record) if record.moving else None)

    async def _target(self, record: VModelRecord) -> StatusInfo:
        """Returns the status of a move's target. It is "loading" until the target becomes active or its load fails."""
        found = await self._status.of(record.target)
        why = record.more.why
        errors = found.errors if not why or any(why in error for error in found.errors) else (why, *found.errors)
        loaded = found.status in (ModelStatus.LOADED, ModelStatus.LOADING)
        status = ModelStatus.LOADING_FAILED if record.failed and not loaded else ModelStatus.LOADING
        return replace(found, status=status, errors=errors)
