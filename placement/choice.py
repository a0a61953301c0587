"""Which pod loads a model: filter, rank coarsely, draw.

Views of pods lag by seconds, so "the best pod" by exact figures is the same pod for everybody until it publishes again,
and all of them fall upon it. Hence three steps:

1. **Filter**: each pod that may not take the model is refused, with the cause.
2. **Rank** the others in coarse buckets, in this order: it fits into free space, before it needs an eviction; where
   it needs one, the pod whose oldest copy has been idle longer, in powers of two (that makes the pods' caches work as
   one: whoever holds the stalest copies gets the next load); fewer loads queued for each loading thread; fewer calls
   a minute. Ages and rates are compared with the best of the candidates, not with fixed marks: two pods at 63 and 65
   s are equal.
3. **Draw** within the best bucket by rendezvous hash, weighted by free space (by capacity where all are full).

The predecessor also refuses a load where the oldest copy is younger than a "churn age". Left out: a caller who waits is
served, even if the cache turns over quickly; refusing would make the model unavailable for as long as traffic lasts.

The caller brings the figures up to date (`debits`), carries the choice out, and asks again with what failed in
`excluded`.
"""

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from placement import rendezvous, words
from placement.pod import Pod

QUIET_RATE = 600
"""Calls a minute below which pods count as equally idle: 10 a second is nothing to a pod."""

NOTHING: Mapping[str, str] = MappingProxyType({})


class Verdict(enum.Enum):
    """How a choice ended."""

    CHOSEN = "chosen"
    NO_PODS = "no pods"
    """None is there, or each that could hold it is excluded or does not accept loads: another moment may differ."""
    NOWHERE = "nowhere"
    """Larger than the capacity of every pod: waiting does not help."""
    NO_ROOM = "no room"
    """Every pod that could hold it is full of copies used more recently than the model."""


class Cause(enum.Enum):
    """Why a pod was refused."""

    TOO_SMALL = "too small"
    EXCLUDED = "excluded"
    NOT_ACCEPTING = "not accepting"
    MORE_RECENT = "more recent"


@dataclass(frozen=True, slots=True)
class Refused:
    """A pod that may not take the model."""

    pod: str
    cause: Cause
    why: str  # follows the pod's name in a sentence: "has a capacity of 64 MiB and 80 MiB are needed"


@dataclass(frozen=True, slots=True)
class Ranked:
    """A candidate and what it was ranked by. Lower buckets are better; within equal ones the higher score."""

    pod: str
    evicts: bool
    age_bucket: int  # halvings of the longest idle time among the full candidates; 0 where nothing is evicted
    queue_bucket: int  # doublings of the loads queued for each loading thread
    rate_bucket: int  # doublings of the lowest rate among the candidates
    score: float
    free_bytes: int
    oldest_idle_ms: int
    loads_in_progress: int
    loading_threads: int
    rate: int

    @property
    def bucket(self) -> tuple[bool, int, int, int]:
        """What is compared before the draw."""
        return self.evicts, self.age_bucket, self.queue_bucket, self.rate_bucket

    @property
    def why(self) -> str:
        """The figures as part of a sentence that begins with the pod's name."""
        if not self.evicts:
            room = f"has {words.size(self.free_bytes)} free"
        elif self.oldest_idle_ms:
            room = f"is full, its oldest copy idle for {words.span(self.oldest_idle_ms)}"
        else:
            room = "is full of copies in use"
        return f"{room}, {self.loads_in_progress} loads on {self.loading_threads} threads, {self.rate} calls a minute"


@dataclass(frozen=True, slots=True)
class Choice:
    """The decision, and everything it rests on."""

    model_id: str
    size_bytes: int
    verdict: Verdict
    pod: str | None  # set if and only if CHOSEN
    ranking: tuple[Ranked, ...]  # best first
    refused: tuple[Refused, ...]

    @property
    def why(self) -> str:
        """The decision in one plain sentence."""
        size = words.size(self.size_bytes)
        if self.verdict is Verdict.CHOSEN:
            best = self.ranking[0]
            equal = sum(1 for ranked in self.ranking if ranked.bucket == best.bucket)
            drawn = f", drawn by hash among {equal} equally good" if equal > 1 else ""
            return f"{best.pod} {best.why}{drawn}"
        if self.verdict is Verdict.NO_PODS and not self.refused:
            return "there is no runtime pod"
        reasons = "; ".join(f"{refused.pod} {refused.why}" for refused in self.refused[:8])
        if len(self.refused) > 8:
            reasons += f"; and {len(self.refused) - 8} more"
        if self.verdict is Verdict.NOWHERE:
            return f"the model needs {size}, more than any pod can hold: {reasons}"
        if self.verdict is Verdict.NO_ROOM:
            return f"no pod has room for {size} now: {reasons}"
        return f"no pod can take the model now: {reasons}"


