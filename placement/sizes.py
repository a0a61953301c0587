"""How much memory a model will take, before anybody knows, and how wrong that was.

Best is what an earlier load of this very model measured. Else what its type has shown: a line through measured bytes
over file bytes, learned from every load. Its slope is what a byte of a file becomes, its intercept what a session takes
without any; both are middle values over the last few loads, so that neither one odd model nor an old time decides.
Files below `SMALL_BYTES` say what a session takes and nothing about the slope: 80 KB for a file of 558 bytes is no
factor of 150. Else a default: about its file. Apart for pods with and without a device.

Guesses are low on purpose: guessing high evicts copies that need not go, guessing low is put right by the measurement
a moment later. A guess is never larger than a pod and so never the reason why a model is refused; a measurement, or a
file, that is larger than any pod is. And a guess alone evicts no more than about twice the file: `Prediction.steps`
says what to reserve for one, where there is little room.

What is kept is bounded: some loads of each of the types that were seen last.
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
"""Loads that are kept of a type, as many again of small files; odd, so that there is a middle one."""

ENOUGH = 3
"""Loads of a type from which on they are believed."""

SMALL_BYTES = 64 << 10
"""Files below this teach no slope: their session takes more than they do."""

SPREAD = 4
"""How many times as large as the smallest the largest file must be for loads of larger files alone to tell slope and
intercept apart."""

MOST = 2
"""Times its file that a guess may evict."""

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
    file_bytes: int = 0

    def steps(self, free: Footprint) -> tuple[Footprint, ...]:
        """What to reserve, in this order, until there is room for one, where `free` is what nobody has.

        A measurement, all of it. A guess, as much as is free anyway, or about twice the file; and where there is no
        room even for that, about the file itself. So nobody is refused, and no more evicted, for a guess alone: the
        load is tried, and measured."""
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
    """A line through what loads of a type took, over the sizes of their files."""

    base_bytes: int
    ratio: float

    def of(self, file_bytes: int) -> int:
        """Bytes for a file of that size."""
        return round(self.base_bytes + self.ratio * file_bytes)


class _Seen:
    """What was learned of a type: (file, measured) of its last loads, small files apart."""

    __slots__ = ("fit", "large", "small")

    def __init__(self) -> None:
        self.small: deque[tuple[int, int]] = deque(maxlen=SAMPLES)
        self.large: deque[tuple[int, int]] = deque(maxlen=SAMPLES)
        self.fit: Fit | None = None  # worked out when it is asked for


@dataclass(frozen=True, slots=True)
class SizesStatistics:
    """How predictions did. Bytes are sums over both memories."""

    predictions: int  # that were compared with a measurement
    over: int  # predicted too large: copies were evicted for nothing
    under: int  # predicted too small: memory was promised twice for a moment
    over_bytes: int
    under_bytes: int
    types: int  # that something was learned of


class Sizes:
    """Predicts, and learns from what is measured."""

    __slots__ = ("_default_bytes", "_over", "_over_bytes", "_predictions", "_seen", "_under", "_under_bytes")

    def __init__(self, *, default_bytes: int = 0) -> None:
        """`default_bytes` is reckoned with where neither the model, nor its type, nor its file is known."""
        self._default_bytes = default_bytes
        self._seen: LRUCache[tuple[str, bool], _Seen] = LRUCache(maxsize=2 * TYPES)
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
        if not file_bytes:
            return self._bounded(
                Footprint(self._default_bytes), 0, limit_bytes, Source.DEFAULT, "nothing is known of it"
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
            seen = self._seen.get((model_type, device))
            if seen is None:
                seen = self._seen[model_type, device] = _Seen()
            (seen.small if file_bytes < SMALL_BYTES else seen.large).append((file_bytes, took))
            seen.fit = None

    def fit(self, model_type: str, *, device: bool = False) -> Fit | None:
        """What the type has shown; None while too few loads are known."""
        seen = self._seen.get((model_type, device))
        if seen is None or max(len(seen.small), len(seen.large)) < ENOUGH:
            return None
        if seen.fit is None:
            seen.fit = _fit(seen, _with_weights(0, device).total_bytes)
        return seen.fit

    def statistics(self) -> SizesStatistics:
        """How predictions did so far."""
        types = len({model_type for model_type, _ in self._seen})
        return SizesStatistics(self._predictions, self._over, self._under, self._over_bytes, self._under_bytes, types)

    @staticmethod
    def _bounded(footprint: Footprint, file: int, limit: int | None, source: Source, why: str) -> Prediction:
        if limit is not None and footprint.total_bytes > limit:
            footprint = Footprint(0, limit) if footprint.device_bytes else Footprint(limit)
            why += f"; {words.size(limit)} are the most that a pod can hold"
        return Prediction(footprint, source, why, file)


def _fit(seen: _Seen, usual_base: int) -> Fit:
    """The line: intercept from small files where there are enough, else from larger ones where their sizes differ
    enough to tell, else what sessions usually take."""
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
    """The lower median."""
    return sorted(values)[(len(values) - 1) // 2]


def _in(took: int, device: bool) -> Footprint:
    """So much in the memory that weights are kept in."""
    return Footprint(min(OVERHEAD_BYTES, took), max(0, took - OVERHEAD_BYTES)) if device else Footprint(took)


def _with_weights(weights: int, device: bool) -> Footprint:
    """What a session with such weights takes."""
    return Footprint(OVERHEAD_BYTES, SESSION_BYTES + weights) if device else Footprint(OVERHEAD_BYTES + weights)
