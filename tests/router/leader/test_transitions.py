"""The leader's moves of vmodels, with a real etcd that feeds a real view, and fake agents."""

import asyncio
import json
import time

import pytest

from mesh.etcd import ChangeKind, Mirror, Snapshot
from mesh.etcd.ranges import after_prefix
from mesh.pb import agent_pb2
from mesh.schema import vmodels
from mesh.schema.records import LOADED, LOADING, CopyRecord, ModelRecord, PodRecord
from placement.choice import choose
from placement.debits import Debits
from placement.limits import TypeLimits
from placement.vmodels.record import VModelMore, VModelRecord
from router.fencing.tombstones import Tombstones
from router.fencing.withdrawal import Withdrawal
from router.leader import moving, transitions
from router.leader.moving import Loads
from router.leader.orders import Orders
from router.leader.transitions import Transitions, TransitionsStatistics
from router.loads.agents import Unreachable
from router.state.registry import Registry
from router.state.view import View
from router.state.vmodels import Vmodels
from router.vmodels import store
from router.vmodels.store import VModelStore
from tests.support.fakecalls import FakePool, failed, refused
from tests.support.waiting import until

MIB = 1 << 20


class Mesh:
    """Pods that do as the test says. `fates` has the outcomes of loads by pod."""

    def __init__(self, etcd, keys) -> None:
        self.etcd, self.keys = etcd, keys
        self.view = View(keys, FakePool)
        self.records = Vmodels(keys)
        self.registry = Registry(etcd, keys)
        self.fates: dict[str, object] = {}
        self.held: dict[str, asyncio.Event] = {}
        self.asked: list[tuple[str, str]] = []
        self.requests: list[agent_pb2.LoadRequest] = []
        self.idle: int | None = 1000
        self.unpublished = False  # agents answer before their copies are in etcd
        self.maximum: int | None = None
        self.fed = 0  # snapshots
        self.tasks = [
            asyncio.ensure_future(self.feed(keys.presence_range, self.view)),
            asyncio.ensure_future(self.feed((keys.vmodels, after_prefix(keys.vmodels)), self.records)),
        ]
        self.leading: asyncio.Future[None] | None = None

    async def feed(self, bounds, reader) -> None:
        async for change in Mirror(self.etcd, *bounds):
            if isinstance(change, Snapshot):
                reader.snapshot(change.revision, [(kv.key, kv.value) for kv in change.kvs])
                self.fed += 1
            else:
                items = [(e.kv.key, e.kv.value if e.kind is ChangeKind.PUT else None) for e in change.events]
                reader.delta(change.revision, items)

    async def lead(self) -> None:
        """Stops the leader, if there is one, and starts another."""
        await self.stop()
        tombstones = Tombstones(self.etcd, self.keys, self)
        withdrawal = Withdrawal(
            etcd=self.etcd, keys=self.keys, registry=self.registry, view=self.view, agents=self, tombstones=tombstones,
            wait=1.0,
        )  # fmt: skip
        self.store = VModelStore(
            etcd=self.etcd,
            keys=self.keys,
            registry=self.registry,
            withdrawal=withdrawal,
            tombstones=tombstones,
            note=self.records.read,
        )
        loads = Loads(
            view=self.view,
            orders=Orders(view=self.view, agents=self, limits=TypeLimits, debits=Debits()),
            choose=lambda registration, size, excluded, idle_ms: choose(
                registration.model_id, size, self.view.candidates(0.0, ""), excluded=excluded, idle_ms=idle_ms
            ),
            idle_ms=lambda _: self.idle,
            maximum=lambda _: self.maximum,
        )
        self.transitions = Transitions(records=self.records, loads=loads, registry=self.registry, store=self.store)
        self.leading = asyncio.ensure_future(self.transitions.run())

    async def stop(self) -> None:
        """Stops the leader by cancelling its task."""
        if self.leading is not None:
            self.leading.cancel()
            await asyncio.wait({self.leading})
            await self.transitions.close()
            await self.store.close()

    async def close(self) -> None:
        await self.stop()
        for task in self.tasks:
            task.cancel()
        await asyncio.wait(self.tasks)
        await self.registry.close()

    # --- what is in etcd

    async def pod(self, *names: str, **figures) -> None:
        for name in names:
            record = PodRecord("i", f"{name}:1", f"{name}:2", **{"capacity_bytes": 64 * MIB, **figures})
            await self.etcd.put(self.keys.pod(name), record.encode())
        await until(lambda: set(names) <= self.view.pods.keys(), why="the pods are in view")

    async def register(self, *models: str, **more) -> None:
        for model in models:
            record = ModelRecord("t", f"/{model}", **{"host_bytes": MIB, "refs": 1, **more})
            await self.etcd.put(self.keys.model(model), record.encode())

    async def copy(self, model: str, *pods: str, state: str = LOADED) -> None:
        kv = await self.etcd.get(self.keys.model(model))
        for pod in pods:
            await self.etcd.put(self.keys.copy(model, pod), CopyRecord("i", kv.create_revision, state, MIB).encode())
        await until(lambda: set(pods) <= self.pods_of(model), why="the copies are in view")

    async def alias(self, name: str = "v", **fields) -> None:
        await self.etcd.put(self.keys.vmodel(name), json.dumps(fields).encode())

    async def record(self, name: str = "v") -> VModelRecord:
        return vmodels.decode((await self.etcd.get(self.keys.vmodel(name))).value)

    async def refs(self, model: str) -> int | None:
        kv = await self.etcd.get(self.keys.model(model))
        return None if kv is None else ModelRecord.decode(kv.value).refs

    def pods_of(self, model: str) -> set[str]:
        return {copy.pod.name for copy in self.view.known(model)}

    async def becomes(self, expected: VModelRecord, name: str = "v") -> None:
        """Waits until the vmodel's record is as expected."""
        found = await self.record(name)
        deadline = time.monotonic() + 20
        while found != expected and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
            found = await self.record(name)
        assert found == expected

    # --- the agents

    async def load(self, pod, request, *, timeout):
        self.asked.append((pod.name, request.model_id))
        self.requests.append(request)
        if pod.name in self.held:
            await self.held[pod.name].wait()
        fate = self.fates.get(pod.name)
        if isinstance(fate, Exception):
            raise fate
        if isinstance(fate, agent_pb2.LoadReply):
            return fate
        copy = CopyRecord("i", request.create_revision, LOADED, MIB)
        if not self.unpublished:
            await self.etcd.put(self.keys.copy(request.model_id, pod.name), copy.encode())
        return agent_pb2.LoadReply(loaded=agent_pb2.LoadReply.Loaded(incarnation="i", host_bytes=MIB))

    async def unload(self, pod, request, *, timeout):
        await self.etcd.delete(self.keys.copy(request.model_id, pod.name))
        return agent_pb2.UnloadReply(had_copy=True)

    async def describe(self, pod, model_id="", *, timeout):
        return agent_pb2.DescribeReply(pod=pod.name, incarnation="i")


