"""A range of keys, followed through all faults of etcd: first the range's content, then every change.

    async for change in Mirror(etcd, start, end):
        match change:
            case Snapshot(): ...
            case Delta(): ...

A broken watch resumes after the last revision delivered, at the same or another member, with back-off and without
limit. The range is read again only if that revision no longer exists, because etcd has compacted it or was restored
with other data. In this case another `Snapshot` follows, which the consumer compares with what it knows. The stream is
read only as fast as the consumer takes changes; unread changes wait in etcd.
"""

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass

from mesh.etcd.client import Etcd
from mesh.etcd.errors import EtcdClosed, EtcdCompacted, EtcdError, EtcdReplaced
from mesh.etcd.records import Delta, KeyValue, Snapshot
from mesh.etcd.watch import Watch
from mesh.telemetry import logs

log = logs.get(__name__)

Change = Snapshot | Delta

_PAUSE_FIRST, _PAUSE_MAX = 0.05, 1.0  # seconds between attempts
_SETTLED = 5.0  # seconds a watch must have lived for the back-off to start over


@dataclass(frozen=True, slots=True)
class MirrorStatistics:
    """The state and the counters of a mirror."""

    connected: bool
    stale_for: float  # seconds
    revision: int  # everything up to it was delivered
    snapshots: int
    deltas: int
    events: int
    watches: int  # opened


class _OtherData(EtcdError):
    """A sign that etcd's data has been replaced, for example by a restore."""


class Mirror:
    """A followed range of keys. One consumer, in one task, iterates over the mirror once.

    The iteration ends when that task is cancelled or `close()` is called, and raises EtcdClosed when the client is
    closed. Nothing else ends the iteration. Cancelling a single step cancels the whole iteration, so do not put
    `wait_for` around steps.
    """

    def __init__(self, etcd: Etcd, start: bytes, end: bytes, *, page_size: int = 1000) -> None:
        """Follows the keys in [start, end). For a prefix, `end` is `mesh.etcd.ranges.after_prefix(start)`. Raises
        ValueError if `start` is empty."""
        if not start:
            raise ValueError(
                "the start of the range is empty, but a range has to start with a key: b'\\0' is the first"
            )
        self._etcd = etcd
        self._start = start
        self._end = end
        self._page_size = page_size
        self._loop = asyncio.get_running_loop()
        self._stale_since: float | None = self._loop.time()
        self._told = False  # the log says that it is stale
        self._revision = 0  # 0: nothing valid was delivered yet
        self._cluster_id = 0
        self._snapshots = self._deltas = self._events = self._watches = 0
        self._changes = self._follow()

    def __aiter__(self) -> AsyncIterator[Change]:
        return self._changes

    async def close(self) -> None:
        """Ends the mirror. If a task waits for the next change, cancel that task instead."""
        await self._changes.aclose()

    @property
    def connected(self) -> bool:
        """True while changes arrive, as far as this process knows. A hung member is noticed after 13 seconds."""
        return self._stale_since is None

    @property
    def stale_for(self) -> float:
        """Seconds since the connection was lost, or since the start if the mirror has never been connected. 0 while
        `connected` is True."""
        return 0.0 if self._stale_since is None else self._loop.time() - self._stale_since

    def statistics(self) -> MirrorStatistics:
        """Returns the mirror's counters."""
        return MirrorStatistics(
            self.connected,
            self.stale_for,
            self._revision,
            self._snapshots,
            self._deltas,
            self._events,
            self._watches,
        )

    async def _follow(self) -> AsyncGenerator[Change, None]:
        failed = 0
        try:
            while True:
                watch: Watch | None = None
                opened = 0.0
                try:
                    if self._revision == 0:
                        snapshot = await self._read()
                        self._revision = snapshot.revision
                        self._snapshots += 1
                        yield snapshot
                    watch = await self._open()
                    opened = self._loop.time()
                    self._fresh()
                    while True:
                        for delta in await watch.read():
                            self._revision = delta.revision
                            self._deltas += 1
                            self._events += len(delta.events)
                            yield delta
                        self._revision = max(self._revision, watch.revision)
                except EtcdClosed:
                    raise
                except EtcdReplaced:
                    continue
                except (EtcdCompacted, _OtherData) as error:
                    self._stale(error)
                    self._revision = self._cluster_id = 0
                except EtcdError as error:
                    self._stale(error)
                finally:
                    if watch is not None:
                        watch.cancel()
                failed = 1 if watch is not None and self._loop.time() - opened > _SETTLED else failed + 1
                pause = min(_PAUSE_FIRST * 2 ** min(failed - 1, 8), _PAUSE_MAX)
                await asyncio.sleep(pause * random.uniform(0.5, 1.5))
        finally:
            if self._stale_since is None:
                self._stale_since = self._loop.time()

    async def _read(self) -> Snapshot:
        kvs: list[KeyValue] = []
        revision = 0
        async for page in self._etcd.pages(self._start, self._end, page_size=self._page_size):
            kvs.extend(page.kvs)
            revision = page.revision
        return Snapshot(revision, tuple(kvs))

    async def _open(self) -> Watch:
        self._watches += 1
        watch = await Watch.open(self._etcd.connection, self._start, self._end, self._revision)
        try:
            replaced = self._cluster_id not in (0, watch.cluster_id)
            if watch.member_revision < self._revision:
                # Either this member lags behind, which ends by itself, or etcd has other data; a read through the
                # quorum distinguishes the two.
                page = await self._etcd.page(self._start, self._end, limit=1, keys_only=True)
                replaced = replaced or page.revision < self._revision
            if replaced:
                raise _OtherData("etcd has restarted with other data")
        except BaseException:
            watch.cancel()
            raise
        self._cluster_id = watch.cluster_id
        return watch

    def _fresh(self) -> None:
        if self._told:
            log.info("watch of etcd works", revision=self._revision, after_s=round(self.stale_for, 1))
        self._stale_since, self._told = None, False

    def _stale(self, error: EtcdError) -> None:
        if self._stale_since is None:
            self._stale_since = self._loop.time()
        if self._told:
            log.debug("watch of etcd still fails", revision=self._revision, why=error.detail)
        else:
            self._told = True
            log.warning("watch of etcd failed, trying again", revision=self._revision, why=error.detail)
