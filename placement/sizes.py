"""How much memory a model will take, before anybody knows, and how wrong that was.

Best is what an earlier load of this very model measured. Else what its type has shown: the ratio of measured bytes to
file bytes, learned from every load, its middle value over the last few, so that neither one odd model nor an old time
decides. Else a default: about its file. Apart for pods with and without a device.

Guesses are low on purpose: guessing high evicts copies that need not go, guessing low is put right by the measurement
a moment later. A guess is never larger than a pod and so never the reason why a model is refused; a measurement, or a
file, that is larger than any pod is.

What is kept is bounded: some ratios for each of the types that were seen last.
"""

import enum
from collections import deque
from dataclasses import dataclass

from cachetools import LRUCache

from placement import words
from placement.footprint import OVERHEAD_BYTES, SESSION_BYTES, Footprint

SAMPLES = 33
"""Ratios that are kept of a type; odd, so that there is a middle one."""

ENOUGH = 3
"""Ratios of a type from which on they are believed."""

TYPES = 1024

TOLERANCE = 0.10
"""A prediction within this share of what was measured was right."""


class Source(enum.Enum):
    """What a prediction rests on."""

    MEASURED = "measured"
    TYPE = "type"
    DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a load is reckoned with."""

    footprint: Footprint
    source: Source
    why: str


@dataclass(frozen=True, slots=True)
class SizesStatistics:
    """How predictions did. Bytes are sums over both memories."""

    predictions: int  # that were compared with a measurement
    over: int  # predicted too large: copies were evicted for nothing
    under: int  # predicted too small: memory was promised twice for a moment
    over_bytes: int
    under_bytes: int
    types: int  # with learned ratios


class Sizes:
    """Predicts, and learns from what is measured."""

    __slots__ = ("_default_bytes", "_over", "_over_bytes", "_predictions", "_ratios", "_under", "_under_bytes")

    def __init__(self, *, default_bytes: int = 0) -> None:
        """`default_bytes` is reckoned with where neither the model, nor its type, nor its file is known."""
        self._default_bytes = default_bytes
        self._ratios: LRUCache[tuple[str, bool], deque[float]] = LRUCache(maxsize=2 * TYPES)
        self._predictions = self._over = self._under = 0
        self._over_bytes = self._under_bytes = 0

    def predict(
        self,
        model_type: str,
        *,
        file_bytes: int = 0,
        measured: Footprint | None = None,
        device: bool = False,
        limit_bytes: int | None = None,
    ) -> Prediction:
        """What a model will take. `file_bytes` 0: not known yet. `device`: on a pod that keeps models on one.
        `limit_bytes` bounds a guess, not what was measured: the capacity of the largest pod, of its device's memory
        where it has one."""
        if measured is not None and measured.total_bytes:
            footprint = measured.on(device=device)
            where = " without a device" if device and not measured.device_bytes else ""
            return Prediction(footprint, Source.MEASURED, f"{footprint}, measured by an earlier load{where}")
        ratio = self.ratio(model_type, device=device)
        if not file_bytes:
            return self._bounded(Footprint(self._default_bytes), limit_bytes, Source.DEFAULT, "nothing is known of it")
        if ratio is None:
            why = f"about its file of {words.size(file_bytes)}"
            return self._bounded(_with_weights(file_bytes, device), limit_bytes, Source.DEFAULT, why)
        why = f"{ratio:.2g} times its file of {words.size(file_bytes)}, as models of type {model_type} take"
        return self._bounded(_with_weights(round(file_bytes * ratio), device), limit_bytes, Source.TYPE, why)

    def learn(
        self,
        model_type: str,
        *,
        predicted: Footprint,
        measured: Footprint,
        file_bytes: int = 0,
        device: bool = False,
    ) -> None:
        """A load has ended and was measured. Nothing is learned of a server that does not measure (0 bytes)."""
        took = measured.total_bytes
        if not took:
            return
        self._predictions += 1
        wrong = predicted.total_bytes - took
        if wrong > TOLERANCE * took:
            self._over += 1
            self._over_bytes += wrong
        elif wrong < -TOLERANCE * took:
            self._under += 1
            self._under_bytes -= wrong
        if file_bytes > 0:
            ratios = self._ratios.get((model_type, device))
            if ratios is None:
                ratios = self._ratios[model_type, device] = deque(maxlen=SAMPLES)
            ratios.append(max(0, took - _with_weights(0, device).total_bytes) / file_bytes)

    def ratio(self, model_type: str, *, device: bool = False) -> float | None:
        """Bytes in memory for each byte of a file, as the type has shown; None while too few are known."""
        ratios = self._ratios.get((model_type, device))
        if ratios is None or len(ratios) < ENOUGH:
            return None
        return sorted(ratios)[(len(ratios) - 1) // 2]

    def statistics(self) -> SizesStatistics:
        """How predictions did so far."""
        types = len({model_type for model_type, _ in self._ratios})
        return SizesStatistics(self._predictions, self._over, self._under, self._over_bytes, self._under_bytes, types)

    @staticmethod
    def _bounded(footprint: Footprint, limit: int | None, source: Source, why: str) -> Prediction:
        if limit is not None and footprint.total_bytes > limit:
            footprint = Footprint(0, limit) if footprint.device_bytes else Footprint(limit)
            why += f"; {words.size(limit)} are the most that a pod can hold"
        return Prediction(footprint, source, why)


def _with_weights(weights: int, device: bool) -> Footprint:
    """What a session with such weights takes."""
    return Footprint(OVERHEAD_BYTES, SESSION_BYTES + weights) if device else Footprint(OVERHEAD_BYTES + weights)
