"""The progress of a pull, and its rate."""

import time
from collections.abc import Callable
from dataclasses import dataclass

_WINDOW = 2.0  # seconds, about, over which the rate is measured


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of one pull."""

    done_bytes: int  # on disk, fetched now or before
    total_bytes: int | None  # None: the store has not announced it
    bytes_per_second: float  # the current rate; 0 while nothing arrives
    seconds: float  # since it began


class PullMeter:
    """A counter of bytes and their recent rate. Several threads may call `add`, so a rate may be slightly off."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.bytes = 0
        self._clock = clock
        self._since = clock()
        self._before: tuple[float, int] = (self._since, 0)
        self._mark: tuple[float, int] = (self._since, 0)

    def add(self, count: int) -> None:
        """Notes that `count` bytes have arrived."""
        self.bytes += count
        now = self._clock()
        if now - self._mark[0] >= _WINDOW / 2:
            self._before, self._mark = self._mark, (now, self.bytes)

    def rate(self) -> float:
        """Returns the bytes a second, over about the last two seconds, or since the meter was made."""
        now = self._clock()
        at, count = self._before
        if now - self._mark[0] >= _WINDOW:
            at, count = self._mark  # nothing has arrived since
        return (self.bytes - count) / max(now - at, 1e-3)
