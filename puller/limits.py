"""The bounds of a pod's use of the network: bytes a second, and concurrent connections, in total and to each store.

A starting pod fetches many models over the link that also carries its calls. The bandwidth is a token bucket that is
charged after bytes have arrived: a pull that took too many waits until they are paid for, which slows the sender
through TCP. Both the event loop and threads use the bucket, so it returns the time to wait and leaves the waiting to
them.

Large files are fetched in several concurrent ranges, since a single connection is limited to the TLS speed of one core
and to one machine of the store. Measured for 1 GiB from a local S3 server: one stream 1,542 MB/s, eight of 128 MiB each
2,006 MB/s; over TLS 110 MB/s and 412 MB/s.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from puller.shares import Shares

_LEAST = 4  # connections that a store may always have, regardless of others
_BEYOND = 128  # connections for that, in all
_BURST = 0.1  # seconds' worth of bytes that may arrive at once after a pause


@dataclass(frozen=True, slots=True)
class LimitsStatistics:
    """The connections in use, and the callers that wait for one."""

    connections: int
    waiting: int  # for a connection


class PullLimits:
    """The bounds that all pulls of a pod share. `connection` is for one event loop, `take` for any thread."""

    def __init__(
        self,
        *,
        bytes_per_second: int = 0,
        connections: int = 32,
        ranges: int = 8,
        range_bytes: int = 128 * 2**20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Makes the bounds; 0 for `bytes_per_second` means no limit. Files of more than `range_bytes` are fetched in up
        to `ranges` parts at the same time. Raises ValueError for a bound that is too small."""
        bounds = {"bytes_per_second": (bytes_per_second, 0), "range_bytes": (range_bytes, 1)}
        bounds |= {"connections": (connections, 1), "ranges": (ranges, 1)}
        for name, (value, least) in bounds.items():
            if value < least:
                raise ValueError(f"{name} is {value}: it must be {least} or more")
        self.connections = connections
        self.ranges = ranges
        self.range_bytes = range_bytes
        self._rate = bytes_per_second
        self._clock = clock
        self._paid_at = 0.0  # time at which all bytes taken so far are paid for
        self._lock = threading.Lock()
        each = -(-connections * 3 // 4)
        self._slots = Shares(total=connections, each=each, least=min(_LEAST, each), most=connections + _BEYOND)

    def take(self, count: int) -> float:
        """Notes that `count` bytes have arrived; returns the seconds to wait before asking for more."""
        if not self._rate:
            return 0.0
        with self._lock:
            now = self._clock()
            self._paid_at = max(self._paid_at, now - _BURST) + count / self._rate
            return max(0.0, self._paid_at - now)

    async def acquire(self, store: str) -> None:
        """Takes one of the pod's connections for this store, once one is free. A caller that holds a connection must
        not ask for a second one."""
        await self._slots.acquire(store)

    def release(self, store: str) -> None:
        """Gives back a connection that was taken for this store."""
        self._slots.release(store)

    @asynccontextmanager
    async def connection(self, store: str) -> AsyncIterator[None]:
        """Holds a connection for as long as the block lasts."""
        async with self._slots.turn(store):
            yield

    async def in_parts(
        self, missing: list[tuple[int, int]], fetch: Callable[[int, int], Coroutine[Any, Any, None]]
    ) -> None:
        """Fetches ranges (first byte, one after the last) in several concurrent parts. Raises the first error of a
        part.

        `fetch` must take a connection for its part.
        """
        queue = iter(self.parts(missing))

        async def work() -> None:
            for start, end in queue:
                await fetch(start, end)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.ranges, len(self.parts(missing)))):
                    group.create_task(work())
        except BaseExceptionGroup as errors:
            # `from None`: the others failed similarly, and a cause may quote secrets.
            raise errors.exceptions[0] from None

    def parts(self, missing: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Cuts ranges (first byte, one after the last) into parts of at most `range_bytes` bytes, in order."""
        parts: list[tuple[int, int]] = []
        for start, end in missing:
            length = end - start
            pieces = -(-length // self.range_bytes)
            # Parts of equal length: 129 MiB as 65 and 64, not as 128 and 1.
            step = -(-length // max(pieces, 1))
            parts.extend((at, min(at + step, end)) for at in range(start, end, max(step, 1)))
        return parts

    def statistics(self) -> LimitsStatistics:
        """Returns how many connections are in use, and how many callers wait."""
        return LimitsStatistics(self._slots.taken, self._slots.waiting)
