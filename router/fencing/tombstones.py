"""Tombstones of unregistered models for which pods may still answer, and the end of the wait for these pods.

Unregistering a model leaves a tombstone if the model has a copy, or if a life is open (`mesh.schema.lives`). While the
tombstone exists, the id cannot be registered again with other attributes. The tombstone is removed once no pod can
answer for the model:

- a published pod has released its copy when the copy's key is removed;
- a pod that is not published, but whose life is open, cannot answer if etcd's history shows that it did not have the
  model, or if its agent has just confirmed that the copy is unloaded. Otherwise its life must be closed first
  (`closing`).

Lives are read after copies, never before. This order is sufficient: no pod can claim an id that is not registered, and
a life appears open only after the pod's keys were removed, so the earlier read has included the pod's copies.

When a node with thousands of models is lost, thousands of tombstones wait for one life. The leader therefore reads many
tombstones in one transaction, concurrent readers share one read of the lives, and the answers of etcd's history and of
agents are cached for as long as the life is open.
"""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from mesh.etcd import (
    Etcd,
    EtcdCompacted,
    EtcdError,
    EtcdUnavailable,
    KeyValue,
    absent_range,
    count_op,
    counted,
    delete_op,
    get_op,
    get_range_op,
    modified,
)
from mesh.etcd import found as kvs_of
from mesh.etcd.ranges import after_prefix
from mesh.pb import agent_pb2
from mesh.schema.keys import Keys
from mesh.schema.lives import Life, all_present, census
from mesh.schema.records import PodRecord
from mesh.statuses import MeshError, Reason
from mesh.telemetry import logs
from router.loads.agents import Agent, Unreachable
from router.state.pods import Pod

log = logs.get(__name__)

BATCH = 60
"""Largest number of tombstones in one transaction: each needs two reads, and etcd allows 128 operations."""

AT_ONCE = 16
"""Largest number of tombstones that are checked at the same time."""

HISTORY = 120
"""Number of models that one transaction looks up in etcd's history."""

_ASK = 2.0  # seconds for an agent to confirm
_SILENT = 2.0  # seconds for which an agent that has not answered is not asked again


@dataclass(frozen=True, slots=True)
class Open:
    """An open life: its pod has no presence in etcd."""

    pod: str
    incarnation: str
    life: Life
    revision: int  # of the last change of its key


@dataclass(frozen=True, slots=True)
class Holder:
    """A pod that may still answer for an unregistered model."""

    pod: str
    open: Open | None  # None: the pod is published, and its copy's key exists

    def left(self, reregister_after: float | None) -> float | None:
        """Returns the seconds until the wait for this pod ends. Returns None if the wait has no limit, or if the pod is
        published and will withdraw its copy soon."""
        if self.open is None or reregister_after is None:
            return None
        return max(0.0, reregister_after - self.open.life.open_seconds)


@dataclass(frozen=True, slots=True)
class _ReadTombstone:
    model_id: str
    revision: int  # of the tombstone: distinguishes two unregistrations of one id
    holders: tuple[str, ...]  # published pods whose copies' keys exist


@dataclass(slots=True)
class _Known:
    """Facts about one life, kept while it is open."""

    held: dict[str, bool]  # whether it had the model's key when its presence ended, by etcd's history
    gone: set[tuple[str, int]]  # models its agent confirmed as unloaded, with their tombstones' revisions


