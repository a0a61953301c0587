"""Failed loads: which pods are not asked again yet, what callers are told meanwhile, and whose fault it was.

Failures have kinds, each with its own memory. What may pass is tried again soon: the pause is as long as the model has
been failing, a second at least and half a minute at most, or as long as the store asked for. So it is served again
after at most twice as long as the trouble lasted, and a store that is down is not asked by every call. Files that are
there and cannot be loaded are looked at again at the same pace, and loaded again only where they have changed; that
comparison is the agent's. Only what nobody can tell anything about holds for the full `EXPIRY_MS`.

Another pod is tried after each failure, up to a bound; then the model's own error is the answer.

That is right where the model is at fault, and wrong where a pod is: one whose disk or device is broken fails every
load, and as it is empty it would be chosen first each time. A failure is evidence against a pod only where another pod
has loaded the same model: broken models make no pod unwell. A pod with evidence of several different models since its
last success is *unwell*: it gets no loads, except one now and then to see whether it has recovered, and what failed
there does not count against the models. Where all pods look unwell at once, none does.

Times in milliseconds on any clock that does not go back. The caller brings failures from wherever they are written
(`recall`, from records by way of `recorded`) and leaves out what was released.
"""

import enum
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from cachetools import LRUCache

from placement import words

EXPIRY_MS = 15 * 60_000
"""As the predecessor's."""

FIRST_PAUSE_MS = 1_000
LONGEST_PAUSE_MS = 30_000
"""The shortest and the longest pause before what may pass is tried again."""

MOST_ASKED_MS = 5 * 60_000
"""The longest that a store's own wish (Retry-After) is followed."""

MAX_FAILURES = 3
"""Pods in which a model may fail before its error is the answer; the predecessor's figure."""

UNWELL = 4
"""Different models that fail in a pod and load elsewhere, with no load succeeding in between, from which on it counts
as unwell."""

WITNESS_MS = 30_000
"""A model that loads elsewhere later than this after a failure says nothing about the pod: its store or its file may
have recovered in between."""

RETRY_MS = 60_000
"""How long an unwell pod is left alone before one load is tried there again."""

MODELS = 10_000
"""Models whose failures are kept; the least recently failed are forgotten."""


class Kind(enum.Enum):
    """The kind of a failed load, as it is written in records."""

    PASSING = "passing"
    """Unreachable, timed out, incomplete, overloaded: the same load may succeed a moment later."""
    NOT_FOUND = "not found"
    """There is nothing at that path: somebody may put it there."""
    FORBIDDEN = "forbidden"
    """By the store or the operator's rules, or for want of credentials: somebody may allow it."""
    CONTENT = "content"
    """The files are there, can be told from others, and cannot be loaded: they may be replaced."""
    MEMORY = "memory"
    """The same, because they ask for more memory than the model server has for them."""
    LASTING = "lasting"
    """Anything else, and all that was written before there were kinds."""

    @classmethod
    def named(cls, name: str) -> "Kind":
        """The kind of that name; LASTING for a name of another version."""
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
    kind: Kind = Kind.LASTING
    since_ms: int | None = None  # when the first of an unbroken series of failures was; None: this is the first
    asked_ms: int = 0  # how long the store asks to be left alone; 0: it does not
    recorded: int = 0  # tells one entry of the record from another; 0: it comes from a load's answer

    @property
    def began_ms(self) -> int:
        """When the series of failures that it belongs to began."""
        return self.at_ms if self.since_ms is None else min(self.since_ms, self.at_ms)

    @property
    def due_ms(self) -> int:
        """When the pod may be asked again."""
        return self.at_ms + pause_ms(self.kind, self.at_ms - self.began_ms, self.asked_ms)


def pause_ms(kind: Kind, failing_ms: int, asked_ms: int = 0) -> int:
    """The pause before a load is tried again that has been failing for so long."""
    if kind is Kind.LASTING:
        return EXPIRY_MS
    return max(min(max(FIRST_PAUSE_MS, failing_ms), LONGEST_PAUSE_MS), min(asked_ms, MOST_ASKED_MS))


