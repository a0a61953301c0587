"""A router's entry on the roster: the key `routers/<name>` in etcd, under a lease, by which routers know each other.

No call depends on the roster, so a lost lease is simply replaced.
"""

import asyncio
from collections.abc import Callable

from mesh.etcd import Etcd, EtcdError, Lease, put_op
from mesh.schema.keys import Keys
from mesh.schema.lives import RouterRecord
from mesh.telemetry import logs

log = logs.get(__name__)

TTL = 10
"""Lease time to live, in seconds."""

_PAUSE = 1.0  # seconds between attempts


class Roster:
    """One router's entry on the roster. `record` returns its current content."""

    def __init__(self, etcd: Etcd, keys: Keys, name: str, record: Callable[[], RouterRecord]) -> None:
        self._etcd = etcd
        self._key = keys.router(name)
        self._record = record

    async def run(self) -> None:
        """Keeps the entry in etcd until cancelled, then removes it."""
        while True:
            try:
                await self._stand()
            except EtcdError as error:
                log.debug("this router is not on the roster: etcd is unavailable", why=error.detail)
            await asyncio.sleep(_PAUSE)

    async def _stand(self) -> None:
        lease = await Lease.grant(self._etcd, ttl=TTL)
        try:
            await self._etcd.txn([], [put_op(self._key, self._record().encode(), lease.id)])
            await lease.lost.wait()
        finally:
            await lease.give_back()
