"""The rate of calls a minute, computed from a counter that only grows."""

import asyncio
import time
from collections import deque
from collections.abc import Callable

WINDOW, STEP = 60.0, 5.0
"""Seconds that the rate covers, and seconds between two readings."""


class Rate:
    """A rate, computed from readings of `count` that `run` takes every few seconds."""

    def __init__(self, count: Callable[[], int], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._count = count
        self._clock = clock
        self._readings: deque[tuple[float, int]] = deque()  # (seconds, count)

    async def run(self) -> None:
        """Reads every `STEP` seconds until cancelled."""
        while True:
            self.read()
            await asyncio.sleep(STEP)

    def read(self) -> None:
        """Takes one reading."""
        now = self._clock()
        self._readings.append((now, self._count()))
        while now - self._readings[0][0] > WINDOW:
            self._readings.popleft()

    @property
    def per_minute(self) -> int:
        """The rate over the last minute. In the first 15 seconds, the rate is computed as if 15 seconds had passed, so
        that a few calls do not look like a high rate."""
        if len(self._readings) < 2:
            return 0
        (start, before), (end, now) = self._readings[0], self._readings[-1]
        return round((now - before) * 60 / max(end - start, WINDOW / 4))
