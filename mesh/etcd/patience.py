"""Waiting for etcd when a process starts, without a time limit.

The processes of an installation start in any order. A process that ended because etcd was still starting would be
restarted by its supervisor after ever longer pauses. So routers and runtime pods wait, live but not ready. They give
the reason at `/ready`, and in the log at once and then every minute. Faults that waiting does not cure, such as a wrong
password, are raised. The process then ends with the error's text, and reads its credentials again when it is restarted.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from mesh.etcd.errors import EtcdClosed, EtcdDenied, EtcdUnavailable
from mesh.telemetry import logs

log = logs.get(__name__)

T = TypeVar("T")

_PAUSE = 0.5  # seconds between two attempts, each of which tries all members
_REMIND = 60.0  # seconds between two lines in the log


class Patience:
    """The wait of a process for etcd. `why` is the reason for the wait, or "" if the process is not waiting."""

    def __init__(self, *, pause: float = _PAUSE, remind: float = _REMIND) -> None:
        self._pause = pause
        self._remind = remind
        self.why = ""

    async def until_done(self, work: Callable[[], Awaitable[T]]) -> T:
        """Calls `work` until it no longer raises EtcdUnavailable, and returns its result. Raises EtcdDenied,
        EtcdClosed, and any other error of `work`."""
        began = time.monotonic()
        told: float | None = None
        while True:
            try:
                done = await work()
            except EtcdClosed:
                raise
            except EtcdDenied as error:
                raise EtcdDenied(
                    f"etcd refuses this process ({error.detail}): check the user, password and certificate, and "
                    "the user's roles"
                ) from error
            except EtcdUnavailable as error:
                self.why = f"etcd is unavailable: {error.detail}"
                now = time.monotonic()
                if told is None or now - told >= self._remind:
                    told = now
                    log.warning("waiting for etcd", why=error.detail, waited_s=round(now - began))
                await asyncio.sleep(self._pause)
                continue
            if told is not None:
                log.info("etcd answers", waited_s=round(time.monotonic() - began, 1))
            self.why = ""
            return done
