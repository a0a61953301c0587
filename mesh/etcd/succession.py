"""From one set of credentials to the next while the process runs, so that a changed Secret needs no restart.

The files are looked at now and then, and when etcd refuses what is in use. What has changed is proven first: a
connection of its own asks etcd what was asked last. Only if that is answered the client goes over to it. So a Secret
with a typo, or one that comes before etcd's own change, harms nobody: the old credentials stay in use, the log says
why, and the new ones are tried again until they work.
"""

import asyncio
import contextlib
from typing import Protocol

from mesh.etcd import sources
from mesh.etcd.errors import EtcdError
from mesh.options.etcdsettings import EtcdSettings
from mesh.telemetry import logs

log = logs.get(__name__)

LOOK = 2.0
"""Seconds between two looks; Kubernetes itself takes a minute to bring a changed Secret."""

_LOOK_LEAST = 0.25  # seconds between them, however many requests fail

_AGAIN_FIRST, _AGAIN_MAX = 1.0, 16.0
"""Seconds between two proofs of the same: each takes 100 ms of etcd's time where there is a password."""

_PROOF = 3.0  # seconds


class Replacing(Protocol):
    """A connection whose credentials can be replaced."""

    @property
    def settings(self) -> EtcdSettings:
        """Those in use."""

    async def succeed(self, settings: EtcdSettings, timeout: float) -> None:
        """Goes over to others if etcd answers to them within `timeout` s; raises EtcdError, ValueError if not."""


class Succession:
    """Of one connection. `begin` at its first request, `end` at its last."""

    def __init__(self, connection: Replacing) -> None:
        self.refusal = ""  # why what the files hold now is not used; empty: it is
        self.changes = 0  # times that the client went over to others
        self._connection = connection
        self._lock = asyncio.Lock()
        self._wanted = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._candidate: EtcdSettings | None = None  # was not accepted when it was tried last
        self._looked = 0.0  # when, by the loop's clock
        self._tried = 0.0  # when, by the loop's clock
        self._pause = _AGAIN_FIRST

    def begin(self) -> None:
        """Looks from now on; again: nothing."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="follow etcd's credentials")

    async def end(self) -> None:
        """Looks no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def suspect(self) -> None:
        """A request has failed, maybe because of the credentials: a look at once."""
        if asyncio.get_running_loop().time() >= self._looked + _LOOK_LEAST:  # else the next failure will tell
            self._wanted.set()

    async def settle(self) -> None:
        """A look at once, which is over when this returns: the credentials in use were refused."""
        async with self._lock:
            await self._look(urgent=True)

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK):
                    await self._wanted.wait()
            urgent = self._wanted.is_set()
            self._wanted.clear()
            async with self._lock:
                await self._look(urgent=urgent)

    async def _look(self, *, urgent: bool) -> None:
        loop = asyncio.get_running_loop()
        self._looked = loop.time()
        used = self._connection.settings
        try:
            found = sources.read(used)
        except ValueError as error:
            self._candidate = None
            self._refuse(str(error))
            return
        if found == used:
            self._candidate, self.refusal = None, ""
            return
        if found == self._candidate:
            if loop.time() < self._tried + (_AGAIN_FIRST if urgent else self._pause):
                return
            self._pause = min(self._pause * 2, _AGAIN_MAX)
        else:
            self._candidate, self._pause = found, _AGAIN_FIRST
        try:
            await self._connection.succeed(found, _PROOF)
        except EtcdError as error:
            self._tried = loop.time()
            self._refuse(f"etcd does not answer to them: {error}", of=type(error).__name__)
            return
        self.changes += 1
        self._candidate, self.refusal = None, ""
        log.info("etcd is reached by changed credentials from now on", changed=sources.changes(used, found))

    def _refuse(self, why: str, of: str = "") -> None:
        """`of` stands for `why` where that differs from one time to the next."""
        if not self.refusal.startswith(of or why):
            log.warning("the credentials for etcd are kept: the changed ones are not used", why=why)
        self.refusal = f"{of}: {why}" if of else why
