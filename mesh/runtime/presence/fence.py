"""The fence of one pod: every second, the agent's permission for its model server to answer, written into the board.

`placement.fence` decides what is permitted; this looks at the lease, at etcd and at the clock, and writes. The model
server obeys by itself, so an agent that is stopped or hangs silences its server before etcd lets go of the pod's keys.

The clock is CLOCK_BOOTTIME: it goes on while the machine sleeps, as etcd's does.
"""

import asyncio
from collections.abc import Awaitable, Callable
from time import CLOCK_BOOTTIME, clock_gettime_ns
from typing import Protocol

from mesh.etcd import EtcdError
from mesh.process.tasks import turned
from mesh.runtime.sharedmemory.board import Board
from mesh.telemetry import logs
from placement import fence
from placement.fence import SECOND, Mode

log = logs.get(__name__)


class Presence(Protocol):
    """What is asked of the pod's presence."""

    @property
    def proof_ns(self) -> int | None:
        """Returns when the last answered keep-alive was sent, in ns of CLOCK_BOOTTIME; None: no lease is held."""

    @property
    def keyed(self) -> bool:
        """Returns whether the pod and every copy that may answer have their keys under that lease."""


class Fence:
    """Grants the permission of one pod. `reach` asks etcd for anything; it raises EtcdError where etcd is away."""

    def __init__(
        self,
        board: Board,
        presence: Presence,
        *,
        ttl: float,
        serve_without_etcd: float | None,
        reach: Callable[[float], Awaitable[object]],
        clock: Callable[[], int] = lambda: clock_gettime_ns(CLOCK_BOOTTIME),
    ) -> None:
        """`ttl` and `serve_without_etcd` (None: without end) in seconds; `reach` gets its time-out in seconds."""
        self._board = board
        self._presence = presence
        self._ttl = int(ttl * SECOND)
        self._limit = None if serve_without_etcd is None else int(serve_without_etcd * SECOND)
        self._reach = reach
        self._clock = clock
        self._last_proof = 0
        self._reached: bool | None = None  # whether etcd answers; None: not known
        self._asked = 0  # when, on the clock
        self._lapsed = False  # the permission has run out since the agent could last be sure
        self._closed = False
        self._permission = fence.Permission(0, Mode.CLOSED, "the pod has not been published yet")
        self._news = asyncio.Event()
        self._probe: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Grants permission again and again, until cancelled. The pod cannot do without it."""
        try:
            while True:
                self.look()
                turned()
                try:
                    async with asyncio.timeout(fence.pause(self._ttl) / SECOND):
                        await self._news.wait()
                except TimeoutError:
                    pass
                self._news.clear()
        finally:
            if self._probe is not None:
                self._probe.cancel()

    def look(self) -> None:
        """Decides now, and writes it."""
        if self._closed:
            return
        now, proof = self._clock(), self._presence.proof_ns
        if self._permission.until and now >= self._permission.until and not self._lapsed:
            self._lapsed = True
            self._reached = None
            if self._probe is not None:  # what it finds out is of the time before: the pause itself may have failed it
                self._probe.cancel()
                self._probe = None
            log.warning("the permission to answer ran out: the agent was stopped, or is starved of CPU")
        if proof is not None:
            self._last_proof = max(self._last_proof, proof)
        if proof is not None and now - proof < self._ttl // 2:
            self._reached = True
            if self._presence.keyed:
                self._lapsed = False
        else:
            if self._reached and proof is not None:
                self._reached = None  # it did a while ago
            if self._probe is None and now - self._asked >= SECOND:
                self._asked = now
                self._probe = asyncio.get_running_loop().create_task(self._ask(), name="fence: is etcd there")
        # As long as the lease may still be held, no answer is taken for none: calls need not wait until a question has
        # timed out. A lease that is lost although nobody knows etcd to be away was ended by etcd.
        unknown = self._reached is None and proof is not None and not self._lapsed
        away = self._reached is False or unknown
        standing = fence.Standing(
            now=now,
            ttl=self._ttl,
            proof=proof,
            keyed=self._presence.keyed,
            away=away,
            last_proof=self._last_proof,
            serve_without_etcd=self._limit,
        )
        self._grant(fence.permit(standing) if self._last_proof else self._permission)

    def wake(self) -> None:
        """Decides again at once: the pod's standing has changed."""
        self._news.set()

    def why_silent(self) -> str:
        """Says why the pod answers no call at this moment; empty where it answers some."""
        if self._clock() >= self._permission.until:
            self.look()  # this process has paused, and may be sure of more by now
        return "" if self._clock() < self._permission.until else self._permission.why

    def close(self) -> None:
        """Shuts the fence for good, before the pod's keys go: from now on every call is answered *not here*."""
        self._closed = True
        self._grant(fence.Permission(0, Mode.CLOSED, "the pod leaves"))

    def _grant(self, permission: fence.Permission) -> None:
        if permission.mode is not self._permission.mode:
            log.info("the fence moves", mode=permission.mode.name.lower(), why=permission.why)
        self._permission = permission
        self._board.permit(permission.until, permission.mode)

    async def _ask(self) -> None:
        try:
            await self._reach(self._ttl / SECOND / 4)
            self._reached = True
        except EtcdError:
            self._reached = False
        finally:
            if self._probe is asyncio.current_task():
                self._probe = None
            self._news.set()
