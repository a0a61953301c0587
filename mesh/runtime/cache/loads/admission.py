"""A model's way into memory: room on the books, which may evict; its turn; the server's part; and room for what that
has measured, which may evict more.

Sizes. What was measured before comes with the request. Otherwise the size is predicted from the file when it is there,
by what models of its type have shown (`placement.sizes`), and low on purpose: predicting high evicts models that need
not go, predicting low is put right by the measurement a moment later, and the server's memory has headroom for it.
"""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from mesh.options.values import format_bytes
from mesh.runtime.cache.books.entries import Entry, State
from mesh.runtime.cache.books.ledger import Ledger
from mesh.runtime.cache.books.meters import Meters
from mesh.runtime.cache.books.space import Space
from mesh.runtime.cache.evictions.unloads import Unloads
from mesh.runtime.cache.loads.gate import Gate
from mesh.runtime.cache.loads.outcomes import Failed, Refused, Want
from mesh.runtime.cache.loads.rooms import Answer, GivesWay, Rooms
from mesh.runtime.cache.loads.serverside import ServerSide
from mesh.runtime.servers.spi import Size
from mesh.runtime.turns import Turns
from mesh.statuses import Reason
from mesh.telemetry import logs
from placement.failures import Kind
from placement.footprint import NOTHING, Footprint
from placement.queue import Forecast, QueueStatistics, forecast
from placement.sizes import Sizes, SizesStatistics
from puller.puller import Pulled

log = logs.get(__name__)

_SPACE_WAIT = 60.0  # seconds for victims to go: calls in flight in them may take half of it
_ROOM_WAIT = 120.0  # seconds in which a load may lose its room to others again and again


@dataclass(frozen=True, slots=True)
class Ticket:
    """A load that is to be admitted: its files are here, and its claim is won."""

    want: Want
    entry: Entry
    pulled: Pulled
    spares: Mapping[str, int]  # copies elsewhere, of those that may have to make way
    place: int  # in the line for room
    since: float  # monotonic seconds, when it began to wait
    apart: bool  # a server may have died of its load, so this one is made while no other is