def choose(
    model_id: str,
    size_bytes: int,
    pods: Iterable[Pod],
    *,
    excluded: Mapping[str, str] = NOTHING,
    idle_ms: int = 0,
) -> Choice:
    """Chooses a pod to load the model.

    `excluded` names pods not to use, each with the reason as it follows the pod's name ("holds a copy already").
    `idle_ms` is the time since the model's last use, 0 where a caller waits for it: a model is never loaded in place of
    copies used more recently.
    """
    candidates: list[Pod] = []
    refused: list[Refused] = []
    for pod in pods:
        refusal = _refuse(pod, size_bytes, excluded, idle_ms)
        if refusal is None:
            candidates.append(pod)
        else:
            refused.append(refusal)
    if candidates:
        ranking = tuple(sorted(_rank(model_id, size_bytes, candidates), key=lambda r: (r.bucket, -r.score, r.pod)))
        return Choice(model_id, size_bytes, Verdict.CHOSEN, ranking[0].pod, ranking, tuple(refused))
    causes = {refusal.cause for refusal in refused}
    if causes == {Cause.TOO_SMALL}:
        verdict = Verdict.NOWHERE
    elif Cause.MORE_RECENT in causes:
        verdict = Verdict.NO_ROOM
    else:
        verdict = Verdict.NO_PODS
    return Choice(model_id, size_bytes, verdict, None, (), tuple(refused))


def _refuse(pod: Pod, size_bytes: int, excluded: Mapping[str, str], idle_ms: int) -> Refused | None:
    # What can never change comes first: a pod that is too small and also leaving is no hope for later.
    if size_bytes > pod.capacity_bytes:
        capacity, needed = words.size(pod.capacity_bytes), words.size(size_bytes)
        return Refused(pod.name, Cause.TOO_SMALL, f"has a capacity of {capacity} where {needed} are needed")
    if pod.name in excluded:
        return Refused(pod.name, Cause.EXCLUDED, excluded[pod.name] or "is excluded")
    if not pod.accepts:
        return Refused(pod.name, Cause.NOT_ACCEPTING, pod.why_not or "accepts no loads")
    if size_bytes > pod.free_bytes and idle_ms > pod.oldest_idle_ms:
        why = f"is full of copies used within {words.span(pod.oldest_idle_ms)}, the model {words.span(idle_ms)} ago"
        return Refused(pod.name, Cause.MORE_RECENT, why)
    return None


def _rank(model_id: str, size_bytes: int, candidates: list[Pod]) -> Iterable[Ranked]:
    oldest = max((pod.oldest_idle_ms for pod in candidates if size_bytes > pod.free_bytes), default=0)
    calmest = max(QUIET_RATE, min(pod.rate for pod in candidates))
    for pod in candidates:
        evicts = size_bytes > pod.free_bytes
        weight = pod.capacity_bytes if evicts else pod.free_bytes
        yield Ranked(
            pod=pod.name,
            evicts=evicts,
            age_bucket=_doublings(oldest, pod.oldest_idle_ms) if evicts else 0,
            queue_bucket=(1 + pod.loads_in_progress // max(1, pod.loading_threads)).bit_length() - 1,
            rate_bucket=_doublings(pod.rate, calmest),
            score=rendezvous.score(model_id, pod.name, max(1, weight)),
            free_bytes=pod.free_bytes,
            oldest_idle_ms=pod.oldest_idle_ms,
            loads_in_progress=pod.loads_in_progress,
            loading_threads=pod.loading_threads,
            rate=pod.rate,
        )


def _doublings(large: int, small: int) -> int:
    """How often `small` can be doubled without exceeding `large`: floor(log2(large / small)), at least 0."""
    return max(0, (large // max(1, small)).bit_length() - 1)
