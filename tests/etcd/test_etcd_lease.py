"""Leases, which are kept alive, revoked, and lost in time whatever etcd answers."""

import asyncio

import pytest

from mesh.etcd import Etcd, EtcdClosed, EtcdUnavailable, Lease
from mesh.options.etcdsettings import EtcdSettings
from mesh.pb import etcd_pb2 as pb
from mesh.schema.keys import Keys
from tests.support.etcd import EtcdServer
from tests.support.following import following
from tests.support.proxy import Proxy
from tests.support.waiting import until


async def test_a_lease_is_kept_and_revoked(etcd: Etcd, keys: Keys) -> None:
    """One stream keeps a lease alive beyond its TTL. When the lease is revoked, its keys are deleted at once."""
    lease = await Lease.grant(etcd, ttl=2)
    key = keys.pod("p")
    await etcd.put(key, b"", lease=lease.id)
    await until(
        lambda: lease.statistics().renewals >= 4, why="the lease has been renewed past its TTL"
    )  # each third of it
    assert await etcd.get(key)
    assert not lease.lost.is_set()
    assert 0 < lease.remaining <= 2
    assert lease.statistics().streams == 1
    await lease.revoke()
    assert await etcd.get(key) is None
    assert not lease.lost.is_set()
    await lease.revoke()  # revoking again succeeds, because the lease is gone as requested


async def test_a_lease_that_etcd_ended_is_lost_at_the_next_renewal(etcd: Etcd) -> None:
    lease = await Lease.grant(etcd, ttl=3)
    request = pb.LeaseRevokeRequest(ID=lease.id)
    await etcd.connection.call("revoke", lambda m: m.lease.LeaseRevoke, request, repeatable=True)
    async with asyncio.timeout(10):
        await lease.lost.wait()
    assert lease.why_lost == "etcd says that it has expired"
    assert lease.remaining == 0
    await lease.close()


async def test_a_lease_is_lost_no_later_than_etcd_ends_it(own_etcd: EtcdServer) -> None:
    """A client that cannot reach etcd considers its lease lost no later than other clients see its key disappear."""
    async with Proxy(own_etcd.port) as proxy, Etcd(own_etcd.settings) as near, following(near, b"k") as follower:
        async with Etcd(EtcdSettings(endpoints=(proxy.endpoint,))) as far:
            lease = await Lease.grant(far, ttl=2)
            await near.put(b"k", b"", lease=lease.id)
            await follower.has(lambda f: f.content and lease.statistics().renewals, "it is there and renewed")
            proxy.swallow()
            await follower.has(lambda f: not f.content, "etcd has ended the lease")
            assert lease.lost.is_set()
            assert lease.why_lost == "not renewed in time"


async def test_a_lease_survives_a_broken_connection_and_a_silent_member(etcd_server: EtcdServer, keys: Keys) -> None:
    async with Proxy(etcd_server.port) as first, Proxy(etcd_server.port) as second:
        async with Etcd(EtcdSettings(endpoints=(first.endpoint, second.endpoint))) as etcd:
            lease = await Lease.grant(etcd, ttl=5)
            first.cut()
            await until(lambda: lease.statistics().streams >= 2, why="the stream is open again")
            renewals = lease.statistics().renewals
            await until(lambda: lease.statistics().renewals > renewals, why="the lease is renewed again")
            first.swallow()
            second.swallow()
            await until(lambda: lease.statistics().streams >= 3, why="silence is noticed before the lease is lost")
            first.flow()
            second.flow()
            renewals = lease.statistics().renewals
            await until(lambda: lease.statistics().renewals > renewals, why="the lease is renewed again")
            assert not lease.lost.is_set()
            await lease.revoke()


async def test_a_process_that_stood_still_has_lost_its_lease(etcd: Etcd, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was stopped has lost its lease. A renewal whose answer it reads too late does not count."""
    lease = await Lease.grant(etcd, ttl=5)
    loop = asyncio.get_running_loop()
    clock = loop.time
    monkeypatch.setattr(loop, "time", lambda: clock() + 60)
    await until(lambda: lease.lost.is_set(), why="the jump of the clock is noticed")
    monkeypatch.undo()
    assert lease.why_lost == "not renewed in time"
    await lease.close()


async def test_granting_is_bounded_and_ends_with_the_client(etcd_server: EtcdServer) -> None:
    async with Proxy(etcd_server.port) as proxy:
        etcd = Etcd(EtcdSettings(endpoints=(proxy.endpoint,)))
        lease = await Lease.grant(etcd, ttl=1)
        proxy.swallow()
        with pytest.raises(EtcdUnavailable):
            await Lease.grant(etcd, ttl=2, timeout=0.05)
        await etcd.close()
        with pytest.raises(EtcdClosed):
            await Lease.grant(etcd, ttl=2)
        async with asyncio.timeout(10):
            await lease.lost.wait()  # no holder renews this lease
        await lease.close()
