"""A pod's keys in a real etcd: publishing, claims, lost leases, names taken by others, and an etcd that is
unavailable."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from mesh.etcd import Etcd, EtcdError
from mesh.runtime.presence import place
from mesh.runtime.presence.claims import Claims
from mesh.runtime.presence.place import NameTaken
from mesh.runtime.presence.publishing import Presence
from mesh.runtime.presence.verdicts import Away, Claimed, Contradicted, Elsewhere, Published, Stale
from mesh.schema.keys import Keys
from mesh.schema.lives import Life
from mesh.schema.records import LOADED, LOADING, CopyRecord, ModelRecord, PodRecord
from tests.support.etcd import EtcdServer
from tests.support.waiting import until


class Pod:
    """A presence, with the state it publishes and the events it receives."""

    def __init__(self, etcd: Etcd, keys: Keys, name: str = "pod-1", *, incarnation: str = "", ttl: int = 3) -> None:
        self.etcd, self.keys, self.name = etcd, keys, name
        self.incarnation = incarnation or f"life-of-{name}"
        self.record = PodRecord(self.incarnation, "host:1", "host:2", capacity_bytes=100)
        self.stale: list[str] = []
        self.on_stale: Callable[[str], Awaitable[None]] | None = None
        self.silencing = False
        self.usurped: list[str] = []
        self.lost: list[str] = []
        self.alive: Callable[[PodRecord], Awaitable[bool | None]] = self._dead
        self.presence = Presence(
            etcd,
            keys,
            pod=name,
            incarnation=self.incarnation,
            ttl=ttl,
            record=lambda: self.record,
            on_stale=self.outdated,
            on_usurped=self.usurped.append,
            is_alive=lambda record: self.alive(record),
            on_lost=self.lost.append,
        )
        self.claims = Claims(etcd, keys, self.presence)

    async def outdated(self, model_id: str) -> None:
        self.stale.append(model_id)
        if self.on_stale is not None:
            self.silencing = True
            await self.on_stale(model_id)

    async def _dead(self, record: PodRecord) -> bool | None:
        return False

    async def __aenter__(self) -> "Pod":
        await self.presence.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.presence.close(revoke=True)

    def copy(self, created: int, state: str = LOADING) -> CopyRecord:
        return CopyRecord(self.incarnation, created, state)

    async def stands(self, model_id: str) -> CopyRecord | None:
        kv = await self.etcd.get(self.keys.copy(model_id, self.name))
        return None if kv is None else CopyRecord.decode(kv.value)

    async def lease_of(self, model_id: str) -> int:
        kv = await self.etcd.get(self.keys.copy(model_id, self.name))
        return 0 if kv is None else kv.lease


@pytest.fixture
async def pod(etcd: Etcd, keys: Keys) -> AsyncIterator[Pod]:
    async with Pod(etcd, keys) as running:
        yield running


@pytest.fixture
async def other(etcd: Etcd, keys: Keys) -> AsyncIterator[Pod]:
    async with Pod(etcd, keys, "pod-2") as running:
        yield running


async def register(pod: Pod, model_id: str, **fields: object) -> int:
    return await pod.etcd.put(pod.keys.model(model_id), ModelRecord(type="t", **fields).encode())  # type: ignore[arg-type]


async def published(pod: Pod) -> PodRecord | None:
    kv = await pod.etcd.get(pod.keys.pod(pod.name))
    return None if kv is None else PodRecord.decode(kv.value)


# --- publishing


async def test_everything_hangs_on_the_lease_and_goes_with_it(pod: Pod) -> None:
    assert await published(pod) == pod.record
    created = await register(pod, "m")
    pod.presence.put("m", pod.copy(created, LOADED))
    assert await pod.presence.settled("m", 5.0)
    assert await pod.stands("m") == pod.copy(created, LOADED)
    assert await pod.lease_of("m") == pod.presence.lease
    await pod.presence.close(revoke=True)
    assert await pod.stands("m") is None
    assert await published(pod) is None


async def test_what_is_dropped_goes_and_the_last_word_counts(pod: Pod) -> None:
    """Puts and drops come faster than etcd can be written, and the last one for each key counts."""
    created = await register(pod, "n")
    for number in range(20):
        pod.presence.put("m", pod.copy(created))
        pod.presence.drop("m")
        pod.presence.put("n", replace(pod.copy(created), host_bytes=number))
    assert await pod.presence.settled("m", 5.0)
    assert await pod.presence.settled("n", 5.0)
    assert await pod.stands("m") is None
    assert await pod.stands("n") == replace(pod.copy(created), host_bytes=19)


async def test_many_keys_need_few_transactions(pod: Pod) -> None:
    created = [await register(pod, f"m{number}") for number in range(250)]
    before = pod.presence.statistics().writes
    for number in range(250):
        pod.presence.put(f"m{number}", pod.copy(created[number]))
    for number in range(250):
        assert await pod.presence.settled(f"m{number}", 5.0)
    assert pod.presence.statistics().writes - before == 3
    assert len(await pod.presence.own_keys()) == 250


async def test_a_change_that_concerns_everybody_is_told_at_once(pod: Pod) -> None:
    pod.record = replace(pod.record, state="leaving")
    pod.presence.changed()

    async def told() -> bool:
        record = await published(pod)
        return record is not None and record.state == "leaving"

    await until(told, why="the new state stands in etcd")


# --- names


async def test_the_name_of_a_live_pod_is_refused(pod: Pod) -> None:
    async def alive(record: PodRecord) -> bool | None:
        return record.incarnation == pod.incarnation

    twin = Pod(pod.etcd, pod.keys, incarnation="twin")
    twin.alive = alive
    with pytest.raises(NameTaken, match=r"another pod .* has the name pod-1: give each pod its own --name"):
        await twin.presence.start()
    assert await published(pod) == pod.record


async def test_a_name_whose_pod_stays_unknown_is_refused(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    async def cannot_tell(record: PodRecord) -> bool | None:
        return None

    monkeypatch.setattr(place, "_LEASES", 0)
    twin = Pod(pod.etcd, pod.keys, incarnation="twin")
    twin.alive = cannot_tell
    with pytest.raises(NameTaken, match=r"has the name pod-1\. It cannot be reached, but may be alive: stop it"):
        await twin.presence.start()


async def test_the_place_of_a_dead_pod_is_taken_at_once(etcd: Etcd, keys: Keys) -> None:
    """The dead pod's keys are deleted although their lease still lives, so they cannot block a claim."""
    dead = Pod(etcd, keys, incarnation="dead", ttl=60)
    await dead.presence.start()
    created = await register(dead, "m")
    dead.presence.put("m", dead.copy(created, LOADED))
    assert await dead.presence.settled("m", 5.0)
    await dead.presence.close(revoke=False)
    async with Pod(etcd, keys, incarnation="next") as successor:
        assert await published(successor) == successor.record

        async def swept() -> bool:
            return await successor.stands("m") is None

        await until(swept, why="the copy of the earlier life is gone")


