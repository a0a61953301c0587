"""Which loads failed where, and whose fault that was: the model's, or the pod's.

A failed load is remembered for a time, by model and pod. Another pod is tried, up to a bound; then the model's own
error is the answer until the memory expires. That is right where the model is at fault, and wrong where a pod is: one
whose disk or device is broken fails every load, and as it is empty it would be chosen first each time. So a pod in
which several different models have failed since the last success is *unwell*: it gets no loads, except one now and then
to see whether it has recovered, and what failed there does not count against the models.

Where all pods look unwell at once, none does: then it is the storage or the models, and refusing everything would only
hide the reason.

Times in milliseconds on any clock that does not go back; the caller brings failures from wherever they are written.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from cachetools import LRUCache

from placement import words

EXPIRY_MS = 15 * 60_000
"""As the predecessor's."""

MAX_FAILURES = 3
"""Pods in which a model may fail before its error is the answer; the predecessor's figure."""

UNWELL = 4
"""Different models that fail in a pod, with no load succeeding in between, from which on it counts as unwell."""

RETRY_MS = 60_000
"""How long an unwell pod is left alone before one load is tried there again."""

MODELS = 10_000
"""Models whose failures are kept; the least recently failed are forgotten."""


@dataclass(frozen=True, slots=True)
class Failure:
    """One failed load."""

    pod: str
    at_ms: int
    why: str


@dataclass(slots=True)
class _Pod:
    """A pod in which loads failed since the last success there."""

    models: dict[str, int]  # the last UNWELL that failed, and when
    last_ms: int = 0
    probed_ms: int | None = None  # when it was last given one load to try


@dataclass(frozen=True, slots=True)
class FailuresStatistics:
    """What is remembered; what has expired counts until it is asked about."""

    models: int
    pods: int  # with failures since their last success


class Failures:
    """The memory of one observer."""

    __slots__ = ("_expiry_ms", "_max_failures", "_models", "_pods")

    def __init__(self, *, expiry_ms: int = EXPIRY_MS, max_failures: int = MAX_FAILURES) -> None:
        self._expiry_ms = expiry_ms
        self._max_failures = max_failures
        self._models: LRUCache[str, dict[str, Failure]] = LRUCache(maxsize=MODELS)
        self._pods: dict[str, _Pod] = {}

    def failed(self, model_id: str, pod: str, now_ms: int, why: str) -> None:
        """A load has failed there. Another failure of the same model in the same pod replaces the first."""
        failures = self._models.get(model_id) or {}
        failures.pop(pod, None)
        failures[pod] = Failure(pod, now_ms, why)
        self._models[model_id] = failures
        seen = self._pods.setdefault(pod, _Pod({}))
        seen.models.pop(model_id, None)
        seen.models[model_id] = now_ms
        seen.last_ms = now_ms
        while len(seen.models) > UNWELL:
            del seen.models[next(iter(seen.models))]

    def loaded(self, model_id: str, pod: str) -> None:
        """A load has succeeded there: the pod is well, and the model can be loaded in it."""
        self._pods.pop(pod, None)
        failures = self._models.get(model_id)
        if failures is not None and failures.pop(pod, None) is not None and not failures:
            self._models.pop(model_id, None)

    def forget_model(self, model_id: str) -> None:
        """It is registered anew, or not at all any more."""
        self._models.pop(model_id, None)

    def forget_pod(self, pod: str) -> None:
        """The pod is gone, or started anew."""
        self._pods.pop(pod, None)
        for model_id in [model_id for model_id, failures in self._models.items() if pod in failures]:
            self.loaded(model_id, pod)

    def of(self, model_id: str, now_ms: int) -> tuple[Failure, ...]:
        """The failures of a model that have not expired, the newest first."""
        failures = self._models.get(model_id)
        if failures is None:
            return ()
        for pod in [pod for pod, failure in failures.items() if now_ms - failure.at_ms >= self._expiry_ms]:
            del failures[pod]
        if not failures:
            self._models.pop(model_id, None)
        return tuple(reversed(failures.values()))

    def excluded(self, model_id: str, now_ms: int) -> dict[str, str]:
        """The pods that this model is not to be loaded in, with the reason as it follows the pod's name."""
        return {
            failure.pod: f"failed to load it {words.span(now_ms - failure.at_ms)} ago: {failure.why}"
            for failure in self.of(model_id, now_ms)
        }

    def exhausted(self, model_id: str, now_ms: int, pods: Iterable[str]) -> Failure | None:
        """The failure that is the answer to the model's callers, where it has failed in as many of these pods as it
        may: the newest that is not an unwell pod's fault."""
        unwell = self.unwell(pods, now_ms)
        own = [failure for failure in self.of(model_id, now_ms) if failure.pod not in unwell]
        return own[0] if len(own) >= self._max_failures else None

    def unwell(self, pods: Iterable[str], now_ms: int) -> dict[str, str]:
        """Those of the pods in which everything fails, with the reason; none of them where all look like that."""
        names = list(pods)
        found: dict[str, str] = {}
        for name in names:
            seen = self._pods.get(name)
            if seen is None or len(seen.models) < UNWELL:
                continue
            if now_ms - min(seen.models.values()) >= self._expiry_ms:
                continue
            ago = words.span(now_ms - seen.last_ms)
            found[name] = f"has failed to load the last {UNWELL} models it was given, the latest {ago} ago"
        return found if len(found) < len(names) else {}

    def avoided(self, pods: Iterable[str], now_ms: int) -> dict[str, str]:
        """The unwell pods that get no load now: all but those whose time has come to be tried once more."""
        found = self.unwell(pods, now_ms)
        return {pod: why for pod, why in found.items() if now_ms - self._last_try(pod) < RETRY_MS}

    def tried(self, pod: str, now_ms: int) -> None:
        """A load was sent to it: an unwell pod is left alone until that one has ended, or for `RETRY_MS`."""
        if pod in self._pods:
            self._pods[pod].probed_ms = now_ms

    def statistics(self) -> FailuresStatistics:
        """How much is remembered."""
        return FailuresStatistics(len(self._models), len(self._pods))

    def _last_try(self, pod: str) -> int:
        seen = self._pods[pod]
        return max(seen.last_ms, seen.probed_ms or 0)
