"""Preloading: models are loaded into free space before anyone calls them, the most recently used first.

A restarted mesh warms up in this way, and a new pod gets its models. Preloads evict nothing: they carry the idle time
of their models, and only pods with free space are asked. They leave an eighth of each pod free, so that a first call
finds room without an eviction. Their number is limited for each pod, so that callers do not queue behind them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from placement import choice, words
from placement.actions import Action, ActionKind, Plan, PlannedPods
from placement.constraints import NONE, Constraints
from placement.footprint import Footprint
from placement.pod import Candidate

RESERVE = 8
"""One part in this many of a pod's memory stays free."""

AHEAD = 8
"""Number of loads in progress, for each loading thread of a pod, at which the pod gets no more preloads. Loads for
callers overtake preloads in the pod's queue."""

TRIES = 1000
"""Models considered in one round, whether they fit or not."""


@dataclass(frozen=True, slots=True)
class Idle:
    """A registered model without a copy or a load in progress."""

    model_id: str
    footprint: Footprint
    idle_ms: int  # since its last use
    model_type: str = ""


def plan(
    models: Iterable[Idle],
    pods: Sequence[Candidate],
    *,
    constraints: Constraints = NONE,
    avoided: Mapping[str, str] = choice.NOTHING,
    most: int = 64,
) -> Plan:
    """Plans at most `most` loads of idle models, the most recently used first. `avoided` maps pods that get no loads to
    the reason."""
    room = PlannedPods(pods, constraints)
    actions: list[Action] = []
    for number, model in enumerate(sorted(models, key=lambda model: (model.idle_ms, model.model_id))):
        if len(actions) >= most or number >= TRIES:
            break
        excluded = dict(avoided)
        for pod in room:
            if (why := _why_not(pod, model.footprint)) is not None:
                excluded.setdefault(pod.name, why)
        if len(excluded) >= len(pods) and not any(_has_turns(pod) for pod in room):
            break  # no pod takes another one now
        chosen = choice.choose(
            model.model_id,
            model.footprint,
            room,
            excluded=excluded,
            idle_ms=model.idle_ms,
            model_type=model.model_type,
            constraint=constraints.of(model.model_type),
            preferences=room.preferences(model.model_type),
        )
        if chosen.pod is not None:
            room.take(chosen.pod, model.footprint)
            why = f"used {words.span(model.idle_ms)} ago, and there is free space: {chosen.why}"
            actions.append(Action(ActionKind.LOAD, model.model_id, chosen.pod, why, max(1, model.idle_ms)))
    return Plan(tuple(actions))


def has_space(pod: Candidate) -> bool:
    """Returns whether a pod can take a preload of the smallest model."""
    return _why_not(pod, Footprint(1, 1)) is None


def _has_turns(pod: Candidate) -> bool:
    return pod.loads_in_progress < AHEAD * max(1, pod.loading_threads)


def _why_not(pod: Candidate, footprint: Footprint) -> str | None:
    if not _has_turns(pod):
        return f"has {pod.loads_in_progress} loads in progress"
    need = footprint.on(device=pod.has_device)
    if need.host_bytes > pod.capacity_bytes - pod.used_bytes - pod.capacity_bytes // RESERVE:
        return (
            f"has {words.size(pod.free_bytes)} free, of which {words.size(pod.capacity_bytes // RESERVE)} are kept free"
        )
    if need.device_bytes > pod.device_capacity_bytes - pod.device_used_bytes - pod.device_capacity_bytes // RESERVE:
        return f"has {words.size(pod.device_free_bytes)} of device memory free; an eighth of the whole is kept free"
    return None
