"""The choice of a pod to load a model, in three steps: filter, rank coarsely, draw.

Views of pods lag by seconds. If every router picked "the best pod" by exact figures, all of them would pick the same
pod until it publishes new figures. That is why there are three steps:

1. **Filter**: each pod that may not take the model is refused, with the cause: too small, without a label that the
   model's type requires, for other types only, excluded, accepting no loads, or full of copies used more recently.
2. **Rank** the other pods in coarse buckets, by these criteria in this order. Pods that a rollout is about to replace
   come last. Pods in zones with fewer copies of the model come first. Pods with free space come before those that must
   evict. Then comes the type's preference; among full pods it counts only if the preferred pod's oldest copy has been
   idle for about as long as the others'. If an eviction is needed, pods whose oldest copy has been idle longer come
   first, in powers of two (so the pods' caches work as one: the pod with the oldest copies gets the next load). Then
   fewer loads queued for each loading thread, then fewer calls a minute. Ages and rates are compared with the best
   candidate's, not with fixed marks: two pods at 63 and 65 s are equal. Last, among otherwise equal pods, those that
   have the files on disk come first.
3. **Draw** within the best bucket by rendezvous hash, weighted by free space (by capacity if all are full).

ModelMesh also refuses a load if the oldest copy is younger than a "churn age". Mesh does not: a waiting caller is
served even if the cache turns over quickly; a refusal would make the model unavailable for as long as traffic lasts.

The caller brings the figures up to date (`debits`), carries out the choice, and asks again with failed pods in
`excluded`.
"""

import enum
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

from placement import rendezvous, words
from placement.constraints import ANYWHERE, Constraint
from placement.footprint import Footprint
from placement.modeltypes import ANY, takes
from placement.pod import Candidate

QUIET_RATE = 600
"""Calls a minute below which pods count as equally idle: even 10 calls a second do not load a pod noticeably."""

PREFERRED_MS = 120_000
"""A full pod is preferred for the model's type only if its oldest copy has been idle for nearly as long as the longest
idle copy of all full pods: for at most so many milliseconds less, or a quarter of the longest idle time if that is
more. ModelMesh's figures."""

NOTHING: Mapping[str, str] = MappingProxyType({})


class ChoiceVerdict(enum.Enum):
    """The outcome of a choice."""

    CHOSEN = "chosen"
    NO_PODS = "no pods"
    """There are no pods, or each pod that could hold the model is excluded or accepts no loads. A retry may succeed."""
    NOWHERE = "nowhere"
    """Every pod is too small for the model, or must not take its type: waiting does not help."""
    NO_ROOM = "no room"
    """No pod takes the model, and at least one only because it is full of copies used more recently than the model."""


class IneligibilityCause(enum.Enum):
    """The reason why a pod was ruled out."""

    TOO_SMALL = "too small"
    NOT_ALLOWED = "not allowed"
    EXCLUDED = "excluded"
    NOT_ACCEPTING = "not accepting"
    MORE_RECENT = "more recent"


@dataclass(frozen=True, slots=True)
class Ineligible:
    """A pod that may not take the model."""

    pod: str
    cause: IneligibilityCause
    why: str  # follows the pod's name in a sentence: "has a capacity of 64 MiB, and the model needs 80 MiB"


