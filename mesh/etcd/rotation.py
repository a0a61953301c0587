"""Rotation of etcd's credentials while the process runs, so that a changed Secret needs no restart.

The files are checked periodically, and when etcd refuses the credentials in use. Changed credentials are tried first: a
separate connection repeats the last read, and the client switches only if etcd answers. A Secret with a typo, or one
that changes before etcd does, is therefore harmless: the old credentials stay in use, the log gives the reason, and the
new credentials are tried again until they work.
"""

import asyncio
import contextlib
from typing import Protocol

from mesh.etcd import sources
from mesh.etcd.errors import EtcdError
from mesh.options.etcdsettings import EtcdSettings
from mesh.process.tasks import Duty, Tasks
from mesh.telemetry import logs

log = logs.get(__name__)

LOOK = 2.0
"""Seconds between two checks. Kubernetes needs a minute to deliver a changed Secret anyway."""

_LOOK_LEAST = 0.25  # seconds between two checks, even if many requests fail

_AGAIN_FIRST, _AGAIN_MAX = 1.0, 16.0
"""Seconds between two tests of the same credentials. A test with a password takes 100 ms of etcd's time."""

_PROOF = 3.0  # seconds

_FOLLOW = Duty(
    "follow etcd's credentials", "changed ones are noticed only when etcd refuses the old ones", essential=False
)


class Replacing(Protocol):
    """A connection whose credentials can be replaced."""

    @property
    def settings(self) -> EtcdSettings:
        """The settings in use."""

    async def switch(self, settings: EtcdSettings, timeout: float) -> None:
        """Switches to other settings if etcd accepts them within `timeout` seconds. Otherwise raises EtcdError or
        ValueError."""


class Rotation:
    """The rotation of one connection's credentials. Call `begin` at its first request, `end` after its last."""

    def __init__(self, connection: Replacing) -> None:
        self.refusal = ""  # why the current content of the files is not used; empty: it is
        self.changes = 0  # switches
        self._connection = connection
        self._lock = asyncio.Lock()
        self._wanted = asyncio.Event()
        self._tasks = Tasks()
        self._candidate: EtcdSettings | None = None  # not accepted at the last attempt
        self._looked = 0.0  # when, by the loop's clock
        self._tried = 0.0  # when, by the loop's clock
        self._pause = _AGAIN_FIRST

    def begin(self) -> None:
        """Starts the periodic checks. A second call does nothing."""
        if not len(self._tasks):
            self._tasks.run(_FOLLOW, self._run)

    async def end(self) -> None:
        """Stops the checks."""
        await self._tasks.close()

    def suspect(self) -> None:
        """Requests a check of the files, because a request has failed and the credentials may be the reason."""
        if asyncio.get_running_loop().time() >= self._looked + _LOOK_LEAST:  # otherwise the next failure triggers it
            self._wanted.set()

    async def settle(self) -> None:
        """Checks the files immediately and waits for the outcome, because etcd has refused the credentials in use."""
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
            await self._connection.switch(found, _PROOF)
        except EtcdError as error:
            self._tried = loop.time()
            self._refuse(f"a test of the changed ones failed: {error}", of=type(error).__name__)
            return
        self.changes += 1
        self._candidate, self.refusal = None, ""
        log.info("switched to the changed credentials for etcd", changed=sources.changes(used, found))

    def _refuse(self, why: str, of: str = "") -> None:
        """Logs why the changed credentials are not used, once for each reason. `of` identifies the reason if the text
        `why` differs between attempts."""
        if not self.refusal.startswith(of or why):
            log.warning("the credentials for etcd are kept: the changed ones are not used", why=why)
        self.refusal = f"{of}: {why}" if of else why
