"""Registering, forgetting, asking about and loading models: what gRPC management and REST both call.

Semantics and texts are the predecessor's where its clients can observe them. All state is in etcd, so nothing here
needs to be told to other workers: a registration is a transaction that holds only where the id is free *and* no copy of
a former life of it is left; and "no such model" is never remembered (`registry`). So a model is callable through any
worker of any router the moment its registration has returned, and never answers from a former life.

Everything is bounded by etcd's and the agents' time-outs and raises MeshError. Loading itself is `coldstart`'s.
"""

import asyncio
import contextlib
import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from mesh import etcd as etcds
from mesh.etcd import Etcd, KeyValue
from mesh.etcd.ranges import after_prefix
from mesh.pb import agent_pb2
from mesh.schema import confidential, records
from mesh.schema.keys import TOMBSTONE, Keys
from mesh.schema.lives import Life, RouterRecord, Tombstone, all_present, census
from mesh.schema.records import CopyRecord, ModelRecord, Reload
from mesh.statuses import MeshError, Reason
from mesh.telemetry import logs
from placement.copies import UNLIMITED, Limits
from router.fencing.tombstones import Holder, Tombstones, waits
from router.loads.agents import Agent, Unreachable
from router.loads.coldstart import ColdStart
from router.management import explain
from router.settings import RouterSettings
from router.state.registry import Registration, Registry, decode
from router.state.view import Pod, View

log = logs.get(__name__)

NOT_FOUND = "NOT_FOUND"
NOT_LOADED = "NOT_LOADED"
LOADING = "LOADING"
LOADED = "LOADED"
LOADING_FAILED = "LOADING_FAILED"

HOUR_MS = 3_600_000
RECENCY_LOAD_NOW_MS = HOUR_MS
"""A model registered and loaded at once counts as used an hour ago: it does not push out what is really in use."""
RECENCY_MS = 6 * HOUR_MS

BATCH = 60
"""Registrations in one transaction: each takes two compares, and etcd allows 128."""

BATCHES = 16
"""Transactions in flight."""

MAX_PAGE = 1000

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_ROUNDS = 8  # attempts at a transaction that others keep changing
_PAUSE = 0.1  # seconds between looks at copies of a former life
_TELL = 1.0  # seconds between telling the agents of those copies: the view of who they are may lag
_DESCRIBE = 5.0  # seconds
_PROGRESS = 1.0  # seconds
# What can be wrong with a model or its place, as against what is wrong with this router or the request.
_LOAD_ERRORS = (
    Reason.LOAD_FAILED,
    Reason.NOT_FETCHED,
    Reason.CONTENT_CHANGED,
    Reason.NOWHERE,
    Reason.NO_ROOM,
    Reason.QUARANTINED,
    Reason.UNAVAILABLE,
)


@dataclass(frozen=True, slots=True)
class CopyInfo:
    """One copy, or one failure to make one."""

    pod: str
    status: str  # LOADED, LOADING, LOADING_FAILED
    time_ms: int  # epoch: when it came into this status, by its pod's clock
    bytes: int = 0
    generation: int = 0  # of the registration's content
    digest: str = ""  # hex, of what it was loaded from


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """How a model is."""

    status: str  # NOT_FOUND, NOT_LOADED, LOADING, LOADED, LOADING_FAILED
    errors: tuple[str, ...] = ()  # newest first
    copies: tuple[CopyInfo, ...] = ()  # newest first
    record: ModelRecord | None = None
    created: bool = False  # by this very call
    reload: Reload | None = None  # its copies move to new content


@dataclass(frozen=True, slots=True)
class Page:
    """A part of the registered models, in the order of their ids."""

    models: list[tuple[str, ModelRecord]]
    next: str | None  # the `after` of the next page


@dataclass(frozen=True, slots=True)
class _Seen:
    """A model as it stood in etcd at one revision."""

    registration: Registration | None
    copies: dict[str, CopyRecord]  # by pod
    revision: int
    reload: Reload | None = None


class Item(NamedTuple):
    """What is registered: as the predecessor knows it, and what may be said beside it."""

    model_id: str
    type: str
    path: str = ""
    key: str = ""
    sha256: str = ""  # hex, of the model's file; "": not named
    limits: Limits = UNLIMITED  # of its copies


