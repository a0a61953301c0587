"""Removal of many registrations in few transactions.

Most registered models have no copies. These are deleted together, many in one transaction, which succeeds only if none
of them has changed since it was read. All other models are removed one by one (`withdrawal`), as is every model of a
batch whose transaction failed.
"""

import asyncio
from collections.abc import Iterable, Sequence

from mesh import etcd as etcds
from mesh.etcd import Etcd, KeyValue
from mesh.etcd.ranges import after_prefix
from mesh.schema.keys import Keys
from mesh.schema.lives import Tombstone, all_present, census
from mesh.schema.records import ModelRecord
from mesh.statuses import MeshError
from router.fencing.withdrawal import Withdrawal
from router.state.registry import Registry, decode_for_removal

BATCH = 40
"""Largest number of models in one transaction: each needs three deletions, and etcd allows 128 operations."""

BATCHES = 16
"""Largest number of concurrent transactions."""

SINGLE = 64
"""Maximum number of models that are removed one by one at the same time. Each may wait for pods to unload its
copies."""

MISSING = "missing"
"""The outcome for a model that is not registered."""

Outcome = str | MeshError | None
"""The outcome for one model: None (unregistered), MISSING, or the reason why it stays registered."""


class Removal:
    """The bulk removal of registrations by one worker."""

    def __init__(self, *, etcd: Etcd, keys: Keys, registry: Registry, withdrawal: Withdrawal) -> None:
        self._etcd = etcd
        self._keys = keys
        self._registry = registry
        self._withdrawal = withdrawal
        self._batches = asyncio.Semaphore(BATCHES)
        self._single = asyncio.Semaphore(SINGLE)

    async def unregister(self, model_ids: Iterable[str]) -> dict[str, Outcome]:
        """Unregisters models. Returns the outcome of each. Never raises."""
        ids = list(model_ids)
        outcomes: dict[str, Outcome] = {}
        batches = (ids[start : start + BATCH] for start in range(0, len(ids), BATCH))
        await asyncio.gather(*(self._batch(batch, outcomes) for batch in batches))
        return outcomes

    async def _batch(self, ids: Sequence[str], outcomes: dict[str, Outcome]) -> None:
        async with self._batches:
            try:
                left = await self._together(ids, outcomes)
            except etcds.EtcdUnavailable as error:
                outcomes |= dict.fromkeys((one for one in ids if one not in outcomes), error)
                return
            except etcds.EtcdError:  # most likely the batch is too large
                left = [one for one in ids if one not in outcomes]
        await asyncio.gather(*(self._alone(model_id, outcomes) for model_id in left))

    async def _together(self, ids: Sequence[str], outcomes: dict[str, Outcome]) -> list[str]:
        """Deletes the registrations of models without copies in one transaction. Returns the models that must be
        removed one by one."""
        keys = self._keys
        gets = [*census(keys)]
        for model_id in ids:
            copies = keys.copies(model_id)
            gets.append(etcds.get_op(keys.model(model_id)))
            gets.append(etcds.get_range_op(copies, after_prefix(copies), limit=1, keys_only=True))
        seen = (await self._etcd.txn([], gets)).responses
        left: list[str] = []
        free: dict[str, tuple[KeyValue, ModelRecord]] = {}
        present = all_present(seen[:2])
        for model_id, record, copies_found in zip(ids, seen[2::2], seen[3::2], strict=True):
            found = etcds.found(record)
            if not found:
                self._registry.forget(model_id)
                outcomes[model_id] = MISSING
                continue
            registered = decode_for_removal(model_id, found[0]).record
            idle = present and not etcds.found(copies_found) and self._withdrawal.idle(model_id)
            if idle and not registered.refs:
                free[model_id] = found[0], registered
            else:
                left.append(model_id)
        if not free:
            return left
        compares, ops = [], []
        for model_id, (kv, _) in free.items():
            compares += [etcds.modified(kv.key, kv.mod_revision), etcds.absent_prefix(keys.copies(model_id))]
            ops += [etcds.delete_op(key) for key in (kv.key, keys.want(model_id), keys.reload(model_id))]
        result = await self._etcd.txn(compares, [*ops, *census(keys)])
        if not result.succeeded:
            return [*left, *free]
        if not all_present(result.responses[-2:]):  # a pod was cut off just now; a moment ago it had no copy
            burials = [
                etcds.put_op(keys.tombstone(model_id), Tombstone.of(registered).encode())
                for model_id, (_, registered) in free.items()
            ]
            absent = [etcds.absent(kv.key) for kv, _ in free.values()]
            if not (await self._etcd.txn(absent, burials)).succeeded:
                for compare, burial in zip(absent, burials, strict=True):
                    await self._etcd.txn([compare], [burial])
        for model_id in free:
            self._registry.forget(model_id)
            outcomes[model_id] = None
        return left

    async def _alone(self, model_id: str, outcomes: dict[str, Outcome]) -> None:
        async with self._single:
            try:
                outcomes[model_id] = None if await self._withdrawal.unregister(model_id) else MISSING
            except MeshError as error:
                outcomes[model_id] = error
