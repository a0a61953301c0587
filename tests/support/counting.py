"""A writer that counts through faults, and a watcher that must see each count once."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from mesh.etcd import Etcd, EtcdUnavailable, KeyValue
from tests.support.following import Follower, following
from tests.support.waiting import until

KEY = b"counter/key"


class Writer:
    """A writer that adds one to a key, again and again."""

    def __init__(self, etcd: Etcd, key: bytes = KEY) -> None:
        self.etcd = etcd
        self.key = key
        self.done = 0  # additions that were certainly made
        self.failed = 0  # additions that were certainly not made
        self.open = 0  # additions of unknown outcome
        self._stopping = False
        self.task = asyncio.create_task(self._write())

    async def _write(self) -> None:
        def plus_one(kv: KeyValue | None) -> bytes:
            return b"%d" % (int(kv.value) + 1 if kv else 1)

        while not self._stopping:
            try:
                await self.etcd.update(self.key, plus_one)
                self.done += 1
            except EtcdUnavailable as error:
                self.open += error.ambiguous
                self.failed += not error.ambiguous
            await asyncio.sleep(0.002)

    async def more(self, count: int = 20) -> None:
        """Waits until `count` more additions are made."""
        goal = self.done + count
        await until(lambda: self.task.done() or self.done >= goal, timeout=40, why="the writer counts on")
        if self.task.done():
            self.task.result()

    async def stop(self) -> None:
        self._stopping = True
        await self.task


@asynccontextmanager
async def counting(
    near: Etcd, writing: Etcd, watching: Etcd, key: bytes = KEY
) -> AsyncIterator[tuple[Writer, Follower]]:
    """Writes and watches during the block, then checks that every count was seen once and in order."""
    async with following(watching, key) as follower:
        writer = Writer(writing, key)
        await writer.more()
        yield writer, follower
        await writer.more()
        await writer.stop()
        last = await near.get(key)
        assert last is not None
        assert last.version == int(last.value), "no addition was made twice or lost"
        assert writer.done <= int(last.value) <= writer.done + writer.open
        await follower.has(lambda f: f.content.get(key) == last.value, "the last count has come")
        events = [event for delta in follower.deltas for event in delta.events]
        assert [int(event.kv.value) for event in events] == list(range(1, int(last.value) + 1))
        assert len(follower.snapshots) == 1
