"""Failed loads: the pauses before each retry, the error that callers get meanwhile, and whether the model or the pod is
at fault.

Failures have kinds, which decide when the load is retried. A temporary failure is retried soon: after as long as the
model has been failing, at least a second and at most half a minute, or after as long as the store asked for. The model
is therefore served again after at most twice the duration of the fault, and a store that is down does not get a request
for every call. Files that exist but cannot be loaded are checked again after the same pauses, and loaded again only if
they have changed; the agent compares them. Only failures of unknown cause last for the full `EXPIRY_MS`.

After each failure another pod is tried, up to a limit; then callers get the model's own error.

That is right if the model is at fault, and wrong if a pod is. A pod with a broken disk or device fails every load, and
because it is empty, it would be chosen first each time. A failure is only evidence against a pod if another pod has
loaded the same model, so broken models make no pod unhealthy. Nor is it evidence if the pod's own rules forbid the
load. A pod with evidence from several models since its last success is *unhealthy*: it gets no loads, except one now
and then to see whether it has recovered, and its failures do not count against the models. If all pods that a model may
use look unhealthy at the same time, none is treated as unhealthy.

Times are in milliseconds on any clock that does not go back. The caller passes recorded failures to `recall` (converted
by `recorded`), without released ones.
"""

import enum
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from cachetools import LRUCache

from placement import words

EXPIRY_MS = 15 * 60_000
"""Lifetime of a failure; ModelMesh's figure."""

FIRST_PAUSE_MS = 1_000
LONGEST_PAUSE_MS = 30_000
"""The shortest and the longest pause before a retry, after failures of all kinds but `LASTING`. A store may ask for a
longer one."""

MOST_ASKED_MS = 5 * 60_000
"""Longest Retry-After of a store that is respected."""

MAX_FAILURES = 3
"""Number of pods in which a model may fail before callers get its error; ModelMesh's figure."""

UNHEALTHY = 4
"""Number of models that make a pod unhealthy: they failed there and loaded elsewhere, with no successful load in the
pod in between."""

WITNESS_MS = 30_000
"""Time after a failure within which the model must load elsewhere to be evidence against the pod. Later, its store or
file may have recovered."""

RETRY_MS = 60_000
"""Time after which an unhealthy pod gets one load as a trial."""

MODELS = 10_000
"""Number of models whose failures are kept; beyond that, those looked up least recently are dropped."""


class FailureKind(enum.Enum):
    """The kind of a failed load, as it is written in records."""

    PASSING = "passing"
    """Unreachable, timed out, incomplete, overloaded: the same load may succeed a moment later."""
    NOT_FOUND = "not found"
    """Nothing exists at that path; files may be added."""
    FORBIDDEN = "forbidden"
    """Forbidden by the store or by the operator's rules, or tried without credentials; it may be allowed later."""
    CONTENT = "content"
    """The files exist, have a digest, and cannot be loaded; they may be replaced."""
    MEMORY = "memory"
    """The files cannot be loaded because they need more memory than the model server has."""
    RULES = "rules"
    """The rules or the present state of the pod forbid it: the model runs code, for example, and the pod allows none.
    Another pod may load it, and so may this one with other options."""
    LASTING = "lasting"
    """Anything else, and records from before there were kinds."""

    @classmethod
    def named(cls, name: str) -> "FailureKind":
        """Returns the kind with that name, or LASTING for a name that this version does not know."""
        try:
            return cls(name)
        except ValueError:
            return cls.LASTING


@dataclass(frozen=True, slots=True)
class Failure:
    """One failed load."""

    pod: str
    at_ms: int
    why: str
    kind: FailureKind = FailureKind.LASTING
    since_ms: int | None = None  # start of the unbroken series of failures; None: it starts with this one
    asked_ms: int = 0  # pause that the store asked for; 0: none
    recorded: int = 0  # identifies the entry in the record; 0: from a load's answer

    @property
    def began_ms(self) -> int:
        """Start of the series of failures that this one belongs to."""
        return self.at_ms if self.since_ms is None else min(self.since_ms, self.at_ms)

    @property
    def due_ms(self) -> int:
        """Time from which the pod may be asked again."""
        return self.at_ms + pause_ms(self.kind, self.at_ms - self.began_ms, self.asked_ms)


