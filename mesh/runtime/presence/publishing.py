"""The pod's presence in etcd: a lease, and under it the pod's record and its copies' keys, kept up to date.

Other parts note changes (`put`, `drop`, `changed`), and do not wait. One task writes the difference (kept by
`copykeys`), many keys per transaction (`batch`), and retries as long as etcd is unavailable. If nothing has to be
written for some seconds, an empty transaction checks that `pods/<pod>` is still under this pod's lease, because a pod
that has lost its place must stop answering.

A lost lease is an ordinary event: when etcd stalls, every lease of the mesh may end at once. Then everything is
published again, after a random pause that spreads the pods' writes. A copy is published only if its model still has the
same registration, and no reload has replaced its content meanwhile. For each other copy, `on_stale` is called. The
copies are written first and the pod's record last, so if the pod is published, each copy that answers has its key. The
fence (`placement.fence`) and unregistering rely on this order.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from mesh.etcd import (
    Compare,
    Etcd,
    EtcdError,
    EtcdLeaseLost,
    Lease,
    Patience,
    leased,
    modified,
)
from mesh.process.tasks import Tasks, turned
from mesh.runtime import duties
from mesh.runtime.presence import figures, place
from mesh.runtime.presence.batch import Batch
from mesh.runtime.presence.copykeys import Claiming, CopyKeys
from mesh.runtime.presence.outdated import Outdated
from mesh.runtime.presence.place import NameTaken
from mesh.schema import records
from mesh.schema.keys import Keys
from mesh.telemetry import logs

log = logs.get(__name__)

_LINGER = 0.003  # seconds; a write costs the event loop 0.3 ms, so changes in quick succession share one
_TICK = 1.0  # seconds between two looks at the pod's figures
_ASSURED = 4.0  # seconds without a write, at most half a lease time, until the pod checks its presence
_JITTER = 1.0  # seconds over which the pods of a mesh spread their return
_PAUSE_FIRST, _PAUSE_MAX = 0.1, 2.0  # seconds between attempts while etcd is unavailable


@dataclass(frozen=True, slots=True)
class PresenceStatistics:
    """The numbers of a pod's presence."""

    behind: int  # keys that differ from what they should be
    leases: int  # granted so far
    writes: int


