"""Which copies make way for a load: all that is needed or nothing, and nothing that need not go.

Least recently used goes first. A copy whose model has another copy elsewhere counts as `SPARE` times as idle as it is:
losing it costs no cold start, only capacity, so it goes before a sole copy of similar age; but a second copy was made
because its model is busy, so it does not go before a sole copy that nobody has wanted for long. An absolute preference
would make the second copy of the busiest model the first victim of every load.

Never a victim: a copy with a call in flight, a copy that is loading or unloading, a copy used more recently than the
newcomer. The last means that what is loaded for nobody in particular (a preload, a registration) cannot push out what
is in use, while a load that a caller waits for (`idle_ms` 0) may push out anything at rest.

The agent brings the ages from its use board and carries the evictions out. With a negative `free_bytes` (a size was
predicted too small) and nothing needed, the same function says what repairs it.
"""

import enum
import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from placement import words

SPARE = 4
"""How much older a copy counts that has another one elsewhere."""


@dataclass(frozen=True, slots=True)
class Held:
    """A copy in the cache."""

    key: str
    bytes: int
    idle_ms: int  # since its last use
    in_flight: int = 0
    busy_reason: str = ""  # "loading", "unloading", "pinned": it cannot go now; "": it can
    other_copies: int = 0  # of the same model, loaded elsewhere


class RoomVerdict(enum.Enum):
    """How the search ended."""

    FITS = "fits"
    EVICT = "evict"
    NO_ROOM = "no room"
    TOO_LARGE = "too large"


@dataclass(frozen=True, slots=True)
class Room:
    """The decision. `victims` is empty unless the verdict is EVICT."""

    verdict: RoomVerdict
    victims: tuple[str, ...]
    freed_bytes: int
    why: str


def make_room(need_bytes: int, free_bytes: int, capacity_bytes: int, held: Iterable[Held], *, idle_ms: int = 0) -> Room:
    """Finds room for `need_bytes`. `idle_ms` is the time since the newcomer's last use, 0 where a caller waits.

    `held` is not read where the need fits into `free_bytes`, so it may be a generator that is costly to run.
    """
    if need_bytes > capacity_bytes:
        why = f"needs {words.size(need_bytes)}, the capacity is {words.size(capacity_bytes)}"
        return Room(RoomVerdict.TOO_LARGE, (), 0, why)
    if need_bytes <= free_bytes:
        return Room(RoomVerdict.FITS, (), 0, f"{words.size(free_bytes)} are free")
    short = need_bytes - free_bytes

    # A heap, not a sort: of thousands of copies, mostly one or two are taken.
    evictable: list[tuple[int, bool, str, Held]] = []
    busy = recent = 0  # bytes that may not go
    for copy in held:
        if copy.in_flight or copy.busy_reason:
            busy += copy.bytes
        elif copy.idle_ms < idle_ms:
            recent += copy.bytes
        elif copy.bytes > 0:
            spare = copy.other_copies > 0
            evictable.append((-copy.idle_ms * (SPARE if spare else 1), not spare, copy.key, copy))
    heapq.heapify(evictable)

    taken: list[Held] = []
    freed = 0
    while freed < short and evictable:
        copy = heapq.heappop(evictable)[-1]
        taken.append(copy)
        freed += copy.bytes
    if freed < short:
        why = f"needs {words.size(short)} more than is free, {words.size(freed)} can be evicted"
        kept = [f"{words.size(busy)} are busy"] if busy else []
        kept += [f"{words.size(recent)} were used more recently"] if recent else []
        return Room(RoomVerdict.NO_ROOM, (), 0, f"{why}; {', '.join(kept)}" if kept else why)

    # A large copy may have made the smaller ones before it superfluous: those stay, the most valuable first.
    victims: list[Held] = []
    for copy in reversed(taken):
        if freed - copy.bytes >= short:
            freed -= copy.bytes
        else:
            victims.append(copy)
    victims.reverse()
    why = f"evicts {words.copies(len(victims))}, the last used {words.span(min(v.idle_ms for v in victims))} ago"
    return Room(RoomVerdict.EVICT, tuple(copy.key for copy in victims), freed, why)
