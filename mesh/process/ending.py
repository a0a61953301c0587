"""The end of a process that cannot continue: orderly, bounded in time, with the reason as the last line of its log.

A process that cannot continue may not be able to end in order either. Such an end therefore has a time limit, after
which the process exits, and its children are killed with it (`child`). The time for an ordinary end is limited by the
sender of the signal.
"""

import asyncio
import logging
import os
import sys
from collections.abc import Awaitable

from mesh.telemetry import logs

log = logs.get(__name__)


class Ending:
    """The reason why this process must end. Only the first reason is kept."""

    __slots__ = ("_known", "_leaving", "why")

    def __init__(self) -> None:
        self.why = ""
        self._leaving = False
        self._known = asyncio.Event()

    def because(self, why: str) -> None:
        """Notes the reason. Does nothing if the process is already ending, because the end of a task means nothing
        then."""
        if not self.why and not self._leaving:
            self.why = why
            self._known.set()

    async def wait(self) -> str:
        """Waits for a reason, and returns it."""
        await self._known.wait()
        return self.why

    async def close(self, closing: Awaitable[None], *, within: float) -> int:
        """Awaits `closing`, which ends the parts of the process. Returns the exit status: 1 if a reason was noted, 0
        otherwise. If a reason was noted and `closing` takes more than `within` seconds, exits the process at once, with
        status 1."""
        self._leaving = True
        if not self.why:
            await closing
            return 0
        task = asyncio.ensure_future(closing)
        done, _ = await asyncio.wait({task}, timeout=within)
        if not done:
            log.warning("the parts of this process did not end in time", waited=within)
        elif not task.cancelled() and (error := task.exception()) is not None:
            log.error("ending the parts of this process failed", exc_info=error)
        log.error("this process ends: it cannot continue", why=self.why)
        if not done:
            logging.shutdown()
            sys.stderr.flush()
            os._exit(1)
        return 1