async def test_a_pod_that_may_still_live_keeps_its_name_until_its_lease_ends(etcd: Etcd, keys: Keys) -> None:
    """A pod that may still live, because it is stopped or cut off, keeps its name until its lease ends."""
    asked = asyncio.Event()

    async def cannot_tell(record: PodRecord) -> bool | None:
        asked.set()
        return None

    stopped = Pod(etcd, keys, incarnation="stopped", ttl=60)
    await stopped.presence.start()
    successor = Pod(etcd, keys, incarnation="next")
    successor.alive = cannot_tell
    starting = asyncio.create_task(successor.presence.start())
    await asked.wait()
    assert not starting.done()
    await stopped.presence.close(revoke=True)
    await asyncio.wait_for(starting, 10)
    await successor.presence.close(revoke=True)


async def test_a_pod_whose_place_was_taken_says_so_and_writes_no_more(etcd: Etcd, keys: Keys) -> None:
    """A pod whose name a successor has taken notices this at its next write, and leaves the successor's keys as they
    are."""
    async with Pod(etcd, keys, incarnation="zombie") as zombie, Pod(etcd, keys, incarnation="next") as successor:
        created = await register(zombie, "m")
        successor.presence.put("m", successor.copy(created, LOADED))
        assert await successor.presence.settled("m", 5.0)
        zombie.presence.put("m", zombie.copy(created, LOADED))
        await until(lambda: zombie.usurped, why="the first pod knows that its name is taken")
        assert await successor.stands("m") == successor.copy(created, LOADED)
        assert await published(successor) == successor.record


