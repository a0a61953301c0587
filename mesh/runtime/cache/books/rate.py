"""Calls a minute, from a counter that only grows."""

import asyncio
import time
from collections import deque
from collections.abc import Callable

WINDOW, STEP = 60.0, 5.0
"""Seconds that the rate is about, and between two readings."""


class Rate:
    """Reads `count` every few seconds while `run` runs."""

    def __init__(self, count: Callable[[], int], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._count = count
        self._clock = clock
        self._readings: deque[tuple[float, int]] = deque()  # (seconds, count)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self.read()
            await asyncio.sleep(STEP)

    def read(self) -> None:
        """One reading."""
        now = self._clock()
        self._readings.append((now, self._count()))
        while now - self._readings[0][0] > WINDOW:
            self._readings.popleft()

    @property
    def per_minute(self) -> int:
        """Over the last minute. In the first seconds, little has been seen and not much is made of it."""
        if len(self._readings) < 2:
            return 0
        (start, before), (end, now) = self._readings[0], self._readings[-1]
        return round((now - before) * 60 / max(end - start, WINDOW / 4))
