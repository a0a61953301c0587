"""Reads of model records on demand. Concurrent callers share a read, and a missing record is never reported by mistake.

A model must be callable through any worker as soon as its registration has returned. Therefore, only a read that began
after the caller asked may say that a model does not exist. A caller may join a read under way, but uses its result only
if it finds the record. For the same reason a missing record is never remembered.

Found records are remembered in a bounded LRU cache, without a watch, and may be outdated. Cold starts can use them,
because an agent's claim succeeds only for the current registration.

A name may be that of a model or a vmodel. A worker's reads look for both at one revision and pass the vmodel to
`Vmodels`. So "there is no such model" also says that there was no vmodel of that name.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace

from cachetools import LRUCache

from mesh.etcd import Etcd, KeyValue
from mesh.process.tasks import Tasks
from mesh.schema.keys import Keys
from mesh.schema.records import ModelRecord
from mesh.statuses import MeshError, Reason
from mesh.telemetry import logs
from router.state.vmodels import Vmodels

log = logs.get(__name__)


@dataclass(frozen=True, slots=True)
class Registration:
    """A model's record as read from etcd."""

    model_id: str
    record: ModelRecord
    created: int  # create revision: distinguishes registrations of one id
    modified: int  # mod revision


class _Read:
    __slots__ = ("began", "task")

    def __init__(self, began: int, task: "asyncio.Task[Registration | None]") -> None:
        self.began = began
        self.task = task


class Registry:
    """Shared reads of records.

    All errors are MeshErrors: REGISTRY_AWAY if etcd does not answer within `timeout` seconds, INTERNAL if a record
    cannot be decoded. Each read also passes the vmodel of the same name to `vmodels`, if given.
    """

    def __init__(
        self,
        etcd: Etcd,
        keys: Keys,
        *,
        timeout: float = 3.0,
        remember: int = 10_000,
        vmodels: Vmodels | None = None,
    ) -> None:
        self.etcd = etcd
        self.keys = keys
        self._vmodels = vmodels
        self._timeout = timeout
        self._reads: dict[str, _Read] = {}
        self._cache: LRUCache[str, Registration] = LRUCache(remember)
        self._tasks = Tasks(awaited=(MeshError,))
        self._clock = 0  # counts arrivals and starts of reads, to find out which came first

    async def read(self, model_id: str, *, fresh: bool = False) -> Registration | None:
        """Returns the registration, or None if a read that began after this call has found none.

        Unless `fresh`, may also return a registration found by a read that began earlier.
        """
        self._clock += 1
        arrived = self._clock
        while True:
            read = self._reads.get(model_id)
            # A read that has ended, but is still here because its callback has not run, must not be joined: to await
            # it would not yield to the loop, so it would stay here forever.
            if read is None or read.task.done():
                read = self._begin(model_id)
            enough = read.began > arrived
            try:
                found = await asyncio.shield(read.task)
            except MeshError:
                if enough:
                    raise
                continue
            if enough or (found is not None and not fresh):
                return found

    def remembered(self, model_id: str) -> Registration | None:
        """Returns the registration that an earlier read found, or None. It may have been deleted or replaced since."""
        return self._cache.get(model_id)

    def remember(self, registration: Registration) -> None:
        """Remembers a registration that another module has read or written."""
        self._cache[registration.model_id] = registration

    def forget(self, model_id: str) -> None:
        """Forgets a registration that has proved wrong."""
        self._cache.pop(model_id, None)

    async def change(self, model_id: str, change: Callable[[ModelRecord], ModelRecord | None]) -> Registration | None:
        """Rewrites the record by compare-and-set. `change` may be called several times. It returns None to leave the
        record as it is.

        Returns the registration after the change, or None if the model is not registered.
        """

        def rewrite(kv: KeyValue | None) -> bytes | None:
            if kv is None:
                return None
            changed = change(decode(model_id, kv).record)
            return None if changed is None else changed.encode()

        done = await self.etcd.update(self.keys.model(model_id), rewrite, timeout=self._timeout)
        if done.before is None or done.value is None:
            self.forget(model_id)
            return None
        registration = decode(model_id, replace(done.before, value=done.value, mod_revision=done.mod_revision))
        self.remember(registration)
        return registration

    def _begin(self, model_id: str) -> _Read:
        self._clock += 1
        read = _Read(self._clock, self._tasks.start(self._get(model_id), f"read {model_id}"))
        self._reads[model_id] = read

        def ended(task: "asyncio.Task[Registration | None]") -> None:
            if self._reads.get(model_id) is read:
                del self._reads[model_id]

        read.task.add_done_callback(ended)
        return read

    async def _get(self, model_id: str) -> Registration | None:
        key = self.keys.model(model_id)
        if self._vmodels is None:
            kv = await self.etcd.get(key, timeout=self._timeout)
        else:
            both, revision = await self.etcd.several((key, self.keys.vmodel(model_id)), timeout=self._timeout)
            kv, vmodel = both
            self._vmodels.read(model_id, vmodel, revision)
        if kv is None:
            self._cache.pop(model_id, None)
            return None
        registration = decode(model_id, kv)
        self._cache[model_id] = registration
        return registration

    async def close(self) -> None:
        """Ends the reads under way."""
        await self._tasks.close()


def decode_for_removal(model_id: str, kv: KeyValue) -> Registration:
    """Returns a registration that is to be removed. If its record cannot be read, the returned record is empty, because
    otherwise such a registration could only be removed in etcd."""
    try:
        return decode(model_id, kv)
    except MeshError:
        return Registration(model_id, ModelRecord(type=""), kv.create_revision, kv.mod_revision)


def decode(model_id: str, kv: KeyValue) -> Registration:
    """Returns a registration from a key of etcd. Raises MeshError INTERNAL if the record cannot be read."""
    try:
        record = ModelRecord.decode(kv.value)
    except ValueError as error:
        log.warning("a model record in etcd cannot be read", model=model_id, error=str(error))
        text = f"the record of model {model_id} cannot be read ({error}): unregister the model, and register it again"
        raise MeshError(Reason.INTERNAL, text) from error
    return Registration(model_id, record, kv.create_revision, kv.mod_revision)
