"""Observation of the mesh for plans: agents' reports on the copies that matter, and the models with their own limits.

Every few seconds the leader asks each agent about the copies that are called, pinned, young or being loaded, and about
models with several copies, to learn how long each has been idle. The thousands of idle models with a single copy are
not reported.
"""

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from cachetools import LRUCache

from mesh.etcd import Etcd, KeyValue, absent, delete_op, get_op, modified
from mesh.etcd import found as kvs_of
from mesh.etcd.ranges import after_prefix
from mesh.pb import agent_pb2
from mesh.schema.keys import Keys
from mesh.statuses import MeshError
from mesh.telemetry import logs
from placement.copies import UNLIMITED
from router.loads.agents import Agent, Unreachable
from router.state.pods import Pod
from router.state.registry import Registration, decode
from router.state.view import View

log = logs.get(__name__)

_TIMEOUT = 2.0  # seconds
_BATCH = 100  # records in one transaction
_STATES = 500  # copies that an agent is asked about in one request: a few milliseconds of its loop


@dataclass(frozen=True, slots=True)
class Observation:
    """The reports of agents. Those of pods that did not answer are missing."""

    copies: dict[tuple[str, str], agent_pb2.CopyState] = field(default_factory=dict)  # by model and pod
    wanted: dict[str, Registration] = field(default_factory=dict)  # models with limits of their own


class Observer:
    """The observer of one leader."""

    def __init__(self, *, view: View, agents: Agent, etcd: Etcd, keys: Keys) -> None:
        self._view = view
        self._agents = agents
        self._etcd = etcd
        self._keys = keys
        self._needless: LRUCache[str, int] = LRUCache(
            10_000
        )  # keys of `wanted/` that are not needed, and their revisions

    async def observe(self) -> Observation:
        """Observes the mesh once. Raises EtcdError."""
        several: dict[str, list[str]] = defaultdict(list)
        for model in self._view.models():
            known = tuple(self._view.known(model))
            if len(known) > 1:
                for copy in known:
                    several[copy.pod.name].append(model)
        copies: dict[tuple[str, str], agent_pb2.CopyState] = {}

        async def ask(pod: Pod) -> None:
            try:
                reply = await self._agents.active(pod, several[pod.name], timeout=_TIMEOUT)
            except Unreachable as error:
                log.info("an agent does not report its copies", pod=pod.name, why=str(error))
                return
            for state in reply.copies:
                copies[state.model_id, pod.name] = state

        pods = [pod for pod in self._view.pods.values() if pod.record is not None and not pod.suspect]
        _, wanted = await asyncio.gather(asyncio.gather(*map(ask, pods)), self._wanted())
        return Observation(copies, wanted)

    async def idle(self, pod: Pod) -> AsyncIterator[dict[str, int]]:
        """Yields the idle times of a pod's copies, in ms, in parts. Each part is correct when it is yielded. Ends if
        the pod's agent does not answer."""
        held = list(pod.copies)
        for start in range(0, max(1, len(held)), _STATES):
            try:
                reply = await self._agents.active(pod, held[start : start + _STATES], timeout=_TIMEOUT)
            except Unreachable as error:
                log.info("an agent does not report its copies", pod=pod.name, why=str(error))
                break
            yield {state.model_id: state.idle_ms for state in reply.copies}

    async def all_idle(self) -> AsyncIterator[dict[str, int]]:
        """Yields the idle times of all copies, in ms, pod by pod. Leaves out suspect pods, and pods whose agents do not
        answer."""
        for pod in list(self._view.pods.values()):
            if pod.record is not None and not pod.suspect and pod.copies:
                async for idle in self.idle(pod):
                    yield idle

    async def registrations(self, ids: list[str]) -> dict[str, Registration | None]:
        """Returns the records of the given models. The result has None for a model that is not registered, and no entry
        for a record that cannot be read. Raises EtcdError."""
        found: dict[str, Registration | None] = {}
        for start in range(0, len(ids), _BATCH):
            batch = ids[start : start + _BATCH]
            result = await self._etcd.txn([], [get_op(self._keys.model(model_id)) for model_id in batch])
            for model_id, response in zip(batch, result.responses, strict=True):
                kvs = kvs_of(response)
                with contextlib.suppress(MeshError):  # the record cannot be read, which is logged already
                    found[model_id] = decode(model_id, kvs[0]) if kvs else None
        return found

    async def _wanted(self) -> dict[str, Registration]:
        found: dict[str, Registration] = {}
        async for page in self._etcd.pages(self._keys.wanted, after_prefix(self._keys.wanted), keys_only=True):
            ids = [self._keys.want_of(kv.key) for kv in page.kvs]
            for model_id, registration in (await self.registrations(ids)).items():
                if registration is not None and registration.record.limits != UNLIMITED:
                    found[model_id] = registration
                else:
                    # No longer registered, or its limits were removed. If they are being set just now, the setter
                    # has already put this key and will not again: so it is removed only if nothing has changed
                    # for a round.
                    await self._tidy(model_id, registration)
        return found

    async def _tidy(self, model_id: str, registration: Registration | None) -> None:
        record = self._keys.model(model_id)
        unchanged = absent(record) if registration is None else modified(record, registration.modified)
        kv = await self._etcd.get(self._keys.want(model_id))
        if kv is None or not self._settled(model_id, kv):
            return
        await self._etcd.txn(
            [unchanged, modified(self._keys.want(model_id), kv.mod_revision)], [delete_op(self._keys.want(model_id))]
        )

    def _settled(self, model_id: str, kv: KeyValue) -> bool:
        """Returns whether an earlier round also found that the key is not needed, at the same revision."""
        before = self._needless.get(model_id)
        self._needless[model_id] = kv.mod_revision
        return before == kv.mod_revision
