"""In which order a pod that leaves hands its copies over: loaded elsewhere first, let go afterwards, so that nobody
waits.

The most recently used go first, as there may not be time for all. A copy that has a loaded one elsewhere is let go at
once. One that nobody has used for long is let go without a replacement, at the end. What has no room elsewhere (it
would have to push out what was used more recently) stays until the pod goes.

The caller asks again whenever a load elsewhere has ended; what is loading already is not asked for twice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from placement import choice, words
from placement.actions import Action, Kind, Plan, Room, Unmet
from placement.constraints import NONE, Constraints
from placement.footprint import Footprint
from placement.pod import Pod

RECENT_MS = 3_600_000
"""Used within this, a model is loaded elsewhere before it is let go; the predecessor's figure."""

WIDTH = 16
"""Loads elsewhere at once."""


@dataclass(frozen=True, slots=True)
class Held:
    """A copy in the pod that leaves, and those elsewhere."""

    model_id: str
    footprint: Footprint
    idle_ms: int
    model_type: str = ""
    loaded_in: tuple[str, ...] = ()  # other pods
    loading_in: tuple[str, ...] = ()


def plan(
    leaving: str,
    held: Sequence[Held],
    pods: Sequence[Pod],
    *,
    constraints: Constraints = NONE,
    avoided: Mapping[str, str] = choice.NOTHING,
    width: int = WIDTH,
) -> Plan:
    """What to do now. It is over when there is neither an action nor anything loading elsewhere: what is unmet then
    finds no room anywhere."""
    room = Room(pods, constraints)
    under_way = sum(1 for copy in held if copy.loading_in and not copy.loaded_in)
    loads: list[Action] = []
    unloads: list[Action] = []
    stale: list[Action] = []
    unmet: list[Unmet] = []
    put_off = 0
    for copy in sorted(held, key=lambda copy: (copy.idle_ms, copy.model_id)):
        if copy.loaded_in:
            why = f"the pod leaves, and {copy.loaded_in[0]} has a copy"
            unloads.append(Action(Kind.UNLOAD, copy.model_id, leaving, why))
        elif copy.loading_in:
            continue
        elif copy.idle_ms > RECENT_MS:
            why = f"the pod leaves, and nobody has used it for {words.span(copy.idle_ms)}"
            stale.append(Action(Kind.UNLOAD, copy.model_id, leaving, why))
        elif under_way + len(loads) >= width:
            put_off += 1
        else:
            chosen = choice.choose(
                copy.model_id,
                copy.footprint,
                room,
                excluded={**avoided, leaving: "is leaving"},
                idle_ms=copy.idle_ms,
                constraint=constraints.of(copy.model_type),
                preferences=room.preferences(copy.model_type),
            )
            if chosen.pod is None:
                unmet.append(Unmet(copy.model_id, chosen.why))
                continue
            room.take(chosen.pod, copy.footprint)
            why = f"{leaving} leaves: {chosen.why}"
            loads.append(Action(Kind.LOAD, copy.model_id, chosen.pod, why, copy.idle_ms, 1))
    # Stale ones keep their callers' chance until everything else has moved.
    if not loads and not put_off and not under_way:
        unloads += stale
    else:
        put_off += len(stale)
    return Plan((*unloads, *loads), tuple(unmet), put_off)
