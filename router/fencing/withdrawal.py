"""The removal of registrations from etcd, and of their copies from pods.

Pods with a copy, and pods that are cut off, may still answer for a model after it was unregistered. If there are any,
which is rare, a tombstone is left. `router.fencing.tombstones` removes it when no pod may answer.
"""

import asyncio
import contextlib
from collections.abc import Sequence

from mesh import etcd as etcds
from mesh.etcd import Etcd, KeyValue
from mesh.pb import agent_pb2
from mesh.schema.keys import TOMBSTONE, Keys
from mesh.schema.lives import Tombstone, all_present, census
from mesh.statuses import MeshError, Reason
from mesh.telemetry import logs
from router.fencing.tombstones import Tombstones
from router.loads.agents import Agent, Unreachable
from router.state.registry import Registry, decode_for_removal
from router.state.view import View

log = logs.get(__name__)

ROUNDS = 8
"""Attempts at a transaction whose keys other callers keep changing."""


def changed_all_the_time(model_id: str) -> MeshError:
    """Returns the error for a transaction that failed because the model's keys kept changing."""
    return MeshError(
        Reason.UNAVAILABLE, f"the record or the copies of model {model_id} keep changing: try again", retry_after=1.0
    )


class Withdrawal:
    """The withdrawals of one worker. Agents have `wait` seconds to unload a copy."""

    def __init__(
        self,
        *,
        etcd: Etcd,
        keys: Keys,
        registry: Registry,
        view: View,
        agents: Agent,
        tombstones: Tombstones,
        wait: float,
    ) -> None:
        self._etcd = etcd
        self._keys = keys
        self._registry = registry
        self._view = view
        self._agents = agents
        self._tombstones = tombstones
        self._wait = wait

    async def unregister(self, model_id: str) -> bool:
        """Deletes a registration, even one whose record cannot be read, and has its copies withdrawn. Returns False if
        there was no registration. Raises MeshError: PRECONDITION if an alias names the model, UNAVAILABLE if its keys
        keep changing, REGISTRY_AWAY."""
        key, copies = self._keys.model(model_id), self._keys.copies(model_id)
        tombstone = self._keys.tombstone(model_id)
        for _ in range(ROUNDS):
            seen = await self._etcd.txn(
                [],
                [etcds.get_op(key), etcds.get_range_op(copies, tombstone, keys_only=True), *census(self._keys)],
            )
            found = etcds.found(seen.responses[0])
            if not found:
                self._registry.forget(model_id)
                return False
            registration = decode_for_removal(model_id, found[0])
            if registration.record.refs > 0:
                text = f"Model {model_id} has referents: move or delete the aliases that name it"
                raise MeshError(Reason.PRECONDITION, text)
            # Pods that may answer for the model after this: those with a copy, or cut off. Usually there are none.
            nobody = not etcds.found(seen.responses[1]) and all_present(seen.responses[2:])
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
                # A pod was cut off just now; a moment ago it had no copy.
                nobody = not (await self._etcd.txn([etcds.absent(key)], [burial])).succeeded
            await self.withdraw(model_id, etcds.found(result.responses[3]), "it was unregistered")
            if not nobody:
                with contextlib.suppress(etcds.EtcdError):  # the model is unregistered; the leader does the rest
                    await self._tombstones.resolve(model_id)
            return True
        raise changed_all_the_time(model_id)

    def idle(self, model_id: str) -> bool:
        """Returns whether this router knows no copy of the model, not even in a suspect pod."""
        return not self._view.known(model_id)

    async def withdraw(self, model_id: str, lingering: Sequence[KeyValue], reason: str, *, created: int = 0) -> None:
        """Tells all agents with copies of the model to unload them, and waits until they have, or until the limit of
        the withdrawals has passed. `lingering` are the copies' keys in etcd; copies in the view are added. `created`
        restricts this to copies of the registration with that create revision, unless it is 0."""
        pods = set(self.pods_of(lingering))
        pods |= {copy.pod.name for copy in self._view.known(model_id)}  # suspect pods have no keys

        async def unload(name: str) -> None:
            pod = self._view.pods.get(name)
            if pod is None:
                return
            request = agent_pb2.UnloadRequest(model_id=model_id, create_revision=created, reason=reason)
            try:
                await self._agents.unload(pod, request, timeout=self._wait)
            except Unreachable as error:
                log.warning("a copy could not be withdrawn", model=model_id, pod=name, why=str(error))
                return
            for copy in self._view.known(model_id):
                if copy.pod is pod and created in (0, copy.record.create_revision):
                    self._view.drop(copy)

        await asyncio.gather(*(unload(name) for name in pods))

    def pods_of(self, lingering: Sequence[KeyValue]) -> list[str]:
        """Returns the names of the pods from the keys of copies. Leaves out tombstones, which belong to no pod."""
        pods = (self._keys.copy_of(kv.key)[1] for kv in lingering)
        return [pod for pod in pods if pod != TOMBSTONE]
