"""The leader's work on a reloaded model's copies, with a real etcd, a real view and fake agents."""

import asyncio

import pytest

from mesh.pb import agent_pb2
from mesh.schema.records import LOADED, CopyRecord, ModelRecord, PodRecord, Reload
from placement.choice import choose
from placement.debits import Debits
from placement.limits import TypeLimits
from router.leader import reloading
from router.leader.orders import Orders
from router.leader.reloading import Reloading
from router.loads.agents import Unreachable
from router.state.registry import Registry
from router.state.view import View
from tests.support.waiting import until

MIB = 1 << 20


class Pool:
    def close(self) -> None:
        pass


class Mesh:
    """Pods that do as the test says. `fates` has the outcomes of loads by pod."""

    def __init__(self, etcd, keys) -> None:
        self.etcd, self.keys = etcd, keys
        self.view = View(keys, lambda address: Pool())
        self.fates: dict[str, object] = {}
        self.asked: list[tuple[str, str]] = []
        self.requests: list[agent_pb2.LoadRequest] = []
        self.idle: int | None = None  # milliseconds since the model's last use, as agents report them
        self.held: dict[str, asyncio.Event] = {}
        self.revision = 1
        self.reloading = self.leader()

    def leader(self) -> Reloading:
        return Reloading(
            view=self.view,
            orders=Orders(view=self.view, agents=self, limits=TypeLimits, debits=Debits()),
            registry=Registry(self.etcd, self.keys),
            etcd=self.etcd,
            keys=self.keys,
            idle_ms=lambda _: self.idle,
            choose=lambda registration, size, excluded, idle_ms: choose(
                registration.model_id, size, self.view.candidates(0.0, ""), excluded=excluded, idle_ms=idle_ms
            ),
        )

    def delta(self, key: bytes, value: bytes | None) -> None:
        self.revision += 1
        self.view.delta(self.revision, [(key, value)])

    def pod(self, *names: str, **figures) -> None:
        for name in names:
            record = PodRecord("i", "127.0.0.1:1", "127.0.0.1:2", capacity_bytes=64 * MIB, **figures)
            self.delta(self.keys.pod(name), record.encode())

    def copy(self, pod: str, generation: int = 0, state: str = LOADED) -> None:
        record = CopyRecord("i", self.created, state, MIB, generation=generation)
        self.delta(self.keys.copy("m", pod), record.encode())

    async def register(self) -> None:
        self.created = await self.etcd.put(self.keys.model("m"), ModelRecord("t", "/m", host_bytes=MIB).encode())

    async def reload(self, generation: int = 1) -> None:
        await self.etcd.put(self.keys.model("m"), ModelRecord("t", "/m", generation=generation).encode())
        await self.etcd.put(self.keys.reload("m"), Reload(generation).encode())

    async def told(self) -> Reload | None:
        kv = await self.etcd.get(self.keys.reload("m"))
        return None if kv is None else Reload.decode(kv.value)

    async def round(self) -> None:
        await self.reloading.round()
        await until(lambda: not self.reloading.moving(), why="the moves have ended")

    def generations(self) -> dict[str, int]:
        return {copy.pod.name: copy.record.generation for copy in self.view.known("m")}

    # --- the agents

    async def load(self, pod, request, *, timeout):
        self.asked.append(("load", pod.name))
        self.requests.append(request)
        if pod.name in self.held:
            await self.held[pod.name].wait()
        fate = self.fates.get(pod.name)
        if isinstance(fate, Exception):
            raise fate
        if isinstance(fate, agent_pb2.LoadReply):
            return fate
        self.copy(pod.name, request.generation)
        loaded = agent_pb2.LoadReply.Loaded(incarnation="i", host_bytes=MIB, generation=request.generation)
        return agent_pb2.LoadReply(loaded=loaded)

    async def unload(self, pod, request, *, timeout):
        self.asked.append(("unload", pod.name))
        assert request.create_revision == self.created
        self.delta(self.keys.copy("m", pod.name), None)
        return agent_pb2.UnloadReply(had_copy=True)


def refused(reason: str, text: str = "no") -> agent_pb2.LoadReply:
    return agent_pb2.LoadReply(refused=agent_pb2.LoadReply.Refused(reason=reason, text=text))


