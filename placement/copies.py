"""The number of copies that each model should have, and the loads and unloads that lead there.

Each of these calls for a number of copies, and the largest counts: the minimum of the model or its type; pinning; calls
a minute; concurrent calls; the time that calls wait in a copy's queue. While the mesh has plenty of room, regularly
used models get a second copy, so that the death of a pod causes no cold start. A model that suddenly gets many calls
gets its second copy in the next round, a few seconds later.

Copies are removed more slowly than added. A surplus copy is only unloaded if room is scarce, if the *highest* rate of
the last minutes would use the remaining copies at two thirds of their capacity or less, and if none of the model's
copies is young, so that a copy is not removed by the effect that it had itself. One of two copies is only unloaded if
room is scarce and the model has been idle for long. Copies above the maximum are unloaded immediately.

A copy in a pod that its type may no longer use does not count: another one is loaded first, and then the old one is
unloaded. It is unloaded immediately if every allowed pod is full of models used more recently, or if the load in
another pod has just failed. A model whose last copy was lost with a pod gets a new one if it was used recently; that
load evicts no models used more recently.

Each round is bounded: loads under way and new ones may only take a share of the mesh's memory, the most urgent first,
so that a change of constraints for a thousand models does not start a thousand loads at the same time. The plan is a
pure function; the caller provides rates and ages, and plans again in a few seconds.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from placement import choice, words
from placement.actions import Action, ActionKind, Plan, PlannedPods, Unmet
from placement.constraints import NONE, Constraints
from placement.footprint import Footprint
from placement.modeltypes import takes
from placement.pod import Candidate

NOTHING: Mapping[str, str] = choice.NOTHING


@dataclass(frozen=True, slots=True)
class CopyLimits:
    """The limits on copies of a model or a type; None means not set."""

    minimum: int | None = None
    maximum: int | None = None
    pinned: bool | None = None  # always has a copy, and its copies are never evicted

    def __post_init__(self) -> None:
        """Raises ValueError for a minimum below 0, a maximum below 1, or a maximum below the minimum."""
        if self.minimum is not None and self.minimum < 0:
            raise ValueError(f"the minimum of copies must be 0 or more, not {self.minimum}")
        if self.maximum is not None and self.maximum < max(1, self.minimum or 0):
            least = "1" if self.maximum < 1 else f"the minimum of {self.minimum}"
            raise ValueError(f"the maximum of copies must be {least} or more, not {self.maximum}")

    def over(self, other: "CopyLimits") -> "CopyLimits":
        """Returns these limits, with unset ones taken from `other`. If a minimum and a maximum then conflict, the one
        set here wins."""
        minimum = other.minimum if self.minimum is None else self.minimum
        maximum = other.maximum if self.maximum is None else self.maximum
        if minimum is not None and maximum is not None and minimum > maximum:
            minimum, maximum = (maximum, maximum) if self.minimum is None else (minimum, minimum)
        return CopyLimits(minimum, maximum, other.pinned if self.pinned is None else self.pinned)


UNLIMITED = CopyLimits()


@dataclass(frozen=True, slots=True)
class ReportedCopy:
    """A copy, or a load in progress, as its pod last reported it. Times are in milliseconds."""

    pod: str
    loaded: bool = True  # False: still loading
    rate: int = 0  # calls a minute, over the last seconds
    peak_rate: int = 0  # the highest such rate of the last minutes (`ScalingSettings.remember_ms`)
    in_flight: int = 0
    queue_ms: int = 0  # recent wait of calls before they run
    age_ms: int = 0  # since it was loaded


@dataclass(frozen=True, slots=True)
class ScaledModel:
    """A model that has copies, or should have some."""

    model_id: str
    footprint: Footprint
    copies: tuple[ReportedCopy, ...] = ()
    model_type: str = ""
    idle_ms: int = 0  # since its last use, in any copy
    limits: CopyLimits = UNLIMITED  # the model's own over its type's
    lost: bool = False  # it has no copy since a pod disappeared recently
    stuck: bool = False  # its last load failed: no load is planned now


@dataclass(frozen=True, slots=True)
class ScalingSettings:
    """Thresholds of scaling, with ModelMesh's values where it has them."""

    rate_per_copy: int = 2000  # calls a minute above which another copy is wanted
    in_flight_per_copy: int = 16
    queue_ms: int = 50  # wait above which another copy is wanted
    second_rate: int = 60  # calls a minute that count as regular use: a second copy, if there is plenty of room
    plenty: float = 0.10  # free share of the mesh's memory
    scarce: float = 0.05
    settle_ms: int = 10_000  # after a copy is loaded, before its effect on the queues is judged
    remember_ms: int = 5 * 60_000  # how far back peak rates reach; a copy younger than this keeps all of its model's
    # A model idle for this long, or for a tenth of the oldest copy's idle time, needs only one copy.
    second_idle_ms: int = 10 * 3_600_000
    recreate_idle_ms: int = 3_600_000  # a model lost with its pod gets a copy again if used within this time
    moving: float = 0.05  # share of the mesh's memory that may be loading for these reasons at a time
    most: int = 64  # actions in one round


