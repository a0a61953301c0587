"""A consumer of a mirror that records the changes and their result."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from mesh.etcd import ChangeKind, Delta, Etcd, Mirror, Snapshot
from mesh.etcd.ranges import after_prefix
from tests.support.waiting import until


class Follower:
    def __init__(self, mirror: Mirror) -> None:
        self.mirror = mirror
        self.changes: list[Snapshot | Delta] = []
        self.content: dict[bytes, bytes] = {}
        self.task = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        async for change in self.mirror:
            if isinstance(change, Snapshot):
                self.content = {kv.key: kv.value for kv in change.kvs}
            else:
                for event in change.events:
                    assert event.kv.mod_revision == change.revision
                    if event.kind is ChangeKind.PUT:
                        self.content[event.kv.key] = event.kv.value
                    else:
                        del self.content[event.kv.key]
            self.changes.append(change)

    @property
    def deltas(self) -> list[Delta]:
        return [change for change in self.changes if isinstance(change, Delta)]

    @property
    def snapshots(self) -> list[Snapshot]:
        return [change for change in self.changes if isinstance(change, Snapshot)]

    async def has(self, condition: Callable[["Follower"], object], why: str) -> None:
        """Waits for a condition, and raises the mirror's error if the mirror ends first."""
        await until(lambda: self.task.done() or condition(self), timeout=30, why=why)
        if self.task.done():
            self.task.result()


@asynccontextmanager
async def following(etcd: Etcd, prefix: bytes) -> AsyncIterator[Follower]:
    """Follows a prefix. The mirror is connected when the block begins."""
    follower = Follower(Mirror(etcd, prefix, after_prefix(prefix), page_size=10))
    try:
        await follower.has(lambda f: f.changes and f.mirror.connected, "the mirror has begun")
        yield follower
    finally:
        follower.task.cancel()
        await asyncio.wait({follower.task})