def failed(text: str) -> agent_pb2.LoadReply:
    return agent_pb2.LoadReply(failed=agent_pb2.LoadReply.Failed(reason="LOAD_FAILED", text=text))


@pytest.fixture
async def mesh(etcd, keys):
    made = Mesh(etcd, keys)
    await made.register()
    yield made
    await made.reloading.close()


async def test_all_copies_move_and_then_nothing_is_left_to_do(mesh):
    mesh.pod("a", "b", "c")
    for name in "abc":
        mesh.copy(name)
    await mesh.reload()
    await mesh.round()
    assert mesh.generations() == {"a": 1, "b": 1, "c": 1}
    assert mesh.asked == [("load", "a"), ("load", "b"), ("load", "c")]
    assert await mesh.told() is None
    await mesh.round()
    assert len(mesh.asked) == 3


@pytest.mark.parametrize(("told", "sent"), [(1500, 1500), (0, 0), (None, 60_000)], ids=["told", "in-use", "quiet"])
async def test_the_new_content_is_as_urgent_as_the_model_is_used(mesh, told, sent):
    """The load of the new content states the time since the model's last use, or at least a minute if agents have
    reported no use."""
    mesh.idle = told
    mesh.pod("a")
    mesh.copy("a")
    await mesh.reload()
    await mesh.round()
    assert [request.idle_ms for request in mesh.requests] == [sent]


async def test_a_model_without_copies_is_done_at_once(mesh):
    await mesh.reload()
    await mesh.round()
    assert await mesh.told() is None
    assert mesh.asked == []


async def test_content_that_cannot_be_loaded_costs_one_load_and_is_told(mesh):
    """New content that cannot be loaded costs one load, and the reload says why. The old copies stay. Another reload is
    tried at once."""
    mesh.pod("a", "b")
    mesh.copy("a")
    mesh.copy("b")
    mesh.fates["a"] = failed("no model at all")
    await mesh.reload()
    await mesh.round()
    assert mesh.asked == [("load", "a")]
    assert mesh.generations() == {"a": 0, "b": 0}
    assert await mesh.told() == Reload(1, "a: no model at all")
    await mesh.round()
    assert mesh.asked == [("load", "a")]
    mesh.fates.clear()
    await mesh.reload(2)
    await mesh.round()
    assert mesh.generations() == {"a": 2, "b": 2}
    assert await mesh.told() is None


async def test_it_is_tried_again_after_its_rest(mesh, monkeypatch):
    monkeypatch.setattr(reloading, "REST", 0.0)
    mesh.pod("a")
    mesh.copy("a")
    mesh.fates["a"] = refused("UNAVAILABLE", "the model server is down")
    await mesh.reload()
    await mesh.round()
    assert await mesh.told() == Reload(1, "a: the model server is down")
    mesh.fates.clear()
    await mesh.round()
    assert mesh.generations() == {"a": 1}
    assert await mesh.told() is None


@pytest.mark.parametrize(
    "fate",
    [
        refused("NO_ROOM"),
        refused("NOWHERE"),
        agent_pb2.LoadReply(loaded=agent_pb2.LoadReply.Loaded(incarnation="i")),  # an agent that knows no generations
    ],
    ids=["no-room", "nowhere", "old-version"],
)
async def test_a_pod_that_cannot_hold_both_lets_go_once_another_has_it(mesh, fate):
    mesh.pod("a", "b")
    mesh.copy("a")
    mesh.fates["a"] = fate
    await mesh.reload()
    await mesh.round()
    assert mesh.asked == [("load", "a"), ("load", "b"), ("unload", "a")]
    assert mesh.generations() == {"b": 1}
    assert await mesh.told() is None


async def test_if_no_pod_has_room_the_old_copies_stay_and_the_status_says_why(mesh):
    mesh.pod("a")
    mesh.copy("a")
    mesh.fates["a"] = refused("NO_ROOM", "full of models in use")
    await mesh.reload()
    await mesh.round()
    assert mesh.generations() == {"a": 0}
    told = await mesh.told()
    assert "full of models in use" in told.why