DEFAULTS = ScalingSettings()


@dataclass(frozen=True, slots=True)
class Wanted:
    """The number of copies that a model should have, and why."""

    copies: int
    why: str
    spare: bool = False  # a precaution, for which nothing is evicted


@dataclass(order=True, slots=True)
class _Wish:
    """A wanted load. Wishes sort by urgency, the most urgent first."""

    urgency: int
    order: int
    model_id: str
    model: ScaledModel = field(compare=False)
    why: str = field(compare=False)
    idle_ms: int = field(compare=False)
    spare: bool = field(compare=False)


def wanted(model: ScaledModel, pods: int, free_share: float, settings: ScalingSettings = DEFAULTS) -> Wanted:
    """Returns the number of copies that a model should have, and why. `pods` is the number of pods that may hold the
    model, `free_share` the free share of their memory."""
    limits = model.limits
    reasons = [Wanted(0, "nothing asks for a copy")]
    if limits.minimum:
        reasons.append(Wanted(limits.minimum, f"at least {words.copies(limits.minimum)} by its settings"))
    if limits.pinned:
        reasons.append(Wanted(1, "it is pinned"))
    if model.lost and model.idle_ms <= settings.recreate_idle_ms:
        reasons.append(Wanted(1, f"lost with its pod, used {words.span(model.idle_ms)} ago"))
    loaded = [copy for copy in model.copies if copy.loaded]
    if loaded:
        rate = sum(copy.rate for copy in loaded)
        in_flight = sum(copy.in_flight for copy in loaded)
        queue_ms = max(copy.queue_ms for copy in loaded)
        reasons.append(Wanted(1, "it is in use"))
        reasons.append(Wanted(math.ceil(rate / settings.rate_per_copy), f"{rate} calls a minute"))
        reasons.append(Wanted(math.ceil(in_flight / settings.in_flight_per_copy), f"{in_flight} calls at once"))
        settled = len(loaded) == len(model.copies) and min(copy.age_ms for copy in loaded) >= settings.settle_ms
        if queue_ms >= settings.queue_ms:
            # One more at a time, and only once the effect of the last one shows.
            count = len(loaded) + 1 if settled else len(model.copies)
            reasons.append(Wanted(count, f"calls wait {words.span(queue_ms)} for their turn"))
        if rate >= settings.second_rate and free_share >= settings.plenty:
            reasons.append(Wanted(2, f"{rate} calls a minute, and {free_share:.0%} of the memory is free", spare=True))
    best = max(reasons, key=lambda reason: reason.copies)  # the first of equals
    if limits.maximum is not None and best.copies > limits.maximum:
        return replace(
            best, copies=limits.maximum, why=f"{best.why}; at most {words.copies(limits.maximum)} by its settings"
        )
    if best.copies > pods:
        return replace(best, copies=pods, why=f"{best.why}; {pods} pods may hold it")
    return best


