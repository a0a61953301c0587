"""Unregistered models that a pod may still answer for: who that is, and when it is over.

Unregistering leaves a tombstone where a copy stands or a life is open (`mesh.lives`), and registering the id anew with
other attributes waits until it is gone. It goes once nobody is left who may answer:

- a pod that is published has let go of its copy: its key is gone;
- a pod that is not published but whose life is open has never held the model, as etcd's history shows, or its agent has
  just confirmed that the copy is unloaded. Otherwise its life must be closed first (`router.leader.lives`).

The tombstone, the copies and the lives are read in one transaction. That is enough: nobody can claim the id while it is
not registered, and a pod's life is only seen open once its keys are gone, so what it held a moment ago was seen too.
"""

import asyncio
from dataclasses import dataclass

from mesh.etcd import (
    Etcd,
    EtcdCompacted,
    KeyValue,
    Op,
    absent_range,
    count_op,
    counted,
    delete_op,
    get_op,
    get_range_op,
    modified,
)
from mesh.keys import Keys, after_prefix
from mesh.lives import Life
from mesh.pb import agent_pb2
from mesh.records import PodRecord
from mesh.statuses import MeshError, Reason
from mesh.telemetry import logs
from router.agents import Agent, Unreachable
from router.view import Pod

log = logs.get(__name__)

_ASK = 2.0  # seconds for an agent to confirm
_SILENT = 2.0  # seconds for which an agent that has not answered is not asked again


@dataclass(frozen=True, slots=True)
class Open:
    """One life without presence."""

    pod: str
    incarnation: str
    life: Life
    revision: int  # of the last change of its key


@dataclass(frozen=True, slots=True)
class Holder:
    """A pod that may still answer for an unregistered model."""

    pod: str
    open: Open | None  # None: it is published, and its copy's key stands

    def left(self, reregister_after: float | None) -> float | None:
        """Returns the seconds after which it is not waited for any longer; None: it always is, or will answer soon."""
        if self.open is None or reregister_after is None:
            return None
        return max(0.0, reregister_after - self.open.life.open_seconds)


