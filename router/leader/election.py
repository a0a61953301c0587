"""The election of the leader: the first router that writes its name under `leader` leads for as long as its lease
lives.

A leader that stops revokes its lease, and another router takes over within `LOOK` seconds. A leader that cannot reach
etcd steps down when its lease has expired by its own clock, before etcd admits another leader.
"""

import asyncio
from collections.abc import Awaitable, Callable

from mesh.etcd import Etcd, EtcdError, Lease, absent, put_op
from mesh.schema.keys import Keys
from mesh.telemetry import logs

log = logs.get(__name__)

TTL = 10
"""Lease time to live, in seconds: the time without a leader after one has died."""

LOOK = 1.0
"""Seconds between two attempts to become the leader."""


class Election:
    """One router's candidacy. Runs `lead` while this router leads, and cancels `lead` when it no longer does."""

    def __init__(
        self, etcd: Etcd, keys: Keys, name: str, lead: Callable[[], Awaitable[None]], *, ttl: int = TTL
    ) -> None:
        self._etcd = etcd
        self._keys = keys
        self._name = name
        self._lead = lead
        self._ttl = ttl
        self.leading = False

    async def run(self) -> None:
        """Stands for election repeatedly, and leads when elected, until cancelled. Then revokes the lease."""
        while True:
            try:
                await self._stand()
            except EtcdError as error:
                log.debug("no election: etcd is unavailable", why=error.detail)
            await asyncio.sleep(LOOK)

    async def _stand(self) -> None:
        if await self._etcd.get(self._keys.leader) is not None:
            return  # the usual case: saves an unused lease
        lease = await Lease.grant(self._etcd, ttl=self._ttl)
        try:
            won = await self._etcd.txn(
                [absent(self._keys.leader)], [put_op(self._keys.leader, self._name.encode(), lease.id)]
            )
            if won.succeeded:
                await self._rule(lease)
        finally:
            await lease.give_back()

    async def _rule(self, lease: Lease) -> None:
        log.info("this router leads", name=self._name)
        self.leading = True
        ruling = asyncio.ensure_future(self._lead())
        lost = asyncio.ensure_future(lease.lost.wait())
        why = "it is stopping"
        try:
            await asyncio.wait({ruling, lost}, return_when=asyncio.FIRST_COMPLETED)
            why = "its work as the leader has ended"
            if ruling.done() and not ruling.cancelled() and (error := ruling.exception()) is not None:
                log.error("the work of the leader failed", exc_info=error)
        finally:
            self.leading = False
            for task in (ruling, lost):
                task.cancel()
            await asyncio.wait({ruling, lost})
            log.info("this router no longer leads", name=self._name, why=lease.why_lost or why)
