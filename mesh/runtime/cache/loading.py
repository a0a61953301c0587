"""The steps of one load, and how each of them is undone.

First the claim and the pull side by side, because the one is a round trip to etcd and the other to a store; then room,
which may evict; then the model server; then its measured size, which may evict more. The claim comes before the room,
so whoever loses it has evicted nothing. The answer goes out as soon as the model can serve: the key that says so
follows, and is there already as a claim.

What is loaded holds what the registration's copies hold: content with another digest than the record's is refused
before the model server sees it, and the first load of all writes its digest before it answers (`claims.publish`).

A *reload* brings new content into a pod that has a copy of the old: it is loaded aside, as another generation, and
takes the old one's place once it is published; until then, and where that fails, the old one answers.

Each end but success leaves things as they were: key, room, slot, files, and the server's memory, in which nothing of a
failed load may be left. It does so before it answers, because whoever asked will ask another pod next, and that one
must not find our claim.

Sizes. What was measured before comes with the request. Otherwise the size is predicted from the file when it is there,
by what models of its type have shown (`placement.sizes`), and low on purpose: predicting high evicts models that need
not go, predicting low is put right by the measurement a moment later, and the server's memory has headroom for it.
"""

import asyncio
import functools
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from mesh.options.values import format_bytes
from mesh.runtime.blame.history import Took
from mesh.runtime.cache.ledger import NOTHING, Entry, Ledger, State
from mesh.runtime.cache.meters import Meters
from mesh.runtime.cache.outcomes import Failed, Loaded, Outcome, Refused, Want
from mesh.runtime.cache.rooms import Answer, GivesWay, Rooms, RoomsStatistics
from mesh.runtime.cache.unloads import Keys, Server, Unloads
from mesh.runtime.presence import verdicts
from mesh.runtime.presence.verdicts import Stale
from mesh.runtime.servers.spi import Size, SpiError
from mesh.runtime.turns import Turns
from mesh.schema import records
from mesh.schema.records import CopyRecord, ModelRecord
from mesh.statuses import Code, Reason
from mesh.telemetry import logs
from placement import blame
from placement.failures import Kind
from placement.footprint import Footprint
from placement.queue import Forecast, QueueStatistics, forecast
from placement.room import Room
from placement.sizes import Sizes, SizesStatistics
from puller.errors import Nature, PullError, PullErrorKind
from puller.puller import Pulled
from puller.source import Source

log = logs.get(__name__)

_PULL_TIMEOUT = 900.0  # seconds
_SPACE_WAIT = 60.0  # seconds for victims to go: calls in flight in them may take half of it
_ROOM_WAIT = 120.0  # seconds in which a load may lose its room to others again and again
_SERVER_WAIT = 5.0  # seconds for a server that died after the load had begun; another pod may be quicker
_LOAD_SLACK = 15.0  # seconds after which the server must have given up by itself
_DEATH_WAIT = 2.0  # seconds in which a lost connection shows itself as a death
_KEY_WAIT = 1.0  # seconds that an answer waits for the claim's key to go


class Claiming(Protocol):
    """Who decides whether this pod may load a model."""

    async def claim(
        self, model_id: str, copy: CopyRecord, *, expected: int = 0, ask: Sequence[str] = ()
    ) -> verdicts.Verdict:
        """Claims it."""

    async def look(self, model_id: str, revision: int) -> verdicts.Claimed | Stale | verdicts.Away:
        """Reads its record, where there is nothing to be claimed."""

    async def publish(
        self,
        model_id: str,
        copy: CopyRecord,
        claimed: verdicts.Claimed,
        remember: Callable[[ModelRecord], ModelRecord],
    ) -> verdicts.Publication:
        """Publishes the first copy of a content."""


class Publishing(Keys, Protocol):
    """This pod's keys in etcd."""

    def put(self, model_id: str, record: CopyRecord) -> None:
        """It has that copy."""

    def wanted(self, model_id: str) -> CopyRecord | None:
        """Returns what stands there for that model, or will in a moment."""


