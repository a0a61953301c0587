"""The search for room: which copies to evict for a load. It evicts nothing unless that makes enough room, and never
more than needed.

A policy defines the order of eviction (`policies`; by default least recently used first). A copy whose model has
another copy elsewhere counts as `SPARE` times as idle as it is: its loss costs capacity but no cold start, so it is
evicted before a sole copy of similar age. Yet a second copy exists because its model is busy, so a sole copy that has
been idle for long is evicted before it. An absolute preference would make the second copy of the busiest model the
first victim of every load.

Some copies are never victims, whatever the policy: copies with a call in flight, pinned ones, those loading or
unloading, and those used more recently than the newcomer. The last rule means that a load without a caller (a preload,
a registration) cannot evict copies in use, that a load with a waiting caller (`idle_ms` 0) may evict any idle copy, and
that two loads cannot evict each other in turn. A freshly loaded copy whose caller has not arrived yet is only evicted
if no other copy can be, although some policies would evict it first. A caller that can wait should wait in that case
(`RoomDecision.hasty`), and also if only busy copies are in the way (`RoomDecision.passes`).

There are two kinds of memory, host and device; room is found in both or not at all. In a pod with only one of them, the
figures of the other are 0.

The agent provides the ages from its use board and carries out the evictions. If a size was estimated too small,
`Need.free` is negative; with a need of 0 bytes, the same function then returns the evictions that make it positive
again.
"""

import enum
import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from placement import words
from placement.footprint import NOTHING, Footprint
from placement.policies import Policy, Standing
from placement.policies.base import SPARE

__all__ = [
    "CANDIDATES",
    "FRESH_MS",
    "SPARE",
    "Need",
    "ResidentCopy",
    "RoomDecision",
    "RoomVerdict",
    "make_room",
    "search",
]

CANDIDATES = 16
"""Number of copies to examine before one is chosen, if some of them may have a spare elsewhere."""

LASTING = frozenset({"pinned", "kept", "growing"})
"""Reasons to be busy (`ResidentCopy.busy_reason`) that do not end by themselves. `line` explains `growing`."""

FRESH_MS = 2_000
"""Time for which a loaded copy counts as fresh while it has not been called: its caller still waits in a router."""


@dataclass(frozen=True, slots=True)
class ResidentCopy:
    """A copy in the cache."""

    key: str
    bytes: int
    idle_ms: int  # since its last use
    in_flight: int = 0
    busy_reason: str = ""  # "loading", "unloading", "pinned": it cannot be evicted now; "": it can
    other_copies: int = 0  # of the same model, loaded elsewhere
    device_bytes: int = 0
    standing: Standing | None = None  # by the pod's policy; None: least recently used first
    fresh: bool = False  # loaded less than FRESH_MS ago and not called yet

    @property
    def size(self) -> Footprint:
        """The memory that its eviction frees."""
        return Footprint(self.bytes, self.device_bytes)


@dataclass(frozen=True, slots=True)
class Need:
    """A need for room in a cache."""

    size: Footprint
    free: Footprint  # negative if more is reserved than exists
    capacity: Footprint

    @classmethod
    def of_host(cls, need_bytes: int, free_bytes: int, capacity_bytes: int) -> "Need":
        """Creates a need for host memory alone."""
        return cls(Footprint(need_bytes), Footprint(free_bytes), Footprint(capacity_bytes))

    @property
    def short(self) -> Footprint:
        """The amount of memory that must be freed."""
        return (self.size - self.free).positive


class RoomVerdict(enum.Enum):
    """The outcome of a search."""

    FITS = "fits"
    EVICT = "evict"
    NO_ROOM = "no room"
    TOO_LARGE = "too large"


@dataclass(frozen=True, slots=True)
class RoomDecision:
    """The result of a search. `victims` is empty unless the verdict is EVICT."""

    verdict: RoomVerdict
    victims: tuple[str, ...]
    why: str
    freed: Footprint = NOTHING
    passes: bool = False  # NO_ROOM only: there will be room once busy copies are idle
    hasty: bool = False  # EVICT only: a victim's caller has not arrived yet; there may soon be better victims


