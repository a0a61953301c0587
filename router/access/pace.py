"""A limit on the rate of failures."""

import time
from collections.abc import Callable


class Failures:
    """A budget of failures, which refills at a steady rate. While it is used up, no further attempt is allowed."""

    __slots__ = ("_clock", "_left", "_most", "_rate", "_seen", "refused")

    def __init__(self, rate: float, most: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Makes a full budget of `most` failures, which gains `rate` failures per second."""
        self.refused = 0  # attempts that were not allowed
        self._rate = rate
        self._most = self._left = most
        self._clock = clock
        self._seen = clock()

    def allow(self) -> bool:
        """Returns whether another attempt is allowed."""
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._seen) * self._rate)
        self._seen = now
        if self._left >= 1.0:
            return True
        self.refused += 1
        return False

    def failed(self) -> None:
        """Notes a failed attempt."""
        self._left -= 1.0
