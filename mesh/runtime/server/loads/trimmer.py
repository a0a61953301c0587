"""The return of freed memory to the system, once for several unloads, and when calls have left much freed memory
behind.

`memory` explains why glibc does not do this by itself. The agent watches resident memory, which becomes less.
"""

import asyncio
import time

from mesh.runtime.server.onnx import memory
from mesh.runtime.server.workers import Workers

_DELAY = 0.3  # seconds to wait for further unloads
_SLACK = 64 << 20  # freed bytes still held that cause a trim without an unload
_PAUSE = 10.0  # seconds between two trims without an unload


class Trimmer:
    """Calls `malloc_trim` in a thread of `workers` when it is due."""

    def __init__(self, workers: Workers) -> None:
        self._loop = asyncio.get_running_loop()
        self._workers = workers
        self._timer: asyncio.TimerHandle | None = None
        self._trimming: asyncio.Future[None] | None = None
        self._again = False
        self._looked = 0.0
        self._base = memory.private() - memory.in_use()  # resident and not from malloc: Python's objects, stacks
        self.count = 0

    def soon(self) -> None:
        """Schedules a trim because memory was freed. Does nothing if a trim is already scheduled."""
        if self._trimming is not None and not self._trimming.done():
            self._again = True
        elif self._timer is None:
            self._timer = self._loop.call_later(_DELAY, self._trim)

    def look(self) -> None:
        """Schedules a trim if calls have left much freed memory behind, every 10 s at most. Call it about once a
        second."""
        now = time.monotonic()
        if now - self._looked > _PAUSE and memory.private() - memory.in_use() - self._base > _SLACK:
            self._looked = now
            self.soon()

    def close(self) -> None:
        """Cancels the scheduled trim."""
        if self._timer is not None:
            self._timer.cancel()

    def _trim(self) -> None:
        self._timer = None
        self.count += 1
        self._trimming = self._workers.call(memory.trim)
        self._trimming.add_done_callback(self._trimmed)

    def _trimmed(self, trimming: "asyncio.Future[None]") -> None:
        trimming.result()
        if self._again:
            self._again = False
            self.soon()
