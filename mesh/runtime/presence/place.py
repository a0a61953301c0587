"""A pod's place in the mesh: its name, held by one incarnation at a time under one lease.

A name is taken by compare-and-set, so only one of two pods with the same name gets it. In the same transaction, the pod
writes its *life* (`mesh.schema.lives`), which has no lease.

A record found at the start belongs to a dead pod (the common case: a crash, or a container restarted under the same
name) or to a live one (the operator gave a name twice). The agent therefore asks the pod. If the pod answers with the
record's incarnation, it is alive. If its address refuses the connection, or another agent answers there, the pod is
dead, and is replaced immediately. If the agent cannot tell, the lease decides.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from mesh.etcd import Etcd, KeyValue, Lease, delete_op, modified, put_op
from mesh.schema.keys import Keys
from mesh.schema.lives import Life
from mesh.schema.records import PodRecord
from mesh.telemetry import logs

log = logs.get(__name__)

_POLL = 1.0  # seconds between two looks at a record while waiting for its lease to end
_TRIES = 5
_LEASES = 3  # lease times of this pod to wait for the end of an unknown lease


class NameTaken(Exception):
    """A name that belongs to another pod, which may be alive. The text says what to do."""


@dataclass(frozen=True, slots=True)
class Taken:
    """The result of taking a place: the lease, and the record that was written under it."""

    lease: Lease
    record: PodRecord


class Place:
    """The place of one pod. `record` returns the pod's present record. `is_alive` returns whether the pod of a record
    is alive, or None if that is unknown."""

    def __init__(
        self,
        etcd: Etcd,
        keys: Keys,
        name: str,
        *,
        incarnation: str,
        ttl: int,
        record: Callable[[], PodRecord],
        is_alive: Callable[[PodRecord], Awaitable[bool | None]],
    ) -> None:
        """Makes a place that the pod `name` has not taken yet. `ttl` is the time to live of its lease, in seconds."""
        self._etcd = etcd
        self._key = keys.pod(name)
        self._life = keys.life(name, incarnation)
        self._name = name
        self._incarnation = incarnation
        self._ttl = ttl
        self._record = record
        self._is_alive = is_alive

    async def wait(self) -> KeyValue | None:
        """Waits until it is known that no other pod with this name is alive. Returns the record that is then under the
        pod's key, or None if the key does not exist. Raises NameTaken if another pod is alive, or if that is still
        unknown after three lease times, and EtcdError."""
        deadline = time.monotonic() + _LEASES * self._ttl
        while True:
            present = await self._etcd.get(self._key)
            other = _decode(present)
            if other is None or other.incarnation == self._incarnation:  # our own, unconfirmed write
                return present
            alive = await self._is_alive(other)
            if alive or (alive is None and time.monotonic() > deadline):
                raise NameTaken(self._taken_by(other, alive=bool(alive)))
            if alive is not None:
                return present
            log.info("waiting for the lease of a pod of this name to end", incarnation=other.incarnation)
            await asyncio.sleep(_POLL)

    async def take(self) -> Taken:
        """Takes the name, at the start of the pod. Raises NameTaken, EtcdError."""
        for _ in range(_TRIES):
            present = await self.wait()
            taken = await self.publish(await Lease.grant(self._etcd, ttl=self._ttl), _revision(present))
            if taken is not None:
                if present is not None:
                    log.info("took the place of a dead pod of this name")
                return taken
            # Either a dead pod's lease has just ended, or another pod was quicker, which `wait` will find alive.
        raise NameTaken(f"other pods with the name {self._name} are starting too: give each pod its own --name")

    async def prepare(self) -> tuple[Lease, int]:
        """Prepares for `publish` after a lease was lost. Returns a new lease, and the revision of the pod's key (0 if
        the key does not exist). Raises NameTaken if another pod has the name, and EtcdError."""
        present = await self._etcd.get(self._key)
        other = _decode(present)
        if other is not None and other.incarnation != self._incarnation:
            raise NameTaken(self._taken_by(other, alive=True))
        return await Lease.grant(self._etcd, ttl=self._ttl), _revision(present)

    async def publish(self, lease: Lease, revision: int) -> Taken | None:
        """Writes the pod's record and life, if the pod's key still has `revision` (0: does not exist).

        Returns None, and closes the lease, if the key has changed in the meantime.
        """
        record = self._record()
        life = Life(record.data_address, record.control_address, token=record.token, lease=lease.id)
        done = False
        try:
            puts = [put_op(self._key, record.encode(), lease.id), put_op(self._life, life.encode())]
            done = (await self._etcd.txn([modified(self._key, revision)], puts)).succeeded
        finally:
            if not done:
                await lease.close()
        return Taken(lease, record) if done else None

    def _taken_by(self, other: PodRecord, *, alive: bool) -> str:
        where = f"(incarnation {other.incarnation}, control address {other.control_address})"
        if alive:
            return f"another pod {where} has the name {self._name}: give each pod its own --name"
        return (
            f"another pod {where} has the name {self._name}. It cannot be reached, but may be alive: stop it, or give "
            "this pod another --name"
        )

    async def leave(self, timeout: float) -> None:
        """Deletes the pod's life and its presence, if they still exist, in one transaction: presence without a life
        would hide another pod's open life from a reader that counts both. Raises EtcdError."""
        for _ in range(_TRIES):
            present = await self._etcd.get(self._key, timeout=timeout)
            mine = (record := _decode(present)) is not None and record.incarnation == self._incarnation
            gone = [delete_op(self._life), *([delete_op(self._key)] if mine else ())]
            unchanged = modified(self._key, _revision(present))
            if (await self._etcd.txn([unchanged], gone, timeout=timeout)).succeeded:
                return


def _revision(kv: KeyValue | None) -> int:
    return 0 if kv is None else kv.mod_revision


def _decode(kv: KeyValue | None) -> PodRecord | None:
    if kv is None:
        return None
    try:
        return PodRecord.decode(kv.value)
    except ValueError as error:
        log.warning("the record of a pod cannot be read", key=kv.key, error=str(error))
        return None
