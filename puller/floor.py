"""The minimum rate at which a store must send. A store that sends too slowly is as bad as one that hangs.

Only the time spent waiting for the store counts, not the handling of its bytes, because the operator's bandwidth limit
and the pod's disk may be slow.
"""

import time
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

from puller.errors import PullError, PullErrorKind

LEAST_RATE = 1024  # bytes per second, over a whole read time-out: slower than any usable link

_Piece = TypeVar("_Piece", bytes, memoryview)


async def kept(
    pieces: AsyncIterator[_Piece],
    *,
    shown: str,
    window: float,
    least: int = LEAST_RATE,
    clock: Callable[[], float] = time.monotonic,
) -> AsyncIterator[_Piece]:
    """Yields the pieces of a body. Raises PullError(SLOW) if fewer than `least` bytes arrive in `window` seconds of
    waiting."""
    waited, came = 0.0, 0
    while True:
        began = clock()
        try:
            piece = await anext(pieces)
        except StopAsyncIteration:
            return
        waited, came = waited + clock() - began, came + len(piece)
        if waited >= window:
            if came < window * least:
                text = f"{shown} is sent too slowly ({came} bytes in {waited:.0f} s): check the store, and the network "
                raise PullError(PullErrorKind.SLOW, text + "between it and the pods")
            waited, came = 0.0, 0
        yield piece