class Pulling(Protocol):
    """Who fetches files."""

    async def pull(self, source: Source, *, into: str, tag: str = "") -> Pulled:
        """Raises PullError."""

    def short(self, needs: int) -> int:
        """Returns how many bytes of files in use have to go from the disk before so many find room there."""

    async def remove(self, into: str) -> None:
        """Removes what was pulled."""


class Remembering(Protocol):
    """Who writes into models' records."""

    def first(self, record: ModelRecord, digest: str, took: Took) -> ModelRecord:
        """The record with what the first load of its content has shown."""

    def loaded(self, model_id: str, revision: int, known: ModelRecord, took: Took) -> None:
        """What a load took."""

    def known(self, record: ModelRecord) -> records.Failure | None:
        """Returns this pod's own failure that is on record and has not expired."""

    async def measured(self, model_id: str, revision: int, footprint: Footprint) -> None:
        """What it was found to need that could not stay."""

    async def failed(
        self, model_id: str, revision: int, text: str, kind: Kind, *, asked_ms: int = 0, digest: str = ""
    ) -> None:
        """Why it failed."""

    def killed(
        self, model_id: str, revision: int, text: str, *, sure: bool = False, digests: tuple[str, ...] = ()
    ) -> None:
        """It has cost a server, or a part of one."""

    async def changed(self, model_id: str, revision: int, digest: str) -> None:
        """Other content was found than the registration's."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What a load works with. `why_refused` gives a reason to take no loads at all, `why_silent` one to tell of no copy
    as loaded, because the model server may answer for none, `why_down` how the server died."""

    ledger: Ledger
    server: Server
    unloads: Unloads
    keys: Publishing
    claiming: Claiming
    pulling: Pulling
    history: Remembering
    meters: Meters
    incarnation: str
    pod: str  # its name
    concurrency: int  # loads in the model server at once
    load_timeout: float  # seconds, the model server's own
    evict: Callable[[Room, str], None]  # a decision, and for whom
    why_refused: Callable[[], Refused | None]
    why_silent: Callable[[], Refused | None]
    why_down: Callable[[], str]
    optimised_tag: Callable[[], str]  # under which optimised forms that the model server can use are kept
    slow: Callable[[str, Pulled, float], None]  # told of every load: id, files, ms in the model server