@pytest.fixture
async def mesh(etcd, keys, monkeypatch):
    monkeypatch.setattr(store, "FAREWELL", 0.01)
    made = Mesh(etcd, keys)
    await until(lambda: made.fed == 2, why="etcd is followed")
    yield made
    await made.close()


MOVED = VModelRecord("b", "b")


async def test_a_vmodel_moves_once_its_target_is_loaded(mesh):
    """The former active model loses its reference when the vmodel moves."""
    await mesh.pod("p", "q")
    await mesh.register("a", "b")
    await mesh.copy("a", "p")
    await mesh.lead()
    mesh.held = {name: asyncio.Event() for name in "pq"}
    await mesh.alias(amid="a", tmid="b")
    await until(lambda: mesh.asked, why="the target is loaded")
    assert await mesh.record() == VModelRecord("a", "b")
    mesh.held[mesh.asked[0][0]].set()
    await mesh.becomes(MOVED)
    assert (await mesh.refs("a"), await mesh.refs("b"), len(mesh.asked)) == (0, 1, 1)
    assert [request.idle_ms for request in mesh.requests] == [1000], "as urgent as the active model's use"
    await until(lambda: not mesh.transitions.moving(), why="the move has ended")
    assert mesh.transitions.statistics() == TransitionsStatistics(moving=0, parked=0, moved=1, failures=0)