class Admission:
    """Admits loads to memory, a few at a time."""

    def __init__(
        self,
        ledger: Ledger,
        rooms: Rooms,
        server: ServerSide,
        unloads: Unloads,
        gate: Gate,
        space: Space,
        meters: Meters,
        *,
        concurrency: int,
    ) -> None:
        """`concurrency`: loads in the model server at once."""
        self._ledger = ledger
        self._rooms = rooms
        self._server = server
        self._unloads = unloads
        self._gate = gate
        self._space = space
        self._meters = meters
        self._turns = Turns(concurrency)
        self._sizes = Sizes()

    def lift(self, entry: Entry) -> None:
        """A caller has come for a load that may have begun without one: from now on it is as urgent as any other."""
        entry.idle_ms = 0
        self._turns.lift(entry.model_id)

    def queued(self) -> QueueStatistics:
        """The loads that wait for the model server."""
        return self._turns.statistics()

    def sizes(self) -> SizesStatistics:
        """How predictions of sizes did."""
        return self._sizes.statistics()

    def ahead_of(self, entry: Entry) -> int:
        """How many loads have their turn before that one. O(n): for people."""
        return self._turns.ahead_of(entry.model_id)

    def expected(self, entry: Entry) -> Forecast:
        """When a load under way should be done, its files being here. O(n): for people."""
        usual, gone, mean = entry.usual_ms, self._ledger.asked_ms(entry), round(self._server.mean_ms)
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

    def too_large(self, want: Want) -> Refused | None:
        """Why a model of known size can never be here."""
        ledger = self._ledger
        need = want.footprint.on(device=ledger.has_device)
        if ledger.holds(need):
            return None
        return Refused(Reason.NOWHERE, f"it takes {need}, this pod's capacity is {ledger.capacity}")

    async def admit(
        self, want: Want, entry: Entry, pulled: Pulled, *, spares: Mapping[str, int], apart: bool
    ) -> Size | Refused | Failed:
        """Brings a model into memory. Returns the size that was measured, which is on the books then. `spares`: copies
        elsewhere, of those that may have to make way. `apart`: a server may have died of its load, so this one is made
        while no other is."""
        ticket = Ticket(want, entry, pulled, spares, self._rooms.place(), time.monotonic(), apart)
        while True:
            if (refused := await self._reserve(ticket)) is not None:
                return refused
            if not await self._wait_for_space(entry):
                text = f"{entry.footprint} were not free after {_SPACE_WAIT:g} s: victims have calls in flight"
                return Refused(Reason.NO_ROOM, text)
            if entry.begun:
                known = await self._take_turn(ticket)
                if isinstance(known, Size | Refused | Failed):
                    return known
                if known is not None:
                    ticket = replace(ticket, want=known)
            # Others were larger than predicted, and have taken its room, or need it.
            self._ledger.give_back(entry)
            self._space.freed()
            if time.monotonic() - ticket.since > _ROOM_WAIT:
                text = f"others have taken its room for {_ROOM_WAIT:g} s, which were larger than predicted"
                return Refused(Reason.NO_ROOM, text)

    async def _take_turn(self, ticket: Ticket) -> Size | Refused | Failed | Want | None:
        """One turn at the model server. Returns None where the room is gone by then, and what is wanted, of known size,
        where the load has given way."""
        want, entry, pulled = ticket.want, ticket.entry, ticket.pulled
        take = self._turns.apart if ticket.apart else self._turns.turn
        async with take(want.model_id, idle_ms=entry.idle_ms):
            if not self._ledger.fits(NOTHING):
                return None
            self._meters.queue_ms.observe((time.monotonic() - ticket.since) * 1000)
            size = await self._server.load(want, entry, pulled)
            if isinstance(size, Failed) and pulled.digest:
                kind = Kind.MEMORY if size.kind is Kind.MEMORY else Kind.CONTENT
                return replace(size, kind=kind, digest=pulled.digest)
            if not isinstance(size, Size):
                return size
            # While it has its turn: no more loads are in memory beyond what was reserved than load at once.
            grown = await self._grow(ticket, size.footprint)
            if grown is None:
                return size
            if isinstance(grown, GivesWay):
                grown = await self._take_out(entry, grown)
            return grown or want.of_size(size.footprint)

    async def _take_out(self, entry: Entry, gives_way: GivesWay) -> Refused | None:
        """Takes a load out of the server that gives way to others there, so that it may begin again."""
        log.info("load gives way", model=entry.model_id, bytes=entry.weight, why=gives_way.why)
        if not await self._unloads.take_out(entry):
            return Refused(Reason.NO_ROOM, f"it could not be unloaded to give way: {gives_way.why}")
        if entry not in self._ledger:  # the server has died meanwhile
            return Refused(Reason.UNAVAILABLE, self._server.why_down)
        self._ledger.enter(entry, State.WAITING)
        return None

    async def _reserve(self, ticket: Ticket) -> Refused | None:
        """Room for it on the books; victims begin to go."""
        want, pulled, ledger = ticket.want, ticket.pulled, self._ledger
        capacity = ledger.capacity
        largest = max(1, capacity.device_bytes or capacity.host_bytes)
        if pulled.bytes > largest:
            text = f"its files have {format_bytes(pulled.bytes)}, this pod's capacity is {capacity}"
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
        return await self._rooms.reserve(ticket.entry, prediction, place=ticket.place, spares=ticket.spares)

    async def _wait_for_space(self, entry: Entry) -> bool:
        """Whether its room is free, or was taken by a larger one than predicted."""
        self._ledger.enter(entry, State.WAITING)
        try:
            async with asyncio.timeout(_SPACE_WAIT):
                while not self._ledger.begin(entry) and self._ledger.fits(NOTHING):
                    await self._space.news.wait()
        except TimeoutError:
            return False
        return True

    async def _grow(self, ticket: Ticket, took: Footprint) -> Answer:
        """Puts what was measured on the books, where there is room for it."""
        want, entry, ledger = ticket.want, ticket.entry, self._ledger
        here = took if ledger.has_device else Footprint(took.total_bytes)
        if not ledger.holds(here):  # one that fits nowhere says nothing about the others of its type
            return Refused(Reason.NOWHERE, f"it takes {here}, this pod's capacity is {ledger.capacity}", took)
        self._sizes.learn(
            want.type,
            predicted=entry.footprint,
            measured=took,
            file_bytes=ticket.pulled.bytes,
            device=ledger.has_device,
        )
        grown = await self._rooms.grow(entry, here, place=ticket.place, spares=ticket.spares)
        if entry not in ledger:  # the server has died meanwhile
            return Refused(Reason.UNAVAILABLE, self._server.why_down)
        if isinstance(grown, Refused):
            return Refused(grown.reason, f"it takes {here}: {grown.text}", took)
        self._space.freed()  # where less was needed than was reserved
        return grown
