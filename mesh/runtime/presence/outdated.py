"""The withdrawal of copies whose registration has ended, or whose content a reload has replaced.

Until it is withdrawn, an outdated copy may answer without a key, so the pod does not count as keyed.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from mesh.etcd import Etcd, KeyValue, get_op
from mesh.process.tasks import Tasks
from mesh.runtime.presence.copykeys import BATCH, CopyKeys
from mesh.schema.keys import Keys
from mesh.schema.records import CopyRecord, ModelRecord


class Outdated:
    """The outdated copies of one pod.

    `withdraw` gets the id of a model, and returns once the model's copy answers no calls. `on_gone` is called after
    each withdrawal.
    """

    def __init__(
        self,
        etcd: Etcd,
        keys: Keys,
        copies: CopyKeys,
        tasks: Tasks,
        *,
        withdraw: Callable[[str], Coroutine[Any, Any, object]],
        on_gone: Callable[[], None],
    ) -> None:
        self._etcd = etcd
        self._keys = keys
        self._copies = copies
        self._tasks = tasks
        self._withdraw = withdraw
        self._on_gone = on_gone
        self._going: dict[str, asyncio.Task[Any]] = {}  # by model

    def begin(self, model_id: str) -> None:
        """Withdraws a copy in the background, unless that is under way."""
        self._copies.forget(model_id)
        if model_id in self._going:
            return
        going = self._going[model_id] = self._tasks.start(self._withdraw(model_id), f"withdraw {model_id}")

        def over(_: object) -> None:
            del self._going[model_id]
            self._copies.gone(model_id)
            self._on_gone()

        going.add_done_callback(over)

    async def begin_replaced(self) -> None:
        """Withdraws the copies whose content was replaced while this pod was cut off, and waits for the withdrawals.
        (As long as no pod has loaded the new content, the old content may answer.)"""
        ids = list(self._copies.wanted)
        for start in range(0, len(ids), BATCH):
            batch = ids[start : start + BATCH]
            result = await self._etcd.txn([], [get_op(self._keys.model(model_id)) for model_id in batch])
            for model_id, found in zip(batch, result.responses, strict=True):
                wanted = self._copies.wanted.get(model_id)
                if wanted is not None and isinstance(found, tuple) and found and _replaced(wanted, found[0]):
                    self.begin(model_id)
        await self.wait()

    async def wait(self) -> bool:
        """Waits for the withdrawals under way. Their keys need not be deleted, because they ended with the lease.
        Returns False if there were none."""
        if not self._going:
            return False
        self._copies.skip(self._going)
        await asyncio.wait(tuple(self._going.values()))
        return True


def _replaced(copy: CopyRecord, model: KeyValue) -> bool:
    try:
        record = ModelRecord.decode(model.value)
    except ValueError:
        return False  # a load that reads it reports the error
    return model.create_revision == copy.create_revision and record.generation > copy.generation and bool(record.digest)
