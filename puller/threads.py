"""Threads for work on the pod's own disk, which must not block the event loop."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_T = TypeVar("_T")


class Threads:
    """A small pool of threads."""

    def __init__(self, count: int, name: str) -> None:
        self._executor = ThreadPoolExecutor(count, thread_name_prefix=name)

    async def run(
        self, function: Callable[..., _T], *arguments: object, undo: Callable[[_T], None] | None = None
    ) -> _T:
        """Runs the function to its end, even if the caller is cancelled meanwhile. The cancellation takes effect
        afterwards, and `undo` is called with the result, which the caller does not get."""
        work = self.begin(function, *arguments)
        cancelled: asyncio.CancelledError | None = None
        while not work.done():
            try:
                await asyncio.wait([work])
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            if work.exception() is None and undo is not None:
                undo(work.result())
            raise cancelled
        return work.result()

    def begin(self, function: Callable[..., _T], *arguments: object) -> "asyncio.Future[_T]":
        """Starts the function in a thread, and returns a future for its result. The function also runs if nothing
        awaits the future."""
        return asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)

    def close(self, *, drop: bool = False) -> None:
        """Ends the threads without waiting for them. `drop` discards work that has not begun."""
        self._executor.shutdown(wait=False, cancel_futures=drop)