def make_room(need: Need, held: Iterable[ResidentCopy], *, idle_ms: int = 0) -> RoomDecision:
    """Finds room. `idle_ms` is the time since the newcomer's last use, 0 if a caller waits.

    `held` is not read if the need fits into free memory, so it may be an expensive generator.
    """
    if (decided := _without_looking(need)) is not None:
        return decided
    short = need.short

    # A heap rather than a sort: usually one or two of thousands of copies are taken.
    evictable: list[tuple[bool, Standing, bool, int, str, ResidentCopy]] = []
    busy = recent = 0  # bytes of host memory that must not be evicted
    soon_host = soon_device = 0  # bytes that may be evicted in a moment
    for copy in held:
        if copy.in_flight or copy.busy_reason:
            busy += copy.bytes
            if copy.busy_reason not in LASTING and copy.idle_ms >= idle_ms:
                soon_host += copy.bytes
                soon_device += copy.device_bytes
        elif copy.idle_ms < idle_ms:
            recent += copy.bytes
        elif (short.host_bytes and copy.bytes > 0) or (short.device_bytes and copy.device_bytes > 0):
            spare = copy.other_copies > 0
            standing = copy.standing or (1, -copy.idle_ms * (SPARE if spare else 1))
            evictable.append((copy.fresh, standing, not spare, -copy.idle_ms, copy.key, copy))
    heapq.heapify(evictable)

    taken: list[ResidentCopy] = []
    freed = NOTHING
    while not short.within(freed) and evictable:
        copy = heapq.heappop(evictable)[-1]
        left = (short - freed).positive
        if (copy.bytes if left.host_bytes else 0) or (copy.device_bytes if left.device_bytes else 0):
            taken.append(copy)
            freed += copy.size
    if not short.within(freed):
        soon = freed + Footprint(soon_host, soon_device)
        return replace(_refusal(short, freed, busy, recent), passes=short.within(soon))

    # A large copy may have made smaller ones before it superfluous: those are kept, the most valuable first.
    victims: list[ResidentCopy] = []
    for copy in reversed(taken):
        if short.within(freed - copy.size):
            freed -= copy.size
        else:
            victims.append(copy)
    victims.reverse()
    why = f"evicts {words.copies(len(victims))}, the last used {words.span(min(v.idle_ms for v in victims))} ago"
    hasty = any(copy.fresh for copy in victims)
    return RoomDecision(RoomVerdict.EVICT, tuple(copy.key for copy in victims), why, freed, hasty=hasty)


def search(
    need: Need,
    policy: Policy[str],
    look: Callable[[str], ResidentCopy],
    *,
    idle_ms: int = 0,
    spares: Mapping[str, int] | None = None,
    busy: Iterable[ResidentCopy] = (),
    on_looked: Callable[[Sequence[ResidentCopy]], None] | None = None,
) -> RoomDecision:
    """Runs `make_room` over copies in the policy's order of eviction, and examines only as many as needed.

    `look` returns a copy's current state, with its `standing` by the same policy. `spares` counts copies elsewhere; if
    there are any, at least `CANDIDATES` copies are examined, so that a spare can be evicted first. `busy` are copies
    that the policy does not know because they are still loading. `on_looked` is called with the examined copies."""
    short = need.short
    looked: list[ResidentCopy] = []
    if short.total_bytes:
        least = CANDIDATES if spares else 1
        found = found_device = 0

        def enough(key: str) -> bool:
            nonlocal found, found_device
            copy = look(key)
            looked.append(copy)
            if not (copy.in_flight or copy.busy_reason or copy.fresh) and copy.idle_ms >= idle_ms:
                found += copy.bytes
                found_device += copy.device_bytes
            return found >= short.host_bytes and found_device >= short.device_bytes and len(looked) >= least

        if need.size.within(need.capacity):
            policy.walk(enough)
            looked.extend(busy)
    if on_looked is not None:
        on_looked(looked)
    return make_room(need, looked, idle_ms=idle_ms)


def _without_looking(need: Need) -> RoomDecision | None:
    """Returns the decision if it does not depend on the copies, or None if it does."""
    size, capacity = need.size, need.capacity
    if size.host_bytes > capacity.host_bytes:
        why = f"needs {words.size(size.host_bytes)}, the capacity is {words.size(capacity.host_bytes)}"
        return RoomDecision(RoomVerdict.TOO_LARGE, (), why)
    if size.device_bytes > capacity.device_bytes:
        why = f"needs device memory {words.size(size.device_bytes)}"
        why += f", the device memory capacity is {words.size(capacity.device_bytes)}"
        return RoomDecision(RoomVerdict.TOO_LARGE, (), why)
    if size.within(need.free):
        return RoomDecision(RoomVerdict.FITS, (), f"{words.size(need.free.host_bytes)} are free")
    return None


def _refusal(short: Footprint, freed: Footprint, busy: int, recent: int) -> RoomDecision:
    if freed.host_bytes < short.host_bytes:
        why = f"needs {words.size(short.host_bytes)} more than is free, {words.size(freed.host_bytes)} can be evicted"
    else:
        why = f"needs {words.size(short.device_bytes)} more device memory than is free"
        why += f", {words.size(freed.device_bytes)} of it can be evicted"
    kept = [f"{words.size(busy)} are busy"] if busy else []
    kept += [f"{words.size(recent)} were used more recently"] if recent else []
    return RoomDecision(RoomVerdict.NO_ROOM, (), f"{why}; {', '.join(kept)}" if kept else why)