def pause_ms(kind: FailureKind, failing_ms: int, asked_ms: int = 0) -> int:
    """Returns the pause before a retry of a load that has been failing for `failing_ms`. `asked_ms` is the pause that
    the store asked for, or 0."""
    if kind is FailureKind.LASTING:
        return EXPIRY_MS
    return max(min(max(FIRST_PAUSE_MS, failing_ms), LONGEST_PAUSE_MS), min(asked_ms, MOST_ASKED_MS))


def hint(model_id: str, kind: FailureKind, retry_ms: int) -> str:
    """Returns the way out, shown in brackets after the model's own error."""
    when = words.span(max(retry_ms, 1))
    what = (
        "the files are checked again if it is called"
        if kind in (FailureKind.CONTENT, FailureKind.MEMORY)
        else "the load is tried again if it is called"
    )
    return f"{what} in {when}, or immediately after `mesh release {model_id[:200]}`"


@dataclass(frozen=True, slots=True)
class Eligibility:
    """The pods in which a model may be loaded now, according to its failures."""

    excluded: Mapping[str, str]  # pods not to ask now, each with the reason as it follows the pod's name
    answer: Failure | None  # the model's own error, if no further pod should be asked
    newest: Failure | None  # the error for callers if the remaining pods cannot take it
    retry_ms: int  # until a pod may be asked again; 0: now
    pods: tuple[str, ...] = ()  # where it has failed, the newest first


@dataclass(slots=True)
class _PodEvidence:
    """The evidence against one pod since its last successful load."""

    models: dict[str, int]  # models that failed here recently and loaded elsewhere, with the time of failure
    last_ms: int = 0
    probed_ms: int | None = None  # time of its last trial load


@dataclass(slots=True)
class _ModelFailures:
    created: int
    failures: dict[str, Failure] = field(default_factory=dict)  # by pod, the newest last


@dataclass(frozen=True, slots=True)
class FailuresStatistics:
    """The numbers of models and pods in the kept failures. Expired failures count until they are next looked up."""

    models: int  # with failures
    pods: int  # with evidence against them since their last success


