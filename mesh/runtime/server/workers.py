"""Threads for blocking work, which never keep the process from ending.

The standard executor waits for its threads when the interpreter ends, so a model that never returns would make an
orderly stop impossible. These threads are daemons, and one can be added for each that never returns.
"""

import asyncio
import contextlib
import os
import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from mesh.telemetry import logs

log = logs.get(__name__)

T = TypeVar("T")


class Workers:
    """Threads on one queue, first come, first served. `put` and `call` are for the event loop's thread."""

    def __init__(self, name: str, count: int) -> None:
        self._name = name
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.count = 0
        for _ in range(count):
            self.grow()

    def put(self, work: Callable[[], None]) -> None:
        """Queues `work` for a thread. Its exceptions are only logged; `call` returns a result."""
        self._queue.put(work)

    def call(self, work: Callable[[], T]) -> "asyncio.Future[T]":
        """Returns a future for the result or the exception of `work`. Cancelling the future does not stop the work."""
        future, run = _promise(work)
        self.put(run)
        return future

    def grow(self) -> None:
        """Adds a thread."""
        self.count += 1
        threading.Thread(target=self._work, name=f"{self._name}-{self.count}", daemon=True).start()

    def close(self) -> None:
        """Ends each thread once the work that is already queued is done."""
        for _ in range(self.count):
            self._queue.put(None)

    def _work(self) -> None:
        while (work := self._queue.get()) is not None:
            try:
                work()
            except BaseException:
                log.exception("work in a thread failed", thread=threading.current_thread().name)
            del work  # its memory must not be held until the next work arrives


class Lone(Generic[T]):
    """A thread for one piece of work that may take long. Its priority can be lowered. Starting a thread takes 0.1
    ms."""

    def __init__(self, name: str, work: Callable[[], T]) -> None:
        self.future, run = _promise(work)
        """The future for the result or the exception of the work. Cancelling it does not stop the work."""
        self._thread = threading.Thread(target=run, name=name, daemon=True)
        self._thread.start()

    def make_way(self) -> None:
        """Lowers the priority of the thread, if the system can do that for a single thread."""
        if self._thread.native_id is not None and self._thread.is_alive():
            with contextlib.suppress(OSError):  # the thread has just ended
                os.setpriority(os.PRIO_PROCESS, self._thread.native_id, _LOWER)


_LOWER = 10
"""Niceness with which a thread gets a tenth of the processor time of others. With an even smaller share, the thread
could hold the interpreter's lock for long when it returns from ONNX Runtime."""


def _promise(work: Callable[[], T]) -> "tuple[asyncio.Future[T], Callable[[], None]]":
    """Returns a future, and a function for another thread, which does the work and settles the future."""
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
        with contextlib.suppress(RuntimeError):  # the loop is closed: there are no waiters left
            loop.call_soon_threadsafe(settle, result, error)

    return future, run
