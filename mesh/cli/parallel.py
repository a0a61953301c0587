"""The same work by several tasks at once, such as batches that they take from one iterator."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any


async def run(work: Callable[[], Coroutine[Any, Any, None]], count: int, *errors: type[Exception]) -> None:
    """Runs `work` in `count` tasks until all have ended. The first that fails ends the others.

    Raises one of `errors` as itself; any other error in an ExceptionGroup."""
    failure: BaseException | None = None
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(work())
    except* errors as several:
        failure = several.exceptions[0]
    if failure is not None:  # raised here, because before 3.11.4 an error raised above comes in a group of its own
        raise failure
