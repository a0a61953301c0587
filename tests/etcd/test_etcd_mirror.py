"""A mirror of a range in a real etcd: the changes it reports, their order, and their cost."""

import asyncio

import pytest

from mesh.etcd import ChangeKind, Delta, Etcd, EtcdClosed, Lease, Mirror, Snapshot, delete_op, put_op
from mesh.etcd.ranges import after_prefix
from mesh.options.etcdsettings import EtcdSettings
from mesh.schema.keys import Keys
from tests.support.etcd import EtcdServer
from tests.support.following import following
from tests.support.proxy import Proxy


async def test_what_is_there_comes_first_then_every_change(etcd: Etcd, keys: Keys) -> None:
    base = keys.registry
    for number in range(25):  # several pages
        await etcd.put(base + b"%02d" % number, b"old")
    await etcd.put(keys.vmodels + b"other", b"")
    async with following(etcd, base) as follower:
        (first,) = follower.snapshots
        assert [kv.key for kv in first.kvs] == [base + b"%02d" % number for number in range(25)]
        await etcd.put(keys.vmodels + b"another", b"")  # outside
        written = await etcd.put(base + b"00", b"new")
        await etcd.delete(base + b"01")
        await follower.has(lambda f: len(f.deltas) == 2, "both changes have come")
        put, deleted = follower.deltas
        assert put.revision == written
        assert [(e.kind, e.kv.key, e.kv.value) for e in put.events] == [(ChangeKind.PUT, base + b"00", b"new")]
        assert [(e.kind, e.kv.key, e.kv.value) for e in deleted.events] == [(ChangeKind.DELETE, base + b"01", b"")]
        assert put.events[0].kv.version == 2
        assert follower.mirror.connected
        assert follower.mirror.stale_for == 0
        statistics = follower.mirror.statistics()
        assert (statistics.snapshots, statistics.deltas, statistics.events, statistics.watches) == (1, 2, 2, 1)


async def test_a_transaction_is_one_delta(etcd: Etcd, keys: Keys) -> None:
    base = keys.registry
    await etcd.put(base + b"gone", b"")
    async with following(etcd, base) as follower:
        await etcd.txn([], [put_op(base + b"a", b""), put_op(base + b"b", b""), delete_op(base + b"gone")])
        await follower.has(lambda f: f.deltas, "the transaction has come")
        (delta,) = follower.deltas
        assert len(delta.events) == 3


async def test_the_end_of_a_lease_is_one_delta(etcd: Etcd, keys: Keys) -> None:
    """All deletions at the end of a lease come in one delta, so a vanished pod looks different from a pod that withdrew
    a copy."""
    base = keys.registry
    lease = await Lease.grant(etcd, ttl=10)
    for name in (b"a", b"b", b"c"):
        await etcd.put(base + name, b"", lease=lease.id)
    async with following(etcd, base) as follower:
        await lease.revoke()
        await follower.has(lambda f: not f.content, "the keys are gone")
        assert [len(delta.events) for delta in follower.deltas] == [3]


async def test_large_revisions_arrive_whole_though_etcd_cuts_them(etcd_server: EtcdServer, keys: Keys) -> None:
    """Large revisions arrive complete although etcd sends them in many fragments: here, 12 transactions of 1.2 MB each,
    all at once."""
    base, value = keys.registry, b"x" * 100_000
    async with Proxy(etcd_server.port) as proxy, Etcd(EtcdSettings(endpoints=(proxy.endpoint,))) as far:
        async with following(far, base) as follower, Etcd(etcd_server.settings) as near:
            proxy.swallow()  # keeps the watch from returning before all is written
            proxy.cut()
            for number in range(12):
                await near.txn([], [put_op(base + b"%02d-%02d" % (number, k), value) for k in range(12)])
            assert not follower.deltas
            proxy.flow()
            await follower.has(lambda f: len(f.content) == 144, "all has come")
            assert len(follower.snapshots) == 1
            assert [len(delta.events) for delta in follower.deltas] == [12] * 12
            await near.delete_range(base, after_prefix(base))


async def test_a_consumer_that_stands_still_holds_nothing_up_but_itself(etcd: Etcd, keys: Keys) -> None:
    """If a consumer stops reading, the mirror waits with it, and no change is lost."""
    base = keys.registry
    mirror = Mirror(etcd, base, after_prefix(base))
    changes = aiter(mirror)
    assert isinstance(await anext(changes), Snapshot)
    for number in range(300):
        await etcd.put(base + b"%04d" % number, b"x" * 1000)
    seen = [(await anext(changes)) for _ in range(300)]
    assert [change.events[0].kv.key for change in seen if isinstance(change, Delta)] == [
        base + b"%04d" % number for number in range(300)
    ]
    await mirror.close()
    assert not mirror.connected