class Presence:
    """The presence of one pod. `record` returns the pod's present record."""

    def __init__(
        self,
        etcd: Etcd,
        keys: Keys,
        *,
        pod: str,
        incarnation: str,
        ttl: int,
        record: Callable[[], records.PodRecord],
        on_stale: Callable[[str], Coroutine[Any, Any, object]],
        on_usurped: Callable[[str], None],
        is_alive: Callable[[records.PodRecord], Awaitable[bool | None]],
        on_lost: Callable[[str], None],
    ) -> None:
        """Makes a presence that is not published yet. `ttl` is in seconds. `on_stale` is called with the id of a model
        whose registration has ended or whose content was replaced, and returns once no call is answered from its copy.
        `on_usurped` is called with the reason once another pod has taken the name. `is_alive` returns whether the pod
        of a record under this name is alive, or None if that is unknown. `on_lost` is called with the reason if the
        task that keeps the keys up to date ends or hangs before `close`."""
        self.pod = pod
        self.key = keys.pod(pod)
        self._etcd = etcd
        self._keys = keys
        self._record = record
        self._ttl = ttl
        self._assured = 0.0  # when etcd last confirmed the pod's presence under its lease; monotonic
        self._place = place.Place(etcd, keys, pod, incarnation=incarnation, ttl=ttl, record=record, is_alive=is_alive)
        self._on_usurped = on_usurped
        self._lease: Lease | None = None
        self._published: figures.Published | None = None
        self._wake = asyncio.Event()
        self._copies = CopyKeys(self._wake.set)
        self._tasks = Tasks(on_lost)
        self._outdated = Outdated(etcd, keys, self._copies, self._tasks, withdraw=on_stale, on_gone=self._tell)
        self._leases = self._writes = 0
        self._away = ""
        self._next: Lease | None = None  # the lease under which the pod will be published again
        self._listeners: list[Callable[[], None]] = []

    # --- life ---

    async def wait_for_name(self) -> None:
        """Waits until it is known that no other pod with this name is alive. Raises NameTaken if one is, or if that
        remains unknown, and EtcdError."""
        await self._place.wait()

    async def start(self, patience: Patience | None = None) -> None:
        """Publishes the pod for the first time, as soon as etcd is available. Raises NameTaken, EtcdError."""
        patience = patience or Patience()
        self._hold(await patience.until_done(self._place.take))
        await patience.until_done(self._sweep)
        self._tasks.run(duties.PRESENCE, self._run)

    async def close(self, *, revoke: bool, timeout: float = 2.0) -> None:
        """Ends the presence. With `revoke`, which is allowed only after the pod's model server has ended, all keys of
        this pod are deleted immediately, including its life. Otherwise the life stays, and etcd deletes the other keys
        when the lease expires."""
        await self._tasks.close()
        lease, self._lease = self._lease, None
        if lease is not None:
            try:
                if revoke and not lease.lost.is_set():
                    await lease.revoke(timeout=timeout)
                else:
                    await lease.close()
            except EtcdError as error:
                log.warning(
                    "this pod's lease was not revoked: its keys stay until the lease expires", error=error.detail
                )
        if revoke:
            try:
                await self._place.leave(timeout)
            except EtcdError as error:
                log.warning(
                    "this pod's life was not deleted: it stays until the leader finds that this pod has ended",
                    error=error.detail,
                )

    def listen(self, listener: Callable[[], None]) -> None:
        """Registers a listener, which is called whenever `keyed` may have changed."""
        self._listeners.append(listener)

    @property
    def proof_ns(self) -> int | None:
        """The time at which the last answered keep-alive was sent, in ns of CLOCK_BOOTTIME, or None without a lease."""
        return self._lease.proof_ns if self._lease is not None and not self._lease.lost.is_set() else None

    @property
    def keyed(self) -> bool:
        """True if the pod is published and each copy that may answer has its key, as far as this pod knows."""
        return self.published and self._copies.all_keyed

    @property
    def published(self) -> bool:
        """True if this pod's record is in etcd, judging by the local clock."""
        return self._lease is not None and not self._lease.lost.is_set()

    @property
    def lease(self) -> int | None:
        """The lease under which the pod is published, or None if the pod is not published."""
        return self._lease.id if self._lease is not None and self.published else None

    @property
    def away(self) -> str:
        """The reason why the pod's keys in etcd may be missing or outdated, or "" if they are up to date."""
        return self._away

    def statistics(self) -> PresenceStatistics:
        """Returns the presence in numbers."""
        return PresenceStatistics(
            behind=self._copies.behind,
            leases=self._leases,
            writes=self._writes,
        )

    # --- what should be there ---

    def put(self, model_id: str, record: records.CopyRecord) -> None:
        """Notes a copy of this pod. The copy's key is written a moment later, together with other changes."""
        if self._copies.put(model_id, record):
            self._tell()
        asyncio.get_running_loop().call_later(_LINGER, self._wake.set)

    def drop(self, model_id: str) -> None:
        """Notes that this pod has no copy of a model, or none that still answers."""
        self._copies.drop(model_id)

    def changed(self) -> None:
        """Notes that the pod's state, addresses or labels may have changed."""
        self._wake.set()

    def wanted(self, model_id: str) -> records.CopyRecord | None:
        """Returns the record that a model's key should have, or None if the key should not exist."""
        return self._copies.wanted.get(model_id)

    def lease_gone(self, lease: int, why: str) -> None:
        """Gives up a lease, because etcd has answered that the lease, or this pod's presence under it, does not exist.
        Keeps a newer lease."""
        if self.published and self._lease is not None and self._lease.id == lease:
            log.warning("this pod is no longer published in etcd", why=why)
            self._forget_lease()
            self._tell()
            self._wake.set()

    async def settled(self, model_id: str, timeout: float) -> bool:
        """Waits until the key of a model in etcd is as wanted. Returns False after `timeout` seconds."""
        return await self._copies.settled(model_id, timeout)

    @contextlib.asynccontextmanager
    async def claiming(self, model_id: str) -> AsyncIterator[Claiming]:
        """Leaves a model's key to a claim for the duration of the block. The caller must not begin another claim of the
        model meanwhile, or call `put` for it."""
        try:
            async with self._copies.claiming(model_id, lambda: self.lease) as claim:
                yield claim
        finally:
            self._tell()

    # --- writing it ---

    async def _run(self) -> None:
        pause = _PAUSE_FIRST
        while True:
            turned()
            try:
                if not self.published:
                    await self._return()
                await self._write_all()
                self._away, pause = "", _PAUSE_FIRST
                await self._idle()
            except NameTaken as error:
                self._away = str(error)
                log.error("another pod has taken this pod's name", why=str(error))
                self._on_usurped(str(error))
                return
            except EtcdError as error:
                if not self._away:
                    log.warning("etcd is unavailable", error=error.detail, behind=self._copies.behind)
                self._away = error.text
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(pause * 2, _PAUSE_MAX)

    async def _idle(self) -> None:
        try:
            async with asyncio.timeout(_TICK):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()

    async def _write_all(self) -> None:
        while self.published:
            assert self._lease is not None
            batch = self._copies.next_batch()
            record = self._figures()
            if not batch and record is None and time.monotonic() - self._assured < min(_ASSURED, self._ttl / 2):
                return
            await self._write_batch(batch, self._lease.id, leased(self.key, self._lease.id), record)

    async def _write_batch(
        self, batch: list[str], lease: int, guard: Compare, record: records.PodRecord | None = None
    ) -> bool:
        """Writes or deletes the keys of these models, as wanted. Returns False if the keys must be written again."""
        checked = self._copies.begin(batch)
        done = False
        try:
            done = await self._write(checked, lease, guard, record)
        finally:
            self._copies.end(checked, done=done)
        return done

    def _figures(self) -> records.PodRecord | None:
        """Returns the pod's record if it is worth writing, or None."""
        record, now = self._record(), time.monotonic()
        if self._published is not None and not figures.worth_telling(self._published, record, now):
            return None
        return record

    async def _write(
        self, checked: dict[str, bool], lease: int, guard: Compare, record: records.PodRecord | None
    ) -> bool:
        """Executes one transaction, which succeeds only if `guard` holds. Returns False if its keys must be written
        again."""
        batch = Batch(self._keys, self.pod, guard, lease)
        batch.add_copies(checked, self._copies.wanted)
        if record is not None:
            batch.add_pod(record)
        try:
            result = await self._etcd.txn(batch.compares, batch.success, batch.failure)
        except EtcdLeaseLost:
            self.lease_gone(lease, "etcd no longer knows its lease")
            return False
        self._writes += bool(batch.success)
        if result.succeeded:
            self._assured = time.monotonic()
            if record is not None:
                self._published = figures.Published(record, time.monotonic())
            current = self._lease or self._next
            if current is not None and current.id == lease and self._copies.stand(batch.keyed):
                self._tell()
            return True
        if self.published and batch.unguarded(result):
            self.lease_gone(lease, "its key is not in etcd")
            return False
        for model_id in batch.outdated(result):
            self._outdated.begin(model_id)
        return False

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()

    # --- the lease ---

    async def _return(self) -> None:
        """Publishes all copies that are still current, and then the pod, after the lease was lost."""
        self._forget_lease()
        await asyncio.sleep(random.uniform(0, _JITTER))
        self._next, revision = await self._place.prepare()
        try:
            if await self._write_copies(self._next, revision):
                lease, self._next = self._next, None
                if (taken := await self._place.publish(lease, revision)) is not None:
                    self._hold(taken)
                    log.info("published again", copies=len(self._copies.wanted), lease=f"{lease.id:x}")
        finally:
            if self._next is not None:
                await self._next.close()
                self._next = None

    async def _write_copies(self, lease: Lease, revision: int) -> bool:
        """Writes all keys except the pod's own, which must still have `revision`, and waits until no stale copy
        answers. Returns False if the pod's own key has changed, or the lease has ended, meanwhile."""
        guard = modified(self.key, revision)
        await self._outdated.begin_replaced()
        self._copies.renew()
        while batch := self._copies.next_batch():
            if await self._write_batch(batch, lease.id, guard):
                continue
            if not await self._outdated.wait():
                return False
        return True

    def _hold(self, taken: place.Taken) -> None:
        self._leases += 1
        self._lease = taken.lease
        self._published = figures.Published(taken.record, time.monotonic())
        self._assured = time.monotonic()
        self._watcher = self._tasks.start(self._on_lost(taken.lease), "lease watch")
        self._tell()

    _watcher: asyncio.Task[None] | None = None

    async def _on_lost(self, lease: Lease) -> None:
        await lease.lost.wait()
        self._wake.set()
        self._tell()

    def _forget_lease(self) -> None:
        lease, self._lease = self._lease, None
        self._copies.lost()
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None
        if lease is not None:
            self._tasks.start(lease.close(), "close lease")

    async def _sweep(self) -> None:
        """Marks for deletion the keys of copies that earlier incarnations of this pod have left under leases that have
        not ended."""
        left = self._copies.stray(await self.own_keys())
        for model_id in left:
            self._copies.touch(model_id)
        if left:
            log.info("deleting copies of an earlier life", copies=len(left))

    async def own_keys(self) -> list[str]:
        """Returns the models for which etcd has a copy of this pod. Reads the keys of all copies in the mesh. Raises
        EtcdError."""
        found = []
        async for kv in self._etcd.scan(self._keys.all_copies, keys_only=True):
            try:
                model_id, pod = self._keys.copy_of(kv.key)
            except ValueError:
                continue  # invalid keys are left to routers, which log them
            if pod == self.pod:
                found.append(model_id)
        return found

    async def tidy(self) -> None:
        """Marks superfluous keys of this pod for deletion, which are late results of claims that timed out. Marks
        missing keys to be written again, because etcd may have been restored from a snapshot. Reads the keys of all
        copies in the mesh. Raises EtcdError."""
        expected = self._copies.as_wanted
        found = set(await self.own_keys())
        for model_id in self._copies.stray(found):
            self._copies.touch(model_id)
        missing = [one for one in expected if one in self._copies.wanted and one not in found]
        if missing:
            log.warning("keys of copies are missing in etcd: writing them again", copies=len(missing))
            self._copies.missing(missing)
            self._tell()
