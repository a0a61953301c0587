"""Room for loads: who makes way for them, and who waits for what is busy now to come to rest.

Which copies go is `placement.room`'s decision, the same for memory and for the pod's disk. Where there is no room only
because of what is at work at this moment (calls in flight, loads under way, copies whose caller has not come yet), a
load that a caller waits for waits too, for `WAIT` at most: a storm of cold calls is served in turn, as fast as the
loads go, instead of being refused. It is looked again whenever memory becomes free, and now and then, because the end
of a call is told to nobody; in the order in which the loads came, and a load that finds no room lets smaller ones pass.

A load for which no caller waits never waits: it is refused, and made some other time.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace

from mesh.runtime.cache.ledger import Entry, Ledger
from mesh.runtime.cache.outcomes import Refused
from mesh.statuses import Reason
from mesh.telemetry import logs
from placement.footprint import Footprint
from placement.room import FRESH_MS, Room, RoomVerdict
from placement.sizes import Prediction

log = logs.get(__name__)

WAIT = 60.0
"""Seconds that a load waits for room. Calls in flight in a victim are given half of it before they are ended."""

LOOK = 0.05
"""Seconds between two looks while somebody waits; longer where a look takes long: thousands of copies, all busy."""

_LOOK_SHARE = 0.1  # of the event loop's time that looks may take


@dataclass(frozen=True, slots=True)
class RoomsStatistics:
    """The loads that wait."""

    waiting: int


class _Waiting:
    """A load that waits."""

    __slots__ = ("ask", "began", "done", "first", "least", "refused", "take", "why_not")

    def __init__(
        self,
        ask: Callable[[], Room],
        take: Callable[[Room], None],
        why_not: Callable[[], Refused | None],
        least: Footprint | None,
        *,
        first: bool,
    ) -> None:
        self.ask = ask
        self.take = take
        self.why_not = why_not
        self.first = first  # before those that are not
        self.least = least  # what it needs in any case; None: that cannot be compared
        self.refused: Refused | None = None  # why it has none, as of the latest look
        self.began = time.monotonic()
        self.done = asyncio.Event()


class Rooms:
    """See the module's text. `evict` carries a decision out for somebody; `gone` returns once nothing of a copy that is
    being unloaded is left, its files included."""

    def __init__(
        self, ledger: Ledger, *, evict: Callable[[Room, str], None], gone: Callable[[str], Awaitable[None]]
    ) -> None:
        self._ledger = ledger
        self._evict = evict
        self._gone = gone
        self._waiting: list[_Waiting] = []  # in the order of arrival
        self._wake = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None

    async def reserve(
        self, entry: Entry, prediction: Prediction, *, spares: Mapping[str, int], why_not: Callable[[], Refused | None]
    ) -> Refused | None:
        """Room for it on the books; victims begin to go. Why not, where there is none. `why_not` gives a reason to take
        no loads at all."""
        need = prediction.footprint
        keep = (entry.model_id, entry.key)  # the copy that it may be about to replace stays until then

        def ask() -> Room:
            nonlocal need
            free = Footprint(max(0, self._ledger.free_bytes), max(0, self._ledger.free_device_bytes))
            for need in prediction.steps(free):
                room = self._ledger.room_for(
                    need, idle_ms=entry.idle_ms, spares=spares, keep=keep, for_whom=entry.model_id
                )
                if room.verdict is not RoomVerdict.NO_ROOM:
                    break
            return room

        def take(room: Room) -> None:
            self._ledger.weigh(entry, need.host_bytes, need.device_bytes)
            self._evict(room, entry.model_id)

        return await self._made(entry, ask, take, why_not, prediction.steps(Footprint())[-1])

    async def grow(self, entry: Entry, measured: Footprint, *, spares: Mapping[str, int]) -> Refused | None:
        """Room for what a load was measured to take here beyond what was reserved.

        It is in memory already, so it may take what is only promised to loads that have not begun; they find out when
        their turn comes (`Ledger.fits`). And until there is room the books keep what was reserved. Else loads that
        were all guessed too small would wait for each other."""
        reserved = entry.footprint
        more = Footprint(
            max(0, measured.host_bytes - reserved.host_bytes), max(0, measured.device_bytes - reserved.device_bytes)
        )

        def ask() -> Room:
            return self._ledger.room_for(
                more,
                idle_ms=entry.idle_ms,
                spares=spares,
                keep=(entry.model_id, entry.key),
                for_whom=entry.model_id,
                besides=self._ledger.promised(),
            )

        def take(room: Room) -> None:
            self._ledger.weigh(entry, measured.host_bytes, measured.device_bytes)
            self._evict(room, entry.model_id)

        if not more.total_bytes:
            self._ledger.weigh(entry, measured.host_bytes, measured.device_bytes)
            return None
        return await self._made(entry, ask, take, lambda: None, more, first=True)

    async def disk(self, entry: Entry, short_bytes: int, *, spares: Mapping[str, int]) -> Refused | None:
        """Has copies go until so many bytes of files have: as for memory, and in the same order. Returns when their
        files are gone, or why they cannot go."""
        victims: tuple[str, ...] = ()

        def ask() -> Room:
            return self._ledger.disk_room_for(
                short_bytes, idle_ms=entry.idle_ms, spares=spares, for_whom=entry.model_id
            )

        def take(room: Room) -> None:
            nonlocal victims
            victims = room.victims
            self._evict(room, entry.model_id)

        if (refused := await self._made(entry, ask, take, lambda: None)) is not None:
            return Refused(refused.reason, f"the pod's disk: {refused.text}")
        try:
            async with asyncio.timeout(WAIT):
                for victim in victims:
                    await self._gone(victim.removesuffix("\0"))
        except TimeoutError:
            text = f"files of {len(victims)} copies were not gone from the pod's disk after {WAIT:g} s"
            return Refused(Reason.NO_ROOM, text)
        return None

    def freed(self) -> None:
        """To be called whenever memory has become free, or a load has ended."""
        self._wake.set()

    def statistics(self) -> RoomsStatistics:
        """The loads that wait."""
        return RoomsStatistics(len(self._waiting))

    async def _made(
        self,
        entry: Entry,
        ask: Callable[[], Room],
        take: Callable[[Room], None],
        why_not: Callable[[], Refused | None],
        least: Footprint | None = None,
        *,
        first: bool = False,
    ) -> Refused | None:
        waiting = _Waiting(ask, take, why_not, least, first=first)
        if entry.idle_ms:
            self._settle(waiting)
            return waiting.refused
        if first:  # it is in memory already
            self._waiting.insert(sum(other.first for other in self._waiting), waiting)
        else:
            self._waiting.append(waiting)
        try:
            self._serve()  # whoever came before goes first
            if not waiting.done.is_set():
                if self._looking is None:
                    self._looking = asyncio.get_running_loop().create_task(self._look(), name="look for room")
                async with asyncio.timeout(WAIT):
                    await waiting.done.wait()
        except TimeoutError:
            log.info("no room for a load", model=entry.model_id, waited=WAIT)
            if waiting.refused is not None:
                return replace(waiting.refused, text=f"{waiting.refused.text}, for {WAIT:g} s by now")
        finally:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
        return waiting.refused

    async def _look(self) -> None:
        """While somebody waits."""
        try:
            while self._waiting:
                began = time.monotonic()
                self._serve()
                await asyncio.sleep((time.monotonic() - began) / _LOOK_SHARE)
                try:
                    async with asyncio.timeout(LOOK):
                        await self._wake.wait()
                except TimeoutError:
                    pass
                self._wake.clear()
        finally:
            self._looking = None

    def _serve(self) -> None:
        """Gives room to those for whom there is some now, or never will be."""
        failed: Footprint | None = None  # the least that there was no room for
        for waiting in list(self._waiting):
            if failed is not None and waiting.least is not None and _at_least(waiting.least, failed):
                continue
            if self._settle(waiting, wait=True):
                self._waiting.remove(waiting)
                waiting.done.set()
            elif waiting.least is not None and (failed is None or _at_least(failed, waiting.least)):
                failed = waiting.least

    @staticmethod
    def _settle(waiting: _Waiting, *, wait: bool = False) -> bool:
        """Takes the room that there is, or notes why there is none; with `wait`, returns False where waiting pays."""
        room = waiting.ask()
        waiting.refused = no_room(room) or waiting.why_not()
        if wait and room.passes:
            return False
        if wait and room.hasty and time.monotonic() - waiting.began < FRESH_MS / 1000:
            waiting.refused = Refused(Reason.NO_ROOM, "only copies could go whose callers are on their way")
            return False
        if waiting.refused is None:
            waiting.take(room)
        return True


def _at_least(one: Footprint, other: Footprint) -> bool:
    return one.host_bytes >= other.host_bytes and one.device_bytes >= other.device_bytes


def no_room(room: Room) -> Refused | None:
    """The refusal that a decision means; None where there is room, or will be once the victims are gone."""
    if room.verdict is RoomVerdict.TOO_LARGE:
        return Refused(Reason.NOWHERE, room.why)
    if room.verdict is RoomVerdict.NO_ROOM:
        return Refused(Reason.NO_ROOM, room.why)
    return None
