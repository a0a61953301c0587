"""A lease: etcd deletes the keys attached to it unless it is renewed in time.

The holder must notice a loss before etcd deletes the keys, and without asking etcd, which may be unavailable. The lease
therefore counts as lost when its TTL has passed since the last answered renewal was *sent*, by the local monotonic
clock, or as soon as etcd answers that the lease does not exist. A lost lease stays lost. The holder, who knows the
keys, then gets another lease and writes the keys again.
"""

import asyncio
import random
from dataclasses import dataclass
from time import CLOCK_BOOTTIME, clock_gettime_ns

from mesh.etcd.client import Etcd
from mesh.etcd.errors import EtcdClosed, EtcdError, EtcdLeaseLost, EtcdUnavailable
from mesh.etcd.stream import Stream
from mesh.pb import etcd_pb2 as pb
from mesh.telemetry import logs

log = logs.get(__name__)

_GIVE_BACK = 2.0  # seconds
_PAUSE_FIRST, _PAUSE_MAX = 0.05, 1.0  # seconds between attempts to open the stream again


@dataclass(frozen=True, slots=True)
class LeaseStatistics:
    """The state and the counters of a lease."""

    id: int
    ttl: int  # seconds
    remaining: float  # seconds until the lease counts as lost
    renewals: int
    streams: int  # number opened; 1 if none has failed
    lost: str  # why; empty while held


class Lease:
    """A lease, made by `Lease.grant()` and kept alive in the background until it is lost, revoked or closed."""

    def __init__(self, etcd: Etcd, lease_id: int, ttl: int, deadline: float, proof_ns: int) -> None:
        self.id = lease_id
        self.ttl = ttl  # seconds, as etcd granted it
        self.proof_ns = proof_ns
        """Time at which the last answered request was sent, in ns of CLOCK_BOOTTIME. The keys exist for at least one
        TTL from this time on."""
        self.lost = asyncio.Event()
        self.why_lost = ""
        self._etcd = etcd
        self._loop = asyncio.get_running_loop()
        self._deadline = deadline
        self._expiry = self._loop.call_at(deadline, self._lose, "not renewed in time")
        self._renewals = self._streams = 0
        self._task = self._loop.create_task(self._keep_alive(), name=f"etcd lease {lease_id:x}")
        self._task.add_done_callback(self._ended)

    @classmethod
    async def grant(cls, etcd: Etcd, *, ttl: int, timeout: float | None = None) -> "Lease":
        """Requests a new lease of `ttl` seconds (etcd grants at least 2 by default). Raises EtcdError.

        If etcd's answer is lost, its lease expires by itself, so repeating the request is harmless.
        """
        sent, proof_ns = asyncio.get_running_loop().time(), clock_gettime_ns(CLOCK_BOOTTIME)
        request = pb.LeaseGrantRequest(TTL=ttl)
        reply, _ = await etcd.connection.call(
            "lease grant", lambda m: m.lease.LeaseGrant, request, repeatable=True, timeout=timeout
        )
        if reply.error:
            raise EtcdError(f"lease grant: {reply.error}")
        return cls(etcd, reply.ID, reply.TTL, sent + reply.TTL, proof_ns)

    def __repr__(self) -> str:
        return f"<Lease {self.id:x}: {self.why_lost or f'{self.remaining:.1f} s left'}>"

    @property
    def remaining(self) -> float:
        """Seconds until the lease counts as lost if etcd answers no more renewals; 0 once it is lost."""
        return 0.0 if self.lost.is_set() else max(0.0, self._deadline - self._loop.time())

    def statistics(self) -> LeaseStatistics:
        """Returns the lease's counters."""
        return LeaseStatistics(self.id, self.ttl, self.remaining, self._renewals, self._streams, self.why_lost)

    async def revoke(self, *, timeout: float | None = None) -> None:
        """Revokes the lease, so that etcd deletes its keys immediately. After EtcdUnavailable, etcd may delete the keys
        only when the lease expires.

        A revoked lease does not count as lost: `lost` stays unset."""
        await self.close()
        request = pb.LeaseRevokeRequest(ID=self.id)
        try:
            await self._etcd.connection.call(
                "lease revoke", lambda m: m.lease.LeaseRevoke, request, repeatable=True, timeout=timeout
            )
        except EtcdLeaseLost:
            pass  # it has already expired, or an earlier attempt was done

    async def give_back(self) -> None:
        """Revokes the lease when its holder ends. If etcd does not answer within 2 seconds, the lease expires by
        itself."""
        try:
            await asyncio.shield(self.revoke(timeout=_GIVE_BACK))
        except EtcdError as error:
            log.debug("a lease is left to expire", lease=f"{self.id:x}", why=error.detail)

    async def close(self) -> None:
        """Stops keeping the lease alive. etcd deletes the keys when the lease expires."""
        self._expiry.cancel()
        self._task.cancel()
        await asyncio.wait({self._task})

    def _lose(self, why: str) -> None:
        if not self.lost.is_set():
            self.why_lost = why
            self._expiry.cancel()
            self.lost.set()
            self._task.cancel()
            log.warning("lease lost", lease=f"{self.id:x}", why=why, ttl=self.ttl)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        """Marks the lease as lost if a bug ends the renewing task. Otherwise nobody would notice the end."""
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("renewing a lease failed", lease=f"{self.id:x}", exc_info=error)
            self._lose(f"renewing it failed: {error}")

    def _renewed(self, sent: float, proof_ns: int, ttl: int) -> None:
        self._renewals += 1
        self.proof_ns = max(self.proof_ns, proof_ns)
        self._deadline = max(self._deadline, sent + ttl)
        self._expiry.cancel()
        # If this process was stopped meanwhile, this moment has passed and the timer fires at once.
        self._expiry = self._loop.call_at(self._deadline, self._lose, "not renewed in time")

    async def _keep_alive(self) -> None:
        failed = 0
        while True:
            stream: Stream | None = None
            try:
                request = pb.LeaseKeepAliveRequest(ID=self.id)
                while True:
                    sent, proof_ns = self._loop.time(), clock_gettime_ns(CLOCK_BOOTTIME)
                    if stream is None:
                        stream = await self._open(request)
                    else:
                        await stream.write(request, self._patience)
                    reply = await stream.read(self._patience)
                    if reply.TTL <= 0:
                        self._lose("etcd says that it has expired")
                        return
                    self._renewed(sent, proof_ns, reply.TTL)
                    failed = 0
                    await asyncio.sleep(max(0.0, sent + self.ttl / 3 - self._loop.time()))
            except EtcdClosed:
                return  # the owner has closed the client: the lease is now lost when it expires
            except EtcdUnavailable as error:
                log.debug("lease renewal failed", lease=f"{self.id:x}", error=error.detail)
            except EtcdError as error:
                log.warning("lease renewal refused", lease=f"{self.id:x}", error=error.detail)
            finally:
                if stream is not None:
                    stream.cancel()
            # The first attempt is made at once: a stream that broke while idle only shows at the next write.
            if failed:
                pause = min(_PAUSE_FIRST * 2 ** min(failed, 8), _PAUSE_MAX, self.ttl / 6)
                await asyncio.sleep(pause * random.uniform(0.5, 1.5))
            failed += 1

    async def _open(self, request: pb.LeaseKeepAliveRequest) -> Stream:
        self._streams += 1
        return await self._etcd.connection.open(
            "lease renewal", lambda m: m.lease.LeaseKeepAlive, request, self._patience
        )

    @property
    def _patience(self) -> float:
        """Time to wait for one answer, in seconds. It is short enough to leave time for an attempt at another
        member."""
        return max(0.5, self.ttl / 4)
