"""The line of loads that wait for room: whom one look at it serves, who goes on waiting, and who gives way.

There are two kinds. A *newcomer* has its files and nothing else; it holds no memory while it waits, so nobody waits for
it. A load *in memory* was measured there, larger than the room that was reserved for it, and holds that room and its
turn at the model server until it gets the rest. Loads in memory come first, and may take what is only promised to loads
that have not begun (those come back into the line). Then newcomers in the order of their arrival; one for whom there is
no room lets smaller ones pass.

What somebody waits for must end by itself. Calls end, loads under way end, copies that were loaded a moment ago are
called. Only loads in memory could wait for each other, each holding what the next one needs, so what the others of them
hold does not count as what comes to rest (`placement.room.LASTING`). Where all of them are left without hope in this
way, the one that came last *gives way*: it leaves memory, and comes back into the line, at its former place, as a
newcomer of known size. The first of them never does, so each time one is served in the end. The last one alone that is
without hope is refused, for what is in its way then stays.

A newcomer for whom room would take copies whose callers are on their way waits for those for a moment.
"""

import enum
from collections.abc import Callable, Collection, Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from placement.footprint import Footprint
from placement.room import FRESH_MS, Room, RoomVerdict

K = TypeVar("K", bound=Hashable)


class Fate(enum.Enum):
    """What becomes of one that waits."""

    GOES = "goes"
    WAITS = "waits"
    GIVES_WAY = "gives way"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Waiter(Generic[K]):
    """One that waits."""

    key: K
    place: int  # in the order of arrival; one that comes back has its former place
    since_ms: int  # when this wait began, by any clock
    least: Footprint | None = None  # what it needs in any case; None: that cannot be compared with others' needs
    in_memory: bool = False


@dataclass(frozen=True, slots=True)
class Step(Generic[K]):
    """What becomes of one of them at this look, and the answer to its question for room."""

    waiter: Waiter[K]
    fate: Fate
    room: Room


def look(waiters: Collection[Waiter[K]], ask: Callable[[K], Room], *, now_ms: int) -> Iterator[Step[K]]:
    """Looks once at all that wait.

    Each step is to be carried out before the next one is taken: room that one has got is not there for another. For a
    load in memory, `ask` counts what others in memory that wait hold as `growing`. One that needs no less than another
    before it that found no room is not asked about, and has no step: with thousands of copies that is too dear."""
    hopeless: list[Step[K]] = []
    hope = False  # one of those in memory goes, or waits for what ends
    short: Footprint | None = None  # the least that there was no room for
    short_for_now: Footprint | None = None  # likewise, for those that wait for callers on their way
    for waiter in sorted(waiters, key=lambda waiter: (not waiter.in_memory, waiter.place)):
        patient = now_ms - waiter.since_ms < FRESH_MS
        if waiter.in_memory:
            step = Step(waiter, *_fate(ask(waiter.key), patient))
            if step.fate is Fate.REFUSED and step.room.verdict is RoomVerdict.NO_ROOM:
                hopeless.append(step)
                continue
            hope = hope or step.fate in (Fate.GOES, Fate.WAITS)
            yield step
            continue
        if hopeless:
            yield from _settled(hopeless, hope)
            hopeless = []
        if _no_less(waiter.least, short) or (patient and _no_less(waiter.least, short_for_now)):
            continue
        step = Step(waiter, *_fate(ask(waiter.key), patient))
        if step.fate is Fate.WAITS and step.room.verdict is RoomVerdict.NO_ROOM:
            short = _lesser(waiter.least, short)
        elif step.fate is Fate.WAITS:
            short_for_now = _lesser(waiter.least, short_for_now)
        yield step
    if hopeless:
        yield from _settled(hopeless, hope)


def _fate(room: Room, patient: bool) -> tuple[Fate, Room]:
    if room.verdict is RoomVerdict.NO_ROOM:
        return (Fate.WAITS if room.passes else Fate.REFUSED), room
    if room.verdict is RoomVerdict.TOO_LARGE:
        return Fate.REFUSED, room
    return (Fate.WAITS if room.hasty and patient else Fate.GOES), room


def _settled(hopeless: list[Step[K]], hope: bool) -> Iterator[Step[K]]:
    """Those in memory that nothing but each other's end helps, in their order."""
    *others, last = hopeless
    if not hope and not others:
        yield last
        return
    for step in others:
        yield Step(step.waiter, Fate.WAITS, step.room)
    yield Step(last.waiter, Fate.WAITS if hope else Fate.GIVES_WAY, last.room)


def _no_less(need: Footprint | None, other: Footprint | None) -> bool:
    if need is None or other is None:
        return False
    return need.host_bytes >= other.host_bytes and need.device_bytes >= other.device_bytes


def _lesser(need: Footprint | None, other: Footprint | None) -> Footprint | None:
    return need if need is not None and (other is None or _no_less(other, need)) else other
