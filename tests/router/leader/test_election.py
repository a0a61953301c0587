"""The election of one leader at a time, on a real etcd."""

import asyncio

from mesh.pb import etcd_pb2
from router.leader.election import Election
from tests.support.waiting import until


class Candidate:
    """A candidate that records when it leads."""

    def __init__(self, etcd, keys, name: str) -> None:
        self.terms = 0
        self.now = False
        self.election = Election(etcd, keys, name, self._lead, ttl=2)
        self.task = asyncio.ensure_future(self.election.run())

    async def _lead(self) -> None:
        self.terms += 1
        self.now = True
        try:
            await asyncio.Event().wait()
        finally:
            self.now = False

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.wait({self.task})


async def test_one_leads_and_the_next_follows(etcd, keys):
    """A leader that stops revokes its lease, so the next candidate follows at once."""
    one, two = Candidate(etcd, keys, "one"), Candidate(etcd, keys, "two")
    try:
        await until(lambda: one.now or two.now)
        assert one.now != two.now
        first, second = (one, two) if one.now else (two, one)
        assert (await etcd.get(keys.leader)).value.decode() == ("one" if first is one else "two")
        await first.stop()
        assert not first.now
        await until(lambda: second.now, why="the other one follows")
        assert second.election.leading
    finally:
        for candidate in (one, two):
            await candidate.stop()
    assert await etcd.get(keys.leader) is None


async def test_a_leader_whose_lease_is_gone_stops_and_stands_again(etcd, keys):
    """Another program revokes the lease of the only candidate, which then leads a second term."""
    one = Candidate(etcd, keys, "one")
    try:
        await until(lambda: one.now)
        lease = (await etcd.get(keys.leader)).lease
        await etcd.connection.call(
            "lease revoke", lambda m: m.lease.LeaseRevoke, etcd_pb2.LeaseRevokeRequest(ID=lease), repeatable=True
        )
        await until(lambda: one.terms == 2 and one.now, timeout=20, why="the candidate leads again")
    finally:
        await one.stop()
    assert not one.now


async def test_leading_that_fails_is_given_up_and_tried_again(etcd, keys):
    terms = 0

    async def lead() -> None:
        nonlocal terms
        terms += 1
        if terms == 1:
            raise ZeroDivisionError
        await asyncio.Event().wait()

    task = asyncio.ensure_future(Election(etcd, keys, "r", lead, ttl=2).run())
    await until(lambda: terms == 2, timeout=20)
    task.cancel()
    await asyncio.wait({task})
