"""The call rate of each copy, from readings of the use board every few seconds.

A rate is the mean of the latest reading and the rate before it, so a model that suddenly gets many calls is noticed
within seconds. A peak is remembered for some minutes, so that a short pause does not look like the end of the traffic.

The time that calls wait before they run follows from the number of waiting calls and the number answered per second
(Little's law). The board, which is written at every call, therefore does not have to record this time.
"""

import asyncio
import time
from collections.abc import Callable

from mesh.runtime.cache.books.entries import CacheEntry, EntryState
from mesh.runtime.cache.books.ledger import Ledger

STEP = 3.0
"""Seconds between two readings. Reading 2,000 copies takes 10 ms."""

REMEMBER = 300.0
"""Half-life of a remembered peak, in seconds."""


class Activity:
    """The computation of `rate`, `peak_rate` (in calls a minute) and `queue_ms` of the ledger's entries."""

    def __init__(self, ledger: Ledger, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._ledger = ledger
        self._clock = clock
        self._before: dict[CacheEntry, int] = {}  # calls at the last look
        self._at = clock()

    async def run(self) -> None:
        """Updates the rates every `STEP` seconds until cancelled."""
        while True:
            await asyncio.sleep(STEP)
            self.look()

    def look(self) -> None:
        """Updates the rates of all copies."""
        now = self._clock()
        elapsed = max(now - self._at, 0.001)
        fade = 0.5 ** (elapsed / REMEMBER)
        calls: dict[CacheEntry, int] = {}
        for entry in self._ledger.entries.values():
            if entry.state is not EntryState.LOADED or (use := self._ledger.use(entry)) is None:
                continue
            calls[entry] = use.calls
            made = use.calls - self._before.get(entry, 0)
            # Averaged with the previous rate, as a dozen calls in 3 s are not yet a rate.
            entry.rate = round((entry.rate + made * 60 / elapsed) / 2) if made else entry.rate // 2
            entry.peak_rate = max(entry.rate, int(entry.peak_rate * fade))
            waiting = max(0, use.in_flight - use.running)
            entry.queue_ms = round((entry.queue_ms + waiting * elapsed * 1000 / max(1, made)) / 2)
        self._before, self._at = calls, now


YOUNG = 60.0
"""Age up to which a copy counts as young, in seconds."""


def active(ledger: Ledger, entry: CacheEntry) -> bool:
    """Returns whether the leader should know of a copy, because it was called recently or has calls in flight, is
    pinned or young, or is being loaded or unloaded."""
    if entry.rate or entry.pinned or entry.state is not EntryState.LOADED or ledger.age(entry) < YOUNG:
        return True
    use = ledger.use(entry)
    return use is not None and use.in_flight > 0
