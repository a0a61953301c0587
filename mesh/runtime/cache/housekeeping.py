"""The periodic comparison with the registry, which unloads copies whose model was unregistered or registered again.

A router that unregisters a model informs the agents that have a copy. This check finds the other cases: an agent was
cut off, or the router died in between. Copies are compared a hundred at a time, in one transaction that usually finds
no difference. From time to time the pod's keys in etcd are also compared with its copies, because etcd may have
executed a claim after its time-out.
"""

import asyncio
import itertools
import random

from mesh.etcd import Etcd, EtcdError, created, get_range_op
from mesh.process.tasks import turned
from mesh.runtime.cache.books.entries import EntryState
from mesh.runtime.cache.books.ledger import Ledger
from mesh.runtime.cache.loads.flights import Loads
from mesh.runtime.presence.copykeys import BATCH
from mesh.runtime.presence.publishing import Presence
from mesh.schema.keys import Keys
from mesh.telemetry import logs

log = logs.get(__name__)

OWN_KEYS_EVERY = 10
"""Number of rounds between two checks of this pod's own keys, for which the keys of all copies in the mesh are read."""


class Housekeeping:
    """The periodic check, about every `interval` seconds."""

    def __init__(
        self,
        etcd: Etcd,
        keys: Keys,
        ledger: Ledger,
        presence: Presence,
        loads: Loads,
        *,
        interval: float,
    ) -> None:
        self._etcd = etcd
        self._keys = keys
        self._ledger = ledger
        self._presence = presence
        self._interval = interval
        self._loads = loads

    async def run(self) -> None:
        """Checks periodically until cancelled, and from time to time also compares the pod's keys with its copies.
        Skips a round if etcd is unavailable."""
        for round_ in itertools.count(1):
            # Spreads the checks of all pods over time.
            await asyncio.sleep(self._interval * random.uniform(0.75, 1.25))
            turned()
            try:
                await self.check()
                if round_ % OWN_KEYS_EVERY == 0:
                    await self._presence.tidy()
            except EtcdError as error:
                log.info("housekeeping was postponed", error=error.detail)

    async def check(self) -> int:
        """Compares all copies and loads with the registry once, and withdraws those whose registration has ended.
        Returns their number. Raises EtcdError."""
        held = [
            (entry.model_id, entry.revision)
            for entry in self._ledger.entries.values()
            if entry.state is not EntryState.UNLOADING
        ]
        stale = []
        for start in range(0, len(held), BATCH):
            stale += await self._stale(held[start : start + BATCH])
        for model_id, revision in stale:
            await self._loads.outdated(model_id, revision)
        return len(stale)

    async def _stale(self, batch: list[tuple[str, int]]) -> list[tuple[str, int]]:
        models = [self._keys.model(model_id) for model_id, _ in batch]
        compares = [created(model, "==", revision) for model, (_, revision) in zip(models, batch, strict=True)]
        reads = [get_range_op(model, model + b"\0", keys_only=True) for model in models]
        result = await self._etcd.txn(compares, [], reads)
        if result.succeeded:
            return []
        return [
            held
            for held, found in zip(batch, result.responses, strict=True)
            if not (isinstance(found, tuple) and found and found[0].create_revision == held[1])
        ]
