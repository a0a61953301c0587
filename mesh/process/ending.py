"""The end of a process that cannot continue: orderly, bounded in time, with the reason as the last line of its log.

A process that cannot continue may not be able to end in order either. So an end for such a reason has a time limit,
after which the process exits and its children die with it (`child`). For an ordinary end, the sender of the signal sets
the limit.
"""

import asyncio
import logging
import os
import sys
from collections.abc import Awaitable

from mesh.telemetry import logs

log = logs.get(__name__)


class Ending:
    """The reason why this process must end, once it is known. Only the first reason is kept."""

    __slots__ = ("_known", "_leaving", "why")

    def __init__(self) -> None:
        self.why = ""
        self._leaving = False
        self._known = asyncio.Event()

    def because(self, why: str) -> None:
        """Notes the reason, unless the process is already ending: its tasks may then end for any reason."""
        if not self.why and not self._leaving:
            self.why = why
            self._known.set()

    async def wait(self) -> str:
        """Returns the reason, once there is one."""
        await self._known.wait()
        return self.why

    async def close(self, closing: Awaitable[None], *, within: float) -> int:
        """Waits until the process's parts have ended. Returns the exit status, which is 1 if there is a reason. In that
        case the wait is limited to `within` seconds, after which the process exits."""
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