@dataclass(frozen=True, slots=True)
class Ranked:
    """A candidate and the figures that it was ranked by. Lower buckets are better; within a bucket, higher scores."""

    pod: str
    evicts: bool
    age_bucket: int  # halvings of the longest idle time among the full candidates; 0 if nothing is evicted
    queue_bucket: int  # doublings of the loads queued for each loading thread
    rate_bucket: int  # doublings of the lowest rate among the candidates
    score: float
    free_bytes: int  # of the memory that weights are kept in
    oldest_idle_ms: int
    loads_in_progress: int
    loading_threads: int
    rate: int
    outgoing: bool = False
    zone_copies: int = 0  # copies that are in its zone already
    preferred: bool = False
    passed_over: bool = False  # another one is preferred, and this one is not, or is too young for that to count
    on_disk: bool = False

    @property
    def bucket(self) -> "_Bucket":
        """The figures that are compared before the draw."""
        return (
            self.outgoing,
            self.zone_copies,
            self.evicts,
            self.passed_over,
            self.age_bucket,
            self.queue_bucket,
            self.rate_bucket,
            not self.on_disk,
        )

    @property
    def why(self) -> str:
        """The figures in words, as the rest of a sentence that begins with the pod's name."""
        if not self.evicts:
            room = f"has {words.size(self.free_bytes)} free"
        elif self.oldest_idle_ms:
            room = f"is full, its oldest copy idle for {words.span(self.oldest_idle_ms)}"
        else:
            room = "is full of copies in use"
        text = f"{room}, {self.loads_in_progress} loads on {self.loading_threads} threads, {self.rate} calls a minute"
        for holds, remark in (
            (self.preferred, "preferred by the model's type"),
            (self.on_disk, "has the files on disk"),
            (self.zone_copies > 0, f"{words.copies(self.zone_copies)} in its zone"),
            (self.outgoing, "being replaced by a rollout"),
        ):
            if holds:
                text += f", {remark}"
        return text


_Bucket = tuple[bool, int, bool, bool, int, int, int, bool]


@dataclass(frozen=True)
class Choice:
    """The decision, with everything that it is based on."""

    model_id: str
    size_bytes: int
    device_bytes: int
    verdict: ChoiceVerdict
    pod: str | None  # set if and only if CHOSEN
    refused: tuple[Ineligible, ...]
    candidates: tuple[tuple[_Bucket, Candidate, bool], ...]  # each with its bucket, and whether its type prefers it

    @cached_property
    def ranking(self) -> tuple[Ranked, ...]:
        """The candidates, best first. Computed on demand, because it is only for people and costs more than the choice
        itself."""
        ranked = [_ranked(self.model_id, *candidate) for candidate in self.candidates]
        return tuple(sorted(ranked, key=lambda r: (r.bucket, -r.score, r.pod)))

    @property
    def why(self) -> str:
        """The decision in one sentence."""
        size = str(Footprint(self.size_bytes, self.device_bytes))
        if self.verdict is ChoiceVerdict.CHOSEN:
            best = self.ranking[0]
            equal = sum(1 for ranked in self.ranking if ranked.bucket == best.bucket)
            drawn = f", drawn by hash among {equal} equally good" if equal > 1 else ""
            return f"{best.pod} {best.why}{drawn}"
        if self.verdict is ChoiceVerdict.NO_PODS and not self.refused:
            return "there is no runtime pod"
        reasons = "; ".join(f"{refused.pod} {refused.why}" for refused in self.refused[:8])
        if len(self.refused) > 8:
            reasons += f"; and {len(self.refused) - 8} more"
        if self.verdict is ChoiceVerdict.NOWHERE:
            if all(refused.cause is IneligibilityCause.TOO_SMALL for refused in self.refused):
                return f"the model needs {size}, more than the capacity of any pod: {reasons}"
            return f"no pod of this mesh may hold the model, which needs {size}: {reasons}"
        if self.verdict is ChoiceVerdict.NO_ROOM:
            return f"no pod has room for {size} now: {reasons}"
        return f"no pod can take the model now: {reasons}"


