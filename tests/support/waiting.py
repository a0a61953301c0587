"""Waiting for conditions, so that no test sleeps a fixed time."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


async def until(
    condition: Callable[[], T | Awaitable[T]],
    *,
    timeout: float = 10.0,
    interval: float = 0.01,
    why: str | Callable[[], str] = "",
) -> T:
    """Polls `condition` until its value is true, and returns the value. Raises AssertionError with `why` after
    `timeout` seconds."""
    end = time.monotonic() + timeout
    while True:
        result = condition()
        if isinstance(result, Awaitable):
            result = await result
        if result:
            return result
        if time.monotonic() > end:
            raise AssertionError(f"not within {timeout:g} s: {(why() if callable(why) else why) or condition}")
        await asyncio.sleep(interval)
