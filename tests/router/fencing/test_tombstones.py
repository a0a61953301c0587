"""Tombstones: when the id of a deleted registration is free again, and which pods it must wait for."""

import asyncio
import socket
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from mesh.etcd import Etcd, EtcdUnavailable, Lease, Op, delete_op, put_op
from mesh.schema.keys import TOMBSTONE, Keys
from mesh.schema.lives import Life, Tombstone
from mesh.schema.records import LOADED, LOADING, CopyRecord, ModelRecord, PodRecord
from mesh.statuses import MeshError, Reason
from mesh.telemetry import metrics
from router.calls.meter import Meter
from router.fencing import closing
from router.fencing.closing import REPLACED, Closing
from router.fencing.tombstones import Tombstones
from router.loads.coldstart import ColdStart
from router.management.handlers import Management
from router.management.requests import Item
from router.settings import RouterSettings
from router.state.registry import Registry
from router.state.view import View
from tests.support.asked import Asked
from tests.support.fakecalls import FakeAgents, FakePool, unreachable
from tests.support.waiting import until


@dataclass
class Town:
    """Management and a leader's fencing on a real etcd. Pods are mere keys, and agents do as the test says."""

    etcd: Etcd
    keys: Keys
    agents: FakeAgents
    view: View
    management: Asked
    tombstones: Tombstones
    lives: Closing
    deaf: socket.socket  # accepts connections and never answers, like a stopped server

    @property
    def address(self) -> str:
        host, port = self.deaf.getsockname()
        return f"{host}:{port}"

    async def pod(self, name: str, *models: str, incarnation: str = "i", data: str = "") -> None:
        """Publishes a pod with copies of these models."""
        record = PodRecord(incarnation, data or self.address, f"{name}:2", capacity_bytes=1 << 30)
        lease = await Lease.grant(self.etcd, ttl=60)
        await lease.close()
        await self.etcd.put(self.keys.pod(name), record.encode(), lease=lease.id)
        life = Life(record.data_address, f"{name}:2", lease=lease.id)
        await self.etcd.put(self.keys.life(name, incarnation), life.encode())
        for model_id in models:
            kv = await self.etcd.get(self.keys.model(model_id))
            assert kv is not None
            copy = CopyRecord(incarnation, kv.create_revision, LOADED)
            await self.etcd.put(self.keys.copy(model_id, name), copy.encode())
        await self.see()

    async def cut_off(self, name: str, incarnation: str = "i", *, seen: bool = True) -> None:
        """Ends the pod's lease, and makes its agent unreachable. `seen` says whether a leader saw the end."""
        lease = await Lease.grant(self.etcd, ttl=60)
        copies = [kv.key async for kv in self.etcd.scan(self.keys.all_copies)]
        for key in (self.keys.pod(name), *(key for key in copies if self.keys.copy_of(key)[1] == name)):
            kv = await self.etcd.get(key)
            assert kv is not None
            await self.etcd.put(key, kv.value, lease=lease.id)
        await lease.revoke()
        await self.see()
        if seen:
            page = await self.etcd.page(self.keys.pods, self.keys.pods + b"\0", limit=1)
            self.view.lives.ended[name, incarnation] = page.revision
        self.agents.answers[f"{name} ({incarnation})"] = unreachable(name)

    async def see(self) -> None:
        """Updates the view from etcd."""
        start, end = self.keys.presence_range
        ended = dict(self.view.lives.ended)
        page = await self.etcd.page(start, end, limit=1000)
        self.view.snapshot(page.revision, [(kv.key, kv.value) for kv in page.kvs])
        self.view.lives.ended.update(ended)

    async def look(self) -> None:
        """Lets the leader look twice, because the second look uses what the first one notes. Updates the view each
        time."""
        for _ in range(2):
            await self.see()
            await self.lives.look()
        await self.see()

    def burial(self, model_id: str, record: ModelRecord) -> Op:
        """Returns the operation that puts the model's tombstone."""
        return put_op(self.keys.tombstone(model_id), Tombstone.of(record).encode())

    async def buried(self, model_id: str = "m") -> bool:
        return await self.etcd.get(self.keys.tombstone(model_id)) is not None

    async def open(self) -> list[str]:
        return [life.pod for life in await self.tombstones.open_lives()]

    async def refused(self, model_id: str = "m", path: str = "file:///new") -> MeshError:
        """Checks that the id cannot be registered with another file, and returns the error."""
        with pytest.raises(MeshError) as error:
            await self.management.register(model_id, "onnx", path)
        assert error.value.reason is Reason.FORMER_LIFE
        assert await self.etcd.get(self.keys.model(model_id)) is None
        return error.value