async def test_another_leader_goes_on_where_one_has_died(mesh):
    """The next leader continues a reload whose leader died during the second load."""
    mesh.pod("a", "b")
    mesh.copy("a")
    mesh.copy("b")
    mesh.held["b"] = asyncio.Event()
    await mesh.reload()
    await mesh.reloading.round()
    await until(lambda: ("load", "b") in mesh.asked, why="the second pod is asked")
    await mesh.reloading.close()
    assert mesh.generations() == {"a": 1, "b": 0}
    mesh.held.clear()
    mesh.reloading = mesh.leader()
    await mesh.round()
    assert mesh.generations() == {"a": 1, "b": 1}
    assert await mesh.told() is None


async def test_reloaded_again_in_the_middle(mesh):
    """The model is reloaded again while its first reload is in progress. The end of the first one does not delete the
    key of the second."""
    mesh.pod("a")
    mesh.copy("a")
    go = mesh.held["a"] = asyncio.Event()
    await mesh.reload()
    await mesh.reloading.round()
    await until(lambda: mesh.asked, why="the pod is asked")
    await mesh.reload(2)
    go.set()
    await until(lambda: not mesh.reloading.moving(), why="the moves have ended")
    assert mesh.generations() == {"a": 2}
    assert await mesh.told() is None


async def test_copies_of_two_contents_are_moved_without_being_asked(mesh):
    """Copies of old content are replaced without a request, for instance when a pod that was cut off returns."""
    mesh.pod("a", "b")
    await mesh.etcd.put(mesh.keys.model("m"), ModelRecord("t", "/m", generation=2).encode())
    mesh.copy("a", 2)
    mesh.copy("b", 1)
    await mesh.round()
    assert mesh.generations() == {"a": 2, "b": 2}


async def test_a_pod_that_has_died_in_the_middle_holds_nothing_up(mesh):
    """A pod that dies during a reload does not delay it. The other copies are replaced, and the dead pod's are deleted
    with its lease."""
    mesh.pod("a", "b", "c")
    for name in "abc":
        mesh.copy(name)
    mesh.fates["a"] = Unreachable("a does not answer", refused=True)
    await mesh.reload()
    await mesh.reloading.round()
    await until(lambda: mesh.generations() == {"a": 0, "b": 1, "c": 1}, why="the others have moved")
    mesh.delta(mesh.keys.copy("m", "a"), None)
    await until(lambda: not mesh.reloading.moving(), why="the move has ended")
    assert await mesh.told() is None


async def test_a_pod_that_does_not_answer_for_long_is_told_of(mesh, monkeypatch):
    """A reload whose pod does not answer for long says so, and is tried again after a pause."""
    monkeypatch.setattr(reloading, "PATIENCE", 0.0)
    monkeypatch.setattr(reloading, "REST", 0.0)
    mesh.pod("a")
    mesh.copy("a")
    mesh.fates["a"] = Unreachable("the agent of a does not answer", refused=True)
    await mesh.reload()
    await mesh.round()
    assert await mesh.told() == Reload(1, "the agent of a does not answer")
    mesh.fates.clear()
    await mesh.round()
    assert mesh.generations() == {"a": 1}
    assert await mesh.told() is None


async def test_what_cannot_be_read_holds_no_other_model_up(mesh):
    """The leader skips a reload whose key, value or model's record cannot be read. Other models are not delayed."""
    await mesh.etcd.put(mesh.keys.reloads + b"\xff", Reload(1).encode())
    await mesh.etcd.put(mesh.keys.reload("broken"), b"no json")
    await mesh.etcd.put(mesh.keys.reload("unreadable"), Reload(1).encode())
    await mesh.etcd.put(mesh.keys.model("unreadable"), b"no json")
    mesh.pod("a")
    mesh.copy("a")
    await mesh.reload()
    await mesh.round()
    assert mesh.generations() == {"a": 1}
    await mesh.reloading.round()
    assert mesh.reloading.moving() == []


async def test_unregistered_meanwhile(mesh):
    mesh.pod("a")
    mesh.copy("a")
    await mesh.reload()
    await mesh.etcd.delete(mesh.keys.model("m"))
    await mesh.round()
    assert await mesh.told() is None
    assert mesh.asked == []
