"""The search for room: which copies to evict for a load. All that is needed or none, and none without need.

The order of eviction is up to a policy (`policies`; by default least recently used first). A copy whose model has
another copy elsewhere counts as `SPARE` times as idle as it is: its loss costs capacity but no cold start, so it goes
before a sole copy of similar age. Yet a second copy exists because its model is busy, so it does not go before a sole
copy that has been idle for long. An absolute preference would make the second copy of the busiest model the first
victim of every load.

Some copies are never victims, whatever the policy: those with a call in flight, pinned ones, those loading or
unloading, and those used more recently than the newcomer. By the last rule a load without a caller (a preload, a
registration) cannot evict what is in use, a load with a waiting caller (`idle_ms` 0) may evict any idle copy, and two
loads cannot evict each other in turn. A freshly loaded copy whose caller has not come yet goes only if nothing else
can, although some policies would evict it first. A caller that can wait should do so in that case (`Room.hasty`), and
if only busy copies are in the way (`Room.passes`).

There are two kinds of memory, host and device; room is found in both or not at all. In a pod with one of them, the
figures of the other are 0.

The agent provides the ages from its use board and carries out the evictions. With a negative `free_bytes` (a size was
estimated too small) and no need, the same function returns the evictions that repair it.
"""

import enum
import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from placement import words
from placement.policies import Policy, Standing
from placement.policies.base import SPARE

__all__ = ["CANDIDATES", "FRESH_MS", "SPARE", "Held", "Room", "RoomVerdict", "make_room", "search"]

CANDIDATES = 16
"""Copies to examine before one is taken, if some may have a spare elsewhere."""

LASTING = frozenset({"pinned", "kept", "growing"})
"""Reasons to be busy (`Held.busy_reason`) that do not end by themselves; for `growing` see `line`."""

FRESH_MS = 2_000
"""Time for which a loaded copy counts as fresh if it was not called yet: its caller waits in a router."""


@dataclass(frozen=True, slots=True)
class Held:
    """A copy in the cache."""

    key: str
    bytes: int
    idle_ms: int  # since its last use
    in_flight: int = 0
    busy_reason: str = ""  # "loading", "unloading", "pinned": it cannot go now; "": it can
    other_copies: int = 0  # of the same model, loaded elsewhere
    device_bytes: int = 0
    standing: Standing | None = None  # by the pod's policy; None: least recently used first
    fresh: bool = False  # loaded less than FRESH_MS ago and not called yet


class RoomVerdict(enum.Enum):
    """The outcome of a search."""

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
    freed_device_bytes: int = 0
    passes: bool = False  # NO_ROOM only: there will be room once busy copies are idle
    hasty: bool = False  # EVICT only: a victim's caller has not come yet; a better victim is near


def make_room(
    need_bytes: int,
    free_bytes: int,
    capacity_bytes: int,
    held: Iterable[Held],
    *,
    idle_ms: int = 0,
    need_device_bytes: int = 0,
    free_device_bytes: int = 0,
    capacity_device_bytes: int = 0,
) -> Room:
    """Finds room for `need_bytes`. `idle_ms` is the time since the newcomer's last use, 0 where a caller waits.

    `held` is not read if the need fits into free space, so it may be a costly generator.
    """
    host = _without_looking(need_bytes, free_bytes, capacity_bytes, "")
    device = _without_looking(need_device_bytes, free_device_bytes, capacity_device_bytes, "device memory ")
    for decided in (host, device):
        if decided is not None and decided.verdict is RoomVerdict.TOO_LARGE:
            return decided
    if host is not None and device is not None:
        return host
    short = max(0, need_bytes - free_bytes)
    short_device = max(0, need_device_bytes - free_device_bytes)

    # A heap, not a sort: usually one or two of thousands of copies are taken.
    evictable: list[tuple[bool, Standing, bool, int, str, Held]] = []
    busy = recent = 0  # bytes that may not go
    soon = soon_device = 0  # bytes of copies that may go shortly
    for copy in held:
        if copy.in_flight or copy.busy_reason:
            busy += copy.bytes
            if copy.busy_reason not in LASTING and copy.idle_ms >= idle_ms:
                soon += copy.bytes
                soon_device += copy.device_bytes
        elif copy.idle_ms < idle_ms:
            recent += copy.bytes
        elif (short and copy.bytes > 0) or (short_device and copy.device_bytes > 0):
            spare = copy.other_copies > 0
            standing = copy.standing or (1, -copy.idle_ms * (SPARE if spare else 1))
            evictable.append((copy.fresh, standing, not spare, -copy.idle_ms, copy.key, copy))
    heapq.heapify(evictable)

    taken: list[Held] = []
    freed = freed_device = 0
    while (freed < short or freed_device < short_device) and evictable:
        copy = heapq.heappop(evictable)[-1]
        if (copy.bytes if freed < short else 0) or (copy.device_bytes if freed_device < short_device else 0):
            taken.append(copy)
            freed += copy.bytes
            freed_device += copy.device_bytes
    if freed < short or freed_device < short_device:
        refusal = _refusal(short, short_device, freed, freed_device, busy, recent)
        passes = freed + soon >= short and freed_device + soon_device >= short_device
        return replace(refusal, passes=passes)

    # A large victim may have made smaller ones before it superfluous: those stay, the most valuable first.
    victims: list[Held] = []
    for copy in reversed(taken):
        if freed - copy.bytes >= short and freed_device - copy.device_bytes >= short_device:
            freed -= copy.bytes
            freed_device -= copy.device_bytes
        else:
            victims.append(copy)
    victims.reverse()
    why = f"evicts {words.copies(len(victims))}, the last used {words.span(min(v.idle_ms for v in victims))} ago"
    hasty = any(copy.fresh for copy in victims)
    return Room(RoomVerdict.EVICT, tuple(copy.key for copy in victims), freed, why, freed_device, hasty=hasty)


