"""Admission of models to memory. A model first gets room on the books, then its turn, and the model server loads it.
Then its room is corrected to the measured size. The first and the last step may need evictions.

If the size was measured before, it is part of the request. Otherwise the size is estimated once the files are here: by
a foreign server if it predicts sizes, or from experience with models of the same type (`placement.sizes`). The estimate
is low on purpose. A high estimate would evict models needlessly, whereas a low one is corrected by the measurement a
moment later, and the server's memory has headroom for the difference.
"""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from mesh.options.values import format_bytes
from mesh.runtime.cache.books.account import Account
from mesh.runtime.cache.books.entries import CacheEntry, EntryState
from mesh.runtime.cache.books.ledger import Ledger
from mesh.runtime.cache.books.meters import Meters
from mesh.runtime.cache.books.space import Space
from mesh.runtime.cache.evictions.unloads import Unloads
from mesh.runtime.cache.loads.gate import Gate
from mesh.runtime.cache.loads.outcomes import Failed, Refused, Want
from mesh.runtime.cache.loads.rooms import Answer, GivesWay, Rooms
from mesh.runtime.cache.loads.serverside import ServerSide
from mesh.runtime.cache.loads.sizing import Sizing
from mesh.runtime.servers.spi import Size
from mesh.runtime.turns import Turns
from mesh.statuses import Reason
from mesh.telemetry import logs
from placement.failures import FailureKind
from placement.footprint import NOTHING, Footprint
from placement.queue import Forecast, QueueStatistics, forecast
from placement.sizes import Prediction, Sizes, SizesStatistics, Source
from puller.puller import Pulled

log = logs.get(__name__)

_SPACE_WAIT = 60.0  # seconds for victims to be unloaded: their calls in flight may take half of it
_ROOM_WAIT = 120.0  # seconds in which a load may repeatedly lose its room to others
_UNKNOWN = Prediction(NOTHING, Source.DEFAULT, "not predicted yet")


@dataclass(frozen=True, slots=True)
class Ticket:
    """A load to be admitted: its files are here, and its claim is won."""

    want: Want
    entry: CacheEntry
    pulled: Pulled
    spares: Mapping[str, int]  # copies elsewhere of possible victims
    place: int  # its place in the line for room
    since: float  # monotonic seconds, when it began to wait
    apart: bool  # a server may have died of its load, so no other load runs beside it
    prediction: Prediction = _UNKNOWN