async def test_a_pod_whose_place_was_taken_finds_out_though_it_has_nothing_to_write(etcd: Etcd, keys: Keys) -> None:
    """The pod's lease lives, so the pod notices only because it checks its own key from time to time."""
    idle = Pod(etcd, keys, incarnation="idle", ttl=2)
    await idle.presence.start()
    record = replace(idle.record, incarnation="next")
    await etcd.put(keys.pod(idle.name), record.encode())
    await until(lambda: idle.usurped, timeout=15, why="the first pod knows that its name is taken")
    await idle.presence.close(revoke=True)
    assert await published(idle) == record


# --- losing the lease


async def test_a_lost_lease_is_replaced_and_everything_published_again(pod: Pod, etcd_server: EtcdServer) -> None:
    """After a lost lease, hundreds of copies are published again. Copies of ended registrations and of replaced content
    are withdrawn, but an old copy stays while no pod has loaded the new content."""
    created = {f"m{number}": await register(pod, f"m{number}") for number in range(230)}
    for model_id, revision in created.items():
        pod.presence.put(model_id, pod.copy(revision, LOADED))
    for model_id in created:
        assert await pod.presence.settled(model_id, 5.0)
    await pod.etcd.delete(pod.keys.model("m7"))
    await register(pod, "m7")
    await pod.etcd.delete(pod.keys.model("m150"))
    for model_id, digest in (("m8", "new"), ("m9", "")):
        after = replace(ModelRecord("t").reloaded(), digest=digest)
        await pod.etcd.put(pod.keys.model(model_id), after.encode())
    before = pod.presence.lease
    etcd_server.etcdctl("lease", "revoke", f"{before:x}")
    await until(lambda: pod.presence.statistics().leases == 2, why="the pod has another lease", timeout=15)
    for model_id in created:
        assert await pod.presence.settled(model_id, 10.0)
    assert sorted(pod.stale) == ["m150", "m7", "m8"]
    assert set(await pod.presence.own_keys()) == set(created) - {"m7", "m8", "m150"}
    assert await pod.lease_of("m3") == pod.presence.lease != before


async def test_etcd_frozen_for_longer_than_the_lease(own_etcd: EtcdServer, keys: Keys) -> None:
    """While etcd hangs for longer than the lease, the pod knows that it is not published. It writes its changes when
    etcd is back."""
    async with Etcd(own_etcd.settings) as etcd, Pod(etcd, keys, ttl=2) as pod:
        for name in ("kept", "dropped"):
            pod.presence.put(name, pod.copy(await register(pod, name), LOADED))
            assert await pod.presence.settled(name, 5.0)
        created = await register(pod, "late")
        own_etcd.freeze()
        try:
            await until(lambda: not pod.presence.published, timeout=15, why="the lease counts as lost")
            pod.presence.drop("dropped")
            verdict = await pod.claims.claim("late", pod.copy(created))
            assert isinstance(verdict, Away)
            assert not await pod.presence.settled("dropped", 0.05)
        finally:
            own_etcd.thaw()
        assert await pod.presence.settled("dropped", 15.0)
        assert await pod.presence.settled("kept", 15.0)
        await until(lambda: pod.presence.published, timeout=5, why="the pod is published after its copies")
        assert await pod.presence.own_keys() == ["kept"]