@pytest.fixture
def deaf() -> Iterator[socket.socket]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(100)
        yield listening


async def build(etcd: Etcd, keys: Keys, deaf: socket.socket, after: float | None = 600.0) -> Town:
    settings = RouterSettings("r", unload_wait=0.3, registry_timeout=2.0, reregister_after=after)
    view, agents = View(keys, FakePool), FakeAgents()  # type: ignore[arg-type]
    registry = Registry(etcd, keys, timeout=2.0)
    meter = Meter(metrics.Registry())
    tombstones = Tombstones(etcd, keys, agents)
    management = Management.of(
        etcd=etcd,
        keys=keys,
        registry=registry,
        view=view,
        coldstart=ColdStart(view=view, registry=registry, agents=agents, meter=meter, settings=settings),
        agents=agents,
        tombstones=tombstones,
        settings=settings,
    )
    lives = Closing(view, etcd, keys, Tombstones(etcd, keys, agents), reregister_after=after)
    return Town(etcd, keys, agents, view, Asked(management), tombstones, lives, deaf)


@pytest.fixture
async def town(etcd: Etcd, keys: Keys, deaf: socket.socket) -> Town:
    town = await build(etcd, keys, deaf)
    await town.management.register("m", "onnx", "file:///old")
    await town.management.register("n", "onnx", "file:///n")
    return town


# --- what it costs where nobody is cut off ---


async def test_nothing_is_left_of_a_model_that_nobody_held(town):
    """Unregistering a model that no pod held leaves no tombstone, although a pod has a copy of another model."""
    await town.pod("a", "n")
    assert await town.management.unregister("m")
    assert not await town.buried()
    assert (await town.management.register("m", "onnx", "file:///new")).created


async def test_a_copy_is_withdrawn_and_the_id_is_free_at_once(town):
    """An id is free at once, without a leader, when the agent confirms that its copy no longer answers and the copy's
    key is deleted."""
    await town.pod("a", "m")

    async def unload(pod, request, *, timeout):
        await town.etcd.delete(town.keys.copy(request.model_id, pod.name))

    town.agents.unload = unload
    assert await town.management.unregister("m")
    assert not await town.buried()
    assert (await town.management.register("m", "onnx", "file:///new")).created


async def test_a_copy_that_stays_keeps_the_id(town):
    """An id stays taken while etcd has the key of a copy. The error of a new registration names the copy's pod."""
    await town.pod("a", "m")
    await town.management.unregister("m")
    assert await town.buried()
    error = await town.refused()
    assert "a has not unloaded its copy" in error.text
    assert error.details["pod"] == "a"
    await town.etcd.delete(town.keys.copy("m", "a"))
    await town.look()
    assert not await town.buried()
    assert (await town.management.register("m", "onnx", "file:///new")).created


# --- pods that are cut off ---


@pytest.mark.parametrize("order", ["cut off first", "unregistered first"])
async def test_an_id_waits_for_a_pod_that_held_it_and_is_cut_off(town, order):
    """An id waits for a cut-off pod that held it, in whatever order things happened. The error names the pod, the time
    left and the way out. Other ids do not wait."""
    await town.pod("a", "m")
    if order == "cut off first":
        await town.cut_off("a")
        await town.management.unregister("m")
    else:
        town.agents.answers["a"] = unreachable("a")
        await town.management.unregister("m")
        await town.cut_off("a")
    await town.look()
    assert await town.buried()
    error = await town.refused()
    assert error.details["pod"] == "a"
    assert 590 <= int(error.details["seconds_left"]) <= 600
    assert "mesh pods forget a" in error.text
    assert error.retry_after
    await town.management.unregister("n")
    await town.look()
    assert (await town.management.register("n", "onnx", "file:///other")).created, "a has never held n"