async def test_a_copy_that_only_its_agent_knows_of_does_not_end_a_move(mesh, monkeypatch):
    """A vmodel moves only when the copy of its target is in etcd, where other routers learn of it."""
    await mesh.pod("p")
    await mesh.register("a", "b")
    await mesh.copy("a", "p")
    mesh.unpublished = True
    await mesh.lead()
    loads, looks = mesh.transitions._loads, []
    look = loads.target
    monkeypatch.setattr(loads, "target", lambda registration: looks.append(mesh.pods_of("b")) or look(registration))
    await mesh.alias(amid="a", tmid="b")
    await until(lambda: looks.count({"p"}) >= 4, why="the leader has looked again since the agent's answer")
    assert await mesh.record() == VModelRecord("a", "b")
    await mesh.copy("b", "p")
    await mesh.becomes(MOVED)


async def test_the_target_gets_as_many_copies_as_the_active_model(mesh):
    """The first copy of a target is loaded alone, the others together. Calls follow when all are loaded."""
    await mesh.pod("p", "q", "r")
    await mesh.register("a", "b")
    await mesh.copy("a", "p", "q", "r")
    mesh.held = {name: asyncio.Event() for name in "pqr"}
    await mesh.lead()
    await mesh.alias(amid="a", tmid="b")
    await until(lambda: len(mesh.asked) == 1, why="the first copy is loaded")
    mesh.held[mesh.asked[0][0]].set()
    await until(lambda: len(mesh.asked) == 3, why="the others are loaded")
    assert [request.expected_copies for request in mesh.requests] == [0, 2, 2]
    mesh.held[mesh.asked[1][0]].set()
    await until(lambda: len(mesh.pods_of("b")) == 2, why="the second copy is in view")
    assert await mesh.record() == VModelRecord("a", "b")
    mesh.held[mesh.asked[2][0]].set()
    await mesh.becomes(MOVED)
    assert mesh.pods_of("b") == {"p", "q", "r"}


@pytest.mark.parametrize(
    ("fates", "maximum", "copies"),
    [
        pytest.param({"q": refused("NO_ROOM"), "r": refused("NOWHERE")}, None, {"p"}, id="no-room"),
        pytest.param({"q": failed("bad disk"), "r": Unreachable("away", refused=True)}, None, {"p"}, id="faults"),
        pytest.param({}, 2, None, id="limit"),
    ],
)
async def test_fewer_copies_are_enough_where_no_more_can_be(mesh, monkeypatch, fates, maximum, copies):
    """A move does not wait for copies that cannot be loaded, because pods have no room or fail, or because the target's
    copies are limited."""
    monkeypatch.setattr(moving, "PATIENCE", 0.3)
    await mesh.pod("p", "q", "r")
    await mesh.register("a", "b")
    await mesh.copy("a", "p", "q", "r")
    mesh.fates, mesh.maximum = fates, maximum
    await mesh.lead()
    await mesh.alias(amid="a", tmid="b")
    await mesh.becomes(MOVED)
    found = mesh.pods_of("b")
    assert found == copies if copies is not None else len(found) == maximum


@pytest.mark.parametrize(
    ("fate", "why"),
    [
        pytest.param(failed("bad file"), "bad file", id="fails"),
        pytest.param(refused("NO_ROOM", "full of models in use"), "full of models in use", id="no-room"),
        pytest.param(refused("QUARANTINED", "it kills servers"), "it kills servers", id="refused"),
        pytest.param(Unreachable("q does not answer", refused=True), "does not answer", id="silent"),
    ],
)
async def test_calls_stay_where_they_are_if_the_target_cannot_be_loaded(mesh, monkeypatch, fate, why):
    """If no pod can load the target, the record says so and why. When the cause is gone, the move ends."""
    monkeypatch.setattr(moving, "PATIENCE", 0.2)
    monkeypatch.setattr(transitions, "REST", 0.3)
    await mesh.pod("p", "q")
    await mesh.register("a", "b")
    await mesh.copy("a", "p")
    mesh.fates = {"p": fate, "q": fate}
    await mesh.lead()
    await mesh.alias(amid="a", tmid="b")
    await until(lambda: (r := mesh.records.get("v")) is not None and r.failed, why="the move has failed")
    record = await mesh.record()
    assert (record.active, record.target, why in record.more.why) == ("a", "b", True), record
    assert {pod for pod, _ in mesh.asked} == {"p", "q"}
    assert (await mesh.refs("a"), await mesh.refs("b")) == (1, 1)
    mesh.fates = {}
    await mesh.becomes(MOVED)


