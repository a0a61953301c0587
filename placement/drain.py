"""The order in which a draining pod hands over its copies. Each copy is loaded elsewhere first and unloaded afterwards,
so that no call waits.

The most recently used copies come first, because there may not be time for all. A copy whose model is loaded elsewhere
is unloaded as soon as all routers know of the other copy. A copy that has not been used for long is unloaded at the
end, without a replacement. A copy that no other pod could take without evicting models used more recently gets no
action (`Plan.unmet`); the caller unloads it once nothing else is left to do.

The caller plans repeatedly until the drain is over; loads under way are not planned twice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from placement import choice, words
from placement.actions import Action, ActionKind, Plan, PlannedPods, Unmet
from placement.constraints import NONE, Constraints
from placement.footprint import Footprint
from placement.pod import Candidate

RECENT_MS = 3_600_000
"""A model used within this time is loaded elsewhere before it is unloaded; ModelMesh's figure."""

WIDTH = 16
"""Concurrent loads elsewhere."""


@dataclass(frozen=True, slots=True)
class DrainingCopy:
    """A copy in the draining pod, and the other pods that have the model."""

    model_id: str
    footprint: Footprint
    idle_ms: int
    model_type: str = ""
    loaded_in: tuple[str, ...] = ()  # other pods
    loading_in: tuple[str, ...] = ()
    settled: bool = True  # False while some router may not know yet that another pod has loaded the model


def plan(
    leaving: str,
    held: Sequence[DrainingCopy],
    pods: Sequence[Candidate],
    *,
    constraints: Constraints = NONE,
    avoided: Mapping[str, str] = choice.NOTHING,
    width: int = WIDTH,
) -> Plan:
    """Plans the next step. The drain is over when the plan has no action, no load elsewhere is under way, and all
    copies elsewhere are settled. Models that are then still unmet find no room in any other pod."""
    room = PlannedPods(pods, constraints)
    under_way = sum(1 for copy in held if copy.loading_in and not copy.loaded_in)
    loads: list[Action] = []
    unloads: list[Action] = []
    stale: list[Action] = []
    unmet: list[Unmet] = []
    put_off = settling = 0
    for copy in sorted(held, key=lambda copy: (copy.idle_ms, copy.model_id)):
        if copy.loaded_in:
            if not copy.settled:
                settling += 1
                continue
            why = f"the pod leaves, and {copy.loaded_in[0]} has a copy"
            unloads.append(Action(ActionKind.UNLOAD, copy.model_id, leaving, why))
        elif copy.loading_in:
            continue
        elif copy.idle_ms > RECENT_MS:
            why = f"the pod leaves, and it has not been used for {words.span(copy.idle_ms)}"
            stale.append(Action(ActionKind.UNLOAD, copy.model_id, leaving, why))
        elif under_way + len(loads) >= width:
            put_off += 1
        else:
            chosen = choice.choose(
                copy.model_id,
                copy.footprint,
                room,
                excluded={**avoided, leaving: "is leaving"},
                idle_ms=copy.idle_ms,
                model_type=copy.model_type,
                constraint=constraints.of(copy.model_type),
                preferences=room.preferences(copy.model_type),
            )
            if chosen.pod is None:
                unmet.append(Unmet(copy.model_id, chosen.why))
                continue
            room.take(chosen.pod, copy.footprint)
            why = f"{leaving} leaves: {chosen.why}"
            loads.append(Action(ActionKind.LOAD, copy.model_id, chosen.pod, why, copy.idle_ms, 1))
    # Idle copies stay callable until all others have moved.
    if not (loads or put_off or under_way or settling):
        unloads += stale
    else:
        put_off += len(stale)
    return Plan((*unloads, *loads), tuple(unmet), put_off)