async def test_the_same_registration_does_not_wait(town):
    """Registering the same content again does not wait for the old copy, because both copies give the same answers.
    Another digest makes it other content."""
    await town.pod("a", "m")
    await town.cut_off("a")
    await town.management.unregister("m")
    with pytest.raises(MeshError):
        await town.management.register("m", "onnx", "file:///old", sha256="0" * 64)
    assert (await town.management.register("m", "onnx", "file:///old")).created
    assert not await town.buried()
    await town.management.unregister("m")
    assert await town.buried(), "the id waits again the next time"


async def test_a_registration_that_etcd_did_not_confirm_was_made_all_the_same(town, monkeypatch):
    """A registration succeeds although etcd does not confirm the write that replaces the tombstone, because registering
    can be repeated."""
    await town.pod("a", "m")
    await town.cut_off("a")
    await town.management.unregister("m")
    txn = town.etcd.txn

    async def unconfirmed(compares, success, failure=(), **named):
        done = await txn(compares, success, failure, **named)
        if done.succeeded and len(compares) == 3:
            raise EtcdUnavailable("timed out", ambiguous=True)
        return done

    monkeypatch.setattr(town.etcd, "txn", unconfirmed)
    assert (await town.management.register("m", "onnx", "file:///old")).created
    assert not await town.buried()


async def test_many_are_registered_while_some_wait(town):
    """When many ids are registered at once, those that must wait do so concurrently, and only those fail."""
    for number in range(20):
        await town.management.register(f"w{number}", "onnx", "file:///old")
    await town.pod("a", *(f"w{number}" for number in range(20)))
    await town.cut_off("a")
    for number in range(20):
        await town.management.unregister(f"w{number}")
    await town.look()
    items = [Item(f"{kind}{number}", "onnx", "file:///new") for number in range(20) for kind in ("w", "fresh")]
    async with asyncio.timeout(20):
        results = await town.management.register_many(items)
    for item, result in zip(items, results, strict=True):
        if item.model_id.startswith("fresh"):
            assert result is None
        else:
            assert isinstance(result, MeshError)
            assert result.reason is Reason.FORMER_LIFE


async def test_a_pod_whose_end_no_leader_saw_counts_as_having_held_the_model(town):
    """A pod whose end no leader saw counts as having held the model, because nobody knows at which revision to look."""
    await town.pod("a", "n")
    await town.cut_off("a", seen=False)
    await town.management.unregister("m")
    await town.look()
    await town.refused()


async def test_history_that_is_compacted_counts_as_having_held_it(town):
    await town.pod("a", "n")
    await town.cut_off("a")
    await town.look()
    page = await town.etcd.page(town.keys.pods, town.keys.pods + b"\0", limit=1)
    await town.etcd.compact(page.revision)
    await town.management.unregister("m")
    await town.look()
    await town.refused()


async def test_an_agent_that_is_there_confirms_that_the_copy_is_gone(town):
    """An agent that has lost etcd but not the network confirms that its copy is gone. Then the id is free."""
    await town.pod("a", "m")
    await town.cut_off("a")
    del town.agents.answers["a (i)"]
    await town.management.unregister("m")
    assert ("a (i)", "m") in town.agents.unloads
    assert not await town.buried()
    assert await town.open() == ["a"], "the pod may still have its other copies"


async def test_a_stranger_on_the_agents_address_confirms_nothing(town):
    await town.pod("a", "m")
    await town.cut_off("a")

    async def describe(pod, model_id="", *, timeout):
        return type("Reply", (), {"incarnation": "another"})

    town.agents.describe = describe
    await town.management.unregister("m")
    await town.look()
    await town.refused()


# --- when a life is over ---


async def test_a_life_ends_when_its_agent_says_so(town):
    """An agent deletes the key of its pod's life once its model server has ended."""
    await town.pod("a", "m")
    await town.cut_off("a")
    await town.management.unregister("m")
    await town.look()
    assert await town.open() == ["a"]
    await town.etcd.delete(town.keys.life("a", "i"))
    await town.look()
    assert not await town.buried()
    assert (await town.management.register("m", "onnx", "file:///new")).created