async def test_a_pod_that_returns_publishes_its_copies_first(own_etcd: EtcdServer, keys: Keys) -> None:
    """When the presence of a returning pod appears in etcd, each copy that answers has a key, and none is stale."""
    async with Etcd(own_etcd.settings) as etcd, Pod(etcd, keys, ttl=2) as pod:
        created = {f"m{number}": await register(pod, f"m{number}") for number in range(150)}
        for model_id, revision in created.items():
            pod.presence.put(model_id, pod.copy(revision, LOADED))
            assert await pod.presence.settled(model_id, 5.0)
        assert pod.presence.keyed
        silent = asyncio.Event()

        async def outdated(model_id: str) -> None:
            await silent.wait()

        pod.on_stale = outdated
        await etcd.delete(keys.model("m7"))
        before = pod.presence.lease
        own_etcd.etcdctl("lease", "revoke", f"{before:x}")
        await until(lambda: not pod.presence.keyed, timeout=15, why="the lease is gone")
        await until(lambda: pod.silencing, timeout=15, why="the stale copy is being silenced")
        assert await etcd.get(keys.pod("pod-1")) is None, "the pod was published while a stale copy may answer"
        silent.set()
        await until(lambda: pod.presence.keyed, timeout=15, why="the pod is back")
        assert set(await pod.presence.own_keys()) == set(created) - {"m7"}
        presence = await etcd.get(keys.pod("pod-1"))
        assert presence is not None
        for model_id in ("m0", "m99", "m149"):
            kv = await etcd.get(keys.copy(model_id, "pod-1"))
            assert kv is not None
            assert kv.mod_revision < presence.mod_revision


async def test_a_copy_without_its_key_is_known(pod: Pod) -> None:
    """A pod cannot prove that it may answer calls while one of its copies has no key."""
    created = await register(pod, "m")
    assert pod.presence.keyed
    pod.presence.put("m", pod.copy(created, LOADED))
    assert not pod.presence.keyed
    assert await pod.presence.settled("m", 5.0)
    assert pod.presence.keyed
    assert pod.presence.proof_ns


async def test_a_copy_that_was_never_claimed_has_to_be_current(pod: Pod) -> None:
    """A copy that was never claimed gets a key only if its registration is current. Until the copy has a key or is
    silenced, the pod does not count as fully keyed."""
    told: list[bool] = []
    pod.presence.listen(lambda: told.append(pod.presence.keyed))
    created = await register(pod, "m")
    pod.presence.put("m", pod.copy(created, LOADED))
    assert told == [False]
    assert await pod.presence.settled("m", 5.0)
    assert told[-1]

    silent = asyncio.Event()

    async def outdated(model_id: str) -> None:
        await silent.wait()
        pod.presence.drop(model_id)

    pod.on_stale = outdated
    pod.presence.put("n", pod.copy(created, LOADED))
    await until(lambda: pod.silencing, why="the copy is being silenced")
    await asyncio.sleep(0)
    assert not pod.presence.keyed
    silent.set()
    await until(lambda: pod.presence.keyed, why="the copy is silent")
    assert pod.stale == ["n"]
    assert await pod.stands("n") is None
    assert told[-1]


async def test_a_claim_leaves_a_pod_with_a_stale_copy_fully_keyed(pod: Pod) -> None:
    created = await register(pod, "m")
    pod.presence.put("gone", pod.copy(created, LOADED))
    await until(lambda: pod.stale, why="the copy is found stale")
    again = await register(pod, "gone")
    assert isinstance(await pod.claims.claim("gone", pod.copy(again)), Claimed)
    await until(lambda: pod.presence.keyed, why="the copy has its key")