class Admission:
    """The admission of loads to memory, a few at a time."""

    def __init__(
        self,
        ledger: Ledger,
        rooms: Rooms,
        server: ServerSide,
        unloads: Unloads,
        gate: Gate,
        space: Space,
        meters: Meters,
        account: Account,
        *,
        concurrency: int,
    ) -> None:
        """Makes an admission without loads. `concurrency` loads may be in the model server at the same time, apart from
        those that take long (`Turns`)."""
        self._ledger = ledger
        self._rooms = rooms
        self._server = server
        self._unloads = unloads
        self._gate = gate
        self._space = space
        self._meters = meters
        self._turns = Turns(concurrency)
        self._sizes = Sizes()
        self._sizing = Sizing(ledger, server, account, self._turns)

    @property
    def concurrency(self) -> int:
        """The number of loads that may be in the model server at the same time, apart from those that take long."""
        return self._turns.count

    def resize(self, concurrency: int) -> None:
        """Sets the number of concurrent loads that the server declares."""
        self._sizing.resize(concurrency)

    def lift(self, entry: CacheEntry) -> None:
        """Makes a load urgent that may have begun without a caller, because a caller now waits for it."""
        entry.idle_ms = 0
        self._turns.lift(entry.model_id)

    def queued(self) -> QueueStatistics:
        """Returns the number of loads that wait for their turn at the model server."""
        return self._turns.statistics()

    def sizes(self) -> SizesStatistics:
        """Returns the accuracy of size estimates."""
        return self._sizes.statistics()

    def ahead_of(self, entry: CacheEntry) -> int:
        """Returns the number of loads that get their turn before this one, or 0 if this load does not wait for a turn.
        For operators. O(n)."""
        return self._turns.ahead_of(entry.model_id)

    def expected(self, entry: CacheEntry) -> Forecast:
        """Returns a forecast of when a load in progress will be done, for operators. The load's files must be here.
        O(n)."""
        usual, gone, mean = entry.usual_ms, self._ledger.asked_ms(entry), round(self._server.mean_ms)
        if entry.state is EntryState.LOADING:
            return forecast(usual, begun_ms=gone)
        # The usual time includes a pull of unknown length, which is over: expect at least the mean turn.
        return forecast(
            max(usual - gone, min(usual, mean)),
            ahead=self.ahead_of(entry),
            in_progress=self._turns.taken,
            threads=self._turns.count,
            mean_load_ms=mean,
        )

    def too_large(self, want: Want) -> Refused | None:
        """Returns a refusal if a model of known size can never fit into this pod, or None if it can."""
        ledger = self._ledger
        need = want.footprint.on(device=ledger.has_device)
        if ledger.holds(need):
            return None
        return Refused(Reason.NOWHERE, f"the model takes {need}, but this pod's capacity is {ledger.capacity}")

    async def admit(
        self, want: Want, entry: CacheEntry, pulled: Pulled, *, spares: Mapping[str, int], apart: bool
    ) -> Size | Refused | Failed:
        """Brings a model into memory. Returns the measured size, which is then on the books, or the reason why the
        model was not loaded. `spares` is the number of copies of possible victims in other pods. `apart` is True if the
        model's load may have killed a server before; no other load then runs at the same time."""
        ticket = Ticket(want, entry, pulled, spares, self._rooms.place(), time.monotonic(), apart)
        while True:
            prediction = await self._predict(ticket)
            if isinstance(prediction, Refused):
                return prediction
            ticket = replace(ticket, prediction=prediction)
            if (refused := await self._reserve(ticket)) is not None:
                return refused
            if not await self._wait_for_space(entry):
                text = f"copies that were evicted for the model did not free {entry.footprint} within {_SPACE_WAIT:g} s"
                return Refused(Reason.NO_ROOM, text)
            if entry.begun:
                known = await self._take_turn(ticket)
                if isinstance(known, Size | Refused | Failed):
                    return known
                if known is not None:
                    ticket = replace(ticket, want=known)
            # Other models were larger than predicted, and have taken its room, or need it.
            self._ledger.give_back(entry)
            self._space.freed()
            if time.monotonic() - ticket.since > _ROOM_WAIT:
                text = f"for {_ROOM_WAIT:g} s, other models that are larger than predicted have taken the model's room"
                return Refused(Reason.NO_ROOM, text)

    async def _take_turn(self, ticket: Ticket) -> Size | Refused | Failed | Want | None:
        """Takes one turn at the model server. Returns None if the reserved room was lost meanwhile. Returns the
        request, with the size that is now known, if the load has yielded."""
        want, entry, pulled = ticket.want, ticket.entry, ticket.pulled
        take = self._turns.apart if ticket.apart else self._turns.turn
        async with take(want.model_id, idle_ms=entry.idle_ms):
            if not self._ledger.fits(NOTHING):
                return None
            self._meters.queue_ms.observe((time.monotonic() - ticket.since) * 1000)
            size = await self._server.load(want, entry, pulled)
            if isinstance(size, Failed) and size.kind is FailureKind.RULES:
                return size  # without the digest: the same files can be loaded here once the rules are others
            if isinstance(size, Failed) and pulled.digest:
                kind = FailureKind.MEMORY if size.kind is FailureKind.MEMORY else FailureKind.CONTENT
                return replace(size, kind=kind, digest=pulled.digest)
            if not isinstance(size, Size):
                return size
            size = await self._sizing.settle(want, entry, pulled, ticket.prediction, size)
            if entry not in self._ledger:  # the server has died in the meantime
                return Refused(Reason.UNAVAILABLE, self._server.why_down)
            # Within its turn: only as many loads as run at once exceed their reservations in memory.
            grown = await self._grow(ticket, size.footprint)
            if grown is None:
                return size
            if isinstance(grown, GivesWay):
                grown = await self._take_out(entry, grown)
            return grown or want.of_size(size.footprint)

    async def _take_out(self, entry: CacheEntry, gives_way: GivesWay) -> Refused | None:
        """Takes a load that yields to others out of the server, so that it can begin again."""
        log.info("load gives way", model=entry.model_id, bytes=entry.weight, why=gives_way.why)
        if not await self._unloads.take_out(entry):
            return Refused(
                Reason.NO_ROOM, f"the model could not be unloaded to give way to other loads: {gives_way.why}"
            )
        if entry not in self._ledger:  # the server has died in the meantime
            return Refused(Reason.UNAVAILABLE, self._server.why_down)
        self._ledger.enter(entry, EntryState.WAITING)
        return None

    async def _predict(self, ticket: Ticket) -> Prediction | Refused:
        want, pulled, ledger = ticket.want, ticket.pulled, self._ledger
        capacity = ledger.capacity
        largest = max(1, capacity.device_bytes or capacity.host_bytes)
        if pulled.bytes > largest:
            text = f"the model's files take {format_bytes(pulled.bytes)}, but this pod's capacity is {capacity}"
            return Refused(Reason.NOWHERE, text, None if want.footprint.total_bytes else Footprint(pulled.bytes))
        if (refused := self._gate.why_refused()) is not None:
            return refused
        prediction = self._sizes.predict(
            want.type,
            file_bytes=pulled.bytes,
            measured=want.footprint,
            device=ledger.has_device,
            limit_bytes=largest,
        )
        if not want.footprint.total_bytes and (said := await self._server.predicted(want, pulled)):
            prediction = Prediction(Footprint(min(said, largest)), Source.TYPE, "its server predicts it", pulled.bytes)
        return prediction

    async def _reserve(self, ticket: Ticket) -> Refused | None:
        """Reserves room for a load, and begins to unload the victims."""
        capacity = self._ledger.capacity
        counted = self._sizing.counted(ticket.prediction, capacity.host_bytes)
        return await self._rooms.reserve(ticket.entry, counted, place=ticket.place, spares=ticket.spares)

    async def _wait_for_space(self, entry: CacheEntry) -> bool:
        """Waits until the load's room is free. Ends early, with the load not begun, if a model that is larger than
        predicted takes the room. Returns False after `_SPACE_WAIT` seconds."""
        self._ledger.enter(entry, EntryState.WAITING)
        try:
            async with asyncio.timeout(_SPACE_WAIT):
                while not self._ledger.begin(entry) and self._ledger.fits(NOTHING):
                    await self._space.news.wait()
        except TimeoutError:
            return False
        return True

    async def _grow(self, ticket: Ticket, took: Footprint) -> Answer:
        """Puts the measured size on the books, which may need evictions. Returns a refusal if there is no room for it,
        or GivesWay if the load must leave memory to others."""
        want, entry, ledger = ticket.want, ticket.entry, self._ledger
        here = took if ledger.has_device else Footprint(took.total_bytes)
        if not ledger.holds(here):  # a model that fits nowhere is no evidence about others of its type
            return Refused(
                Reason.NOWHERE, f"the model takes {here}, but this pod's capacity is {ledger.capacity}", took
            )
        if not entry.guessed:
            self._sizes.learn(
                want.type,
                predicted=ticket.prediction.footprint,
                measured=took,
                file_bytes=ticket.pulled.bytes,
                device=ledger.has_device,
            )
        grown = await self._rooms.grow(entry, ledger.counted(entry), place=ticket.place, spares=ticket.spares)
        if entry not in ledger:  # the server has died in the meantime
            return Refused(Reason.UNAVAILABLE, self._server.why_down)
        if isinstance(grown, Refused):
            return Refused(grown.reason, f"the model takes {here}: {grown.text}", took)
        self._space.freed()  # if less was needed than reserved
        return grown