async def test_a_life_ends_when_another_incarnation_is_in_its_place(town):
    await town.pod("a", "m")
    await town.cut_off("a")
    await town.management.unregister("m")
    await town.pod("a", incarnation="next")
    await town.look()
    assert await town.open() == []
    assert not await town.buried()


async def test_a_life_ends_when_its_data_port_refuses_connections(town):
    """A life ends when its data port refuses connections, but not while something accepts them without answering."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        await town.pod("a", "m", data=f"127.0.0.1:{port}")
        await town.cut_off("a")
        nobody.listen()
        await town.look()
        assert await town.open() == ["a"]
        await town.management.unregister("m")
        await town.look()
        assert await town.buried()
    await town.look()
    assert await town.open() == []
    assert not await town.buried()


async def test_a_life_ends_when_another_pod_has_its_address(town):
    """Two processes cannot share an address, so a life ends when another pod has its address."""
    await town.pod("a", "m")
    await town.cut_off("a")
    await town.pod("b")
    await town.look()
    assert await town.open() == []


async def test_a_life_is_forgotten_by_hand(town):
    """An operator can have a life forgotten, unless its pod is published or unknown."""
    await town.pod("a", "m")
    for name, reason in (("a", Reason.PRECONDITION), ("b", Reason.UNKNOWN_MODEL)):
        with pytest.raises(MeshError) as error:
            await town.management.handlers.pods.forget(name)
        assert error.value.reason is reason
    await town.cut_off("a")
    await town.management.unregister("m")
    await town.look()
    (shown,) = town.management.handlers.pods.open_lives()
    assert (shown.pod, shown.incarnation, shown.data) == ("a", "i", town.address)
    assert await town.management.handlers.pods.forget("a") == ["i"]
    await town.look()
    assert not await town.buried()
    assert town.management.handlers.pods.open_lives() == []


@pytest.mark.parametrize("after", [0.0, None])
async def test_a_life_that_is_open_for_too_long_is_not_waited_for(etcd, keys, deaf, after):
    """Ids stop waiting for a life that stays open for too long, unless the operator's setting says never."""
    town = await build(etcd, keys, deaf, after)
    await town.management.register("m", "onnx", "file:///old")
    await town.pod("a", "m")
    await town.cut_off("a")
    await town.management.unregister("m")
    await town.look()
    if after is None:
        error = await town.refused()
        assert "seconds_left" not in error.details
        assert await town.open() == ["a"]
    else:
        assert town.lives.statistics().expired == 1
        assert (await town.management.register("m", "onnx", "file:///new")).created


async def test_the_next_leader_goes_on_counting(etcd, keys, deaf):
    """The next leader continues to count a life's age, because leaders hand over ages instead of times."""
    town = await build(etcd, keys, deaf, 600.0)
    await town.pod("a")
    await town.cut_off("a")
    await town.look()
    (life,) = await town.tombstones.open_lives()
    assert life.life.ended_revision
    old = Life(life.life.data_address, life.life.control_address, life.life.ended_revision, open_seconds=599)
    await etcd.put(keys.life("a", "i"), old.encode())
    await town.look()
    assert await town.open() == ["a"]
    (shown,) = town.management.handlers.pods.open_lives()
    assert shown.left_s == 1
    nearly_over = Life(old.data_address, old.control_address, old.ended_revision, open_seconds=600)
    await etcd.put(keys.life("a", "i"), nearly_over.encode())
    await (await build(etcd, keys, deaf, 600.0)).look()
    assert await town.open() == []


async def test_a_pod_that_comes_back_is_waited_for_by_its_keys(town):
    """An id waits for a pod that came back only if the pod has a key for the model, because a pod checks its copies
    before it publishes itself."""
    await town.pod("a", "m", "n")
    await town.cut_off("a")
    await town.management.unregister("m")
    await town.pod("a", "n")
    await town.look()
    assert await town.open() == []
    assert not await town.buried()


# --- what a leader does not know ---


