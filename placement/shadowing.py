"""The part of its calls that a shadow actually gets, so that callers are not slowed down.

A shadow uses processors that callers may need, and no counter shows how much capacity is left over, least of all in
pods on other machines. But the effect can be measured. Callers' calls that began during a shadow call are compared with
those that did not, by the averages of the logarithms of their times, so that a few slow calls do not decide. If the
former are slower by more than a tenth, the shadow gets fewer calls, down to one in a hundred, which no longer affects
the callers' 99th percentile. If they are not slower, the shadow gets more calls again. Only the beginning of a call
counts, not whether it overlapped, because long calls overlap others just by being long.

If every call begins during a shadow call, there is nothing to compare with. The shadow then pauses until a call has
begun without it.
"""

import math

SLOWER = math.log(1.1)
"""The slowdown, as a logarithm, beyond which a shadow gets fewer calls."""

LEAST = 0.01
"""The smallest part of its calls to which a shadow is reduced."""

ENOUGH = 20
"""Number of calls of each kind that must have ended before they are compared."""

STALE = 50
"""Number of successive calls that begin during shadow calls before the shadow has to pause."""

WAY = 0.001
"""Seconds that a call spends between its client and this process. They are added because the total is what clients
notice."""

_WEIGHT = 0.02  # weight of a new call in the averages
_FEWER = 0.97  # factor for each call during a shadow call, while callers are slowed down
_MORE = 0.005  # summand for each such call, while they are not


class Shadowing:
    """The measurements of one shadow's effect in one process. Times are in seconds."""

    __slots__ = ("_alone", "_beside", "_counts", "_since", "part")

    def __init__(self) -> None:
        self._alone = self._beside = 0.0  # averages of the logarithms of callers' times
        self._counts = [0, 0]  # alone, beside
        self._since = 0  # successive calls that began during shadow calls
        self.part = 1.0
        """The part of its calls that the shadow gets now."""

    @property
    def slowdown(self) -> float:
        """The ratio of callers' times during shadow calls to those without; 1 until enough calls are known."""
        return 1.0 if min(self._counts) < ENOUGH else math.exp(self._beside - self._alone)

    @property
    def pauses(self) -> bool:
        """True if the shadow must get no calls until a caller's call has begun without a shadow call."""
        return self._since >= STALE

    def noted(self, time: float, *, beside: bool) -> None:
        """Records the time of a caller's call that has ended, and whether it began during a shadow call."""
        logarithm = math.log(time + WAY)
        count = self._counts[beside] = self._counts[beside] + 1
        weight = max(_WEIGHT, 1 / count)
        if not beside:
            self._alone += (logarithm - self._alone) * weight
            self._since = 0
            return
        self._beside += (logarithm - self._beside) * weight
        self._since += 1
        if min(self._counts) < ENOUGH:
            return
        if self._beside - self._alone > SLOWER:
            self.part = max(LEAST, self.part * _FEWER)
        else:
            self.part = min(1.0, self.part + _MORE)