class Management:
    """The management of one worker. `wall` gives ms since the epoch."""

    def __init__(
        self,
        *,
        etcd: Etcd,
        keys: Keys,
        registry: Registry,
        view: View,
        coldstart: ColdStart,
        agents: Agent,
        tombstones: Tombstones,
        settings: RouterSettings,
        wall: Callable[[], int] = lambda: int(time.time() * 1000),
    ) -> None:
        self._etcd = etcd
        self._keys = keys
        self._registry = registry
        self._view = view
        self._coldstart = coldstart
        self._agents = agents
        self._tombstones = tombstones
        self._settings = settings
        self._wall = wall
        self._batches = asyncio.Semaphore(BATCHES)

    # --- registering ---

    async def register(
        self,
        model_id: str,
        type: str,
        path: str = "",
        key: str = "",
        *,
        sha256: str = "",
        limits: Limits = UNLIMITED,
        load_now: bool = False,
        sync: bool = False,
        last_used_ms: int = 0,
    ) -> ModelStatus:
        """Registers a model; idempotent for equal attributes. A load that fails does not fail this.

        Raises BAD_REQUEST; CONFLICT where it is registered with other attributes; UNAVAILABLE where copies of a
        former life of the id are not withdrawn in time; REGISTRY_AWAY.
        """
        item = Item(model_id, type, path, key, sha256, limits)
        record = self._record(item, load_now=load_now, last_used_ms=last_used_ms)
        registration, created = await self._create(model_id, record)
        if not created and not load_now:
            await self._touch(registration, record.last_used_ms)
        if load_now:
            idle_ms = max(0, self._wall() - max(record.last_used_ms, registration.record.last_used_ms))
            return replace(await self._load(model_id, idle_ms=idle_ms, sync=sync), created=created)
        if created:
            return ModelStatus(NOT_LOADED, record=record, created=True)
        return await self.status(model_id)

    def _record(self, item: Item, *, load_now: bool = False, last_used_ms: int = 0) -> ModelRecord:
        model_id, type, path, key, sha256, limits = item
        _check(model_id)
        if not type:
            raise MeshError(Reason.BAD_REQUEST, "Must provide non-empty model type string")
        now = self._wall()
        if last_used_ms <= 0:
            last_used_ms = now - (RECENCY_LOAD_NOW_MS if load_now else RECENCY_MS)
        try:
            for text in (type, path, key):
                text.encode()
        except UnicodeEncodeError as error:
            raise MeshError(Reason.BAD_REQUEST, "type, path and key must be valid text") from error
        if sha256 and _SHA256.fullmatch(sha256) is None:
            text = f"sha256 must be 64 hexadecimal digits, as `sha256sum` prints them, not {sha256[:80]!r}"
            raise MeshError(Reason.BAD_REQUEST, text)
        if path in (".", "..") or path.startswith(("./", "../")):
            text = (
                f"the path {confidential.masked_path(path)[:500]!r} is relative to a folder that pods do not know: "
                "give an absolute path, a URI "
                "such as s3://bucket/model.onnx, or a path inside the store that the key names"
            )
            raise MeshError(Reason.BAD_REQUEST, text)
        if secrets := confidential.found(path, key):
            text = (
                f"a registration must hold no secret, since all who may read the mesh see it, and etcd keeps it; here: "
                f"{'; '.join(secrets[:5])}. Put it into the storage secret of the pods (--storage-config, "
                'docs/storage.md) and name its key here: {"storage_key": "..."}'
            )
            raise MeshError(Reason.BAD_REQUEST, text)
        last_used_ms = min(last_used_ms, now)
        return ModelRecord(
            type=type, path=path, key=key, sha256=sha256.lower(), limits=limits, last_used_ms=last_used_ms
        )

    async def _create(self, model_id: str, record: ModelRecord) -> tuple[Registration, bool]:
        """The registration, and whether it is new."""
        key, copies = self._keys.model(model_id), self._keys.copies(model_id)
        value = record.encode()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.unload_wait
        told = 0.0
        holders: list[Holder] = []
        while True:
            try:
                result = await self._etcd.txn(
                    [etcds.absent(key), etcds.absent_prefix(copies)],
                    self._puts(model_id, record, value),
                    [etcds.get_op(key), etcds.get_range_op(copies, after_prefix(copies))],
                )
            except etcds.EtcdUnavailable as error:
                return await self._done(model_id, record, error), True
            if result.succeeded:
                return self._created(model_id, record, result.revision), True
            existing, lingering = _keys_of(result.responses[0]), _keys_of(result.responses[1])
            if existing:
                return self._existing(decode(model_id, existing[0]), record), False
            if (former := self._former(lingering)) is not None and former.allows(record):
                tombstone, buried = self._keys.tombstone(model_id), lingering[0].mod_revision
                try:
                    result = await self._etcd.txn(
                        [etcds.absent(key), etcds.modified(tombstone, buried), etcds.absent_range(copies, tombstone)],
                        [*self._puts(model_id, record, value), etcds.delete_op(tombstone)],
                    )
                except etcds.EtcdUnavailable as error:
                    return await self._done(model_id, record, error), True
                if result.succeeded:
                    return self._created(model_id, record, result.revision), True
                continue
            if loop.time() - told > _TELL:
                told = loop.time()
                await self._withdraw(model_id, lingering, "its id is registered again")
                holders = await self._tombstones.resolve(model_id)
            elif loop.time() > deadline:
                holders = holders or [Holder(pod, None) for pod in self._pods_of(lingering)]
                raise waits(model_id, holders, self._settings.reregister_after)
            else:
                await asyncio.sleep(_PAUSE)

    async def _done(self, model_id: str, record: ModelRecord, error: etcds.EtcdUnavailable) -> Registration:
        """Returns the registration where a write that etcd has not confirmed was done: that is all that counts, for
        registering is idempotent. Else raises the error."""
        if error.ambiguous:
            found = await self._registry.read(model_id, fresh=True)
            if found is not None and found.record.same_registration(record):
                return found
        raise error

    def _created(self, model_id: str, record: ModelRecord, revision: int) -> Registration:
        registration = Registration(model_id, record, revision, revision)
        self._registry.remember(registration)
        return registration

    def _former(self, lingering: Sequence[KeyValue]) -> Tombstone | None:
        """What the id stood for before, where a tombstone is all that is left of it."""
        if len(lingering) != 1 or self._keys.copy_of(lingering[0].key)[1] != TOMBSTONE:
            return None
        try:
            return Tombstone.decode(lingering[0].value)
        except ValueError as error:
            log.warning("a tombstone cannot be read", key=lingering[0].key, error=str(error))
            return None

    def _pods_of(self, lingering: Sequence[KeyValue]) -> list[str]:
        """The pods whose copies those are."""
        pods = (self._keys.copy_of(kv.key)[1] for kv in lingering)
        return [pod for pod in pods if pod != TOMBSTONE]

    def _puts(self, model_id: str, record: ModelRecord, value: bytes) -> list[etcds.Op]:
        puts = [etcds.put_op(self._keys.model(model_id), value)]
        if record.limits != UNLIMITED:
            puts.append(etcds.put_op(self._keys.want(model_id), b""))
        return puts

    @staticmethod
    def _existing(registration: Registration, record: ModelRecord) -> Registration:
        if not registration.record.same_registration(record):
            raise MeshError(Reason.CONFLICT, "Model already exists with different attribute values")
        return registration

    async def register_many(self, items: Sequence[Item]) -> list[str | MeshError | None]:
        """Registers many: for each item None (created), "existing", or why it was not registered. Never raises."""
        results: list[str | MeshError | None] = [None] * len(items)
        good: list[int] = []
        again: list[int] = []  # ids that came before in `items`: their turn is after that
        seen: set[str] = set()
        values: dict[int, ModelRecord] = {}
        for index, item in enumerate(items):
            try:
                values[index] = self._record(item)
            except MeshError as error:
                results[index] = error
                continue
            (again if item.model_id in seen else good).append(index)
            seen.add(item.model_id)

        async def batch(indexes: list[int]) -> None:
            async with self._batches:
                await self._create_batch(indexes, items, values, results)

        parts = [good[start : start + BATCH] for start in range(0, len(good), BATCH)]
        await asyncio.gather(*(batch(part) for part in parts))
        # Where etcd was away for the others, these would each wait for the same time-out in its turn.
        away = next((r for r in results if isinstance(r, MeshError) and r.reason is Reason.REGISTRY_AWAY), None)
        await self._create_each(again, items, values, results, away)
        return results

    async def _create_batch(
        self,
        indexes: list[int],
        items: Sequence[Item],
        values: dict[int, ModelRecord],
        results: list[str | MeshError | None],
    ) -> None:
        keys = self._keys
        late: list[int] = []  # what was there before is still being withdrawn: they wait for it side by side
        for _ in range(_ROUNDS):
            if not indexes:
                break
            compares, puts = [], []
            for index in indexes:
                key, copies = keys.model(items[index].model_id), keys.copies(items[index].model_id)
                compares += [etcds.absent(key), etcds.absent_prefix(copies)]
                puts += self._puts(items[index].model_id, values[index], values[index].encode())
            try:
                if (await self._etcd.txn(compares, puts)).succeeded:
                    indexes = []
                    break
                # Somebody has registered some of them, or copies linger. Asked apart: mostly nobody has, and reads in
                # the transaction's other branch would double what every batch costs.
                gets = []
                for index in indexes:
                    key, copies = keys.model(items[index].model_id), keys.copies(items[index].model_id)
                    gets += [
                        etcds.get_op(key),
                        etcds.get_range_op(copies, after_prefix(copies), limit=1, keys_only=True),
                    ]
                found = (await self._etcd.txn((), gets)).responses
            except etcds.EtcdUnavailable as error:
                if not error.ambiguous:
                    for index in indexes:
                        results[index] = error
                    return
                break  # it may have been done: one by one, each is looked up
            except etcds.EtcdError:  # too large together, most likely
                break
            # Those are settled, the rest is tried together.
            rest = []
            for place, index in enumerate(indexes):
                existing, lingering = _keys_of(found[2 * place]), _keys_of(found[2 * place + 1])
                if existing:
                    try:
                        self._existing(decode(items[index].model_id, existing[0]), values[index])
                        results[index] = "existing"
                    except MeshError as error:
                        results[index] = error
                elif lingering:
                    late.append(index)
                else:
                    rest.append(index)
            indexes = rest
        if late:
            await asyncio.gather(*(self._create_one(index, items, values, results) for index in late))
        await self._create_each(indexes, items, values, results, None)

    async def _create_each(
        self,
        indexes: Iterable[int],
        items: Sequence[Item],
        values: dict[int, ModelRecord],
        results: list[str | MeshError | None],
        away: MeshError | None,
    ) -> None:
        """Creates them in turn, until etcd is away: the rest would only wait for the same time-out, each in its turn.
        `away`: it is already, and this is why."""
        for index in indexes:
            if away is None:
                away = await self._create_one(index, items, values, results)
            else:
                results[index] = away

    async def _create_one(
        self,
        index: int,
        items: Sequence[Item],
        values: dict[int, ModelRecord],
        results: list[str | MeshError | None],
    ) -> MeshError | None:
        """Sets its result, and returns it where etcd is away."""
        try:
            _, created = await self._create(items[index].model_id, values[index])
            results[index] = None if created else "existing"
        except MeshError as error:
            results[index] = error
            return error if error.reason is Reason.REGISTRY_AWAY else None
        return None

    async def unregister(self, model_id: str) -> bool:
        """Forgets a model and has its copies withdrawn; whether there was one. Raises PRECONDITION, REGISTRY_AWAY."""
        _check(model_id)
        key, copies = self._keys.model(model_id), self._keys.copies(model_id)
        tombstone = self._keys.tombstone(model_id)
        for _ in range(_ROUNDS):
            seen = await self._etcd.txn(
                [],
                [etcds.get_op(key), etcds.get_range_op(copies, tombstone, keys_only=True), *census(self._keys)],
            )
            found = _keys_of(seen.responses[0])
            if not found:
                self._registry.forget(model_id)
                return False
            registration = decode(model_id, found[0])
            if registration.record.refs > 0:
                raise MeshError(Reason.PRECONDITION, f"Model {model_id} has referents")
            # Who may answer for it after this: pods with a copy, and pods that are cut off. Mostly there is nobody.
            nobody = not _keys_of(seen.responses[1]) and all_present(seen.responses[2:])
            unchanged = [etcds.modified(key, registration.modified)]
            burial = etcds.put_op(tombstone, Tombstone.of(registration.record).encode())
            result = await self._etcd.txn(
                [*unchanged, etcds.absent_prefix(copies)] if nobody else unchanged,
                [
                    etcds.delete_op(key),
                    etcds.delete_op(self._keys.want(model_id)),
                    etcds.delete_op(self._keys.reload(model_id)),
                    etcds.get_range_op(copies, tombstone),
                    *census(self._keys),
                    *([] if nobody else [burial]),
                ],
            )
            if not result.succeeded:
                continue
            self._registry.forget(model_id)
            if nobody and not all_present(result.responses[4:6]):
                # A pod was cut off in this very moment. It had no copy a moment before.
                nobody = not (await self._etcd.txn([etcds.absent(key)], [burial])).succeeded
            await self._withdraw(model_id, _keys_of(result.responses[3]), "it was unregistered")
            if not nobody:
                with contextlib.suppress(etcds.EtcdError):  # it is unregistered; the leader sees to the rest
                    await self._tombstones.resolve(model_id)
            return True
        raise MeshError(
            Reason.UNAVAILABLE, f"model {model_id} is being changed by others all the time", retry_after=1.0
        )

    async def _withdraw(self, model_id: str, lingering: Sequence[KeyValue], reason: str) -> None:
        """Tells the agents that have copies to unload them, all at once, and waits for them, bounded."""
        pods = set(self._pods_of(lingering))
        pods |= {copy.pod.name for copy in self._view.known(model_id)}  # suspects have no keys any more

        async def unload(name: str) -> None:
            pod = self._view.pods.get(name)
            if pod is None:
                return
            request = agent_pb2.UnloadRequest(model_id=model_id, reason=reason)
            try:
                await self._agents.unload(pod, request, timeout=self._settings.unload_wait)
            except Unreachable as error:
                log.warning("a copy could not be withdrawn", model=model_id, pod=name, why=str(error))
                return
            for copy in self._view.known(model_id):
                if copy.pod is pod:
                    self._view.drop(copy)

        await asyncio.gather(*(unload(name) for name in pods))

    async def _touch(self, registration: Registration, last_used_ms: int) -> None:
        """Raises the recorded last use, where that makes a difference of an hour."""
        if last_used_ms - registration.record.last_used_ms <= HOUR_MS:
            return

        def raised(record: ModelRecord) -> ModelRecord | None:
            newer = last_used_ms - record.last_used_ms > HOUR_MS
            return replace(record, last_used_ms=last_used_ms) if newer else None

        await self._registry.change(registration.model_id, raised)

    # --- asking and loading ---

    async def status(self, model_id: str) -> ModelStatus:
        """How a model is. Never loads it, never counts as a use. Raises BAD_REQUEST, REGISTRY_AWAY."""
        _check(model_id)
        seen = await self._look(model_id)
        return ModelStatus(NOT_FOUND) if seen.registration is None else self._status(seen.registration, seen)

    async def _look(self, model_id: str) -> _Seen:
        """Record and copies as they stand in etcd, at one revision."""
        key, copies = self._keys.model(model_id), self._keys.copies(model_id)
        result = await self._etcd.txn(
            [],
            [
                etcds.get_op(key),
                etcds.get_range_op(copies, self._keys.tombstone(model_id)),
                etcds.get_op(self._keys.reload(model_id)),
            ],
        )
        found, moves = _keys_of(result.responses[0]), _keys_of(result.responses[2])
        reload = None
        published = {}
        for kv in _keys_of(result.responses[1]):
            try:
                published[self._keys.copy_of(kv.key)[1]] = CopyRecord.decode(kv.value)
            except ValueError as error:
                log.warning("a record in etcd cannot be read", key=kv.key, error=str(error))
        for kv in moves:
            try:
                reload = Reload.decode(kv.value)
            except ValueError as error:
                log.warning("a record in etcd cannot be read", key=kv.key, error=str(error))
        return _Seen(decode(model_id, found[0]) if found else None, published, result.revision, reload)

    def _status(self, registration: Registration, seen: _Seen) -> ModelStatus:
        record, now = registration.record, self._wall()
        current = {pod: copy for pod, copy in seen.copies.items() if copy.create_revision == registration.created}
        newer = self._view.revision > seen.revision  # the watch has been quicker than the read
        for copy in self._view.known(registration.model_id):
            # Suspects are served though etcd has lost them, and what an agent has answered is newer than its key.
            if (newer or copy.suspect or copy.answered) and copy.record.create_revision == registration.created:
                current[copy.pod.name] = copy.record
        failures = record.recent_failures(now, int(self._settings.failure_expiry * 1000))
        infos = [
            CopyInfo(
                pod,
                LOADED if copy.state == records.LOADED else LOADING,
                copy.since_ms or now - copy.age_ms,  # the time is in the key, which an answer may be ahead of
                copy.host_bytes + copy.device_bytes,
                copy.generation,
                copy.digest,
            )
            for pod, copy in current.items()
        ]
        if any(info.status == LOADED for info in infos):
            status = LOADED
        elif infos or self._coldstart.loading(registration.model_id):
            status = LOADING
        elif (
            failures
            or record.quarantined
            or self._changed(record)
            or self._coldstart.nowhere(registration.model_id, record)
        ):
            status = LOADING_FAILED
        else:
            return ModelStatus(NOT_LOADED, record=record, reload=seen.reload)
        infos += [CopyInfo(failure.pod, LOADING_FAILED, failure.at_ms) for failure in failures]
        infos.sort(key=lambda info: -info.time_ms)
        errors = self.errors(record)
        if status == LOADING_FAILED and (nowhere := self._coldstart.nowhere(registration.model_id, record)):
            errors = (nowhere, *errors)
        return ModelStatus(status, errors, tuple(infos), record, reload=seen.reload)

    def errors(self, record: ModelRecord) -> tuple[str, ...]:
        """Why a model is not loaded, or has not been in some pod: what its record remembers and has not expired."""
        failures = record.recent_failures(self._wall(), int(self._settings.failure_expiry * 1000))
        errors = tuple(failure.text for failure in failures if failure.text)
        if self._changed(record):
            errors = (record.contradiction(record.changed), *errors)
        if record.quarantined:
            errors = (*(f"quarantined, a server died of it: {text}" for text in record.killed), *errors)
        return errors

    def _changed(self, record: ModelRecord) -> bool:
        """Whether a load has lately found other content than the registration's."""
        return bool(record.changed) and self._wall() - record.changed_ms < self._settings.failure_expiry * 1000

    async def ensure_loaded(self, model_id: str, *, last_used_ms: int = 0, sync: bool = False) -> ModelStatus:
        """Loads a model that has no copy. A load that fails is a status, not an error.

        `last_used_ms` 0 is now. Raises BAD_REQUEST, UNKNOWN_MODEL, REGISTRY_AWAY, OVERLOADED.
        """
        _check(model_id)
        now = self._wall()
        used = min(last_used_ms, now) if last_used_ms > 0 else now
        registration = await self._registry.read(model_id, fresh=True)
        if registration is None:
            raise MeshError(Reason.UNKNOWN_MODEL, "model not found")
        await self._touch(registration, used)
        idle_ms = max(0, now - max(used, registration.record.last_used_ms))
        return await self._load(model_id, idle_ms=idle_ms, sync=sync)

    async def _load(self, model_id: str, *, idle_ms: int, sync: bool) -> ModelStatus:
        failure: MeshError | None = None
        if model_id not in self._view.copies:
            try:
                if sync:
                    await self._coldstart.load(model_id, idle_ms=idle_ms)
                else:
                    await self._coldstart.begin(model_id, idle_ms=idle_ms)
            except MeshError as error:
                if error.reason not in (*_LOAD_ERRORS, Reason.NOT_IN_TIME):
                    raise
                failure = error
        status = await self.status(model_id)
        if failure is None or status.status == LOADED:
            return status
        if failure.reason is Reason.NOT_IN_TIME:
            return replace(status, status=LOADING)
        known = any(failure.text.startswith(text) for text in status.errors)  # without its hint
        errors = status.errors if known else (failure.text, *status.errors)
        return replace(status, status=LOADING_FAILED, errors=errors)

    async def release(self, model_id: str) -> ModelStatus:
        """Forgets that servers died of it and that loads failed: it may be loaded again. Raises UNKNOWN_MODEL."""
        _check(model_id)
        found = await self._registry.change(
            model_id,
            lambda record: record.absolved() if record != record.absolved() else None,
        )
        if found is None:
            raise MeshError(Reason.UNKNOWN_MODEL, "model not found")
        return await self.status(model_id)

    async def reload(self, model_id: str) -> ModelStatus:
        """Has all copies of a model move to what lies at its path now; the leader sees to it (`leader.reloading`).

        Returns at once: until they have moved, old and new copies answer. Raises UNKNOWN_MODEL; PRECONDITION where the
        registration itself names a digest; REGISTRY_AWAY.
        """
        _check(model_id)
        key = self._keys.model(model_id)
        for _ in range(_ROUNDS):
            registration = await self._registry.read(model_id, fresh=True)
            if registration is None:
                raise MeshError(Reason.UNKNOWN_MODEL, "model not found")
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
                log.info("a model is to be reloaded", model=model_id, generation=record.generation)
                return await self.status(model_id)
        raise MeshError(
            Reason.UNAVAILABLE, f"model {model_id} is being changed by others all the time", retry_after=1.0
        )

    async def set_limits(self, model_id: str, change: Callable[[Limits], Limits]) -> ModelStatus:
        """Changes how many copies a model has. Raises UNKNOWN_MODEL, and what `change` raises."""
        _check(model_id)

        def changed(record: ModelRecord) -> ModelRecord | None:
            limits = change(record.limits)
            return None if limits == record.limits else replace(record, limits=limits)

        # Before, so that there is no moment in which limits hold that the leader does not know of; it tidies up.
        await self._etcd.put(self._keys.want(model_id), b"")
        found = await self._registry.change(model_id, changed)
        if found is None:
            raise MeshError(Reason.UNKNOWN_MODEL, "model not found")
        return await self.status(model_id)

    # --- looking around ---

    async def explain(self, model_id: str) -> dict[str, Any]:
        """Where a model is, or would go, and why. Raises BAD_REQUEST, UNKNOWN_MODEL, REGISTRY_AWAY."""
        _check(model_id)
        seen = await self._look(model_id)
        if seen.registration is None:
            raise MeshError(Reason.UNKNOWN_MODEL, "model not found")
        record = seen.registration.record
        return explain.model(
            seen.registration,
            self._status(seen.registration, seen),
            lambda excluded: self._coldstart.choose(model_id, record, excluded=excluded),
            size=self._coldstart.footprint_of(seen.registration.record).total_bytes,
            decisions=await self._decisions(model_id),
        )

    async def _decisions(self, model_id: str) -> dict[str, list[str]]:
        """What the agents have lately decided about the model, by pod."""

        async def ask(name: str) -> tuple[str, list[str]]:
            try:
                reply = await self._agents.describe(self._view.pods[name], model_id, timeout=2.0)
            except (Unreachable, KeyError):
                return name, []
            # Of a copy that is there the agent knows for good why it was loaded; decisions are forgotten some time.
            loads = [
                json.dumps({"what": "load", "models": [model_id], "why": copy.reason, "ago_ms": copy.age_ms})
                for copy in reply.copies
                if copy.reason and copy.state == "loaded"
            ]
            return name, [*loads, *reply.decisions]

        return dict(await asyncio.gather(*(ask(name) for name in list(self._view.pods))))

    async def progress(self, model_id: str, status: ModelStatus) -> dict[str, dict[str, Any]]:
        """How far the pods have come that load the model, by pod: `load`, and `pull` while its files are fetched. Who
        does not answer is left out."""
        found: dict[str, dict[str, Any]] = {}

        async def ask(pod: Pod) -> None:
            try:
                reply = await self._agents.describe(pod, model_id, timeout=_PROGRESS)
            except Unreachable:
                return
            for copy in reply.copies:
                if (load := explain.load(copy)) is not None:
                    pull = explain.pull(copy)
                    found[pod.name] = {"load": load} | ({"pull": pull} if pull is not None else {})

        loading = {info.pod for info in status.copies if info.status == LOADING}
        await asyncio.gather(*(ask(pod) for name in loading if (pod := self._view.pods.get(name)) is not None))
        return found

    async def pods(self) -> list[dict[str, Any]]:
        """The pods as this router sees them."""
        return explain.pods(self._view)

    def open_lives(self) -> list[dict[str, Any]]:
        """Returns the lives of pods that are cut off from etcd, as this router sees them."""
        found = []
        for pod, incarnation in sorted(self._view.open_lives()):
            try:
                life = Life.decode(self._view.lives[pod, incarnation])
            except ValueError as error:
                log.warning("a pod's life cannot be read", pod=pod, incarnation=incarnation, error=str(error))
                continue
            after = self._settings.reregister_after
            found.append(
                {
                    "pod": pod,
                    "incarnation": incarnation,
                    "data": life.data_address,
                    "control": life.control_address,
                    "open_s": life.open_seconds,
                    "left_s": None if after is None else max(0, int(after - life.open_seconds)),
                }
            )
        return found

    async def forget_pod(self, name: str) -> list[str]:
        """Closes the open lives of a pod, which nobody waits for from now on; returns their incarnations. Raises
        PRECONDITION where the pod is published, UNKNOWN_MODEL where nothing is known of it, REGISTRY_AWAY."""
        forgotten = await self._tombstones.forget(name)
        if not forgotten:
            if self._view.published(name) is not None:
                text = f"{name} is published, so there is nothing to forget: stop the pod, and its models go with it"
                raise MeshError(Reason.PRECONDITION, text)
            raise MeshError(Reason.UNKNOWN_MODEL, f"there is no pod {name} that is cut off; `mesh pods` lists them")
        return forgotten

    async def routers(self) -> list[dict[str, Any]]:
        """Returns the routers of the mesh, as they stand in etcd. Raises REGISTRY_AWAY."""
        found = []
        async for kv in self._etcd.scan(self._keys.routers):
            try:
                name, record = self._keys.router_of(kv.key), RouterRecord.decode(kv.value)
            except ValueError as error:
                log.warning("a router's record cannot be read", key=kv.key, error=str(error))
                continue
            found.append(
                {
                    "router": name,
                    "address": record.address,
                    "probe": record.probe_address,
                    "workers": record.workers,
                    "protocol": list(record.protocol),
                }
            )
        return found

    async def describe_pod(self, name: str) -> dict[str, Any]:
        """A pod as its agent describes it now. Raises UNKNOWN_MODEL where there is no such pod, UNAVAILABLE."""
        pod = self._view.pods.get(name)
        if pod is None:
            raise MeshError(Reason.UNKNOWN_MODEL, f"there is no pod {name}")
        try:
            reply = await self._agents.describe(pod, timeout=_DESCRIBE)
        except Unreachable as error:
            raise MeshError(Reason.UNAVAILABLE, error.text) from error
        return explain.described(reply)

    async def questions(self, name: str) -> tuple[str, ...]:
        """A pod's latest questions for room, lines of JSON (`placement.replay`). Raises UNKNOWN_MODEL, UNAVAILABLE."""
        pod = self._view.pods.get(name)
        if pod is None:
            raise MeshError(Reason.UNKNOWN_MODEL, f"there is no pod {name}")
        try:
            return tuple((await self._agents.questions(pod, timeout=_DESCRIBE)).decisions)
        except Unreachable as error:
            raise MeshError(Reason.UNAVAILABLE, error.text) from error

    # Last in the class: below it, `list` is this method.
    async def list(self, *, prefix: str = "", after: str = "", limit: int = 100) -> Page:
        """Registered models whose id begins with `prefix`, after the id `after`. At most MAX_PAGE a page."""
        limit = max(1, min(limit, MAX_PAGE))
        try:
            first = self._keys.registry + prefix.encode()
            start = max(first, self._keys.registry + after.encode() + b"\0") if after else first
        except UnicodeEncodeError as error:
            raise MeshError(Reason.BAD_REQUEST, "prefix and after must be valid text") from error
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


def _check(model_id: str) -> None:
    try:
        records.check_id(model_id)
    except ValueError as error:
        raise MeshError(Reason.BAD_REQUEST, str(error)) from error


def _keys_of(response: tuple[KeyValue, ...] | int | None) -> tuple[KeyValue, ...]:
    assert isinstance(response, tuple)
    return response