async def test_fewer_lives_than_pods_prove_nothing(town):
    """If there are fewer lives than pods, nothing is concluded, because the life of a cut-off pod may still be open."""
    await town.pod("a", "m")
    for name in ("b", "c"):
        await town.pod(name, data="127.0.0.1:1")
        await town.etcd.delete(town.keys.life(name, "i"))
    await town.cut_off("a")
    await town.management.unregister("m")
    await town.look()
    await town.refused()


async def test_a_leader_that_was_stopped_judges_nothing_by_what_it_knew_before(town):
    """A leader that was stopped does not end an open life because of outdated knowledge, such as a former incarnation
    or the former holder of an address."""
    await town.pod("a", incarnation="former", data="127.0.0.1:1")
    await town.pod("b")
    stopped = [(kv.key, kv.value) async for kv in town.etcd.scan(town.keys.presence_range)]
    revision = (await town.etcd.page(town.keys.pods, town.keys.pods + b"\0", limit=1)).revision
    await town.etcd.delete(town.keys.pod("b"))
    await town.etcd.delete(town.keys.life("b", "i"))
    await town.pod("a", "m", incarnation="next")
    await town.etcd.delete(town.keys.life("a", "former"))
    await town.cut_off("a", "next")
    await town.management.unregister("m")
    town.view.snapshot(revision, stopped)
    town.view.lives.ended["a", "next"] = 1  # an earlier cut-off of the pod, when it had no copy
    await town.lives.look()
    assert await town.open() == ["a"]
    (life,) = await town.tombstones.open_lives()
    assert not life.life.ended_revision
    await town.refused()


async def test_a_life_does_not_end_at_once_because_its_name_is_taken(town):
    """If a new pod has the same name, the former pod's life ends only after it was open for `REPLACED` seconds, because
    the former agent needs time to notice that it is cut off."""
    await town.pod("a", "m")
    await town.cut_off("a")
    await town.management.unregister("m")
    with socket.socket() as elsewhere:
        elsewhere.bind(("127.0.0.1", 0))
        elsewhere.listen()
        await town.pod("a", incarnation="next", data=f"127.0.0.1:{elsewhere.getsockname()[1]}")
        await town.look()
        assert await town.open() == ["a"]
        await town.refused()
        (life,) = await town.tombstones.open_lives()
        await town.etcd.put(town.keys.life("a", "i"), replace(life.life, open_seconds=REPLACED).encode())
        await (again := await build(town.etcd, town.keys, town.deaf)).look()
    assert await again.open() == []
    assert not await again.buried()