class Failures:
    """The failures that one observer remembers."""

    __slots__ = ("_expiry_ms", "_max_failures", "_models", "_pods")

    def __init__(self, *, expiry_ms: int = EXPIRY_MS, max_failures: int = MAX_FAILURES) -> None:
        self._expiry_ms = expiry_ms
        self._max_failures = max_failures
        self._models: LRUCache[str, _ModelFailures] = LRUCache(maxsize=MODELS)
        self._pods: dict[str, _PodEvidence] = {}

    # --- events ---

    def recall(self, model_id: str, created: int, recorded: Iterable[Failure]) -> None:
        """Replaces the known failures of a model with those in its record.

        If this observer already knew an entry of the record, it keeps its own times for that entry, because they may be
        newer. Entries that are no longer in the record were released, have expired, or were cleared by a success."""
        known = self._models.get(model_id)
        before = known.failures if known is not None and known.created == created else {}
        found: dict[str, Failure] = {}
        newest_first = sorted(recorded, key=lambda failure: -failure.at_ms)
        for failure in reversed(newest_first):
            own = before.get(failure.pod)
            if own is None or own.recorded not in (0, failure.recorded):
                found[failure.pod] = failure
            else:
                found[failure.pod] = replace(failure, at_ms=own.at_ms, since_ms=own.since_ms)
        if found:
            self._models[model_id] = _ModelFailures(created, found)
        else:
            self._models.pop(model_id, None)

    def failed(
        self,
        model_id: str,
        pod: str,
        now_ms: int,
        why: str,
        *,
        created: int = 0,
        kind: FailureKind = FailureKind.LASTING,
        asked_ms: int = 0,
        elsewhere: bool = False,
    ) -> None:
        """Notes a failed load. It replaces an earlier failure of the same model in the same pod.

        `elsewhere` is true if the model is loaded in another pod.
        """
        model = self._models.get(model_id)
        if model is None or model.created != created:
            model = _ModelFailures(created)
        series = [failure.began_ms for failure in self._alive(model, now_ms)]
        former = model.failures.pop(pod, None)
        model.failures[pod] = Failure(
            pod, now_ms, why, kind, min(series, default=now_ms), asked_ms, 0 if former is None else former.recorded
        )
        self._models[model_id] = model
        if elsewhere and kind is not FailureKind.RULES:
            self._testify(model_id, pod, now_ms)

    def loaded(self, model_id: str, pod: str, now_ms: int) -> None:
        """Notes a successful load. It proves the pod healthy, and is evidence against pods in which the model has just
        failed."""
        self._pods.pop(pod, None)
        model = self._models.get(model_id)
        if model is None:
            return
        model.failures.pop(pod, None)
        for failure in model.failures.values():
            if now_ms - failure.at_ms < WITNESS_MS and failure.kind is not FailureKind.RULES:
                self._testify(model_id, failure.pod, failure.at_ms)
        if not model.failures:
            self._models.pop(model_id, None)

    def tried(self, pod: str, now_ms: int) -> None:
        """Notes a load sent to a pod. An unhealthy pod then gets no other load until this one has succeeded, or until
        `RETRY_MS` have passed."""
        if pod in self._pods:
            self._pods[pod].probed_ms = now_ms

    def forget_pod(self, pod: str) -> None:
        """Forgets all failures in a pod that has disappeared or restarted."""
        self._pods.pop(pod, None)
        for model_id in [model_id for model_id, model in self._models.items() if pod in model.failures]:
            failures = self._models[model_id].failures
            del failures[pod]
            if not failures:
                del self._models[model_id]

    # --- questions ---

    def standing(
        self, model_id: str, pods: Iterable[str], now_ms: int, *, created: int = 0, tried: Collection[str] = ()
    ) -> Eligibility:
        """Returns in which of `pods` a registration may be loaded now. Pods in `tried` have just failed to load it for
        the same callers, and are not asked again, however short the pause."""
        model = self._models.get(model_id)
        if model is not None and model.created != created:
            model = None
        alive = self._alive(model, now_ms) if model is not None else []
        if not alive:
            return Eligibility({}, None, None, 0)
        unhealthy = self.unhealthy(pods, now_ms)
        held = [failure for failure in reversed(alive) if failure.due_ms > now_ms or failure.pod in tried]
        excluded = {
            failure.pod: f"failed to load it {words.span(now_ms - failure.at_ms)} ago: {failure.why}"
            for failure in held
        }
        own = [failure for failure in held if failure.pod not in unhealthy]
        # A store's Retry-After applies to all pods.
        asked = next((failure for failure in held if failure.asked_ms), None)
        answer = asked or (own[0] if len(own) >= self._max_failures else None)
        due = asked.due_ms if asked is not None else min((failure.due_ms for failure in held), default=now_ms)
        names = tuple(failure.pod for failure in reversed(alive))
        return Eligibility(excluded, answer, held[0] if held else None, max(0, due - now_ms), names)

    def unhealthy(self, pods: Iterable[str], now_ms: int) -> dict[str, str]:
        """Returns which of `pods` are unhealthy, each with the reason. Returns none if all of them look unhealthy."""
        names = list(pods)
        found: dict[str, str] = {}
        for name in names:
            seen = self._pods.get(name)
            if seen is None or len(seen.models) < UNHEALTHY:
                continue
            if now_ms - min(seen.models.values()) >= self._expiry_ms:
                continue
            ago = words.span(now_ms - seen.last_ms)
            found[name] = f"has failed to load {UNHEALTHY} models that loaded elsewhere, the latest {ago} ago"
        return found if len(found) < len(names) else {}

    def avoided(self, pods: Iterable[str], now_ms: int) -> dict[str, str]:
        """Returns which of `pods` are unhealthy and get no load now: all unhealthy ones except those that are due for a
        trial."""
        found = self.unhealthy(pods, now_ms)
        return {pod: why for pod, why in found.items() if now_ms - self._last_try(pod) < RETRY_MS}

    def statistics(self) -> FailuresStatistics:
        """Returns how many models have failures, and how many pods have evidence against them."""
        return FailuresStatistics(len(self._models), len(self._pods))

    def _alive(self, model: _ModelFailures, now_ms: int) -> list[Failure]:
        """Returns the failures that have not expired, the newest last."""
        for pod in [pod for pod, failure in model.failures.items() if now_ms - failure.at_ms >= self._expiry_ms]:
            del model.failures[pod]
        return list(model.failures.values())

    def _testify(self, model_id: str, pod: str, at_ms: int) -> None:
        seen = self._pods.setdefault(pod, _PodEvidence({}))
        seen.models.pop(model_id, None)
        seen.models[model_id] = at_ms
        seen.last_ms = max(seen.last_ms, at_ms)
        while len(seen.models) > UNHEALTHY:
            del seen.models[next(iter(seen.models))]

    def _last_try(self, pod: str) -> int:
        seen = self._pods[pod]
        return max(seen.last_ms, seen.probed_ms or 0)
