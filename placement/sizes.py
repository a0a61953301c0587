"""Estimates of the memory that a model will take before it is measured, and their accuracy.

The best source is the measurement of an earlier load of the same model. The next one is its type: a line through
measured bytes over file bytes, learned from every load. The slope is the memory for each byte of a file, the intercept
the memory that a session takes besides; both are medians over the last loads, so that neither an odd model nor the
distant past has much influence. Files below `SMALL_BYTES` only contribute to the intercept: 80 KB for a file of 558
bytes does not mean a slope of 150. The last source is the file's size. Pods with and without a device have separate
lines.

Estimates are low on purpose: a high one evicts copies without need, while a low one is corrected by the measurement a
moment later. An estimate is never larger than a pod, so a load is never refused because of an estimate; it is refused
if a measurement, or a file, is larger than any pod. An estimate alone evicts no more than about twice the file:
`Prediction.steps` lists what to reserve if there is little room.

The memory used here is bounded: a few dozen loads of each of the types seen last.
"""

import enum
import itertools
from collections import deque
from dataclasses import dataclass
from typing import TypeVar

from cachetools import LRUCache

from placement import words
from placement.footprint import OVERHEAD_BYTES, SESSION_BYTES, Footprint

SAMPLES = 33
"""Loads kept for each type, and as many of small files. The number is odd, so that there is a middle one."""

ENOUGH = 3
"""Loads of a type that are needed before they are trusted."""

SMALL_BYTES = 64 << 10
"""Files below this size do not contribute to the slope: their sessions take more than the file."""

SPREAD = 4
"""Smallest ratio of the largest to the smallest file with which large files alone can tell slope and intercept
apart."""

MOST = 2
"""Multiple of the file's size up to which an estimate may evict copies."""

TYPES = 1024

TOLERANCE = 0.10
"""Largest relative error of an estimate that counts as right."""


class Source(enum.Enum):
    """The source of an estimate."""

    MEASURED = "measured"
    TYPE = "type"
    DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Prediction:
    """The memory that a load is expected to take."""

    footprint: Footprint
    source: Source
    why: str
    file_bytes: int = 0

    def of(self, footprint: Footprint) -> "Prediction":
        """Returns the prediction with another footprint."""
        return Prediction(footprint, self.source, self.why, self.file_bytes)

    def steps(self, free: Footprint) -> tuple[Footprint, ...]:
        """Returns the reservations to try, in this order, until there is room for one; `free` is unused memory.

        A measurement is reserved completely. For an estimate, the first try is as much as is free anyway, or about
        twice the file; the next is about the file itself. Because of an estimate alone, no load is refused and no more
        is evicted: the load is tried and measured.
        """
        if self.source is Source.MEASURED:
            return (self.footprint,)
        device = self.footprint.device_bytes > 0
        found: list[Footprint] = []
        for times in (MOST, 1):
            about = _with_weights(times * self.file_bytes, device)
            host = min(self.footprint.host_bytes, max(free.host_bytes, about.host_bytes))
            on_device = min(self.footprint.device_bytes, max(free.device_bytes, about.device_bytes))
            if not found or found[-1] != Footprint(host, on_device):
                found.append(Footprint(host, on_device))
        return tuple(found)


@dataclass(frozen=True, slots=True)
class Fit:
    """A line: the memory that loads of a type take, as a function of their files' sizes."""

    base_bytes: int
    ratio: float

    def of(self, file_bytes: int) -> int:
        """Returns the bytes for a file of that size."""
        return round(self.base_bytes + self.ratio * file_bytes)


class _Observations:
    """The last loads of a type as pairs (file bytes, measured bytes); small files are separate."""

    __slots__ = ("fit", "large", "small")

    def __init__(self) -> None:
        self.small: deque[tuple[int, int]] = deque(maxlen=SAMPLES)
        self.large: deque[tuple[int, int]] = deque(maxlen=SAMPLES)
        self.fit: Fit | None = None  # computed on demand


@dataclass(frozen=True, slots=True)
class SizesStatistics:
    """The accuracy of estimates. Bytes are sums of host and device memory."""

    predictions: int  # compared with a measurement
    over: int  # larger than the measurement by more than `TOLERANCE`
    under: int  # smaller by more than `TOLERANCE`
    over_bytes: int
    under_bytes: int
    types: int  # with observations