def hint(model_id: str, kind: Kind, retry_ms: int) -> str:
    """The way out, as it follows the model's own error in brackets."""
    when = words.span(max(retry_ms, 1))
    what = "looked at again if called" if kind in (Kind.CONTENT, Kind.MEMORY) else "tried again if called"
    return f"{what} in {when}, or at once after `mesh release {model_id[:200]}`"


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a model may be loaded now, as far as its failures say."""

    excluded: Mapping[str, str]  # pods that are not asked now, each with the reason as it follows the pod's name
    answer: Failure | None  # the model's own error, where no further pod is to be asked
    newest: Failure | None  # what callers are told where the pods that are left cannot take it
    retry_ms: int  # until a pod may be asked again; 0: now
    pods: tuple[str, ...] = ()  # in which it has failed, the newest first


@dataclass(slots=True)
class _Pod:
    """A pod in which loads failed since the last success there."""

    models: dict[str, int]  # the last UNWELL that failed here and loaded elsewhere, and when they failed
    last_ms: int = 0
    probed_ms: int | None = None  # when it was last given one load to try


@dataclass(slots=True)
class _Model:
    """The failures of one registration."""

    created: int
    failures: dict[str, Failure] = field(default_factory=dict)  # by pod, the newest last


@dataclass(frozen=True, slots=True)
class FailuresStatistics:
    """The extent of the memory; what has expired counts until it is asked about."""

    models: int
    pods: int  # with evidence against them since their last success


class Failures:
    """The memory of one observer."""

    __slots__ = ("_expiry_ms", "_max_failures", "_models", "_pods")

    def __init__(self, *, expiry_ms: int = EXPIRY_MS, max_failures: int = MAX_FAILURES) -> None:
        self._expiry_ms = expiry_ms
        self._max_failures = max_failures
        self._models: LRUCache[str, _Model] = LRUCache(maxsize=MODELS)
        self._pods: dict[str, _Pod] = {}

    # --- events ---

    def recall(self, model_id: str, created: int, recorded: Iterable[Failure]) -> None:
        """Takes over what the model's record says of its failures, in place of what was known.

        What this observer has seen itself since is newer than the same entry of the record, and is kept. What the
        record no longer has was released, expired or made void by a success."""
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
            self._models[model_id] = _Model(created, found)
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
        kind: Kind = Kind.LASTING,
        asked_ms: int = 0,
        elsewhere: bool = False,
    ) -> None:
        """A load has failed there. Another failure of the same model in the same pod replaces the first.

        `elsewhere`: the model is loaded in another pod."""
        model = self._models.get(model_id)
        if model is None or model.created != created:
            model = _Model(created)
        series = [failure.began_ms for failure in self._alive(model, now_ms)]
        former = model.failures.pop(pod, None)
        model.failures[pod] = Failure(
            pod, now_ms, why, kind, min(series, default=now_ms), asked_ms, 0 if former is None else former.recorded
        )
        self._models[model_id] = model
        if elsewhere:
            self._testify(model_id, pod, now_ms)

    def loaded(self, model_id: str, pod: str, now_ms: int) -> None:
        """A load has succeeded there: the pod is well, and those are suspicious in which the model has just failed."""
        self._pods.pop(pod, None)
        model = self._models.get(model_id)
        if model is None:
            return
        model.failures.pop(pod, None)
        for failure in model.failures.values():
            if now_ms - failure.at_ms < WITNESS_MS:
                self._testify(model_id, failure.pod, failure.at_ms)
        if not model.failures:
            self._models.pop(model_id, None)

    def tried(self, pod: str, now_ms: int) -> None:
        """A load was sent to it: an unwell pod is left alone until that one has ended, or for `RETRY_MS`."""
        if pod in self._pods:
            self._pods[pod].probed_ms = now_ms

    def forget_pod(self, pod: str) -> None:
        """The pod is gone, or started anew."""
        self._pods.pop(pod, None)
        for model_id in [model_id for model_id, model in self._models.items() if pod in model.failures]:
            failures = self._models[model_id].failures
            del failures[pod]
            if not failures:
                del self._models[model_id]

    # --- questions ---

    def standing(
        self, model_id: str, pods: Iterable[str], now_ms: int, *, created: int = 0, tried: Collection[str] = ()
    ) -> Standing:
        """Where that registration of the model may be loaded now, `pods` being those that there are. `tried` are those
        in which it has just failed for the same callers: they are asked no second time, however short the pause."""
        model = self._models.get(model_id)
        if model is not None and model.created != created:
            model = None
        alive = self._alive(model, now_ms) if model is not None else []
        if not alive:
            return Standing({}, None, None, 0)
        unwell = self.unwell(pods, now_ms)
        held = [failure for failure in reversed(alive) if failure.due_ms > now_ms or failure.pod in tried]
        excluded = {
            failure.pod: f"failed to load it {words.span(now_ms - failure.at_ms)} ago: {failure.why}"
            for failure in held
        }
        own = [failure for failure in held if failure.pod not in unwell]
        # A store that asks to be left alone asks it of all pods.
        asked = next((failure for failure in held if failure.asked_ms), None)
        answer = asked or (own[0] if len(own) >= self._max_failures else None)
        due = asked.due_ms if asked is not None else min((failure.due_ms for failure in held), default=now_ms)
        names = tuple(failure.pod for failure in reversed(alive))
        return Standing(excluded, answer, held[0] if held else None, max(0, due - now_ms), names)

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
            found[name] = f"has failed to load {UNWELL} models that loaded elsewhere, the latest {ago} ago"
        return found if len(found) < len(names) else {}

    def avoided(self, pods: Iterable[str], now_ms: int) -> dict[str, str]:
        """The unwell pods that get no load now: all but those whose time has come to be tried once more."""
        found = self.unwell(pods, now_ms)
        return {pod: why for pod, why in found.items() if now_ms - self._last_try(pod) < RETRY_MS}

    def statistics(self) -> FailuresStatistics:
        """The extent of the memory."""
        return FailuresStatistics(len(self._models), len(self._pods))

    def _alive(self, model: _Model, now_ms: int) -> list[Failure]:
        """Those that have not expired, the newest last."""
        for pod in [pod for pod, failure in model.failures.items() if now_ms - failure.at_ms >= self._expiry_ms]:
            del model.failures[pod]
        return list(model.failures.values())

    def _testify(self, model_id: str, pod: str, at_ms: int) -> None:
        seen = self._pods.setdefault(pod, _Pod({}))
        seen.models.pop(model_id, None)
        seen.models[model_id] = at_ms
        seen.last_ms = max(seen.last_ms, at_ms)
        while len(seen.models) > UNWELL:
            del seen.models[next(iter(seen.models))]

    def _last_try(self, pod: str) -> int:
        seen = self._pods[pod]
        return max(seen.last_ms, seen.probed_ms or 0)
