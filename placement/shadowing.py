"""The part of its calls that a shadow gets, so that callers are not slowed down.

A shadow uses processors that callers may need, and no counter shows how many are left over, least of all in pods on
other machines. But the effect can be seen. Callers' calls that began beside one of the shadow's are compared with those
that did not, by the averages of the logarithms of their times, since a few slow calls should not decide. If the former
are slower by more than a tenth, the shadow gets fewer calls, down to one in a hundred, which no longer shows in the
callers' 99th percentile; if they are not, it gets more again. How a call began counts, and not whether it overlapped:
long calls overlap others because they are long.

If every call begins beside one of the shadow's, there is nothing to compare with. Then the shadow has to pause until a
call has begun without it.
"""

import math

SLOWER = math.log(1.1)
"""The slowdown, as a logarithm, beyond which a shadow gets fewer calls."""

LEAST = 0.01
"""The part of its calls that a shadow always gets."""

ENOUGH = 20
"""Calls of either kind before they are compared."""

STALE = 50
"""Calls that began beside the shadow's since the last one that did not, before it has to pause."""

WAY = 0.001
"""Seconds that a call takes besides, between its client and this process: what matters is what clients notice."""

_WEIGHT = 0.02  # of a new call in the averages
_FEWER = 0.97  # factor, for each call beside the shadow's while callers are slowed down
_MORE = 0.005  # summand, for each while they are not


class Shadowing:
    """The account of one shadow, seen from one process. Times in seconds."""

    __slots__ = ("_alone", "_beside", "_counts", "_since", "part")

    def __init__(self) -> None:
        self._alone = self._beside = 0.0  # averages of the logarithms of callers' times
        self._counts = [0, 0]  # alone, beside
        self._since = 0  # calls that began beside the shadow's since the last one that did not
        self.part = 1.0
        """The part of its calls that the shadow gets now."""

    @property
    def slowdown(self) -> float:
        """The ratio of callers' times beside the shadow's calls to those without; 1 until enough are known."""
        return 1.0 if min(self._counts) < ENOUGH else math.exp(self._beside - self._alone)

    @property
    def pauses(self) -> bool:
        """True if the shadow must get no calls until a caller's call has begun without one of them."""
        return self._since >= STALE

    def noted(self, time: float, *, beside: bool) -> None:
        """Notes the time of a caller's call that has ended, and whether it began beside one of the shadow's."""
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
