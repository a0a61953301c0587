"""A copy's key in etcd: claimed before the load, published after it.

The key of a loaded copy already exists as a claim, so it is updated only after the load has been answered. The first
copy of a registration's content is published before the answer, in a transaction that writes the content's digest
(`claims.publish`). Thus if two pods make a first load, the later pod learns of the earlier one. If a copy replaces one
whose key was deleted meanwhile, it is also published before the answer.
"""

import time

from mesh.runtime.blame.history import History, Took
from mesh.runtime.cache.books.entries import CacheEntry, EntryState
from mesh.runtime.cache.books.ledger import Ledger
from mesh.runtime.cache.books.meters import Meters
from mesh.runtime.cache.evictions.unloads import Unloads
from mesh.runtime.cache.evictions.victims import Victims
from mesh.runtime.cache.loads.outcomes import Failed, Loaded, Outcome, Refused, Want
from mesh.runtime.presence import verdicts
from mesh.runtime.presence.claims import Claims
from mesh.runtime.presence.publishing import Presence
from mesh.runtime.presence.verdicts import Stale
from mesh.runtime.servers.serverprocess import ServerProcess
from mesh.schema import records, versions
from mesh.schema.records import CopyRecord, ModelRecord
from mesh.statuses import Reason
from mesh.telemetry import logs
from placement.footprint import Footprint

log = logs.get(__name__)

_KEY_WAIT = 1.0  # seconds that an answer waits for the claim's key to be deleted


class Publication:
    """The claims and publications of one pod's copies."""

    def __init__(
        self,
        ledger: Ledger,
        victims: Victims,
        unloads: Unloads,
        meters: Meters,
        *,
        server: ServerProcess,
        presence: Presence,
        claims: Claims,
        history: History,
        incarnation: str,
    ) -> None:
        self._ledger = ledger
        self._victims = victims
        self._unloads = unloads
        self._meters = meters
        self._server = server
        self._presence = presence
        self._claims = claims
        self._history = history
        self._incarnation = incarnation

    async def claim(self, want: Want, entry: CacheEntry) -> verdicts.Verdict:
        """Claims the model. During a reload of this pod's copy no claim is needed; the method then only reads the
        record."""
        if entry.aside:
            return await self._claims.look(want.model_id, want.revision)
        # The claim also reads about possible victims; for an unknown size, only if the pod is nearly full.
        capacity = self._ledger.capacity
        tenth = Footprint(capacity.host_bytes // 10, capacity.device_bytes // 10)
        likely = want.footprint if want.footprint.total_bytes else tenth
        claim = CopyRecord(
            self._incarnation,
            want.revision,
            records.LOADING,
            age_ms=want.idle_ms,
            type=want.type,
            since_ms=_wall_ms(),
        )
        ask = self._victims.candidates(likely)
        return await self._claims.claim(want.model_id, claim, expected=want.expected_copies, ask=ask)

    async def conclude(self, want: Want, entry: CacheEntry, claimed: verdicts.Claimed) -> Outcome:
        """Makes the loaded model the pod's copy, once its content's digest is in etcd. Returns the load's outcome."""
        record, published = claimed.record, False
        outcome: Outcome | None = None
        first = not record.digest and entry.digest and claimed.modified
        if first or self._unclaimed(want, entry):
            publication = await self._publish(want, entry, claimed)
            if not isinstance(publication, ModelRecord):
                return publication  # the measured size may belong to other content than the registration's
            record, published = publication, True
            if self._unclaimed(want, entry):
                outcome = Refused(
                    Reason.UNAVAILABLE, "the copy that this load should replace was unloaded in the meantime: try again"
                )
        self._history.loaded(want.model_id, want.revision, record, _took(entry, record))
        return self._keep(want, entry, published=published) if outcome is None else outcome

    async def withdraw(self, want: Want) -> None:
        """Withdraws the claim of a load that did not become a copy. Waits at most a second for the key to be
        deleted."""
        self._presence.drop(want.model_id)
        await self._presence.settled(want.model_id, _KEY_WAIT)

    def _unclaimed(self, want: Want, entry: CacheEntry) -> bool:
        """Returns whether the key of the copy to be replaced has been deleted, so that no key prevents a new
        registration of the id."""
        return entry.aside and self._presence.wanted(want.model_id) is None

    async def _publish(self, want: Want, entry: CacheEntry, claimed: verdicts.Claimed) -> ModelRecord | Outcome:
        """Publishes a copy in a separate transaction, which also writes the content's digest into the model's record.
        Returns the record."""
        first, took = self._history.first, _took(entry, claimed.record)
        published = await self._claims.publish(
            want.model_id,
            self._record(want, entry),
            claimed,
            lambda record: record if record.digest else first(record, entry.digest, took),
        )
        if entry not in self._ledger:  # the server has died in the meantime
            return Refused(Reason.UNAVAILABLE, self._server.why_down)
        match published:
            case verdicts.Published():
                return published.record
            case verdicts.Contradicted():
                return Failed(Reason.CONTENT_CHANGED, published.record.contradiction(entry.digest))
            case verdicts.Away():
                return Refused(Reason.REGISTRY_AWAY, f"the model's content cannot be recorded in etcd: {published.why}")
            case Stale():
                return published

    def _keep(self, want: Want, entry: CacheEntry, *, published: bool) -> Loaded:
        """Makes the loaded model the pod's copy, in place of the copy of an earlier generation, if any."""
        ledger = self._ledger
        if not published:
            self._presence.put(want.model_id, self._record(want, entry))
        former = ledger.swap(entry) if entry.aside else None
        ledger.enter(entry, EntryState.LOADED)
        if former is not None:
            self._unloads.start(former, f"its content was reloaded, generation {entry.generation}")
        self._meters.cold_ms.observe(entry.load_ms)
        self._meters.model_bytes.observe(entry.weight)
        log.info("model loaded", model=want.model_id, ms=entry.load_ms, bytes=entry.weight, digest=entry.digest)
        return Loaded(entry.measured, entry.load_ms, entry.generation, entry.digest, entry.blamed)

    def _record(self, want: Want, entry: CacheEntry) -> CopyRecord:
        return CopyRecord(
            self._incarnation,
            want.revision,
            records.LOADED,
            host_bytes=entry.measured.host_bytes,
            device_bytes=entry.measured.device_bytes,
            age_ms=entry.idle_ms,
            type=want.type,
            generation=entry.generation,
            digest=entry.digest,
            since_ms=_wall_ms(),
            blamed=entry.blamed,
            version=versions.own(want.path),
        )


def _took(entry: CacheEntry, record: ModelRecord) -> Took:
    """Returns the cost of a load, for the model's record. If the size is only guessed, the recorded size stays."""
    if entry.guessed:
        return Took(Footprint(record.host_bytes, record.device_bytes), entry.load_ms)
    return Took(entry.measured, entry.load_ms)


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000
