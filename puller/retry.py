"""Retries of operations that may succeed a moment later; any other failure is final.

Pauses double, and each is drawn at random up to its bound, so that after a short fault of a store its whole fleet does
not return at the same moment. Both the number of attempts and their time are bounded. An attempt that made progress
does not count against either, since the next one has less to do.

A store that says how long to wait (`Retry-After`) is obeyed: a short wait happens here; a longer one ends the attempts,
and the error carries it to the caller, who decides when to ask again.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from puller.errors import PullError, PullErrorKind

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """The limits on the number of attempts and on their time. Times are in seconds."""

    attempts: int = 4  # in total, without progress in between
    first_pause: float = 0.2
    longest_pause: float = 5.0
    total: float = 60.0  # since the last progress; no attempt begins later
    longest_told: float = 10.0  # longest wait requested by a store that still happens here


async def retried(
    operation: Callable[[], Awaitable[_T]],
    policy: RetryPolicy,
    *,
    progress: Callable[[], int] = lambda: 0,
    on_retry: Callable[[PullError], None] = lambda error: None,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> _T:
    """Returns the operation's result. Raises the PullError of its last attempt. If several attempts were made and the
    error is of a kind that is retried, its text says how many there were.

    `progress` is a number that grows as the operation progresses: a new maximum restarts the count."""
    began = since = clock()
    attempts = failures = 0
    best = progress()
    while True:
        attempts += 1
        try:
            return await operation()
        except PullError as error:
            now = clock()
            # A trickle makes progress too, and would never end.
            if (reached := progress()) > best and error.kind is not PullErrorKind.SLOW:
                best, since, failures = reached, now, 0
            failures += 1
            if not error.kind.retried:
                raise
            told = error.retry_after or 0.0
            if failures >= policy.attempts or now + told - since >= policy.total or told > policy.longest_told:
                if attempts == 1:
                    raise
                text = f"{error.text} (tried {attempts} times in {now - began:.1f} s)"
                raise PullError(error.kind, text, retry_after=error.retry_after) from None
            on_retry(error)
        # The exponent is bounded: a float of 2 ** 1024 overflows.
        pause = min(policy.first_pause * 2.0 ** min(failures - 1, 64), policy.longest_pause)
        await sleep(max(told, pause * (0.5 + random.random() / 2)))