async def test_a_compacted_revision_is_followed_by_a_snapshot(own_etcd: EtcdServer) -> None:
    """If a mirror's revision was compacted while it was disconnected, it reads a snapshot and misses no change."""
    async with Proxy(own_etcd.port) as proxy, Etcd(EtcdSettings(endpoints=(proxy.endpoint,))) as far:
        async with following(far, b"k/") as follower, Etcd(own_etcd.settings) as near:
            await near.put(b"k/1", b"")
            await follower.has(lambda f: f.content == {b"k/1": b""}, "the first key has come")
            proxy.swallow()  # so that it cannot come back before the compaction
            proxy.cut()
            await near.delete(b"k/1")
            await near.put(b"k/2", b"")
            await own_etcd.compact()
            proxy.flow()
            await follower.has(lambda f: len(f.snapshots) == 2, "a second snapshot has come")
            assert follower.content == {b"k/2": b""}
            await near.put(b"k/3", b"")
            await follower.has(lambda f: f.content == {b"k/2": b"", b"k/3": b""}, "changes come again")


async def test_a_compaction_while_connected_is_not_noticed(own_etcd: EtcdServer) -> None:
    async with Etcd(own_etcd.settings) as etcd, following(etcd, b"k/") as follower:
        for number in range(5):
            await etcd.put(b"k/%d" % number, b"")
            await own_etcd.compact()
        await follower.has(lambda f: len(f.content) == 5, "all has come")
        assert len(follower.snapshots) == 1


async def test_a_quiet_range_survives_compaction_by_progress(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A range without changes need not be read again after a compaction, because etcd's progress reports advance its
    revision."""
    option = "--experimental-watch-progress-notify-interval=100ms"
    with EtcdServer(tmp_path_factory.mktemp("etcd") / "data", extra=[option]) as server:
        async with Proxy(server.port) as proxy, Etcd(EtcdSettings(endpoints=(proxy.endpoint,))) as far:
            async with following(far, b"k/") as follower, Etcd(server.settings) as near:
                await near.put(b"k/1", b"")
                written = [await near.put(b"elsewhere", b"") for _ in range(5)]
                await follower.has(lambda f: f.mirror.statistics().revision >= written[-1], "progress is told")
                await server.compact()
                proxy.cut()
                await follower.has(lambda f: f.mirror.statistics().watches == 2, "it has come back")
                await near.put(b"k/2", b"")
                await follower.has(lambda f: len(f.content) == 2, "the change has come")
                assert len(follower.snapshots) == 1


async def test_an_etcd_that_starts_again_without_data_is_read_again(tmp_path_factory: pytest.TempPathFactory) -> None:
    """If etcd starts again without data, the mirror reads everything again. A watch from the old revision, which the
    new store has not reached, would wait silently."""
    folder = tmp_path_factory.mktemp("etcd")
    with EtcdServer(folder / "data") as server:
        async with Etcd(server.settings) as etcd, following(etcd, b"k/") as follower:
            for number in range(10):
                await etcd.put(b"k/%d" % number, b"")
            await follower.has(lambda f: len(f.content) == 10, "all has come")
            server.kill9()
            (folder / "data").rename(folder / "lost")
            await server.start()
            await etcd.put(b"k/new", b"")
            await follower.has(lambda f: set(f.content) == {b"k/new"}, "the new content has come")
            assert len(follower.snapshots) == 2


async def test_it_goes_on_at_the_next_member(etcd_server: EtcdServer, keys: Keys) -> None:
    async with Proxy(etcd_server.port) as first, Proxy(etcd_server.port) as second:
        settings = EtcdSettings(endpoints=(first.endpoint, second.endpoint))
        async with Etcd(settings) as far, Etcd(etcd_server.settings) as near, following(far, keys.registry) as follower:
            first.swallow()
            first.cut()
            await near.put(keys.model("m"), b"")
            await follower.has(lambda f: f.content, "the change has come by the other way")
            assert second.accepted == 1


async def test_it_ends_with_its_client_and_with_its_task(etcd_server: EtcdServer, keys: Keys) -> None:
    etcd = Etcd(etcd_server.settings)
    async with following(etcd, keys.registry) as cancelled, following(etcd, keys.vmodels) as closed:
        cancelled.task.cancel()
        await asyncio.wait({cancelled.task})
        assert cancelled.task.cancelled()
        assert closed.mirror.connected
        await etcd.close()
        with pytest.raises(EtcdClosed):
            await closed.task


async def test_a_range_without_a_start_is_refused(etcd: Etcd) -> None:
    with pytest.raises(ValueError, match="has to start with a key"):
        Mirror(etcd, b"", b"\0")
