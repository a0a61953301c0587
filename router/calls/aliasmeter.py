"""Counters of calls by alias and by the model that served them.

Operators choose these names, and each release of a model adds one. The series of a model are therefore dropped once its
alias no longer names it, and pairs beyond MAX_PAIRS are counted together as `other`.
"""

from mesh.telemetry import metrics
from router.calls.meter import OTHER

MAX_PAIRS = 200
"""Maximum number of pairs of alias and model with their own series."""


class PairMeter:
    """The series of one alias and one of its models."""

    __slots__ = ("diverted", "errors", "ms")

    def __init__(self, ms: metrics.Distribution, errors: metrics.Count, diverted: metrics.Count) -> None:
        self.ms = ms
        self.errors = errors
        self.diverted = diverted

    def call(self, code: int, ms: float) -> None:
        """Counts a finished call, and counts it as an error unless the code is OK."""
        self.ms.observe(ms)
        if code:
            self.errors.inc()


class AliasMeter:
    """The per-alias metrics of one worker."""

    def __init__(self, registry: metrics.Registry) -> None:
        labels = ("alias", "model")
        self._ms = registry.histogram(
            "mesh_alias_milliseconds",
            "Calls by alias, and by the model that it sent them to, all outcomes.",
            metrics.BUCKETS_MS,
            labels,
        )
        self._errors = registry.counter(
            "mesh_alias_errors", "Calls by alias and model that did not end with OK.", labels
        )
        self._diverted = registry.counter(
            "mesh_alias_diverted", "Calls that an alias sent to another model because this one could not serve.", labels
        )
        self._pairs: set[tuple[str, str]] = set()

    def of(self, alias: str, model: str) -> PairMeter:
        """Returns the series of a pair, or those of the pair `other` if MAX_PAIRS other pairs have series."""
        pair = (alias, model)
        if len(self._pairs) < MAX_PAIRS:
            self._pairs.add(pair)
        if pair not in self._pairs:
            pair = (OTHER, OTHER)
        return PairMeter(self._ms.labels(*pair), self._errors.labels(*pair), self._diverted.labels(*pair))

    def forget(self, alias: str, model: str) -> None:
        """Drops the series of a pair that is no longer in use."""
        if (alias, model) in self._pairs:
            self._pairs.discard((alias, model))
            for metric in (self._ms, self._errors, self._diverted):
                metric.forget(alias, model)