class Tombstones:
    """Checks and removal of tombstones. All methods raise EtcdError if etcd does not answer."""

    def __init__(self, etcd: Etcd, keys: Keys, agents: Agent) -> None:
        self._etcd = etcd
        self._keys = keys
        self._agents = agents
        self._asked: set[str] = set()  # names of channels to agents whose lives are open
        self._silent: dict[tuple[str, str], float] = {}  # agents that did not answer: until when not to ask
        self._known: dict[tuple[str, str, int], _Known] = {}  # by pod, incarnation, and when its presence ended
        self._recalling = asyncio.Semaphore(AT_ONCE)
        self._reading: asyncio.Task[list[Open]] | None = None  # the read of lives under way
        self._next: asyncio.Task[list[Open]] | None = None  # the next one, which has not begun yet

    async def open_lives(self) -> list[Open]:
        """Returns the open lives, by a read that begins after this call. Concurrent callers share the read."""
        if self._next is None:
            self._next = asyncio.get_running_loop().create_task(self._read_after(self._reading), name="read lives")
            self._next.add_done_callback(
                lambda task: task.cancelled() or task.exception()
            )  # each waiter gets the error
        return await asyncio.shield(self._next)

    async def _read_after(self, former: "asyncio.Task[list[Open]] | None") -> list[Open]:
        if former is not None:
            await asyncio.wait({former})
        self._reading, self._next = self._next, None
        return await self._read_lives()

    async def _read_lives(self) -> list[Open]:
        lives, pods = self._keys.lives, self._keys.pods
        found = await self._etcd.txn(
            [], [get_range_op(lives, after_prefix(lives)), get_range_op(pods, after_prefix(pods), keys_only=True)]
        )
        present = {(kv.key[len(pods) :], kv.lease) for kv in kvs_of(found.responses[1])}
        result = []
        for kv in kvs_of(found.responses[0]):
            try:
                pod, incarnation = self._keys.life_of(kv.key)
                life = Life.decode(kv.value)
            except ValueError as error:
                log.warning("a pod's life cannot be read", key=kv.key, error=str(error))
                continue
            if (self._keys.pod(pod)[len(pods) :], life.lease) in present:
                continue
            if life.ended_revision > found.revision:  # etcd was restored from a snapshot: that history is another one
                life = replace(life, ended_revision=0)
            result.append(Open(pod, incarnation, life, kv.mod_revision))
        still = {(life.pod, life.incarnation, life.life.ended_revision) for life in result}
        self._known = {who: known for who, known in self._known.items() if who in still}
        for over in self._asked - {_channel(life.pod, life.incarnation) for life in result}:
            self._asked.discard(over)
            self._agents.forget(over)
        self._silent = {who: until for who, until in self._silent.items() if _channel(*who) in self._asked}
        return result

    async def forget(self, pod: str) -> list[str]:
        """Closes the open lives of a pod, so that registrations no longer wait for the pod. Returns the
        incarnations."""
        forgotten = []
        for life in await self.open_lives():
            if life.pod == pod and await self.close(life):
                log.warning("a pod's life was forgotten by an admin", pod=pod, incarnation=life.incarnation)
                forgotten.append(life.incarnation)
        return forgotten

    async def close(self, life: Open) -> bool:
        """Deletes a life that has ended. Returns False if the life has changed meanwhile, or is no longer open."""
        key, presence = self._keys.life(life.pod, life.incarnation), self._keys.pod(life.pod)
        found = await self._etcd.get(presence)
        if found is not None and _incarnation(found) == life.incarnation:
            return False
        unchanged = [modified(key, life.revision), modified(presence, 0 if found is None else found.mod_revision)]
        return (await self._etcd.txn(unchanged, [delete_op(key)])).succeeded

    async def resolve(self, model_id: str) -> list[Holder]:
        """Returns the pods that may still answer for the model. If there are none, removes the model's tombstone."""
        standing, present = await self._look([model_id])
        lives = [] if present or not standing else await self.open_lives()
        await self._recall(lives, standing)
        return [holder for tombstone in standing for holder in await self._judge(tombstone, lives)]

    async def sweep(self, model_ids: Iterable[str]) -> None:
        """Removes the tombstones of models that no pod may answer for any longer."""
        waiting = list(model_ids)
        standing: list[_ReadTombstone] = []
        present = True
        for start in range(0, len(waiting), BATCH):
            found, all_there = await self._look(waiting[start : start + BATCH])
            standing += found
            present &= all_there
        lives = [] if present or not standing else await self.open_lives()
        await self._recall(lives, standing)
        for start in range(0, len(standing), AT_ONCE):
            await asyncio.gather(*(self._judge(tombstone, lives) for tombstone in standing[start : start + AT_ONCE]))

    async def _look(self, model_ids: Sequence[str]) -> tuple[list[_ReadTombstone], bool]:
        """Reads the tombstones of the given models. Returns them, and whether each life has presence at that
        revision."""
        reads = census(self._keys)
        for model_id in model_ids:
            tombstone = self._keys.tombstone(model_id)
            reads += [get_op(tombstone), get_range_op(self._keys.copies(model_id), tombstone, keys_only=True)]
        found = (await self._etcd.txn([], reads)).responses
        standing = []
        for model_id, tombstones, copies in zip(model_ids, found[2::2], found[3::2], strict=True):
            if kvs := kvs_of(tombstones):
                holders = tuple(self._keys.copy_of(kv.key)[1] for kv in kvs_of(copies))
                standing.append(_ReadTombstone(model_id, kvs[0].mod_revision, holders))
        return standing, all_present(found[:2])

    async def _judge(self, tombstone: _ReadTombstone, lives: Sequence[Open]) -> list[Holder]:
        """Returns the pods that may answer for the model of a tombstone. Removes the tombstone if there are none."""
        holders = [Holder(pod, None) for pod in tombstone.holders]
        # Lives share one task: usually only one pod of many has held the model.
        may = [life for life in lives if self._may_hold(life, tombstone)]
        gone = await asyncio.gather(*(self._unloaded(life, tombstone.model_id) for life in may))
        for life, is_gone in zip(may, gone, strict=True):
            if is_gone:  # and it cannot be loaded again while the id is not registered
                self._known_of(life).gone.add((tombstone.model_id, tombstone.revision))
            else:
                holders.append(Holder(life.pod, life))
        if not holders:
            key, prefix = self._keys.tombstone(tombstone.model_id), self._keys.copies(tombstone.model_id)
            await self._etcd.txn([modified(key, tombstone.revision), absent_range(prefix, key)], [delete_op(key)])
        return holders

    def _may_hold(self, life: Open, tombstone: _ReadTombstone) -> bool:
        """Returns whether the incarnation may answer for the model, according to etcd's history and the pod's agent."""
        known = self._known_of(life)
        return known.held.get(tombstone.model_id, True) and (tombstone.model_id, tombstone.revision) not in known.gone

    async def _recall(self, lives: Sequence[Open], standing: Sequence[_ReadTombstone]) -> None:
        """Reads from etcd's history which of the models the pods had, unless this is known already."""

        async def recall(life: Open) -> None:
            known = self._known_of(life)
            unknown = [tombstone.model_id for tombstone in standing if tombstone.model_id not in known.held]
            for start in range(0, len(unknown), HISTORY):
                part = unknown[start : start + HISTORY]
                async with self._recalling:
                    known.held.update(zip(part, await self._held(life, part), strict=True))

        await asyncio.gather(*(recall(life) for life in lives))

    async def _held(self, life: Open, model_ids: Sequence[str]) -> Sequence[bool]:
        """Returns, for each model, whether the pod had the copy's key when its presence ended. Returns True if etcd has
        compacted that history."""
        before = life.life.ended_revision - 1
        if before <= 0:
            return [True] * len(model_ids)  # what it held then is unknown
        keys = [self._keys.copy(model_id, life.pod) for model_id in model_ids]
        try:
            found = await self._etcd.txn([], [count_op(key, key + b"\0", revision=before) for key in keys])
        except EtcdUnavailable:
            raise
        except EtcdError as error:
            if not isinstance(error, EtcdCompacted):
                log.warning("etcd's history cannot be read", pod=life.pod, revision=before, error=error.detail)
            return [True] * len(model_ids)
        return [counted(response) > 0 for response in found.responses]

    def _known_of(self, life: Open) -> _Known:
        return self._known.setdefault((life.pod, life.incarnation, life.life.ended_revision), _Known({}, set()))

    async def _unloaded(self, life: Open, model_id: str) -> bool:
        """Asks the pod's agent to unload the copy, because a router may reach an agent that cannot reach etcd. Returns
        whether the agent has unloaded the copy."""
        loop = asyncio.get_running_loop()
        who = (life.pod, life.incarnation)
        if loop.time() < self._silent.get(who, 0.0):
            return False
        # The view's pod will not do: it may be another incarnation already, or have disappeared.
        pod = Pod(_channel(life.pod, life.incarnation))
        self._asked.add(pod.name)
        pod.record = PodRecord(
            life.incarnation, life.life.data_address, life.life.control_address, token=life.life.token
        )
        try:
            described = await self._agents.describe(pod, model_id, timeout=_ASK)
            if described.incarnation != life.incarnation:
                return False  # another process answers there now, and cannot tell; the leader judges the life
            request = agent_pb2.UnloadRequest(model_id=model_id, reason="it was unregistered")
            await self._agents.unload(pod, request, timeout=_ASK)
        except Unreachable:
            self._silent[who] = loop.time() + _SILENT
            return False
        return True


def waits(model_id: str, holders: list[Holder], reregister_after: float | None) -> MeshError:
    """Returns the error for a registration that must wait until no pod can answer for the id's former registration."""
    told, left = [], []
    for holder in holders[:3]:
        seconds = holder.left(reregister_after)
        if holder.open is None:
            told.append(f"{holder.pod} has not unloaded its copy yet")
        elif seconds is None:
            told.append(f"{holder.pod} is cut off from etcd and may still answer for it")
        else:
            told.append(f"{holder.pod} is cut off from etcd and may still answer for it ({seconds:.0f} s left)")
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
