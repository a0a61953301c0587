"""The size of a foreign model on a pod's books, and the factor that keeps these books true.

A foreign server may say how large its models are, say nothing, or be wrong. The pod then looks at the memory of the
server's processes, and derives two figures:

- The *growth* during one load, if no other load or unload ran beside it (`settle`).
- The *factor* of the pod: the memory that its models really take, divided by the sum of their sizes on the books
  (`Factor`). The books count each copy with the factor, so their sum follows the memory even if every size is wrong.

A factor above 1 applies to all sizes. A factor below 1 only applies to guesses, and never leaves less than was
measured: a size that the server states may be memory that cannot be seen from outside, such as a device's. For a guess,
a load evicts no more than about twice the model's file (`placement.sizes`). A guess beyond that takes free memory only.

Servers keep freed memory for later loads, so the growth of a load after an unload is only a lower bound. The factor
makes up for that. It is smoothed, because memory and books never change at the same moment.
"""

import enum
import math
from dataclasses import dataclass

from placement import words
from placement.footprint import Footprint

LEAST, MOST = 0.5, 4.0
"""Bounds of the factor."""

RISE_S, FALL_S = 5.0, 20.0
"""Time constants of the smoothing, in seconds. Too low a factor fills the server's memory, so it rises faster."""

SOON_REFUTED = 3
"""Number of successive loads after which the server's sizes are refuted at once, if the largest factor does not explain
the memory after any of them."""

REFUTED = 0.95 * MOST
"""Factor from which the server's own sizes are no longer believed: they explain only about a quarter of the memory."""

SLACK_SHARE, SLACK_BYTES = 1 / 50, 16 << 20
"""Excess of observed memory over the books that is always allowed, for calls in flight and imported code: a share of
the capacity, and at least a number of bytes."""

_WORD = 1 << 63  # sizes from here on are negative numbers, sent as unsigned ones
_LONGEST_S = 5.0  # seconds that one look counts for at most


class SizeBasis(enum.Enum):
    """The evidence for a size on the books."""

    SAID = "said"  # by the server
    GROWN = "grown"  # the growth of its processes
    GUESSED = "guessed"


@dataclass(frozen=True, slots=True)
class Growth:
    """The growth of a server's memory during one load."""

    bytes: int
    alone: bool = True  # no other load or unload ran beside it
    fresh: bool = False  # the server had unloaded nothing before, so no freed memory was used again
    first: bool = False  # the server's first load, which also brings its libraries into memory


@dataclass(frozen=True, slots=True)
class Settled:
    """The size of a loaded model."""

    bytes: int
    basis: SizeBasis
    why: str
    least_bytes: int = 0  # measured, whatever the rest is

    @property
    def guessed(self) -> bool:
        """True if the size must not be remembered as a measurement."""
        return self.basis is SizeBasis.GUESSED


_IMPLAUSIBLE = "a guess: the size that its server states is implausible"


def plausible(size: int, capacity: int) -> int:
    """Returns a size that a server states, or 0 if it cannot be true for a model in a server of that capacity."""
    return size if 0 < size <= capacity else 0


def stated(size: int) -> int:
    """Returns a size that a server states, or 0 if it is a negative number."""
    return size if 0 < size < _WORD else 0


def settle(
    *,
    said: int,
    predicted: int,
    remembered: int = 0,
    reserved: int,
    free: int,
    capacity: int,
    growth: Growth | None,
    believed: bool = True,
) -> Settled:
    """Returns the size of a model that was just loaded.

    `said` is the size that the server states, `predicted` the estimate, and `remembered` the measurement of an earlier
    load, 0 if there is none. `reserved` is the room that the books hold for the load, and `free` the rest of the books'
    room. `growth` is None if the server's memory cannot be observed. `believed` means that the memory has not refuted
    the server's sizes. If the load ran alone, a remembered size counts only for half, so that a wrong one is forgotten
    after a few loads. All sizes are in bytes."""
    said, predicted = stated(said), stated(predicted)
    if growth is None:
        if plausible(said, capacity):
            return Settled(said, SizeBasis.SAID, "stated by its server")
        guess = max(plausible(predicted, capacity), plausible(remembered, capacity), reserved)
        why = "a guess: its server states no size" if not said else _IMPLAUSIBLE
        return Settled(guess, SizeBasis.GUESSED, why)
    if believed and plausible(said, capacity):
        return Settled(said, SizeBasis.SAID, "stated by its server")
    grown = max(0, growth.bytes) if growth.alone else 0
    guess = max(plausible(predicted, capacity), plausible(said, capacity))
    why = f"measured: its server's memory grew by {words.size(grown)}"
    if remembered and growth.alone:
        return Settled(max(grown, min(remembered, capacity) // 2), SizeBasis.GROWN, why, grown)
    if grown and not growth.first and (growth.fresh or grown >= guess):
        return Settled(max(grown, guess), SizeBasis.GROWN, why, grown)
    size = max(grown, reserved, min(max(guess, remembered), reserved + max(0, free)))
    why = "a guess: its server states no size" if not said else _IMPLAUSIBLE
    return Settled(size, SizeBasis.GUESSED, why, grown)


class Factor:
    """The factor of one pod, in one life of its server."""

    __slots__ = ("_beyond", "believed", "ratio", "value")

    def __init__(self) -> None:
        self.value = 1.0
        self.ratio = 1.0  # at the last look, without bounds
        self.believed = True  # False: the memory has refuted the server's own sizes
        self._beyond = 0  # loads in a row after which the memory exceeded what the largest factor explains

    def loaded(self, observed: int, accounted: int, *, capacity: int) -> None:
        """Adds an observation after a load, with arguments as for `look`. If the largest factor does not explain
        several of them in a row, the server's sizes are refuted at once, because its memory may be full a few loads
        later."""
        beyond = observed - max(SLACK_BYTES, int(capacity * SLACK_SHARE)) > MOST * accounted
        self._beyond = self._beyond + 1 if beyond else 0
        if self._beyond >= SOON_REFUTED:
            self.believed, self.value = False, MOST

    def look(self, observed: int, accounted: int, *, capacity: int, seconds: float) -> None:
        """Adds an observation, and updates the factor. `observed` is the server's memory beyond its memory without
        models, `accounted` the sum of sizes on the books, and `seconds` the time since the last observation."""
        if accounted <= 0 or seconds <= 0:
            return
        slack = max(SLACK_BYTES, int(capacity * SLACK_SHARE))
        if observed > accounted:
            self.ratio = max(1.0, (observed - slack) / accounted)
        else:
            self.ratio = observed / accounted
        goal = min(MOST, max(LEAST, self.ratio))
        constant = RISE_S if goal > self.value else FALL_S
        self.value += (goal - self.value) * -math.expm1(-min(seconds, _LONGEST_S) / constant)
        self.value = min(MOST, max(LEAST, self.value))
        if self.value >= REFUTED:
            self.believed = False

    def scaled(self, size: Footprint, *, guessed: bool = False, least_bytes: int = 0) -> Footprint:
        """Returns a footprint as the books count it. The factor applies to host memory only. A factor below 1
        applies to guesses only, and leaves at least `least_bytes`."""
        if self.value >= 1.0:
            host = math.ceil(size.host_bytes * self.value)
        elif guessed:
            host = max(least_bytes, math.ceil(size.host_bytes * self.value))
        else:
            return size
        return Footprint(host, size.device_bytes)
