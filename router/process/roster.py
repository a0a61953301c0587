"""A router's place on the roster: `routers/<name>` in etcd, under a lease, so that routers know of each other.

Nothing depends on it to serve calls, so a lease that is lost is only replaced.
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
    """Keeps one router's record there. `record` gives it as it is now."""

    def __init__(self, etcd: Etcd, keys: Keys, name: str, record: Callable[[], RouterRecord]) -> None:
        self._etcd = etcd
        self._key = keys.router(name)
        self._record = record

    async def run(self) -> None:
        """Keeps it until cancelled; the record vanishes then."""
        while True:
            try:
                await self._stand()
            except EtcdError as error:
                log.debug("this router is not on the roster while etcd is away", why=error.detail)
            await asyncio.sleep(_PAUSE)

    async def _stand(self) -> None:
        lease = await Lease.grant(self._etcd, ttl=TTL)
        try:
            await self._etcd.txn([], [put_op(self._key, self._record().encode(), lease.id)])
            await lease.lost.wait()
        finally:
            await lease.give_back()