def search(
    need_bytes: int,
    free_bytes: int,
    capacity_bytes: int,
    policy: Policy[str],
    look: Callable[[str], Held],
    *,
    idle_ms: int = 0,
    spares: Mapping[str, int] | None = None,
    busy: Iterable[Held] = (),
    on_looked: Callable[[Sequence[Held]], None] | None = None,
    need_device_bytes: int = 0,
    free_device_bytes: int = 0,
    capacity_device_bytes: int = 0,
) -> Room:
    """Runs `make_room` over the copies of a policy, and examines only as many as it takes.

    `look` returns a copy's current state, with its `standing` by the same policy. `spares` counts copies elsewhere;
    with any, a few more copies are examined than are needed, so that a spare can go first. `busy` are copies that the
    policy does not know because they are still loading. `on_looked` is called with the copies that were examined."""
    short = need_bytes - free_bytes
    short_device = need_device_bytes - free_device_bytes
    looked: list[Held] = []
    if short > 0 or short_device > 0:
        least = CANDIDATES if spares else 1
        found = found_device = 0

        def enough(key: str) -> bool:
            nonlocal found, found_device
            copy = look(key)
            looked.append(copy)
            if not (copy.in_flight or copy.busy_reason or copy.fresh) and copy.idle_ms >= idle_ms:
                found += copy.bytes
                found_device += copy.device_bytes
            return found >= short and found_device >= short_device and len(looked) >= least

        if need_bytes <= capacity_bytes and need_device_bytes <= capacity_device_bytes:
            policy.walk(enough)
            looked.extend(busy)
    if on_looked is not None:
        on_looked(looked)
    return make_room(
        need_bytes,
        free_bytes,
        capacity_bytes,
        looked,
        idle_ms=idle_ms,
        need_device_bytes=need_device_bytes,
        free_device_bytes=free_device_bytes,
        capacity_device_bytes=capacity_device_bytes,
    )


def _without_looking(need: int, free: int, capacity: int, kind: str) -> Room | None:
    """Decides where the copies do not matter; None where they do."""
    if need > capacity:
        why = f"needs {kind}{words.size(need)}, the {kind}capacity is {words.size(capacity)}"
        return Room(RoomVerdict.TOO_LARGE, (), 0, why)
    if need <= free:
        return Room(RoomVerdict.FITS, (), 0, f"{words.size(free)} are free")
    return None


def _refusal(short: int, short_device: int, freed: int, freed_device: int, busy: int, recent: int) -> Room:
    if freed < short:
        why = f"needs {words.size(short)} more than is free, {words.size(freed)} can be evicted"
    else:
        why = f"needs {words.size(short_device)} more device memory than is free, {words.size(freed_device)} of it"
        why += " can be evicted"
    kept = [f"{words.size(busy)} are busy"] if busy else []
    kept += [f"{words.size(recent)} were used more recently"] if recent else []
    return Room(RoomVerdict.NO_ROOM, (), 0, f"{why}; {', '.join(kept)}" if kept else why)