async def test_every_address_of_a_name_must_refuse(town):
    """A life ends only if every address of its host name refuses connections. `localhost` usually has two."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        await town.pod("a", "m", data=f"localhost:{port}")
        await town.cut_off("a")
        nobody.listen()
        await town.look()
        assert await town.open() == ["a"]
    await town.look()
    assert await town.open() == []


async def test_history_of_an_etcd_that_was_restored_tells_nothing(town):
    """The history of a restored etcd proves nothing. If etcd has not reached the revision at which a pod was cut off,
    the pod counts as having held every model."""
    await town.pod("a", "n")
    await town.cut_off("a", seen=False)
    (life,) = await town.tombstones.open_lives()
    await town.etcd.put(town.keys.life("a", "i"), replace(life.life, ended_revision=10**9).encode())
    await town.management.unregister("m")
    await town.look()
    await town.refused()


# --- many ---


async def test_thousands_of_tombstones_wait_for_one_life_at_little_cost(town, monkeypatch):
    """The tombstones of 130 models wait for one life. Each look reads up to 60 tombstones in one transaction, and the
    lives in another. History is read in the first look only."""
    names = [f"x{number}" for number in range(130)]
    assert await town.management.register_many([Item(name, "onnx", "file:///x") for name in names]) == [None] * 130
    await town.pod("a", *names)
    await town.cut_off("a")
    await town.look()
    for name in names:
        record = ModelRecord("onnx", "file:///x")
        await town.etcd.txn([], [delete_op(town.keys.model(name)), town.burial(name, record)])
    await town.see()
    sweeper = Tombstones(town.etcd, town.keys, town.agents)
    asked = Counter()

    def counting(name, call):
        def counted(*arguments, **named):
            asked[name] += 1
            return call(*arguments, **named)

        return counted

    monkeypatch.setattr(town.etcd, "txn", counting("txn", town.etcd.txn))
    await sweeper.sweep(town.view.lives.tombstones)
    assert asked["txn"] == 6, "three of tombstones, one of lives, two of history"
    await sweeper.sweep(town.view.lives.tombstones)
    assert asked["txn"] == 6 + 4
    await town.etcd.delete(town.keys.life("a", "i"))
    await sweeper.sweep(town.view.lives.tombstones)
    await town.see()
    assert not town.view.lives.tombstones


async def test_a_lost_zone_takes_the_leader_few_connections_at_a_time(town, monkeypatch):
    """The leader makes few connections at a time, because each attempt to reach a silent pod takes the full timeout."""
    for number in range(200):
        await town.etcd.put(town.keys.life(f"p{number}", "i"), Life(f"h{number}:1", f"h{number}:2").encode())
    trying = most = 0

    async def refuses(address):
        nonlocal trying, most
        trying += 1
        most = max(most, trying)
        await asyncio.sleep(0.001)
        trying -= 1
        return True

    monkeypatch.setattr(closing, "_refuses", refuses)
    await town.see()
    await town.lives.look()
    assert 1 < most <= 64
    assert await town.open() == []


async def test_lives_are_read_once_for_all_who_ask_at_the_same_time(town, monkeypatch):
    """Concurrent readers of the lives share one read, which began after all of them had asked."""
    await town.pod("a", "m")
    await town.cut_off("a")
    reads = 0
    txn = town.etcd.txn

    async def slowly(*arguments, **named):
        nonlocal reads
        found = await txn(*arguments, **named)
        reads += 1
        await asyncio.sleep(0.01)
        return found

    monkeypatch.setattr(town.etcd, "txn", slowly)
    first = asyncio.create_task(town.tombstones.open_lives())
    await until(lambda: reads == 1, interval=0.001, why="the first read is done, and its caller not told")
    await town.etcd.delete(town.keys.life("a", "i"))
    others = [asyncio.create_task(town.tombstones.open_lives()) for _ in range(20)]
    assert [life.pod for life in await first] == ["a"]
    assert await asyncio.gather(*others) == [[]] * 20
    assert reads == 2


# --- what does not belong there ---


async def test_tombstones_are_no_copies(town):
    """Tombstones do not count as copies in a model's status or in a router's view, even if a pod has the name that
    their keys use."""
    await town.pod("a", "m")
    await town.management.unregister("m")
    await town.see()
    assert town.view.lives.tombstones == {"m"}
    assert [copy.pod.name for copy in town.view.known("m")] == ["a"]
    assert TOMBSTONE not in town.view.pods
    await town.pod(TOMBSTONE, "n")
    assert [copy.pod.name for copy in town.view.known("n")] == [TOMBSTONE]
    assert (await town.management.status("n")).copies[0].pod == TOMBSTONE
    assert town.view.lives.tombstones == {"m"}


@pytest.mark.parametrize("junk", [b"", b"\xff", b"[]", b'{"data":1}', b'{"data":"a","control":"b","open":1e999}'])
async def test_junk_under_lives_and_tombstones_is_passed_over(town, junk):
    await town.etcd.put(town.keys.life("x", "y"), junk)
    await town.etcd.put(town.keys.lives + b"\xff\xff", junk)
    await town.etcd.put(town.keys.tombstone("n"), junk)
    await town.pod("a", "m")
    await town.cut_off("a")
    await town.look()
    assert await town.open() == ["a"]
    assert [life.pod for life in town.management.handlers.pods.open_lives()] == ["a"]
    await town.management.unregister("m")
    await town.look()
    await town.refused()


async def test_a_copy_being_made_keeps_the_id_too(town):
    """A copy that is still loading keeps the id taken, because its load may end after the id was unregistered."""
    await town.pod("a", "m")
    kv = await town.etcd.get(town.keys.copy("m", "a"))
    await town.etcd.put(town.keys.copy("m", "a"), CopyRecord("i", kv.create_revision, LOADING).encode())
    await town.management.unregister("m")
    await town.refused()
