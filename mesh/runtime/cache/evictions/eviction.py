"""The execution of evictions, for a load that needs room, or because the server uses too much memory.

Other modules choose the victims (`victims` for a load, `memory` for the server). This module has the victims unloaded,
counts them, and keeps the reasons. `unloads` takes the copies out of memory, and `space` wakes the loads that wait for
it.
"""

from mesh.runtime.cache.books.decisions import Decisions
from mesh.runtime.cache.books.demand import Demand
from mesh.runtime.cache.books.entries import CacheEntry, EntryState
from mesh.runtime.cache.books.ledger import Ledger
from mesh.runtime.cache.books.meters import Meters
from mesh.runtime.cache.evictions.unloads import Unloads
from mesh.telemetry import logs
from placement.room import RoomDecision

log = logs.get(__name__)


class Eviction:
    """The evictions of one pod."""

    def __init__(
        self, ledger: Ledger, unloads: Unloads, demand: Demand, *, decisions: Decisions, meters: Meters
    ) -> None:
        self._ledger = ledger
        self._unloads = unloads
        self._demand = demand
        self._decisions = decisions
        self._meters = meters

    def make_way(self, room: RoomDecision, for_whom: str) -> None:
        """Begins to unload the victims of a decision, to make room for the model `for_whom`."""
        for victim in room.victims:
            entry = self._ledger.entries.get(victim)
            if entry is not None and entry.state is EntryState.LOADED:
                self._decisions.note("evict", victim, for_whom, why=room.why)
                self._begin(entry, f"evicted for {for_whom}: {room.why}")

    def evict(self, entry: CacheEntry, why: str) -> None:
        """Begins to unload one copy for a reason other than the load of another model."""
        self._decisions.note("evict", entry.model_id, why=why)
        self._begin(entry, why)

    async def gone(self, room: RoomDecision) -> None:
        """Waits until nothing is left of the victims of a decision, including their files."""
        for victim in room.victims:
            await self._unloads.gone(victim.removesuffix("\0"))

    def _begin(self, entry: CacheEntry, why: str) -> None:
        self._demand.made_way(entry)
        idle = self._ledger.idle_ms(entry)
        if not self._unloads.begin(entry, evicted=True):
            return
        self._meters.age_at_eviction.observe(idle)
        self._meters.evictions.inc()
        log.info("evicting", model=entry.model_id, why=why, idle_ms=idle, bytes=entry.weight)
