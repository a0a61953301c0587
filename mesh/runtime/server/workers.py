"""Threads that work is handed to, and that never keep the process from ending.

The standard executor waits for its threads when the interpreter ends; a model that never returns would then make an
orderly stop impossible. These threads are daemons, and one more can be added for each that will not come back.
"""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

from mesh.telemetry import logs

log = logs.get(__name__)

T = TypeVar("T")


class Workers:
    """Some threads on one queue, first come, first served. `put` and `call` are for the event loop's thread."""

    def __init__(self, name: str, count: int) -> None:
        self._name = name
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.count = 0
        for _ in range(count):
            self.grow()

    def put(self, work: Callable[[], None]) -> None:
        """Has `work` done by some thread. What it raises is logged: it should report by itself."""
        self._queue.put(work)

    def call(self, work: Callable[[], T]) -> "asyncio.Future[T]":
        """What `work` will give or raise. Cancelling the future does not stop the work."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(result: T | None, error: BaseException | None) -> None:
            if future.cancelled():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]

        def run() -> None:
            result: T | None = None
            error: BaseException | None = None
            try:
                result = work()
            except BaseException as raised:
                error = raised
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(settle, result, error)

        self.put(run)
        return future

    def grow(self) -> None:
        """Adds a thread."""
        self.count += 1
        threading.Thread(target=self._work, name=f"{self._name}-{self.count}", daemon=True).start()

    def close(self) -> None:
        """Lets threads end that have nothing to do."""
        for _ in range(self.count):
            self._queue.put(None)

    def _work(self) -> None:
        while (work := self._queue.get()) is not None:
            try:
                work()
            except BaseException:
                log.exception("work in a thread failed", thread=threading.current_thread().name)
            del work  # what it holds must not live until the next one comes
