"""Room for loads: the evictions, and the line of loads that wait for busy copies.

`placement.room` chooses the victims, for memory and for the pod's disk alike. If the only reason for a lack of room is
current work (calls in flight, loads under way, copies that were loaded for a call which has not come yet), a load with
a waiting caller waits too, for at most `WAIT` seconds. Thus a storm of cold calls is served one by one, as fast as
loads end, instead of being refused. `placement.line` chooses the waiting loads that get room, and those that must give
way so that loads do not wait for each other. This module asks it whenever memory becomes free, and also periodically,
because the end of a call is not announced.

A load without a waiting caller never waits. It is refused, and tried again later.
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from mesh.runtime.cache.books.entries import CacheEntry
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
from placement.room import RoomDecision, RoomVerdict
from placement.sizes import Prediction

log = logs.get(__name__)

WAIT = 60.0
"""Seconds for which a load waits for room. A call in flight in a victim gets half of this time before it is ended."""

LOOK = 0.05
"""Seconds between two searches for room while a load waits. The pause is longer if a search takes long, as with
thousands of busy copies."""

_LOOK_SHARE = 0.1  # of the event loop's time that looks may take

_NOT_ASKED = Refused(Reason.NO_ROOM, "earlier loads that need no more memory are waiting for room")


@dataclass(frozen=True, slots=True)
class GivesWay:
    """The order to a load to leave the model server, so that other loads in memory get the room that they need. The
    load then begins again with a known size."""

    why: str


Answer = Refused | GivesWay | None
"""The answer to a load that asked for room: a refusal, the order to give way, or None once the room is on the books."""


@dataclass(frozen=True, slots=True)
class RoomsStatistics:
    """The numbers of loads that wait."""

    waiting: int


class _Waiting:
    __slots__ = ("answer", "ask", "done", "entry", "take", "waiter", "why_not")

    def __init__(
        self,
        entry: CacheEntry,
        waiter: line.WaitingLoad[int],
        ask: Callable[[], RoomDecision],
        take: Callable[[RoomDecision], None],
        why_not: Callable[[], Refused | None],
    ) -> None:
        self.entry = entry
        self.waiter = waiter
        self.ask = ask
        self.take = take
        self.why_not = why_not
        self.answer: Answer = _NOT_ASKED  # refusal by the latest look
        self.done = asyncio.Event()  # set once the answer is final


class Rooms:
    """The room for loads in one pod's memory and disk, and the line of loads that wait for it."""

    def __init__(self, ledger: Ledger, victims: Victims, eviction: Eviction, gate: Gate, space: Space) -> None:
        self._ledger = ledger
        self._victims = victims
        self._eviction = eviction
        self._gate = gate
        self._space = space
        self._places = itertools.count()
        self._waiting: dict[int, _Waiting] = {}  # by place
        self._going: set[str] = set()  # keys of copies whose files are removed for a pull that waits for that
        self._looking: asyncio.Task[None] | None = None

    def place(self) -> int:
        """Returns a new place at the end of the line, for a load that begins. (A load that begins again keeps its
        place.)"""
        return next(self._places)

    async def reserve(
        self,
        entry: CacheEntry,
        prediction: Prediction,
        *,
        place: int,
        spares: Mapping[str, int],
    ) -> Refused | None:
        """Reserves room for a load, and begins to unload the victims. Returns None then, or a refusal if the pod has no
        room or accepts no loads."""
        need = prediction.footprint
        keep = (entry.model_id, entry.key)  # a copy that it may replace stays until the load is done

        def ask() -> RoomDecision:
            nonlocal need
            for need in prediction.steps(self._ledger.free.positive):
                room = self._victims.room_for(
                    need, idle_ms=entry.idle_ms, spares=spares, keep=keep, for_whom=entry.model_id
                )
                if room.verdict is not RoomVerdict.NO_ROOM:
                    break
            return room

        def take(room: RoomDecision) -> None:
            self._ledger.weigh(entry, need)
            self._eviction.make_way(room, entry.model_id)

        # The reasons that protect this copy say nothing about room for loads that may evict it.
        least = None if entry.aside else prediction.steps(Footprint())[-1]
        waiter = line.WaitingLoad(place, place, _now_ms(), least)
        answer = await self._made(_Waiting(entry, waiter, ask, take, self._gate.why_refused))
        assert not isinstance(answer, GivesWay)
        return answer

    async def grow(self, entry: CacheEntry, measured: Footprint, *, place: int, spares: Mapping[str, int]) -> Answer:
        """Makes room for the measured size of a load beyond its reservation.

        The load is in memory already, so it may take memory reserved for loads that have not begun. Those loads notice
        this when their turn comes (`Ledger.fits`). Until there is room, the load's reservation stays on the books. If
        the load must leave memory to others, returns GivesWay.
        """
        more = (measured - entry.footprint).positive

        def ask() -> RoomDecision:
            return self._victims.room_for(
                more,
                idle_ms=entry.idle_ms,
                spares=spares,
                keep=(entry.model_id, entry.key),
                for_whom=entry.model_id,
                growing={other.entry.key for other in self._waiting.values() if other.waiter.in_memory},
            )

        def take(room: RoomDecision) -> None:
            self._ledger.weigh(entry, measured)
            self._eviction.make_way(room, entry.model_id)

        if not more.total_bytes:
            self._ledger.weigh(entry, measured)
            return None
        waiter = line.WaitingLoad(place, place, _now_ms(), more, in_memory=True)
        return await self._made(_Waiting(entry, waiter, ask, take, lambda: None))

    async def disk(
        self,
        entry: CacheEntry,
        short: Callable[[], int],
        *,
        removing: Callable[[], bool],
        place: int,
        spares: Mapping[str, int],
    ) -> Refused | None:
        """Evicts copies until a model's files fit on the disk, by the same rules and in the same order as for memory.

        Returns None once the victims' files are gone, or a refusal if there is no room. `short` returns the number of
        bytes of files in use that must be removed. `removing` returns whether pulled files are being removed, or are
        about to be, so that waiting may help.
        """
        took = RoomDecision(RoomVerdict.FITS, (), "")

        def ask() -> RoomDecision:
            if (bytes_short := short()) <= 0:  # another pull has ended meanwhile
                return RoomDecision(RoomVerdict.FITS, (), "the disk has room now")
            if not entry.idle_ms and bytes_short <= self._victims.leaving_disk_bytes(self._going):
                return RoomDecision(
                    RoomVerdict.NO_ROOM,
                    (),
                    "the files of copies that are being unloaded must be removed first",
                    passes=True,
                )
            decision = self._victims.disk_room_for(
                bytes_short,
                idle_ms=entry.idle_ms,
                spares=spares,
                for_whom=entry.model_id,
                without={other.entry.key for other in self._waiting.values() if other.waiter.least is None},
            )
            if decision.verdict is RoomVerdict.NO_ROOM and removing():
                return replace(decision, passes=True)
            return decision

        def take(room: RoomDecision) -> None:
            nonlocal took
            took = room
            self._going.update(room.victims)
            self._eviction.make_way(room, entry.model_id)

        waiter = line.WaitingLoad(place, place, _now_ms())
        try:
            answer = await self._made(_Waiting(entry, waiter, ask, take, lambda: None))
            assert not isinstance(answer, GivesWay)
            if answer is not None:
                return Refused(answer.reason, f"no room on the pod's disk: {answer.text}")
            async with asyncio.timeout(WAIT):
                await self._eviction.gone(took)
        except TimeoutError:
            text = f"the files of {len(took.victims)} evicted copies are still on the pod's disk after {WAIT:g} s"
            return Refused(Reason.NO_ROOM, text)
        finally:
            self._going.difference_update(took.victims)
        return None

    def statistics(self) -> RoomsStatistics:
        """Returns the number of loads that wait."""
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
            self._serve()  # earlier loads are served first
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
                return replace(refused, text=f"{refused.text} (the load has waited for {WAIT:g} s)")
        finally:
            self._waiting.pop(place, None)
        return waiting.answer

    async def _look(self) -> None:
        try:
            while self._waiting:
                began, news = time.monotonic(), self._space.news
                try:
                    self._serve()
                except Exception:
                    log.exception("the search for room failed inside the agent")
                await asyncio.sleep((time.monotonic() - began) / _LOOK_SHARE)
                try:
                    async with asyncio.timeout(LOOK):
                        await news.wait()
                except TimeoutError:
                    pass
        finally:
            self._looking = None

    def _serve(self) -> None:
        """Gives room to the loads that fit now, and has others wait, give way or be refused, as `placement.line`
        decides."""
        for waiting in list(self._waiting.values()):
            if waiting.entry not in self._ledger:  # the model server has died, with all that it held
                self._tell(waiting, Refused(Reason.UNAVAILABLE, "the model server has died in the meantime"))
        waiters = [waiting.waiter for waiting in self._waiting.values()]
        for step in line.look(waiters, lambda place: self._waiting[place].ask(), now_ms=_now_ms()):
            waiting, room = self._waiting[step.waiter.place], step.room
            match step.fate:
                case line.Fate.WAITS:
                    waiting.answer = no_room(room) or Refused(
                        Reason.NO_ROOM, "the pod can evict only copies whose callers are still on their way"
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


def no_room(room: RoomDecision) -> Refused | None:
    """Returns the refusal that follows from a decision. Returns None if there is room, or will be once the victims are
    gone."""
    if room.verdict is RoomVerdict.TOO_LARGE:
        return Refused(Reason.NOWHERE, room.why)
    if room.verdict is RoomVerdict.NO_ROOM:
        return Refused(Reason.NO_ROOM, room.why)
    return None