def choose(
    model_id: str,
    size: int | Footprint,
    pods: Iterable[Candidate],
    *,
    excluded: Mapping[str, str] = NOTHING,
    idle_ms: int = 0,
    model_type: str = "",
    constraint: Constraint = ANYWHERE,
    preferences: Mapping[frozenset[str], bool] | None = None,
    zones: Collection[str] = (),
) -> Choice:
    """Chooses a pod to load the model. A plain number as `size` is bytes of host memory.

    `excluded` names pods not to use, each with the reason as it follows the pod's name ("holds a copy already").
    `idle_ms` is the time since the model's last use, 0 if a caller waits for it: a model never replaces copies that
    were used more recently. `model_type` is compared with the types that pods take; "" is not compared. `constraint`
    has the labels that the type requires and prefers. `preferences` says for each set of labels whether the type
    prefers it (`Constraints.preferences`); without it, the constraint's own list decides. `zones` lists the zone of
    each existing copy.
    """
    footprint = size if isinstance(size, Footprint) else Footprint(size)
    host, device = footprint.host_bytes, footprint.device_bytes
    on_host, on_device = footprint.on(device=False), None
    bytes_on_host = on_host.host_bytes
    served, taken = ANY, True  # types of the last pod, which most pods share, and whether the model's is among them
    candidates: list[tuple[Candidate, bool]] = []
    refused: list[Ineligible] = []
    for pod in pods:
        # Most pods are full, healthy and without a device, so they are checked here, without a function call.
        if pod.device_capacity_bytes:
            need = on_device = on_device or footprint.on(device=True)
            fit = _has_free(pod, need)
            plain = fit or (not idle_ms and _holds(pod, need))
        else:
            need = on_host
            fit = bytes_on_host <= pod.capacity_bytes - pod.used_bytes or not bytes_on_host
            plain = fit or (not idle_ms and bytes_on_host <= pod.capacity_bytes)
        if pod.types is not served:
            served = pod.types
            taken = takes(served, model_type)
        if not plain or excluded or not pod.accepts or constraint is not ANYWHERE or not taken:
            refusal = _untaken(pod) if not taken else _refuse(pod, need, fit, excluded, idle_ms, constraint)
            if refusal is not None:
                refused.append(refusal)
                continue
        candidates.append((pod, fit))
    if candidates:
        rated = _rate(candidates, constraint, preferences, zones)
        best = min(candidate[0] for candidate in rated)
        equal = [pod for bucket, pod, _ in rated if bucket == best]
        chosen = equal[0] if len(equal) == 1 else _drawn(model_id, equal, evicts=best[2])
        return Choice(model_id, host, device, ChoiceVerdict.CHOSEN, chosen.name, tuple(refused), tuple(rated))
    causes = {refusal.cause for refusal in refused}
    if causes and causes <= {IneligibilityCause.TOO_SMALL, IneligibilityCause.NOT_ALLOWED}:
        verdict = ChoiceVerdict.NOWHERE
    elif IneligibilityCause.MORE_RECENT in causes:
        verdict = ChoiceVerdict.NO_ROOM
    else:
        verdict = ChoiceVerdict.NO_PODS
    return Choice(model_id, host, device, verdict, None, tuple(refused), ())


def fits(pod: Candidate, footprint: Footprint) -> bool:
    """Returns whether a model of that footprint fits into the pod's free host and device memory."""
    return _has_free(pod, footprint.on(device=pod.has_device))


def _has_free(pod: Candidate, need: Footprint) -> bool:
    return need.host_bytes <= pod.free_bytes and need.device_bytes <= pod.device_free_bytes


def _holds(pod: Candidate, need: Footprint) -> bool:
    return need.host_bytes <= pod.capacity_bytes and need.device_bytes <= pod.device_capacity_bytes


def _untaken(pod: Candidate) -> Ineligible:
    why = f"takes only models of type {', '.join(sorted(pod.types))}"
    return Ineligible(pod.name, IneligibilityCause.NOT_ALLOWED, why)


def _refuse(
    pod: Candidate, need: Footprint, fit: bool, excluded: Mapping[str, str], idle_ms: int, constraint: Constraint
) -> Ineligible | None:
    # Permanent causes come first: a pod that is too small and also leaving will not help later.
    if not _holds(pod, need):
        capacity = Footprint(pod.capacity_bytes, pod.device_capacity_bytes)
        return Ineligible(
            pod.name, IneligibilityCause.TOO_SMALL, f"has a capacity of {capacity}, and the model needs {need}"
        )
    if lacking := constraint.lacking(pod.labels):
        label = "label" if len(lacking) == 1 else "labels"
        why = f"lacks the {label} {', '.join(sorted(lacking))}, which the model's type requires"
        return Ineligible(pod.name, IneligibilityCause.NOT_ALLOWED, why)
    if pod.name in excluded:
        return Ineligible(pod.name, IneligibilityCause.EXCLUDED, excluded[pod.name] or "is excluded")
    if not pod.accepts:
        return Ineligible(pod.name, IneligibilityCause.NOT_ACCEPTING, pod.why_not or "accepts no loads")
    if not fit and idle_ms > pod.oldest_idle_ms:
        recent, ago = words.span(pod.oldest_idle_ms), words.span(idle_ms)
        why = f"is full of copies used within the last {recent}, and the model was last used {ago} ago"
        return Ineligible(pod.name, IneligibilityCause.MORE_RECENT, why)
    return None


