"""The fence of one pod. About once a second, it writes to the board which calls the model server may answer, and until
when.

`placement.fence` decides what is permitted. This module reads the state of the lease, of etcd and of the clock, and
writes the permission. The model server checks the permission itself, so the server of a stopped or hung agent stops
answering before etcd removes the pod's keys.

The clock is CLOCK_BOOTTIME: like etcd's clock, it continues while the machine sleeps.
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
    """The pod's presence, as the fence sees it."""

    @property
    def proof_ns(self) -> int | None:
        """The time at which the last answered keep-alive was sent, in ns of CLOCK_BOOTTIME, or None without a lease."""

    @property
    def keyed(self) -> bool:
        """True if the pod and every copy that may answer have their keys under the lease."""


class Fence:
    """The fence of one pod. `reach` sends some request to etcd, and raises EtcdError if etcd is unavailable."""

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
        """Makes a closed fence. `ttl` and `serve_without_etcd` are in seconds; with None for `serve_without_etcd` there
        is no limit. `reach` is called with a time-out in seconds."""
        self._board = board
        self._presence = presence
        self._ttl = int(ttl * SECOND)
        self._limit = None if serve_without_etcd is None else int(serve_without_etcd * SECOND)
        self._reach = reach
        self._clock = clock
        self._last_proof = 0
        self._reached: bool | None = None  # whether etcd answers; None: not known
        self._asked = 0  # time of the last request to etcd
        self._lapsed = False  # the permission has expired since the agent could last be sure
        self._closed = False
        self._permission = fence.Permission(0, Mode.CLOSED, "the pod has not been published yet")
        self._news = asyncio.Event()
        self._probe: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Renews the permission periodically, until cancelled. Without renewals, the permission expires, and the pod
        answers no calls."""
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
        """Decides now which calls may be answered, and writes the permission to the board. Does nothing after
        `close`."""
        if self._closed:
            return
        now, proof = self._clock(), self._presence.proof_ns
        if self._permission.until and now >= self._permission.until and not self._lapsed:
            self._lapsed = True
            self._reached = None
            if self._probe is not None:  # the request is from before the pause, which may have made it fail
                self._probe.cancel()
                self._probe = None
            log.warning("the permission to answer expired: the agent was stopped, or gets too little CPU time")
        if proof is not None:
            self._last_proof = max(self._last_proof, proof)
        if proof is not None and now - proof < self._ttl // 2:
            self._reached = True
            if self._presence.keyed:
                self._lapsed = False
        else:
            if self._reached and proof is not None:
                self._reached = None  # etcd answered a while ago
            if self._probe is None and now - self._asked >= SECOND:
                self._asked = now
                self._probe = asyncio.get_running_loop().create_task(self._ask(), name="fence: ask etcd")
        # While the lease may still be held, etcd counts as unavailable until it answers: calls need not wait for a
        # time-out. If the lease is lost and etcd is not known to be unavailable, etcd ended it.
        unknown = self._reached is None and proof is not None and not self._lapsed
        away = self._reached is False or unknown
        standing = fence.PodStanding(
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
        """Has `run` decide again immediately, because the pod's state has changed."""
        self._news.set()

    def why_silent(self) -> str:
        """Returns the reason why the pod answers no calls at present, or "" if it answers at least some."""
        if self._clock() >= self._permission.until:
            self.look()  # this process was paused, and may know more now
        return "" if self._clock() < self._permission.until else self._permission.why

    def close(self) -> None:
        """Closes the fence permanently, before the pod's keys are deleted. From now on every call gets *not here*."""
        self._closed = True
        self._grant(fence.Permission(0, Mode.CLOSED, "the pod is leaving"))

    def _grant(self, permission: fence.Permission) -> None:
        if permission.mode is not self._permission.mode:
            log.info("fence changed", mode=permission.mode.name.lower(), why=permission.why)
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