async def test_a_failed_move_is_tried_again_when_the_target_is_repaired(mesh, monkeypatch):
    """A failed move is tried again at once when the record of its target changes, for instance because an admin has
    released the target."""
    monkeypatch.setattr(transitions, "CHECK", 0.1)
    monkeypatch.setattr(transitions, "REST", 3600.0)
    await mesh.pod("p")
    await mesh.register("a")
    await mesh.register("b", guilty="it kills servers", killed=("once", "twice"))
    await mesh.copy("a", "p")
    await mesh.lead()
    await mesh.alias(amid="a", tmid="b")
    await until(lambda: (r := mesh.records.get("v")) is not None and r.failed, why="the move has failed")
    assert "quarantined" in (await mesh.record()).more.why
    await until(lambda: mesh.transitions.statistics() == TransitionsStatistics(0, 1, 0, 1), why="the move is parked")
    assert mesh.asked == []
    await mesh.register("b")
    await mesh.becomes(MOVED)


async def test_a_failed_move_ends_when_a_call_has_had_the_target_loaded(mesh, monkeypatch):
    monkeypatch.setattr(transitions, "REST", 3600.0)
    monkeypatch.setattr(transitions, "_AGAIN", 0.1)
    await mesh.pod("p")
    await mesh.register("a", "b")
    await mesh.copy("a", "p")
    mesh.fates = {"p": failed("bad file")}
    await mesh.lead()
    await mesh.alias(amid="a", tmid="b")
    await until(lambda: (r := mesh.records.get("v")) is not None and r.failed, why="the move has failed")
    await mesh.copy("b", "p")
    await mesh.becomes(MOVED)


async def test_a_failed_move_stays_failed_when_the_active_model_is_evicted(mesh, monkeypatch):
    monkeypatch.setattr(transitions, "REST", 0.2)
    await mesh.pod("p")
    await mesh.register("a", "b")
    mesh.fates = {"p": failed("bad file")}
    await mesh.alias(amid="a", tmid="b", failed=True)
    await mesh.lead()
    await until(lambda: len(mesh.asked) >= 2, why="the load is tried again")
    assert (await mesh.record()).active == "a"
    mesh.fates = {}
    await mesh.becomes(MOVED)


async def test_a_target_that_is_not_registered_fails(mesh):
    """A move to a target that is not registered fails and says so. A restored backup may contain such a move."""
    await mesh.pod("p")
    await mesh.register("a")
    await mesh.copy("a", "p")
    await mesh.lead()
    await mesh.alias(amid="a", tmid="b")
    await mesh.becomes(VModelRecord("a", "b", failed=True, more=VModelMore(why="model b is not registered")))


async def test_a_vmodel_without_copies_moves_at_once(mesh):
    """A vmodel whose active model has no copies moves without a load, unless its caller asked to wait for one."""
    await mesh.pod("p")
    await mesh.register("a", "b", last_used_ms=int(time.time() * 1000) - 5000)
    await mesh.lead()
    await mesh.alias(amid="a", tmid="b")
    await mesh.becomes(MOVED)
    assert mesh.asked == []
    mesh.idle = None
    await mesh.alias("w", amid="a", tmid="b", mesh={"wait": True})
    await mesh.becomes(MOVED, "w")
    assert mesh.asked == [("p", "b")]
    assert 5000 <= mesh.requests[0].idle_ms < 60_000


async def test_a_load_of_somebody_else_is_waited_for(mesh):
    """If the target of a move is already being loaded, the move waits for that copy and requests no second one."""
    await mesh.pod("p", "q")
    await mesh.register("a", "b")
    await mesh.copy("a", "p")
    await mesh.copy("b", "q", state=LOADING)
    await mesh.lead()
    await mesh.alias(amid="a", tmid="b")
    await until(lambda: mesh.transitions.moving() == ["v"], why="the move has begun")
    await mesh.copy("b", "q")
    await mesh.becomes(MOVED)
    assert mesh.asked == []