def _rate(
    candidates: list[tuple[Candidate, bool]],
    constraint: Constraint,
    preferences: Mapping[frozenset[str], bool] | None,
    zones: Collection[str],
) -> list[tuple[_Bucket, Candidate, bool]]:
    """Returns each candidate with its bucket (`Ranked.bucket`), and whether the model's type prefers it."""
    oldest, calmest = 0, candidates[0][0].rate
    for pod, fit in candidates:
        if not fit and pod.oldest_idle_ms > oldest:
            oldest = pod.oldest_idle_ms
        if pod.rate < calmest:
            calmest = pod.rate
    calmest = max(QUIET_RATE, calmest)
    # Among full pods a preference only counts if it costs no fresher copies than elsewhere.
    stale_enough = oldest - max(PREFERRED_MS, oldest // 4)
    rated: list[tuple[_Bucket, Candidate, bool]] = []
    for pod, fit in candidates:
        if preferences is None:
            preferred = bool(constraint.preferred) and constraint.prefers(pod.labels)
        else:
            preferred = preferences.get(pod.labels, False)
        bucket = (
            pod.outgoing,
            sum(1 for zone in zones if zone == pod.zone) if zones and pod.zone else 0,
            not fit,
            not (preferred and (fit or pod.oldest_idle_ms >= stale_enough)),
            0 if fit or 2 * pod.oldest_idle_ms > oldest else _doublings(oldest, pod.oldest_idle_ms),
            (1 + pod.loads_in_progress // (pod.loading_threads or 1)).bit_length() - 1,
            0 if pod.rate < 2 * calmest else _doublings(pod.rate, calmest),
            not pod.on_disk,
        )
        rated.append((bucket, pod, preferred))
    return rated


def _score(model_id: str, pod: Candidate, evicts: bool) -> float:
    weight = pod.weights_capacity_bytes if evicts else pod.weights_free_bytes
    return rendezvous.score(model_id, pod.name, max(1, weight))


def _drawn(model_id: str, pods: list[Candidate], *, evicts: bool) -> Candidate:
    """Draws one of equally good pods: the highest score, then the first name."""
    chosen, highest = pods[0], -1.0
    for pod in pods:
        score = _score(model_id, pod, evicts)
        if score > highest or (score == highest and pod.name < chosen.name):
            chosen, highest = pod, score
    return chosen


def _ranked(model_id: str, bucket: _Bucket, pod: Candidate, preferred: bool) -> Ranked:
    outgoing, zone_copies, evicts, passed_over, age_bucket, queue_bucket, rate_bucket, not_on_disk = bucket
    return Ranked(
        pod=pod.name,
        evicts=evicts,
        age_bucket=age_bucket,
        queue_bucket=queue_bucket,
        rate_bucket=rate_bucket,
        score=_score(model_id, pod, evicts),
        free_bytes=pod.weights_free_bytes,
        oldest_idle_ms=pod.oldest_idle_ms,
        loads_in_progress=pod.loads_in_progress,
        loading_threads=pod.loading_threads,
        rate=pod.rate,
        outgoing=outgoing,
        zone_copies=zone_copies,
        preferred=preferred,
        passed_over=passed_over,
        on_disk=not not_on_disk,
    )


def _doublings(large: int, small: int) -> int:
    """Counts how often `small` can be doubled without exceeding `large`: floor(log2(large / small)), at least 0."""
    return max(0, (large // max(1, small)).bit_length() - 1)