def plan(
    models: Iterable[ScaledModel],
    pods: Sequence[Candidate],
    *,
    constraints: Constraints = NONE,
    settings: ScalingSettings = DEFAULTS,
    avoided: Mapping[str, str] = NOTHING,
) -> Plan:
    """Plans the loads and unloads of this round. `avoided` maps pods that get no loads to the reason
    (`failures.avoided`)."""
    models = list(models)
    room = PlannedPods(pods, constraints)
    stalest = room.oldest_idle_ms
    allowed_by: dict[str, tuple[set[str], float]] = {}  # by type: the allowed pods, and the free share of their memory
    budget = settings.moving * room.capacity_bytes
    wishes: list[_Wish] = []
    drops: list[Action] = []
    moving = 0
    for model in models:
        moving += sum(model.footprint.total_bytes for copy in model.copies if not copy.loaded)
        if model.model_type not in allowed_by:
            allowed = PlannedPods(pod for pod in pods if _allowed(pod, model.model_type, constraints))
            allowed_by[model.model_type] = {pod.name for pod in allowed}, allowed.free_share
        names, free_share = allowed_by[model.model_type]
        want = wanted(model, len(names), free_share, settings)
        standing = [copy for copy in model.copies if copy.pod in names]
        if not model.stuck:
            wishes += _wishes(model, standing, want)
        elif not standing:
            drops += _expelled(model, pods, constraints)
        drops += _drops(model, standing, want, room, scarce=free_share <= settings.scarce, stalest=stalest, by=settings)

    actions: list[Action] = []
    unmet: list[Unmet] = []
    put_off = 0
    added: dict[str, list[str]] = {}
    for wish in sorted(wishes):
        model = wish.model
        size = model.footprint.total_bytes
        if len(actions) >= settings.most or (moving and moving + size > budget):
            put_off += 1
            continue
        holders = [copy.pod for copy in model.copies] + added.get(model.model_id, [])
        full = {pod.name: "is full" for pod in room if not choice.fits(pod, model.footprint)} if wish.spare else {}
        chosen = choice.choose(
            model.model_id,
            model.footprint,
            room,
            excluded={**avoided, **full, **dict.fromkeys(holders, "holds a copy already")},
            idle_ms=wish.idle_ms,
            model_type=model.model_type,
            constraint=constraints.of(model.model_type),
            preferences=room.preferences(model.model_type),
            zones=room.zones(holders),
        )
        if chosen.pod is None:
            unmet.append(Unmet(model.model_id, f"{wish.why}, but {chosen.why}"))
            if chosen.verdict is choice.ChoiceVerdict.NO_ROOM:
                drops += _expelled(model, pods, constraints)
            continue
        room.take(chosen.pod, model.footprint)
        moving += size
        added.setdefault(model.model_id, []).append(chosen.pod)
        why = f"{wish.why}; {chosen.why}"
        actions.append(Action(ActionKind.LOAD, model.model_id, chosen.pod, why, wish.idle_ms, len(holders)))
    left = settings.most - len(actions)
    drops.sort(key=lambda action: (action.model_id, action.pod))
    return Plan((*actions, *drops[:left]), tuple(unmet), put_off + len(drops[left:]))


def _wishes(model: ScaledModel, standing: Sequence[ReportedCopy], want: Wanted) -> Iterable[_Wish]:
    """Yields the loads that the model needs. `standing` holds its copies in allowed pods."""
    minimum = max(model.limits.minimum or 0, 1 if model.limits.pinned else 0)
    misplaced = len(model.copies) - len(standing)
    hottest = -sum(copy.rate for copy in model.copies)
    for number in range(len(standing) + 1, want.copies + 1):
        if number <= minimum:
            urgency, idle_ms = 0, 0  # an operator has set it, so it may evict others
        elif not standing and misplaced:
            urgency, idle_ms = 2, model.idle_ms
        elif not standing:
            urgency, idle_ms = 1, model.idle_ms
        else:
            urgency, idle_ms = 3, model.idle_ms
        why = want.why
        if misplaced and not standing:
            why = "its type may no longer use the pod that has it"
        order = hottest if urgency == 3 else model.idle_ms
        yield _Wish(urgency, order, model.model_id, model, why, idle_ms, want.spare and number > 1)