async def test_another_leader_goes_on_where_one_has_died(mesh):
    """If a leader dies while the target of a move is being loaded, the next leader ends the move."""
    await mesh.pod("p")
    await mesh.register("a", "b")
    await mesh.copy("a", "p")
    mesh.held["p"] = asyncio.Event()
    await mesh.lead()
    await mesh.alias(amid="a", tmid="b")
    await until(lambda: mesh.asked, why="the target is loaded")
    await mesh.stop()
    assert await mesh.record() == VModelRecord("a", "b")
    mesh.held.clear()
    await mesh.lead()
    await mesh.becomes(MOVED)


async def test_a_move_that_is_changed_meanwhile_goes_to_the_new_target(mesh):
    await mesh.pod("p")
    await mesh.register("a", "b", "c")
    await mesh.copy("a", "p")
    go = mesh.held["p"] = asyncio.Event()
    await mesh.lead()
    await mesh.alias(amid="a", tmid="b")
    await until(lambda: mesh.asked, why="the target is loaded")
    await mesh.alias(amid="a", tmid="c")
    go.set()
    await mesh.becomes(VModelRecord("c", "c"))


async def test_a_vmodel_that_is_deleted_meanwhile_stays_deleted(mesh):
    await mesh.pod("p")
    await mesh.register("a", "b")
    await mesh.copy("a", "p")
    go = mesh.held["p"] = asyncio.Event()
    await mesh.lead()
    await mesh.alias(amid="a", tmid="b")
    await until(lambda: mesh.asked, why="the target is loaded")
    await mesh.etcd.delete(mesh.keys.vmodel("v"))
    go.set()
    await until(lambda: not mesh.transitions.moving(), why="the move has ended")
    assert await mesh.etcd.get(mesh.keys.vmodel("v")) is None


async def test_the_former_model_goes_with_its_last_reference(mesh):
    """A model flagged for automatic deletion loses its record in the transaction that ends the move, and its copies a
    moment later. Unknown attributes of the vmodel survive."""
    await mesh.pod("p")
    await mesh.register("a", auto_delete=True)
    await mesh.register("b", refs=1)
    await mesh.copy("a", "p")
    await mesh.lead()
    await mesh.alias(amid="a", tmid="b", failed=True, other=[1], mesh={"why": "bad file", "new": {}})
    await until(lambda: (r := mesh.records.get("v")) is not None and not r.moving, why="the vmodel has moved")
    assert json.loads((await mesh.etcd.get(mesh.keys.vmodel("v"))).value) == {
        "amid": "b", "tmid": "b", "other": [1], "mesh": {"new": {}},
    }  # fmt: skip
    assert await mesh.refs("a") is None
    await until(lambda: not mesh.pods_of("a"), why="its copy is unloaded")


async def test_many_vmodels_move_to_one_target_with_one_load(mesh):
    """If fifty vmodels move to one target at the same time, the target gets one copy and has fifty references."""
    await mesh.pod("p", "q")
    await mesh.register("a", refs=50)
    await mesh.register("b", refs=50)
    await mesh.copy("a", "p")
    for number in range(50):
        await mesh.alias(f"v{number}", amid="a", tmid="b")
    await mesh.lead()
    for number in range(50):
        await mesh.becomes(MOVED, f"v{number}")
    assert (await mesh.refs("a"), await mesh.refs("b")) == (0, 50)
    assert len(mesh.pods_of("b")) == 1


async def test_a_record_that_cannot_be_read_holds_no_other_up(mesh):
    await mesh.pod("p")
    await mesh.register("a", "b")
    await mesh.copy("a", "p")
    await mesh.etcd.put(mesh.keys.vmodel("u"), b"no json")
    await mesh.etcd.put(mesh.keys.model("broken"), b"no json")
    await mesh.alias("w", amid="a", tmid="broken")
    await mesh.lead()
    await mesh.alias(amid="a", tmid="b")
    await mesh.becomes(MOVED)
    assert (await mesh.record("w")) == VModelRecord("a", "broken")