async def test_presence_never_outlives_the_life(etcd: Etcd, keys: Keys) -> None:
    """When a pod's life is deleted, its presence is deleted too, even if the lease cannot be revoked or only the pod's
    clock says that it is lost. Otherwise a reader of both would overlook another pod's open life."""
    for how in ("revoked", "not revoked", "lost here"):
        pod = Pod(etcd, keys, ttl=60)
        await pod.presence.start()
        lease = pod.presence._lease
        assert lease is not None

        async def refuse(*, timeout: float | None = None) -> None:
            raise EtcdError("no")

        if how == "not revoked":
            lease.revoke = refuse  # type: ignore[method-assign]
        elif how == "lost here":
            lease._lose("test")
        await pod.presence.close(revoke=True)
        assert await etcd.get(keys.life("pod-1", pod.incarnation)) is None
        assert await etcd.get(keys.pod("pod-1")) is None, how


async def test_a_pod_that_leaves_takes_no_other_ones_presence_along(etcd: Etcd, keys: Keys) -> None:
    """A pod that leaves does not delete the presence of a newer incarnation with the same name."""
    former = Pod(etcd, keys, incarnation="former")
    await former.presence.start()
    async with Pod(etcd, keys, incarnation="next") as successor:
        await former.presence.close(revoke=True)
        assert await published(successor) == successor.record
        assert await etcd.get(keys.life("pod-1", "former")) is None
        assert await etcd.get(keys.life("pod-1", "next")) is not None


async def test_a_life_stands_until_its_agent_has_ended_it(etcd: Etcd, keys: Keys) -> None:
    """A life has no lease and stays until its agent ends it, while presence ends with its lease."""
    pod = Pod(etcd, keys)
    await pod.presence.start()
    life = await etcd.get(keys.life("pod-1", pod.incarnation))
    assert life is not None
    assert life.lease == 0
    assert Life.decode(life.value) == Life("host:1", "host:2", lease=pod.presence.lease)
    await pod.presence.close(revoke=False)
    assert await etcd.get(keys.life("pod-1", pod.incarnation)) is not None
    again = Pod(etcd, keys, incarnation="next")
    await again.presence.start()
    await again.presence.close(revoke=True)
    assert await etcd.get(keys.life("pod-1", "next")) is None
    assert await etcd.get(keys.pod("pod-1")) is None


# --- claims


async def test_a_claim_writes_the_copy_and_brings_the_record(pod: Pod) -> None:
    created = await register(pod, "m", host_bytes=77)
    verdict = await pod.claims.claim("m", pod.copy(created))
    assert isinstance(verdict, Claimed)
    assert verdict.record.host_bytes == 77
    assert await pod.stands("m") == pod.copy(created)
    assert await pod.lease_of("m") == pod.presence.lease


async def test_one_of_two_pods_wins(pod: Pod, other: Pod) -> None:
    """The pod that loses a claim learns the winner's name, and has written nothing."""
    for number in range(20):
        model_id = f"m{number}"
        created = await register(pod, model_id)
        verdicts = await asyncio.gather(
            pod.claims.claim(model_id, pod.copy(created)), other.claims.claim(model_id, other.copy(created))
        )
        winner, loser = (pod, other) if isinstance(verdicts[0], Claimed) else (other, pod)
        assert Elsewhere(winner.name) in verdicts
        assert await loser.stands(model_id) is None
        assert await winner.stands(model_id) is not None


async def test_a_further_copy_is_claimed_with_the_number_expected(pod: Pod, other: Pod, etcd: Etcd, keys: Keys) -> None:
    """A claim of a further copy names the number of copies that it expects, so only one of two pods makes the second
    copy."""
    created = await register(pod, "m")
    async with Pod(etcd, keys, "pod-3") as third:
        assert isinstance(await pod.claims.claim("m", pod.copy(created)), Claimed)
        assert await other.claims.claim("m", other.copy(created)) == Elsewhere("pod-1")
        verdicts = await asyncio.gather(
            other.claims.claim("m", other.copy(created), expected=1),
            third.claims.claim("m", third.copy(created), expected=1),
        )
        assert sum(isinstance(verdict, Claimed) for verdict in verdicts) == 1
        assert isinstance(next(verdict for verdict in verdicts if not isinstance(verdict, Claimed)), Elsewhere)
        loser = third if isinstance(verdicts[0], Claimed) else other
        assert isinstance(await loser.claims.claim("m", loser.copy(created), expected=2), Claimed)