class Tombstones:
    """Resolves tombstones. All methods raise EtcdError where etcd does not answer."""

    def __init__(self, etcd: Etcd, keys: Keys, agents: Agent) -> None:
        self._etcd = etcd
        self._keys = keys
        self._agents = agents
        self._asked: set[str] = set()  # names of channels to agents whose lives are open
        self._silent: dict[tuple[str, str], float] = {}  # agents that have not answered, and until when that counts

    def counts(self) -> list[Op]:
        """Returns the operations whose responses `equal` reads, for a transaction of the caller's."""
        lives, pods = self._keys.lives, self._keys.pods
        return [count_op(lives, after_prefix(lives)), count_op(pods, after_prefix(pods))]

    @staticmethod
    def equal(responses: "tuple[object, ...] | list[object]") -> bool:
        """Returns whether no life is open. Each published pod has a life, so it is enough that there are no more."""
        lives, pods = responses
        return counted(lives) <= counted(pods)

    async def open_lives(self) -> list[Open]:
        """Returns the lives without presence."""
        lives, pods = self._keys.lives, self._keys.pods
        found = await self._etcd.txn(
            [], [get_range_op(lives, after_prefix(lives)), get_range_op(pods, after_prefix(pods))]
        )
        present = set()
        for kv in _kvs(found.responses[1]):
            try:
                present.add((self._keys.pod_of(kv.key), PodRecord.decode(kv.value).incarnation))
            except ValueError as error:
                log.warning("a pod's record cannot be read", key=kv.key, error=str(error))
        result = []
        for kv in _kvs(found.responses[0]):
            try:
                pod, incarnation = self._keys.life_of(kv.key)
                if (pod, incarnation) not in present:
                    result.append(Open(pod, incarnation, Life.decode(kv.value), kv.mod_revision))
            except ValueError as error:
                log.warning("a pod's life cannot be read", key=kv.key, error=str(error))
        for over in self._asked - {_channel(life.pod, life.incarnation) for life in result}:
            self._asked.discard(over)
            self._agents.forget(over)
        self._silent = {who: until for who, until in self._silent.items() if _channel(*who) in self._asked}
        return result

    async def forget(self, pod: str) -> list[str]:
        """Closes the open lives of a pod: nobody waits for it any longer. Returns their incarnations."""
        forgotten = []
        for life in await self.open_lives():
            if life.pod == pod and await self.close(life):
                log.warning("a pod's life is forgotten by hand", pod=pod, incarnation=life.incarnation)
                forgotten.append(life.incarnation)
        return forgotten

    async def close(self, life: Open) -> bool:
        """Deletes a life that is over. Whether it was still as it was seen, and still open."""
        key, presence = self._keys.life(life.pod, life.incarnation), self._keys.pod(life.pod)
        found = await self._etcd.get(presence)
        if found is not None and _incarnation(found) == life.incarnation:
            return False
        unchanged = [modified(key, life.revision), modified(presence, 0 if found is None else found.mod_revision)]
        return (await self._etcd.txn(unchanged, [delete_op(key)])).succeeded

    async def resolve(self, model_id: str) -> list[Holder]:
        """Removes the model's tombstone where nobody may answer for it any more. Returns who may."""
        tombstone, prefix = self._keys.tombstone(model_id), self._keys.copies(model_id)
        found = await self._etcd.txn([], [get_op(tombstone), get_range_op(prefix, tombstone), *self.counts()])
        standing = _kvs(found.responses[0])
        if not standing:
            return []
        holders = [Holder(self._keys.copy_of(kv.key)[1], None) for kv in _kvs(found.responses[1])]
        if not self.equal(found.responses[2:]):
            lives = await self.open_lives()
            held = await asyncio.gather(*(self._may_hold(life, model_id) for life in lives))
            holders += [Holder(life.pod, life) for life, may in zip(lives, held, strict=True) if may]
        if not holders:
            await self._etcd.txn(
                [modified(tombstone, standing[0].mod_revision), absent_range(prefix, tombstone)],
                [delete_op(tombstone)],
            )
        return holders

    async def _may_hold(self, life: Open, model_id: str) -> bool:
        """Whether that incarnation may answer for the model, as far as etcd's history and its agent can tell."""
        if life.life.ended_revision:
            key = self._keys.copy(model_id, life.pod)
            try:
                page = await self._etcd.page(key, key + b"\0", limit=1, revision=life.life.ended_revision - 1)
                if not page.kvs:
                    return False
            except EtcdCompacted:
                pass  # it counts as having held it
        return not await self._unloaded(life, model_id)

    async def _unloaded(self, life: Open, model_id: str) -> bool:
        """Asks its agent, which may be there though it does not reach etcd, to unload the copy. Whether it has."""
        loop = asyncio.get_running_loop()
        who = (life.pod, life.incarnation)
        if loop.time() < self._silent.get(who, 0.0):
            return False
        # Not the view's pod: that may be another incarnation already, or gone.
        pod = Pod(_channel(life.pod, life.incarnation))
        self._asked.add(pod.name)
        pod.record = PodRecord(
            life.incarnation, life.life.data_address, life.life.control_address, token=life.life.token
        )
        try:
            described = await self._agents.describe(pod, model_id, timeout=_ASK)
            if described.incarnation != life.incarnation:
                return False  # whoever answers there now knows nothing of it; its life is the leader's to judge
            request = agent_pb2.UnloadRequest(model_id=model_id, reason="it was unregistered")
            await self._agents.unload(pod, request, timeout=_ASK)
        except Unreachable:
            self._silent[who] = loop.time() + _SILENT
            return False
        return True


def waits(model_id: str, holders: list[Holder], reregister_after: float | None) -> MeshError:
    """Returns the error of who registers an id anew while its former life may still answer."""
    told, left = [], []
    for holder in holders[:3]:
        seconds = holder.left(reregister_after)
        if holder.open is None:
            told.append(f"{holder.pod} has not withdrawn its copy yet")
        elif seconds is None:
            told.append(f"{holder.pod} is cut off from etcd and may still hold it")
        else:
            told.append(f"{holder.pod} is cut off from etcd and may still hold it ({seconds:.0f} s left)")
            left.append(seconds)
    if len(holders) > 3:
        told.append(f"and {len(holders) - 3} more")
    cut_off = [holder.pod for holder in holders if holder.open is not None]
    text = f"{model_id} cannot be registered with other attributes yet: {'; '.join(told)}. "
    if cut_off:
        text += f"Wait, or, if the pod is certainly down, run: mesh pods forget {cut_off[0]}"
    else:
        text += "Try again in a few seconds"
    details = {"pod": holders[0].pod} if holders else {}
    if left:
        details["seconds_left"] = f"{max(left):.0f}"
    return MeshError(Reason.FORMER_LIFE, text, retry_after=min(10.0, max(left, default=2.0)) or 1.0, details=details)


def _channel(pod: str, incarnation: str) -> str:
    return f"{pod} ({incarnation})"


def _incarnation(kv: KeyValue) -> str:
    try:
        return PodRecord.decode(kv.value).incarnation
    except ValueError:
        return ""


def _kvs(response: object) -> tuple[KeyValue, ...]:
    return response if isinstance(response, tuple) else ()
