"""The line of loads that wait for room: which of them get room, keep waiting, or yield.

There are two kinds. A *newcomer* has only its files; it holds no memory while it waits, so no load waits for it. A load
*in memory* has proved larger than its reservation, and holds that memory and its turn at the model server until it gets
the rest. Loads in memory come first, and may take reservations of loads that have not begun (those return to the line).
Then come newcomers in the order of arrival. If there is no room for a newcomer, smaller ones may overtake it.

Every wait must end by itself. Calls end, loads under way end, and copies that were just loaded get their calls. Only
loads in memory could wait for each other forever, each holding what the next one needs. Therefore a load in memory does
not wait for what other such loads hold: that memory does not count as temporarily busy (`placement.room.LASTING`). If
all of them are stuck in this way, the last one to arrive *yields*: it leaves memory and returns to its former place in
the line, as a newcomer of known size. The first one never yields, so it is always served in the end. A single stuck
load is refused, because what is in its way will stay.

If room for a newcomer would require the eviction of fresh copies whose callers are still on their way, the newcomer
waits a moment for those callers.
"""

import enum
from collections.abc import Callable, Collection, Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from placement.footprint import Footprint
from placement.room import FRESH_MS, RoomDecision, RoomVerdict

K = TypeVar("K", bound=Hashable)


class Fate(enum.Enum):
    """The outcome for a waiting load."""

    GOES = "goes"
    WAITS = "waits"
    GIVES_WAY = "gives way"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class WaitingLoad(Generic[K]):
    """A load in the line."""

    key: K
    place: int  # in the order of arrival; kept by a load that returns
    since_ms: int  # when this wait began, by any clock
    least: Footprint | None = None  # what it needs in any case; None: not comparable with others' needs
    in_memory: bool = False


@dataclass(frozen=True, slots=True)
class Step(Generic[K]):
    """The outcome for one load, with the answer to its question for room."""

    waiter: WaitingLoad[K]
    fate: Fate
    room: RoomDecision


def look(waiters: Collection[WaitingLoad[K]], ask: Callable[[K], RoomDecision], *, now_ms: int) -> Iterator[Step[K]]:
    """Looks at all waiting loads once, and yields a step for each.

    Carry out each step before taking the next one, because room is given only once. For a load in memory, `ask` counts
    memory held by other waiting loads in memory as `growing`. A newcomer gets no step if it needs at least as much as
    an earlier one that found no room: with thousands of copies, the question is too expensive.
    """
    hopeless: list[Step[K]] = []
    hope = False  # a load in memory proceeds, or waits for something that ends
    short: Footprint | None = None  # the least need without room
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


def _fate(room: RoomDecision, patient: bool) -> tuple[Fate, RoomDecision]:
    if room.verdict is RoomVerdict.NO_ROOM:
        return (Fate.WAITS if room.passes else Fate.REFUSED), room
    if room.verdict is RoomVerdict.TOO_LARGE:
        return Fate.REFUSED, room
    return (Fate.WAITS if room.hasty and patient else Fate.GOES), room


def _settled(hopeless: list[Step[K]], hope: bool) -> Iterator[Step[K]]:
    """Yields the steps of the loads in memory that cannot get room, in their order. All of them wait if there is `hope`
    that another load makes room. Otherwise the last of several gives way, and a single one is refused."""
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