async def test_the_loser_is_sent_to_a_copy_that_is_loaded(pod: Pod, other: Pod, etcd: Etcd, keys: Keys) -> None:
    created = await register(pod, "m")
    pod.presence.put("m", pod.copy(created, LOADING))
    other.presence.put("m", other.copy(created, LOADED))
    for one in (pod, other):
        assert await one.presence.settled("m", 5.0)
    async with Pod(etcd, keys, "a-third") as third:
        assert await third.claims.claim("m", third.copy(created)) == Elsewhere("pod-2")


async def test_a_claim_for_another_registration_is_stale(pod: Pod) -> None:
    created = await register(pod, "m")
    await pod.etcd.delete(pod.keys.model("m"))
    assert await pod.claims.claim("m", pod.copy(created)) == Stale()
    await register(pod, "m")
    assert await pod.claims.claim("m", pod.copy(created)) == Stale()
    assert await pod.stands("m") is None


async def test_a_key_of_its_own_that_was_left_is_overwritten(pod: Pod) -> None:
    created = await register(pod, "m")
    await pod.etcd.put(pod.keys.copy("m", pod.name), b"of an earlier life")
    assert isinstance(await pod.claims.claim("m", pod.copy(created)), Claimed)
    assert await pod.stands("m") == pod.copy(created)


async def test_a_deletion_that_was_pending_does_not_hit_the_claim(pod: Pod) -> None:
    """A copy is dropped and claimed again thirty times. The pending deletion never removes the key of the next
    claim."""
    created = await register(pod, "m")
    for _ in range(30):
        assert isinstance(await pod.claims.claim("m", pod.copy(created)), Claimed)
        assert await pod.stands("m") == pod.copy(created)
        pod.presence.drop("m")
    assert await pod.presence.settled("m", 5.0)
    assert await pod.stands("m") is None


async def test_a_claim_tells_of_copies_elsewhere(pod: Pod, other: Pod) -> None:
    """A claim reports how many loaded copies the models it asks about have in other pods."""
    created = await register(pod, "m")
    for one, name, state in ((pod, "both", LOADED), (other, "both", LOADED), (other, "coming", LOADING)):
        kv = await one.etcd.get(one.keys.model(name))
        one.presence.put(name, one.copy(kv.create_revision if kv else await register(one, name), state))
        assert await one.presence.settled(name, 5.0)
    verdict = await pod.claims.claim("m", pod.copy(created), ask=["both", "coming", "nowhere"])
    assert isinstance(verdict, Claimed)
    assert verdict.spares == {"both": 1, "coming": 0, "nowhere": 0}


async def test_ids_that_begin_alike_do_not_claim_each_other(pod: Pod, other: Pod) -> None:
    """Some of the ids are the beginning of others, and two differ only in the encoding of a slash."""
    names = ["a", "a/b", "a/pod-1", "a%2Fb", "ab", "a b", "ü"]
    created = {name: await register(pod, name) for name in names}
    for number, name in enumerate(names):
        one = (pod, other)[number % 2]
        assert isinstance(await one.claims.claim(name, one.copy(created[name])), Claimed), name


