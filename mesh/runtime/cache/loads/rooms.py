"""Room for loads: who makes way for them, and who waits for what is busy now to come to rest.

Which copies go is `placement.room`'s decision, the same for memory and for the pod's disk. Where there is no room only
because of what is at work at this moment (calls in flight, loads under way, copies whose caller has not come yet), a
load that a caller waits for waits too, for `WAIT` at most: a storm of cold calls is served in turn, as fast as the
loads go, instead of being refused. Whom a look at those that wait serves, and who has to give way so that they do not
wait for each other, is `placement.line`'s decision. Here the looks are made, whenever memory becomes free, and now and
then, because the end of a call is told to nobody.

A load for which no caller waits never waits: it is refused, and made some other time.
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from mesh.runtime.cache.books.entries import Entry
from mesh.runtime.cache.books.ledger import Ledger
from mesh.runtime.cache.books.space import Space
from mesh.runtime.cache.evictions.eviction import Eviction
from mesh.runtime.cache.evictions.victims import Victims
from mesh.runtime.cache.loads.gate import Gate
from mesh.runtime.cache.loads.outcomes import Refused
from mesh.statuses import Reason
from mesh.telemetry import logs
from placement import line
from placement.footprint import Footprint
from placement.room import Room, RoomVerdict
from placement.sizes import Prediction

log = logs.get(__name__)

WAIT = 60.0
"""Seconds that a load waits for room. Calls in flight in a victim are given half of it before they are ended."""

LOOK = 0.05
"""Seconds between two looks while somebody waits; longer where a look takes long: thousands of copies, all busy."""

_LOOK_SHARE = 0.1  # of the event loop's time that looks may take

_NOT_ASKED = Refused(Reason.NO_ROOM, "loads before it that need no more wait for room")


@dataclass(frozen=True, slots=True)
class GivesWay:
    """The load is to leave the model server, so that others in memory get the room that they need, and to begin again
    as one of known size."""

    why: str


Answer = Refused | GivesWay | None
"""None: the room is on the books."""


@dataclass(frozen=True, slots=True)
class RoomsStatistics:
    """The loads that wait."""

    waiting: int


class _Waiting:
    """A load that waits."""

    __slots__ = ("answer", "ask", "done", "entry", "take", "waiter", "why_not")

    def __init__(
        self,
        entry: Entry,
        waiter: line.Waiter[int],
        ask: Callable[[], Room],
        take: Callable[[Room], None],
        why_not: Callable[[], Refused | None],
    ) -> None:
        self.entry = entry
        self.waiter = waiter
        self.ask = ask
        self.take = take
        self.why_not = why_not
        self.answer: Answer = _NOT_ASKED  # as of the latest look
        self.done = asyncio.Event()  # the answer is final


class Rooms:
    """See the module's text."""

    def __init__(self, ledger: Ledger, victims: Victims, eviction: Eviction, gate: Gate, space: Space) -> None:
        self._ledger = ledger
        self._victims = victims
        self._eviction = eviction
        self._gate = gate
        self._space = space
        self._places = itertools.count()
        self._waiting: dict[int, _Waiting] = {}  # by place
        self._going: set[str] = set()  # keys of copies whose files go for a pull that waits until they have gone
        self._looking: asyncio.Task[None] | None = None

    def place(self) -> int:
        """Returns a place in the line, behind all others. A load that comes back keeps the one it has."""
        return next(self._places)

    async def reserve(
        self,
        entry: Entry,
        prediction: Prediction,
        *,
        place: int,
        spares: Mapping[str, int],
    ) -> Refused | None:
        """Room for it on the books; victims begin to go. Why not, where there is none, or no loads are taken at all."""
        need = prediction.footprint
        keep = (entry.model_id, entry.key)  # the copy that it may be about to replace stays until then

        def ask() -> Room:
            nonlocal need
            for need in prediction.steps(self._ledger.free.positive):
                room = self._victims.room_for(
                    need, idle_ms=entry.idle_ms, spares=spares, keep=keep, for_whom=entry.model_id
                )
                if room.verdict is not RoomVerdict.NO_ROOM:
                    break
            return room

        def take(room: Room) -> None:
            self._ledger.weigh(entry, need)
            self._eviction.make_way(room, entry.model_id)

        # What keeps a copy that others may push out says nothing about their room.
        least = None if entry.aside else prediction.steps(Footprint())[-1]
        waiter = line.Waiter(place, place, _now_ms(), least)
        answer = await self._made(_Waiting(entry, waiter, ask, take, self._gate.why_refused))
        assert not isinstance(answer, GivesWay)
        return answer

    async def grow(self, entry: Entry, measured: Footprint, *, place: int, spares: Mapping[str, int]) -> Answer:
        """Room for what a load was measured to take here beyond what was reserved.

        It is in memory already, so it may take what is only promised to loads that have not begun; they find out when
        their turn comes (`Ledger.fits`). And until there is room the books keep what was reserved."""
        more = (measured - entry.footprint).positive

        def ask() -> Room:
            return self._victims.room_for(
                more,
                idle_ms=entry.idle_ms,
                spares=spares,
                keep=(entry.model_id, entry.key),
                for_whom=entry.model_id,
                growing={other.entry.key for other in self._waiting.values() if other.waiter.in_memory},
            )

        def take(room: Room) -> None:
            self._ledger.weigh(entry, measured)
            self._eviction.make_way(room, entry.model_id)

        if not more.total_bytes:
            self._ledger.weigh(entry, measured)
            return None
        waiter = line.Waiter(place, place, _now_ms(), more, in_memory=True)
        return await self._made(_Waiting(entry, waiter, ask, take, lambda: None))

    async def disk(
        self, entry: Entry, short: Callable[[], int], *, place: int, spares: Mapping[str, int]
    ) -> Refused | None:
        """Has copies go until a model's files find room on the disk: as for memory, and in the same order. Returns when
        their files are gone, or why they cannot go. `short` says how many bytes of files in use are in the way."""
        took = Room(RoomVerdict.FITS, (), "")

        def ask() -> Room:
            if (bytes_short := short()) <= 0:  # somebody else's pull has ended
                return Room(RoomVerdict.FITS, (), "the disk has room by now")
            if not entry.idle_ms and bytes_short <= self._victims.leaving_disk_bytes(self._going):
                return Room(RoomVerdict.NO_ROOM, (), "files of copies that are being unloaded go first", passes=True)
            return self._victims.disk_room_for(
                bytes_short,
                idle_ms=entry.idle_ms,
                spares=spares,
                for_whom=entry.model_id,
                without={other.entry.key for other in self._waiting.values() if other.waiter.least is None},
            )

        def take(room: Room) -> None:
            nonlocal took
            took = room
            self._going.update(room.victims)
            self._eviction.make_way(room, entry.model_id)

        waiter = line.Waiter(place, place, _now_ms())
        try:
            answer = await self._made(_Waiting(entry, waiter, ask, take, lambda: None))
            assert not isinstance(answer, GivesWay)
            if answer is not None:
                return Refused(answer.reason, f"the pod's disk: {answer.text}")
            async with asyncio.timeout(WAIT):
                await self._eviction.gone(took)
        except TimeoutError:
            text = f"files of {len(took.victims)} copies were not gone from the pod's disk after {WAIT:g} s"
            return Refused(Reason.NO_ROOM, text)
        finally:
            self._going.difference_update(took.victims)
        return None

    def statistics(self) -> RoomsStatistics:
        """The loads that wait."""
        return RoomsStatistics(len(self._waiting))

    async def _made(self, waiting: _Waiting) -> Answer:
        entry, place = waiting.entry, waiting.waiter.place
        if entry.idle_ms:
            room = waiting.ask()
            waiting.answer = no_room(room) or waiting.why_not()
            if waiting.answer is None:
                waiting.take(room)
            return waiting.answer
        self._waiting[place] = waiting
        try:
            self._serve()  # whoever came before goes first
            if not waiting.done.is_set():
                if self._looking is None:
                    self._looking = asyncio.get_running_loop().create_task(self._look(), name="look for room")
                async with asyncio.timeout(WAIT):
                    await waiting.done.wait()
        except TimeoutError:
            if not waiting.done.is_set():
                log.info("no room for a load", model=entry.model_id, waited=WAIT)
                refused = waiting.answer
                assert isinstance(refused, Refused)
                return replace(refused, text=f"{refused.text}, for {WAIT:g} s by now")
        finally:
            self._waiting.pop(place, None)
        return waiting.answer

    async def _look(self) -> None:
        """While somebody waits."""
        try:
            while self._waiting:
                began, news = time.monotonic(), self._space.news
                try:
                    self._serve()
                except Exception:
                    log.exception("a look for room failed")
                await asyncio.sleep((time.monotonic() - began) / _LOOK_SHARE)
                try:
                    async with asyncio.timeout(LOOK):
                        await news.wait()
                except TimeoutError:
                    pass
        finally:
            self._looking = None

    def _serve(self) -> None:
        """Gives room to those for whom there is some now, and tells those for whom there never will be."""
        for waiting in list(self._waiting.values()):
            if waiting.entry not in self._ledger:  # the model server has died, and what it held with it
                self._tell(waiting, Refused(Reason.UNAVAILABLE, "the model server has died meanwhile"))
        waiters = [waiting.waiter for waiting in self._waiting.values()]
        for step in line.look(waiters, lambda place: self._waiting[place].ask(), now_ms=_now_ms()):
            waiting, room = self._waiting[step.waiter.place], step.room
            match step.fate:
                case line.Fate.WAITS:
                    waiting.answer = no_room(room) or Refused(
                        Reason.NO_ROOM, "only copies could go whose callers are on their way"
                    )
                case line.Fate.REFUSED:
                    self._tell(waiting, no_room(room))
                case line.Fate.GIVES_WAY:
                    self._tell(waiting, GivesWay(room.why))
                case line.Fate.GOES:
                    if (refused := waiting.why_not()) is None:
                        waiting.take(room)
                    self._tell(waiting, refused)

    def _tell(self, waiting: _Waiting, answer: Answer) -> None:
        del self._waiting[waiting.waiter.place]
        waiting.answer = answer
        waiting.done.set()


def _now_ms() -> int:
    return time.monotonic_ns() // 1_000_000


def no_room(room: Room) -> Refused | None:
    """The refusal that a decision means; None where there is room, or will be once the victims are gone."""
    if room.verdict is RoomVerdict.TOO_LARGE:
        return Refused(Reason.NOWHERE, room.why)
    if room.verdict is RoomVerdict.NO_ROOM:
        return Refused(Reason.NO_ROOM, room.why)
    return None