def _drops(
    model: ScaledModel,
    standing: Sequence[ReportedCopy],
    want: Wanted,
    room: PlannedPods,
    *,
    scarce: bool,
    stalest: int,
    by: ScalingSettings,
) -> Iterable[Action]:
    """Yields the unloads of misplaced copies that have a substitute, of copies above the maximum, and, if room is
    scarce, of one copy that the model does not need."""
    loaded = [copy for copy in standing if copy.loaded]
    least = max(1, model.limits.minimum or 0)
    if len(loaded) >= least:
        names = {copy.pod for copy in standing}
        for copy in model.copies:
            if copy.pod not in names:
                why = "its type may not use that pod, and there is a copy elsewhere"
                yield Action(ActionKind.UNLOAD, model.model_id, copy.pod, why)
    maximum = model.limits.maximum
    if maximum is not None and len(loaded) > maximum:
        for copy in _least_wanted(loaded, room)[: len(loaded) - maximum]:
            why = f"{words.copies(len(loaded))}, at most {maximum} by its settings"
            yield Action(ActionKind.UNLOAD, model.model_id, copy.pod, why)
    elif scarce and len(loaded) == len(model.copies) and len(loaded) > max(least, want.copies):
        superfluous = _superfluous(model, loaded, stalest, by)
        if superfluous:
            yield Action(ActionKind.UNLOAD, model.model_id, _least_wanted(loaded, room)[0].pod, superfluous)


def _allowed(pod: Candidate, model_type: str, constraints: Constraints) -> bool:
    """Returns whether a pod may hold models of a type, by its labels and by what its server takes."""
    return constraints.allows(model_type, pod.labels) and takes(pod.types, model_type)


def _expelled(model: ScaledModel, pods: Sequence[Candidate], constraints: Constraints) -> Iterable[Action]:
    """Yields the unloads of loaded copies in pods that the type may no longer use. The caller has found that no allowed
    pod can load the model now."""
    by_name = {pod.name: pod for pod in pods}
    for copy in model.copies:
        pod = by_name.get(copy.pod)
        if copy.loaded and pod is not None and not _allowed(pod, model.model_type, constraints):
            why = "its type may not use that pod, and no other pod can load it now"
            yield Action(ActionKind.UNLOAD, model.model_id, copy.pod, why)


def _superfluous(model: ScaledModel, loaded: Sequence[ReportedCopy], stalest: int, by: ScalingSettings) -> str:
    """Returns why the model needs one copy fewer, or "" if it needs all of them."""
    if len(loaded) == 2:
        limit = min(by.second_idle_ms, stalest // 10)
        if model.idle_ms > limit:
            return f"unused for {words.span(model.idle_ms)}: one copy is enough, room is scarce"
        return ""
    if min(copy.age_ms for copy in loaded) < by.remember_ms or any(copy.queue_ms >= by.queue_ms for copy in loaded):
        return ""
    peak = sum(max(copy.rate, copy.peak_rate) for copy in loaded)
    in_flight = sum(copy.in_flight for copy in loaded)
    left = len(loaded) - 1
    if 3 * peak > 2 * left * by.rate_per_copy or 3 * in_flight > 2 * left * by.in_flight_per_copy:
        return ""
    return f"at most {peak} calls a minute recently: {words.copies(left)} can answer them, and room is scarce"


def _least_wanted(loaded: Sequence[ReportedCopy], room: PlannedPods) -> list[ReportedCopy]:
    """Sorts copies, the least useful first: those in pods that a rollout replaces, then those in zones with the most
    copies, then those that are rarely called."""
    zones = room.zones(copy.pod for copy in loaded)

    def missed(copy: ReportedCopy) -> tuple[bool, int, int, str]:
        pod = room.get(copy.pod)
        crowd = zones.count(pod.zone) if pod is not None and pod.zone else 1
        return (not (pod is not None and pod.outgoing), -crowd, copy.rate, copy.pod)

    return sorted(loaded, key=missed)
