"""Running the same function in several tasks, for example with batches from one iterator."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from mesh.cli.exits import MeshRefusal
from mesh.statuses import Reason

BUSY_SECONDS = 60.0
"""Longest time, in seconds, for which a batch is retried while the router's worker has as many batches under way as it
accepts."""

_PAUSE = 0.3  # seconds between two attempts


async def run(work: Callable[[], Coroutine[Any, Any, None]], count: int, *errors: type[Exception]) -> None:
    """Runs `work` in `count` tasks until all have ended. The first task that fails ends the others.

    Raises an error of the types in `errors` as it is, and any other error in an ExceptionGroup."""
    failure: BaseException | None = None
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(work())
    except* errors as several:
        failure = several.exceptions[0]
    if failure is not None:  # raised here, because before 3.11.4 an error raised above comes in a group of its own
        raise failure


async def admitted(send: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Sends a batch. Retries for at most `BUSY_SECONDS` while the worker that receives it has too many batches under
    way. Raises MeshRefusal."""
    end = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            await send()
            return
        except MeshRefusal as error:
            if error.reason != Reason.OVERLOADED.name or time.monotonic() > end:
                raise
        await asyncio.sleep(_PAUSE)