class Loading:
    """Carries loads out, each from its entry in the ledger to its outcome."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._ledger = parts.ledger
        self._turns = Turns(parts.concurrency)
        self._sizes = Sizes()
        self._rooms = Rooms(parts.ledger, evict=parts.evict, gone=parts.unloads.gone)
        self._mean_ms = 0.0  # of the last loads in the model server
        self._space = asyncio.Event()

    def lift(self, entry: Entry) -> None:
        """A caller has come for a load that may have begun without one: from now on it is as urgent as any other."""
        entry.idle_ms = 0
        self._turns.lift(entry.model_id)

    def queued(self) -> QueueStatistics:
        """The loads that wait for the model server."""
        return self._turns.statistics()

    def ahead_of(self, entry: Entry) -> int:
        """How many loads have their turn before that one. O(n): for people."""
        return self._turns.ahead_of(entry.model_id)

    def expected(self, entry: Entry) -> Forecast:
        """When a load under way should be done, its files being here. O(n): for people."""
        usual, gone, mean = entry.usual_ms, self._ledger.asked_ms(entry), round(self._mean_ms)
        if entry.state is State.LOADING:
            return forecast(usual, begun_ms=gone)
        # Its pull is behind it, and what that usually takes nobody knows: its turn is at least as long as a mean one.
        return forecast(
            max(usual - gone, min(usual, mean)),
            ahead=self.ahead_of(entry),
            in_progress=self._turns.taken,
            threads=self._turns.count,
            mean_load_ms=mean,
        )

    def sizes(self) -> SizesStatistics:
        """How predictions of sizes did."""
        return self._sizes.statistics()

    def waiting_for_room(self) -> RoomsStatistics:
        """The loads that wait for room."""
        return self._rooms.statistics()

    def freed(self) -> None:
        """To be called whenever memory has become free."""
        space, self._space = self._space, asyncio.Event()
        space.set()
        self._rooms.freed()

    async def run(self, want: Want, entry: Entry) -> Outcome:
        """One load. Cancelled, it undoes what it did before it ends."""
        began = time.monotonic()
        loop = asyncio.get_running_loop()
        granted: asyncio.Future[Mapping[str, int]] = loop.create_future()
        pull = loop.create_task(self._pull(want, entry, granted), name=f"pull {want.model_id}")
        outcome: Outcome | None = None
        try:
            outcome = await self._steps(want, entry, pull, granted, began)
        except PullError as error:
            outcome = _pull_outcome(error)
        except _NoDisk as error:
            outcome = error.refused
        finally:
            if not isinstance(outcome, Loaded):
                await _to_its_end(self._undo(want, entry, pull))
        if isinstance(outcome, Failed) and outcome.reason is Reason.CONTENT_CHANGED:
            await self._parts.history.changed(want.model_id, want.revision, entry.digest)
        elif isinstance(outcome, Failed) and not outcome.again:
            await self._parts.history.failed(
                want.model_id,
                want.revision,
                outcome.text,
                outcome.kind,
                asked_ms=outcome.asked_ms,
                digest=outcome.digest,
            )
        elif isinstance(outcome, Refused) and outcome.needs is not None:
            await self._parts.history.measured(want.model_id, want.revision, outcome.needs)
        return outcome

    async def _steps(
        self,
        want: Want,
        entry: Entry,
        pull: "asyncio.Task[Pulled]",
        granted: "asyncio.Future[Mapping[str, int]]",
        began: float,
    ) -> Outcome:
        parts, ledger = self._parts, self._ledger
        # Who may have to go is asked about in the claim: of an unknown size, whether the pod is nearly full.
        likely = (
            want.footprint
            if want.footprint.total_bytes
            else Footprint(ledger.capacity_bytes // 10, ledger.device_capacity_bytes // 10)
        )
        verdict: verdicts.Verdict
        if entry.aside:
            verdict = await parts.claiming.look(want.model_id, want.revision)
        else:
            claim = CopyRecord(
                parts.incarnation,
                want.revision,
                records.LOADING,
                age_ms=want.idle_ms,
                type=want.type,
                since_ms=_wall_ms(),
            )
            verdict = await parts.claiming.claim(
                want.model_id, claim, expected=want.expected_copies, ask=ledger.candidates(likely)
            )
        if isinstance(verdict, verdicts.Away):
            return Refused(Reason.REGISTRY_AWAY, f"cannot be claimed: {verdict.why}")
        if not isinstance(verdict, verdicts.Claimed):
            return verdict
        record, spares = verdict.record, verdict.spares
        entry.usual_ms = record.load_ms
        entry.generation = record.generation
        entry.blamed = any(one.requests for one in record.blames)
        if record.quarantined:
            return Refused(Reason.QUARANTINED, record.quarantine(want.model_id))
        former = ledger.entries.get(want.model_id)
        if entry.aside and former is not None and former.generation >= record.generation:
            return Stale()  # whoever asked knows of a generation that the registry does not have

        if not want.footprint.total_bytes:  # the router's record may be older than its size
            want = replace(want, host_bytes=record.host_bytes, device_bytes=record.device_bytes)
            if want.footprint.total_bytes and (refused := self.too_large(want)) is not None:
                return refused
        granted.set_result(spares)
        pulled = await pull
        entry.digest, entry.disk_bytes = pulled.digest, pulled.bytes
        if record.digest and entry.digest and record.digest != entry.digest:
            return Failed(Reason.CONTENT_CHANGED, record.contradiction(entry.digest))
        if (failed := self._unchanged(record, pulled)) is not None:
            return failed
        waiting = time.monotonic()
        apart = blame.on_probation(record.blames, _wall_ms())
        size = await self._bring_in(want, entry, pulled, spares, waiting, apart=apart)
        if not isinstance(size, Size):
            return size
        if size.note:
            log.warning("a model was loaded, but", model=want.model_id, note=size.note)
            entry.reason = f"{entry.reason}; {size.note}" if entry.reason else size.note
        entry.load_ms = max(1, round((time.monotonic() - began) * 1000))
        outcome: Outcome | None = None
        published = False
        first = not record.digest and entry.digest and verdict.modified
        if first or self._unclaimed(want, entry):
            publication = await self._publish(want, entry, verdict)
            if not isinstance(publication, ModelRecord):
                return publication  # what it took may be of other content than the registration's
            record, published = publication, True
            if self._unclaimed(want, entry):
                outcome = Refused(Reason.UNAVAILABLE, "the copy that it was to replace was unloaded meanwhile")
        parts.history.loaded(want.model_id, want.revision, record, Took(entry.footprint, entry.load_ms))
        return self._keep(want, entry, published=published) if outcome is None else outcome

    async def _bring_in(
        self, want: Want, entry: Entry, pulled: Pulled, spares: Mapping[str, int], waiting: float, *, apart: bool
    ) -> Size | Refused | Failed:
        """Room, its turn, the server's part, and room for what that has measured. `apart`: a server may have died of
        its load, so this one is made while no other is."""
        parts, ledger = self._parts, self._ledger
        take_turn = self._turns.apart if apart else self._turns.turn
        place = self._rooms.place()
        while True:
            if (refused := await self._reserve(want, entry, pulled, spares, place)) is not None:
                return refused
            if not await self._wait_for_space(entry):
                text = f"{entry.footprint} were not free after {_SPACE_WAIT:g} s: victims have calls in flight"
                return Refused(Reason.NO_ROOM, text)
            if entry.begun:
                async with take_turn(want.model_id, idle_ms=entry.idle_ms):
                    if ledger.fits(NOTHING):
                        parts.meters.queue_ms.observe((time.monotonic() - waiting) * 1000)
                        size = await self._serve(want, entry, pulled)
                        if isinstance(size, Failed) and pulled.digest:
                            kind = Kind.MEMORY if size.kind is Kind.MEMORY else Kind.CONTENT
                            return replace(size, kind=kind, digest=pulled.digest)
                        if not isinstance(size, Size):
                            return size
                        # While it has its turn: no more loads are in memory beyond what was reserved than load at once.
                        grown = await self._grow(want, entry, pulled, size, spares, place)
                        if grown is None:
                            return size
                        if isinstance(grown, Refused):
                            return grown
                        if (refused := await self._take_out(entry, grown)) is not None:
                            return refused
                        want = replace(want, host_bytes=size.host_bytes, device_bytes=size.device_bytes)
            # Others were larger than predicted, and have taken its room, or need it.
            ledger.give_back(entry)
            self.freed()
            if time.monotonic() - waiting > _ROOM_WAIT:
                text = f"others have taken its room for {_ROOM_WAIT:g} s, which were larger than predicted"
                return Refused(Reason.NO_ROOM, text)

    async def _take_out(self, entry: Entry, gives_way: GivesWay) -> Refused | None:
        """Takes a load out of the server that gives way to others there, so that it may begin again."""
        log.info("load gives way", model=entry.model_id, bytes=entry.weight, why=gives_way.why)
        if not await self._parts.unloads.take_out(entry):
            return Refused(Reason.NO_ROOM, f"it could not be unloaded to give way: {gives_way.why}")
        if entry not in self._ledger:  # the server has died meanwhile
            return Refused(Reason.UNAVAILABLE, self._parts.why_down())
        self._ledger.enter(entry, State.WAITING)
        return None

    def _unclaimed(self, want: Want, entry: Entry) -> bool:
        """Returns whether no key keeps the model's id from being registered anew: the copy that this one replaces has
        taken its own away."""
        return entry.aside and self._parts.keys.wanted(want.model_id) is None

    async def _publish(self, want: Want, entry: Entry, claimed: verdicts.Claimed) -> ModelRecord | Outcome:
        """Publishes a copy in a transaction of its own, with its digest in the record, which is returned."""
        first, took = self._parts.history.first, Took(entry.footprint, entry.load_ms)
        published = await self._parts.claiming.publish(
            want.model_id,
            self._record(want, entry),
            claimed,
            lambda record: record if record.digest else first(record, entry.digest, took),
        )
        if entry not in self._ledger:  # the server has died meanwhile
            return Refused(Reason.UNAVAILABLE, self._parts.why_down())
        match published:
            case verdicts.Published():
                return published.record
            case verdicts.Contradicted():
                return Failed(Reason.CONTENT_CHANGED, published.record.contradiction(entry.digest))
            case verdicts.Away():
                return Refused(Reason.REGISTRY_AWAY, f"what it holds cannot be written down: {published.why}")
            case Stale():
                return published

    async def _pull(self, want: Want, entry: Entry, granted: "asyncio.Future[Mapping[str, int]]") -> Pulled:
        """The files. Where the disk is full of others', copies make way; not before the claim is `granted`, with the
        copies elsewhere of those that may have to."""
        place, began = self._rooms.place(), time.monotonic()
        while True:
            try:
                return await self._fetch(want, entry)
            except PullError as error:
                if not error.short:
                    raise
                short = functools.partial(self._parts.pulling.short, error.needs)
            refused = await self._rooms.disk(entry, short, place=place, spares=await granted)
            if refused is None and time.monotonic() - began > _ROOM_WAIT:
                text = f"the pod's disk: others have taken its room for {_ROOM_WAIT:g} s"
                refused = Refused(Reason.NO_ROOM, text)
            if refused is not None:
                raise _NoDisk(refused)

    async def _fetch(self, want: Want, entry: Entry) -> Pulled:
        if entry.state is State.QUEUED:
            self._ledger.enter(entry, State.PULLING)
        began = time.monotonic()
        try:
            # How many of them are fetched at once, from one store and in all, is for the puller to say.
            async with asyncio.timeout(_PULL_TIMEOUT):
                source = Source(want.path, want.key, want.sha256)
                tag = self._parts.optimised_tag()
                pulled = await self._parts.pulling.pull(source, into=want.model_id, tag=tag)
        except TimeoutError as error:
            text = f"its files did not arrive within {_PULL_TIMEOUT:g} s"
            raise PullError(PullErrorKind.TIMEOUT, text) from error
        self._parts.meters.pull_ms.observe((time.monotonic() - began) * 1000)
        return pulled

    def _unchanged(self, record: ModelRecord, pulled: Pulled) -> Failed | None:
        """The failure on record, where these very files have failed here lately: they would fail again."""
        known = self._parts.history.known(record)
        if known is None or not known.digest or known.digest != pulled.digest:
            return None
        reason = Reason.NO_ROOM if known.kind is Kind.MEMORY else Reason.LOAD_FAILED
        return Failed(reason, known.text, known.kind, digest=known.digest, again=True)

    def too_large(self, want: Want) -> Refused | None:
        """Why a model of known size can never be here."""
        ledger = self._ledger
        need = want.footprint.on(device=ledger.has_device)
        if ledger.holds(need):
            return None
        return Refused(Reason.NOWHERE, f"it takes {need}, this pod's capacity is {ledger.capacity}")

    async def _reserve(
        self, want: Want, entry: Entry, pulled: Pulled, spares: Mapping[str, int], place: int
    ) -> Refused | None:
        """Room for it on the books; victims begin to go."""
        ledger = self._ledger
        largest = max(1, ledger.device_capacity_bytes if ledger.has_device else ledger.capacity_bytes)
        if pulled.bytes > largest:
            text = f"its files have {format_bytes(pulled.bytes)}, this pod's capacity is {ledger.capacity}"
            return Refused(Reason.NOWHERE, text, None if want.footprint.total_bytes else Footprint(pulled.bytes))
        if (refused := self._parts.why_refused()) is not None:
            return refused
        prediction = self._sizes.predict(
            want.type,
            file_bytes=pulled.bytes,
            measured=want.footprint,
            device=ledger.has_device,
            limit_bytes=largest,
        )
        return await self._rooms.reserve(entry, prediction, place=place, spares=spares, why_not=self._parts.why_refused)

    async def _wait_for_space(self, entry: Entry) -> bool:
        """Whether its room is free, or was taken by a larger one than predicted."""
        self._ledger.enter(entry, State.WAITING)
        try:
            async with asyncio.timeout(_SPACE_WAIT):
                while not self._ledger.begin(entry) and self._ledger.fits(NOTHING):
                    await self._space.wait()
        except TimeoutError:
            return False
        return True

    async def _serve(self, want: Want, entry: Entry, pulled: Pulled) -> Size | Refused | Failed:
        """The model server's part."""
        parts, ledger = self._parts, self._ledger
        spi = await parts.server.ready(_SERVER_WAIT)
        if spi is None:
            return Refused(Reason.UNAVAILABLE, parts.why_down() or "the model server is not ready")
        # A pod whose server was down while it had no lease counts as ended: nobody waits for what it holds after that.
        if (refused := parts.why_refused()) is not None and refused.reason is Reason.REGISTRY_AWAY:
            return refused
        if not ledger.take_slot(entry):
            return Refused(Reason.NO_ROOM, "this pod holds as many copies as its use board has slots")
        ledger.enter(entry, State.LOADING)
        life = parts.server.lives
        began = time.monotonic()
        try:
            size = await spi.load(
                want.model_id,
                want.type,
                str(pulled.path),
                pulled.key,
                copy=self._record(want, entry).token,
                slot=entry.slot,
                timeout=parts.load_timeout + _LOAD_SLACK,
                optimised=str(pulled.derived or ""),
            )
        except SpiError as error:
            # Where the files lie in this pod is nothing to whoever asked for the model.
            error.text = error.text.replace(f"{pulled.path.parent}/", "")
            outcome = await self._not_loaded(entry, error, life)
            if isinstance(outcome, Failed) and pulled.skipped:  # it may be what is missing
                return replace(outcome, text=f"{outcome.text} (skipped beside it: {'; '.join(pulled.skipped[:3])})")
            return outcome
        if entry not in ledger:  # the server has died since it answered
            return Refused(Reason.UNAVAILABLE, parts.why_down())
        server_ms = (time.monotonic() - began) * 1000
        parts.meters.load_ms.observe(server_ms)
        self._mean_ms += (server_ms - self._mean_ms) / (8 if self._mean_ms else 1)
        parts.slow(want.model_id, pulled, server_ms)
        # A server that does not measure: what was predicted stands.
        return size if size.host_bytes or size.device_bytes else Size(entry.host_bytes, entry.device_bytes)

    async def _not_loaded(self, entry: Entry, error: SpiError, life: int) -> Refused | Failed:
        if error.lost:
            # The connection tells of a death before the process does.
            await self._parts.server.died(life, _DEATH_WAIT)
        if entry not in self._ledger:
            why = self._parts.why_down()
            if entry.suspect:
                return Failed(Reason.LOAD_FAILED, f"{why} while it loaded this model")
            return Refused(Reason.UNAVAILABLE, f"{why} before it had loaded this model")
        if error.stuck:
            text = f"{self._parts.pod}: {error.text}"
            self._parts.history.killed(entry.model_id, entry.revision, text, sure=True)
        if error.lost:
            return Refused(Reason.UNAVAILABLE, f"the model server did not load it: {error.text}")
        if error.code is Code.RESOURCE_EXHAUSTED:
            return Failed(Reason.NO_ROOM, error.text, Kind.MEMORY)
        return Failed(Reason.LOAD_FAILED, error.text)

    async def _grow(
        self, want: Want, entry: Entry, pulled: Pulled, size: Size, spares: Mapping[str, int], place: int
    ) -> Answer:
        """Puts what was measured on the books, where there is room for it."""
        ledger = self._ledger
        took = Footprint(size.host_bytes, size.device_bytes)
        here = took if ledger.has_device else Footprint(took.total_bytes)
        if not ledger.holds(here):  # one that fits nowhere says nothing about the others of its type
            return Refused(Reason.NOWHERE, f"it takes {here}, this pod's capacity is {ledger.capacity}", took)
        self._sizes.learn(
            want.type,
            predicted=entry.footprint,
            measured=took,
            file_bytes=pulled.bytes,
            device=ledger.has_device,
        )
        grown = await self._rooms.grow(entry, here, place=place, spares=spares)
        if entry not in ledger:  # the server has died meanwhile
            return Refused(Reason.UNAVAILABLE, self._parts.why_down())
        if isinstance(grown, Refused):
            return Refused(grown.reason, f"it takes {here}: {grown.text}", took)
        self.freed()  # where less was needed than was reserved
        return grown

    def _keep(self, want: Want, entry: Entry, *, published: bool) -> Loaded:
        """It is a copy from now on, in place of one of an earlier generation where there is one."""
        parts, ledger = self._parts, self._ledger
        if not published:
            parts.keys.put(want.model_id, self._record(want, entry))
        former = ledger.swap(entry) if entry.aside else None
        ledger.enter(entry, State.LOADED)
        if former is not None:
            parts.unloads.start(former, f"its content was reloaded, generation {entry.generation}")
        parts.meters.cold_ms.observe(entry.load_ms)
        parts.meters.model_bytes.observe(entry.weight)
        log.info("model loaded", model=want.model_id, ms=entry.load_ms, bytes=entry.weight, digest=entry.digest)
        return Loaded(entry.host_bytes, entry.device_bytes, entry.load_ms, entry.generation, entry.digest, entry.blamed)

    def _record(self, want: Want, entry: Entry) -> CopyRecord:
        """What stands in etcd of it, once it is loaded."""
        return CopyRecord(
            self._parts.incarnation,
            want.revision,
            records.LOADED,
            host_bytes=entry.host_bytes,
            device_bytes=entry.device_bytes,
            age_ms=entry.idle_ms,
            type=want.type,
            generation=entry.generation,
            digest=entry.digest,
            since_ms=_wall_ms(),
            blamed=entry.blamed,
        )

    async def _undo(self, want: Want, entry: Entry, pull: "asyncio.Task[Pulled]") -> None:
        """Leaves nothing of a load that did not become a copy."""
        pull.cancel()
        await asyncio.wait({pull})
        if not pull.cancelled():
            pull.exception()  # told already, or of no interest any more
        parts = self._parts
        if entry in self._ledger and entry.state in (State.LOADING, State.LOADED):
            parts.unloads.start(entry, "its load did not succeed")
            await parts.unloads.silent(want.model_id)
            return
        self._ledger.remove(entry)
        self.freed()
        if entry.aside:
            if want.model_id not in self._ledger.entries:  # else the files are the other generation's to remove
                await parts.pulling.remove(want.model_id)
            return
        parts.keys.drop(want.model_id)
        await parts.keys.settled(want.model_id, _KEY_WAIT)
        await parts.pulling.remove(want.model_id)


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Does all of it, also where this is cancelled meanwhile; the cancel comes after it.

    A load that has lost its claim undoes itself, and may be withdrawn just then: half undone, its entry would stay in
    the ledger, and whoever waits for it to be gone would wait for ever."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
    task.result()
    if cancelled is not None:
        raise cancelled


def _wall_ms() -> int:
    """Since the epoch: the predecessor's API demands times."""
    return time.time_ns() // 1_000_000


class _NoDisk(Exception):
    """There is no room on the disk."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(refused.text)
        self.refused = refused


def _pull_outcome(error: PullError) -> Refused | Failed:
    if error.kind is PullErrorKind.DISK_FULL:
        return Refused(Reason.NOWHERE if error.never else Reason.NO_ROOM, error.text)
    asked_ms = round(1000 * error.retry_after) if error.retry_after else 0
    return Failed(Reason.LOAD_FAILED, error.text, _KINDS[error.nature], asked_ms)


# Bad content that was not even pulled, too: looking again is cheap, and whoever corrects the file need not wait.
_KINDS = {
    Nature.PASSING: Kind.PASSING,
    Nature.NOT_FOUND: Kind.NOT_FOUND,
    Nature.FORBIDDEN: Kind.FORBIDDEN,
    Nature.CONTENT: Kind.CONTENT,
    Nature.POD: Kind.PASSING,
}