async def test_a_claim_that_timed_out_is_cleaned_up(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    """Etcd may have written the key of a claim that timed out."""
    created = await register(pod, "m")
    txn = pod.etcd.txn

    async def done_but_not_heard(*args: object, **options: object) -> object:
        await txn(*args, **options)  # type: ignore[arg-type]
        raise EtcdError("no answer")

    monkeypatch.setattr(pod.etcd, "txn", done_but_not_heard)
    assert isinstance(await pod.claims.claim("m", pod.copy(created)), Away)
    monkeypatch.setattr(pod.etcd, "txn", txn)
    assert await pod.presence.settled("m", 10.0)
    assert await pod.stands("m") is None


async def test_a_claim_that_comes_late_does_not_give_another_lease_up(
    pod: Pod, etcd_server: EtcdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claim that was begun under a lost lease and answered late does not make the pod give up its new lease."""
    created = await register(pod, "m")
    before = pod.presence.lease
    txn, held = pod.etcd.txn, asyncio.Event()

    async def late(compares: object, success: object, failure: object = (), **options: object) -> object:
        if options:  # a claim has a time-out of its own
            await held.wait()
        return await txn(compares, success, failure, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(pod.etcd, "txn", late)
    claim = asyncio.create_task(pod.claims.claim("m", pod.copy(created)))
    await asyncio.sleep(0)
    etcd_server.etcdctl("lease", "revoke", f"{before:x}")
    await until(lambda: pod.presence.statistics().leases == 2, why="the pod has another lease", timeout=15)
    held.set()
    assert isinstance(await claim, Away)
    assert pod.presence.published
    assert pod.presence.statistics().leases == 2
    assert isinstance(await pod.claims.claim("m", pod.copy(created)), Claimed)


def first(digest: str) -> Callable[[ModelRecord], ModelRecord]:
    """Returns the change that a first load makes to the record."""
    return lambda record: replace(record, digest=digest, digest_ms=1)


async def model(pod: Pod, model_id: str) -> ModelRecord:
    kv = await pod.etcd.get(pod.keys.model(model_id))
    assert kv is not None
    return ModelRecord.decode(kv.value)


async def test_of_two_first_loads_one_says_what_the_content_is(pod: Pod, other: Pod) -> None:
    """The first load to publish records its digest. A copy that was claimed at the same time is published only if its
    digest is the same."""
    created = await register(pod, "m")
    claimed = await pod.claims.claim("m", pod.copy(created))
    also = await other.claims.claim("m", other.copy(created), expected=1)
    assert isinstance(claimed, Claimed)
    assert isinstance(also, Claimed)
    mine = replace(pod.copy(created, LOADED), digest="one")
    assert isinstance(await pod.claims.publish("m", mine, claimed, first("one")), Published)
    assert await pod.stands("m") == mine
    theirs = replace(other.copy(created, LOADED), digest="two")
    contradicted = await other.claims.publish("m", theirs, also, first("two"))
    assert isinstance(contradicted, Contradicted)
    assert contradicted.record.digest == "one"
    assert (await other.stands("m")).state == LOADING  # type: ignore[union-attr]
    same = replace(theirs, digest="one")
    assert isinstance(await other.claims.publish("m", same, also, first("one")), Published)
    assert await other.stands("m") == same
    assert (await model(pod, "m")).digest == "one"


async def test_a_record_that_others_change_meanwhile_keeps_what_they_wrote(pod: Pod) -> None:
    created = await register(pod, "m")
    claimed = await pod.claims.claim("m", pod.copy(created))
    assert isinstance(claimed, Claimed)
    await pod.etcd.put(pod.keys.model("m"), ModelRecord("t", last_used_ms=5).encode())
    copy = replace(pod.copy(created, LOADED), digest="one")
    assert isinstance(await pod.claims.publish("m", copy, claimed, first("one")), Published)
    assert await model(pod, "m") == ModelRecord("t", last_used_ms=5, digest="one", digest_ms=1)


@pytest.mark.parametrize("what", ["registered again", "unregistered", "reloaded"])
async def test_what_was_loaded_for_another_registration_or_generation_is_stale(pod: Pod, what: str) -> None:
    created = await register(pod, "m")
    claimed = await pod.claims.claim("m", pod.copy(created))
    assert isinstance(claimed, Claimed)
    if what == "reloaded":
        await pod.etcd.put(pod.keys.model("m"), claimed.record.reloaded().encode())
    else:
        await pod.etcd.delete(pod.keys.model("m"))
    if what == "registered again":
        await register(pod, "m")
    copy = replace(pod.copy(created, LOADED), digest="one")
    assert await pod.claims.publish("m", copy, claimed, first("one")) == Stale()
    found = await pod.etcd.get(pod.keys.model("m"))
    assert found is None or not ModelRecord.decode(found.value).digest


async def test_nothing_is_published_without_presence(pod: Pod) -> None:
    """A record must not name a content that no pod holds."""
    created = await register(pod, "m")
    claimed = await pod.claims.claim("m", pod.copy(created))
    assert isinstance(claimed, Claimed)
    await pod.etcd.delete(pod.presence.key)
    copy = replace(pod.copy(created, LOADED), digest="one")
    assert isinstance(await pod.claims.publish("m", copy, claimed, first("one")), Away)
    assert not (await model(pod, "m")).digest


async def test_a_look_brings_the_record_of_that_registration_alone(pod: Pod) -> None:
    created = await register(pod, "m", generation=2)
    found = await pod.claims.look("m", created)
    assert isinstance(found, Claimed)
    assert (found.record.generation, found.modified) == (2, created)
    assert await pod.claims.look("m", created + 1) == Stale()
    assert await pod.claims.look("nobody", created) == Stale()


async def test_no_presence_no_claim(pod: Pod) -> None:
    """A pod whose record was deleted claims nothing, and publishes itself again."""
    created = await register(pod, "m")
    await pod.etcd.delete(pod.keys.pod(pod.name))
    assert isinstance(await pod.claims.claim("m", pod.copy(created)), Away)
    await until(lambda: pod.presence.published, why="the pod is published again")
    assert isinstance(await pod.claims.claim("m", pod.copy(created)), Claimed)


async def test_keys_that_the_pod_does_not_want_are_deleted(pod: Pod) -> None:
    pod.presence.put("wanted", pod.copy(await register(pod, "wanted")))
    assert await pod.presence.settled("wanted", 5.0)
    await pod.etcd.put(pod.keys.copy("stray", pod.name), b"{}")
    assert set(await pod.presence.own_keys()) == {"wanted", "stray"}
    await pod.presence.tidy()
    assert await pod.presence.settled("stray", 5.0)
    assert await pod.presence.own_keys() == ["wanted"]


async def test_a_key_that_is_being_written_is_not_missing(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    created = await register(pod, "m")
    execute, begun, may_end = pod.etcd.txn, asyncio.Event(), asyncio.Event()

    async def held(*args: Any, **options: Any) -> Any:
        begun.set()
        await may_end.wait()
        return await execute(*args, **options)

    monkeypatch.setattr(pod.etcd, "txn", held)
    pod.presence.put("m", pod.copy(created, LOADED))
    await begun.wait()
    await pod.presence.tidy()
    assert pod.presence.statistics().behind == 1
    may_end.set()
    assert await pod.presence.settled("m", 5.0)


async def test_missing_keys_are_written_again(pod: Pod) -> None:
    """Keys that were lost when etcd was restored from a snapshot are written again, except keys of ended registrations.
    Until then the pod cannot prove that it may answer."""
    for name in ("stays", "taken", "ended"):
        pod.presence.put(name, pod.copy(await register(pod, name), LOADED))
        assert await pod.presence.settled(name, 5.0)
    keyed = []
    pod.presence.listen(lambda: keyed.append(pod.presence.keyed))
    for name in ("taken", "ended"):
        await pod.etcd.delete(pod.keys.copy(name, pod.name))
    await pod.etcd.delete(pod.keys.model("ended"))
    await register(pod, "ended")
    await pod.presence.tidy()
    assert keyed[0] is False
    await until(lambda: pod.presence.keyed, why="all copies have their keys again")
    assert pod.stale == ["ended"]
    assert sorted(await pod.presence.own_keys()) == ["stays", "taken"]
