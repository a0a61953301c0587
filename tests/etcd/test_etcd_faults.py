"""Faults of etcd and of the network, under a writer that counts and a watcher that must see each number once."""

import asyncio
from pathlib import Path

import pytest

from mesh.etcd import Etcd, Lease, Mirror
from mesh.options.etcdsettings import EtcdSettings
from tests.support.counting import counting
from tests.support.etcd import EtcdServer
from tests.support.proxy import Proxy
from tests.support.waiting import until


async def test_killed_and_restarted(own_etcd: EtcdServer) -> None:
    """The writer, the watcher and a lease continue by themselves after each of three `kill -9` of etcd."""
    async with Etcd(own_etcd.settings) as etcd, counting(etcd, etcd, etcd) as (writer, follower):
        lease = await Lease.grant(etcd, ttl=9)
        await etcd.put(b"leased", b"", lease=lease.id)
        for _ in range(3):
            own_etcd.kill9()
            await follower.has(lambda f: not f.mirror.connected, "the loss is noticed")
            assert follower.mirror.stale_for >= 0
            await own_etcd.start()
            await writer.more()
            await follower.has(lambda f: f.mirror.connected, "the watch is back")
        renewals = lease.statistics().renewals
        await until(lambda: lease.statistics().renewals > renewals, timeout=20, why="the lease is renewed again")
        assert await etcd.get(b"leased")
        await lease.revoke()


async def test_restarted_in_good_order(own_etcd: EtcdServer) -> None:
    """Clients continue after a restart of etcd by SIGTERM, which ends their streams with an OK status."""
    async with Etcd(own_etcd.settings) as etcd, counting(etcd, etcd, etcd) as (writer, _):
        own_etcd.stop()
        await own_etcd.start()
        await writer.more()


@pytest.mark.long
async def test_frozen_and_black_holed(own_etcd: EtcdServer, etcd_server: EtcdServer, tmp_path: Path) -> None:
    """Clients notice a frozen etcd and a black-holed network in bounded time, because signs of life stop, and recover.

    Both faults run at once, because gRPC's keep-alive with its settings for production takes 13 seconds for each.
    """

    async def frozen() -> None:
        async with Etcd(own_etcd.settings) as etcd, counting(etcd, etcd, etcd) as (writer, follower):
            own_etcd.freeze()
            try:
                await follower.has(lambda f: not f.mirror.connected, "the silence is noticed")
            finally:
                own_etcd.thaw()
            await writer.more()
            await follower.has(lambda f: f.mirror.connected, "the watch is back")

    async def black_holed() -> None:
        key = str(tmp_path).encode()
        async with Proxy(etcd_server.port) as proxy, Etcd(etcd_server.settings) as near:
            async with Etcd(EtcdSettings(endpoints=(proxy.endpoint,))) as far:
                async with counting(near, far, far, key) as (writer, follower):
                    proxy.swallow()
                    await follower.has(lambda f: not f.mirror.connected, "the silence is noticed")
                    proxy.flow()
                    await writer.more()
                    await follower.has(lambda f: f.mirror.connected, "the watch is back")

    async with asyncio.TaskGroup() as both:
        both.create_task(frozen())
        both.create_task(black_holed())


async def test_cut_again_and_again(own_etcd: EtcdServer) -> None:
    """Nothing is lost when connections break at any moment, 20 times."""
    async with Proxy(own_etcd.port) as proxy, Etcd(own_etcd.settings) as near:
        async with Etcd(EtcdSettings(endpoints=(proxy.endpoint,))) as far:
            async with counting(near, far, far) as (writer, _):
                for _ in range(20):
                    accepted = proxy.accepted
                    proxy.cut()
                    await until(lambda before=accepted: proxy.accepted > before, why="the client connects again")
                    await writer.more(3)


async def test_compacted_under_way(own_etcd: EtcdServer) -> None:
    """A watcher loses nothing when etcd compacts its history up to the latest revision."""
    async with Etcd(own_etcd.settings) as etcd, counting(etcd, etcd, etcd) as (writer, _):
        for _ in range(5):
            await own_etcd.compact()
            await writer.more(5)


async def test_cancelling_everything_while_etcd_dies(own_etcd: EtcdServer) -> None:
    """Cancelling tasks and closing a client does not hang while etcd dies. A new client works as soon as etcd is
    back."""
    etcd = Etcd(own_etcd.settings)

    async def follow(number: int) -> None:
        async for _ in Mirror(etcd, b"k/%d" % number, b"k0"):
            pass

    async def hold() -> None:
        await (await Lease.grant(etcd, ttl=5)).lost.wait()

    async def write() -> None:
        while True:
            await etcd.put(b"k/0", b"")

    tasks = [asyncio.create_task(work) for number in range(10) for work in (follow(number), hold(), write())]
    await until(lambda: etcd.statistics().requests > 200, why="all are at work")
    own_etcd.kill9()
    for task in tasks:
        task.cancel()
        await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await asyncio.wait(tasks)
        await etcd.close()
    await own_etcd.start()
    async with Etcd(own_etcd.settings) as another:
        assert await another.get(b"k/0")