class Sizes:
    """Estimates of sizes that learn from measurements."""

    __slots__ = ("_default_bytes", "_over", "_over_bytes", "_predictions", "_seen", "_under", "_under_bytes")

    def __init__(self, *, default_bytes: int = 0) -> None:
        """Starts without observations. `default_bytes` is the estimate for a model that was never measured and whose
        file's size is unknown."""
        self._default_bytes = default_bytes
        self._seen: LRUCache[tuple[str, bool], _Observations] = LRUCache(maxsize=2 * TYPES)
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
        """Estimates the memory that a model will take.

        `file_bytes` is 0 while unknown. `device` is true if the pod keeps models on a device. `limit_bytes` bounds
        an estimate, but not a measurement: it is the capacity of the largest pod, or of its device.
        """
        if measured is not None and measured.total_bytes:
            footprint = measured.on(device=device)
            where = " without a device" if device and not measured.device_bytes else ""
            return Prediction(footprint, Source.MEASURED, f"{footprint}, measured by an earlier load{where}")
        if not file_bytes:
            return self._bounded(
                Footprint(self._default_bytes), 0, limit_bytes, Source.DEFAULT, "nothing is known about it"
            )
        fit = self.fit(model_type, device=device)
        if fit is None:
            why = f"about its file of {words.size(file_bytes)}"
            return self._bounded(_with_weights(file_bytes, device), file_bytes, limit_bytes, Source.DEFAULT, why)
        why = f"{words.size(fit.base_bytes)} and {fit.ratio:.2g} times its file of {words.size(file_bytes)}"
        why += f", as models of type {model_type} take"
        footprint = _in(fit.of(file_bytes), device)
        return self._bounded(footprint, file_bytes, limit_bytes, Source.TYPE, why)

    def learn(
        self,
        model_type: str,
        *,
        predicted: Footprint,
        measured: Footprint,
        file_bytes: int = 0,
        device: bool = False,
    ) -> None:
        """Learns from a measured load. A measurement of 0 bytes is ignored: its server does not measure."""
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
            seen = self._seen.get((model_type, device))
            if seen is None:
                seen = self._seen[model_type, device] = _Observations()
            (seen.small if file_bytes < SMALL_BYTES else seen.large).append((file_bytes, took))
            seen.fit = None

    def fit(self, model_type: str, *, device: bool = False) -> Fit | None:
        """Returns the line of a type, or None while there are too few loads."""
        seen = self._seen.get((model_type, device))
        if seen is None or max(len(seen.small), len(seen.large)) < ENOUGH:
            return None
        if seen.fit is None:
            seen.fit = _fit(seen, _with_weights(0, device).total_bytes)
        return seen.fit

    def statistics(self) -> SizesStatistics:
        """Returns how accurate the estimates have been so far."""
        types = len({model_type for model_type, _ in self._seen})
        return SizesStatistics(self._predictions, self._over, self._under, self._over_bytes, self._under_bytes, types)

    @staticmethod
    def _bounded(footprint: Footprint, file: int, limit: int | None, source: Source, why: str) -> Prediction:
        if limit is not None and footprint.total_bytes > limit:
            footprint = Footprint(0, limit) if footprint.device_bytes else Footprint(limit)
            why += f"; {words.size(limit)} are the most that a pod can hold"
        return Prediction(footprint, source, why, file)


def _fit(seen: _Observations, usual_base: int) -> Fit:
    """Fits the line. The intercept comes from small files if there are enough of them, or else from larger ones if
    their sizes differ enough; otherwise it is the memory that sessions usually take."""
    base, ratio = usual_base, 1.0
    if len(seen.small) >= ENOUGH:
        base = max(0, _middle([took - file for file, took in seen.small]))
    elif max(file for file, _ in seen.large) >= SPREAD * min(file for file, _ in seen.large):
        # The median of the slopes between all pairs (Theil-Sen): 33 loads are 528 pairs, 0.1 ms once after each load.
        slopes = [
            (took - other_took) / (file - other_file)
            for (file, took), (other_file, other_took) in itertools.combinations(seen.large, 2)
            if file != other_file
        ]
        slope = max(0.0, _middle(slopes))
        base = max(0, round(_middle([took - slope * file for file, took in seen.large])))
    if len(seen.large) >= ENOUGH:
        ratio = _middle([max(0, took - base) / file for file, took in seen.large])
    return Fit(base, ratio)


_Number = TypeVar("_Number", int, float)


def _middle(values: list[_Number]) -> _Number:
    return sorted(values)[(len(values) - 1) // 2]


def _in(took: int, device: bool) -> Footprint:
    """Returns the footprint of a session that `took` that many bytes in all. On a device, all but OVERHEAD_BYTES of
    them count as device memory."""
    return Footprint(min(OVERHEAD_BYTES, took), max(0, took - OVERHEAD_BYTES)) if device else Footprint(took)


def _with_weights(weights: int, device: bool) -> Footprint:
    """Returns the footprint of a session with weights of that many bytes."""
    return Footprint(OVERHEAD_BYTES, SESSION_BYTES + weights) if device else Footprint(OVERHEAD_BYTES + weights)
