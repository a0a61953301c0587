"""A leader's rounds, with a real etcd, a real view and fake agents: each load and unload is requested once."""

import asyncio
import time

import pytest

from mesh.pb import agent_pb2
from mesh.schema.records import LEAVING, LOADED, CopyRecord, Failure, ModelRecord, PodRecord
from placement.constraints import Constraint, Constraints
from placement.copies import CopyLimits
from placement.failures import UNHEALTHY, FailureKind
from placement.limits import TypeLimits
from router.fencing.tombstones import Tombstones
from router.fencing.withdrawal import Withdrawal
from router.leader.recency import Recency
from router.leader.rounds import Rounds
from router.loads.agents import Unreachable
from router.state.dynamic import Current
from router.state.registry import Registry
from router.state.view import View
from router.state.vmodels import Vmodels
from router.vmodels.store import VModelStore
from tests.support.waiting import until

MIB = 1 << 20


class Pool:
    def close(self) -> None:
        pass


class Agents:
    """Agents whose loads and unloads are in the view at once. In a real mesh etcd reports them a moment later."""

    def __init__(self) -> None:
        self.loads: list[tuple[str, str]] = []
        self.requests: list[agent_pb2.LoadRequest] = []
        self.unloads: list[tuple[str, str]] = []
        self.states: dict[tuple[str, str], dict[str, object]] = {}  # states by pod and model
        self.refuse = ""
        self.broken: set[str] = set()  # pods where every load fails
        self.kind = ""  # of these failures
        self.silent: set[str] = set()
        self.world: World | None = None

    async def load(self, pod, request, *, timeout):
        self.requests.append(request)
        if pod.name in self.broken:
            return agent_pb2.LoadReply(
                failed=agent_pb2.LoadReply.Failed(reason="LOAD_FAILED", text="no disk", kind=self.kind)
            )
        if self.refuse:
            refused = agent_pb2.LoadReply.Refused(reason=self.refuse, text="not here")
            return agent_pb2.LoadReply(refused=refused)
        self.loads.append((request.model_id, pod.name))
        self.world.copy(request.model_id, pod.name, request.create_revision, type=request.model_type)
        return agent_pb2.LoadReply(loaded=agent_pb2.LoadReply.Loaded(incarnation="i", host_bytes=MIB))

    async def unload(self, pod, request, *, timeout):
        self.unloads.append((request.model_id, pod.name))
        self.world.remove(request.model_id, pod.name)
        return agent_pb2.UnloadReply(had_copy=True)

    async def active(self, pod, models, *, timeout):
        if pod.name in self.silent:
            raise Unreachable("silent", refused=False)
        told = {model for (name, model) in self.states if name == pod.name} | (set(models) & set(pod.copies))
        states = [
            agent_pb2.CopyState(model_id=model, age_ms=600_000, **self.states.get((pod.name, model), {}))
            for model in sorted(told)
        ]
        return agent_pb2.DescribeReply(pod=pod.name, copies=states)


class World:
    """A mesh that consists of records in etcd, a view and fake agents."""

    def __init__(self, etcd, keys) -> None:
        self.etcd, self.keys = etcd, keys
        self.view = View(keys, lambda address: Pool())
        self.agents = Agents()
        self.agents.world = self
        self.settings = Current()
        self.revision = 1
        registry, tombstones = Registry(etcd, keys), Tombstones(etcd, keys, self.agents)
        withdrawal = Withdrawal(
            etcd=etcd, keys=keys, registry=registry, view=self.view, agents=self.agents, tombstones=tombstones, wait=1.0
        )
        self.rounds = Rounds(
            view=self.view,
            agents=self.agents,
            registry=registry,
            records=Vmodels(keys),
            store=VModelStore(etcd=etcd, keys=keys, registry=registry, withdrawal=withdrawal, tombstones=tombstones),
            etcd=etcd,
            keys=keys,
            settings=lambda: self.settings,
        )

    def delta(self, key: bytes, value: bytes | None) -> None:
        self.revision += 1
        self.view.delta(self.revision, [(key, value)])

    def pod(self, name: str, **figures) -> None:
        figures = {"capacity_bytes": 64 * MIB, "loading_threads": 2, **figures}
        self.delta(self.keys.pod(name), PodRecord("i", "127.0.0.1:1", "127.0.0.1:2", **figures).encode())

    def copy(self, model: str, pod: str, created: int, *, type: str = "t") -> None:
        record = CopyRecord("i", created, LOADED, MIB, type=type)
        self.delta(self.keys.copy(model, pod), record.encode())

    def remove(self, model: str, pod: str) -> None:
        self.delta(self.keys.copy(model, pod), None)

    async def register(self, model: str, **more) -> int:
        record = ModelRecord(type="t", path="/m", host_bytes=MIB, **more)
        if "limits" in more:
            await self.etcd.put(self.keys.want(model), b"")
        return await self.etcd.put(self.keys.model(model), record.encode())

    async def round(self) -> None:
        await self.rounds.round()
        await until(lambda: not self.rounds.carrying.under_way())


@pytest.fixture
async def world(etcd, keys):
    world = World(etcd, keys)
    for name in ("a", "b", "c"):
        world.pod(name)
    yield world
    await world.rounds.close()


async def test_what_is_hot_gets_a_copy_and_is_asked_for_once(world):
    """A model with a high rate gets one more copy, which is requested once."""
    world.copy("m", "a", await world.register("m"))
    await world.round()
    assert world.agents.loads == []
    world.agents.states["a", "m"] = {"rate": 3000, "peak_rate": 3000}
    await world.round()
    assert len(world.agents.loads) == 1
    request = world.agents.requests[0]
    assert "3000 calls a minute" in request.reason
    assert request.expected_copies == 1
    await world.round()
    assert len(world.agents.loads) == 1


async def test_limits_are_kept_both_ways(world):
    """The leader loads the minimum of copies, and unloads those above the maximum. It tells an agent when the pin of
    its copy changes."""
    created = await world.register("m", limits=CopyLimits(2, None, True))
    await world.round()
    assert {model for model, _ in world.agents.loads} == {"m"}
    assert len(world.agents.loads) == 2
    assert all(request.pinned for request in world.agents.requests)
    await world.register("m", limits=CopyLimits(None, 1, False))
    for name in ("a", "b", "c"):
        world.agents.states[name, "m"] = {"pinned": True}
    await world.round()
    await world.round()
    assert len(world.agents.unloads) == 1
    assert len(tuple(world.view.known("m"))) == 1
    assert [request.pinned for request in world.agents.requests[2:]][:1] == [False]
    assert created


async def test_a_copy_that_is_being_unloaded_does_not_count_as_one_being_loaded(world):
    created = await world.register("m", limits=CopyLimits(None, 1, None))
    world.copy("m", "a", created)
    world.copy("m", "b", created)
    going = asyncio.Event()

    async def unload(pod, request, *, timeout):
        world.agents.unloads.append((request.model_id, pod.name))
        world.remove(request.model_id, pod.name)  # the copy is no longer called; its memory is freed later
        await going.wait()
        return agent_pb2.UnloadReply(had_copy=True)

    world.agents.unload = unload
    await world.rounds.round()
    await until(lambda: world.agents.unloads, why="one too many is unloaded")
    assert world.rounds.carrying.under_way() == {world.agents.unloads[0]}
    assert world.rounds.carrying.loading() == set()
    (left,) = world.view.known("m")
    assert world.rounds._handover.held(left).loading_in == ()
    going.set()
    await until(lambda: not world.rounds.carrying.under_way())


async def test_limits_of_types(world):
    """The limits of a type apply to a model that has no limits of its own."""
    world.settings = Current(limits=TypeLimits(default=CopyLimits(None, 1, True)))
    created = await world.register("m")
    world.copy("m", "a", created)
    world.copy("m", "b", created)
    await world.round()
    assert len(world.agents.unloads) == 1
    assert any(request.pinned for request in world.agents.requests)


async def test_what_stands_on_the_wrong_pod_is_moved(world):
    """The type constraints exclude the pod of the only copy. The model is first loaded in a permitted pod, and then
    unloaded in the excluded one."""
    world.pod("c", labels=("gpu",))
    world.copy("m", "a", await world.register("m"))
    world.settings = Current(constraints=Constraints({"t": Constraint(frozenset({"gpu"}))}))
    await world.round()
    assert (world.agents.loads, world.agents.unloads) == ([("m", "c")], [])
    await world.round()
    assert world.agents.unloads == [("m", "a")]


async def test_what_a_dead_pod_had_comes_back_if_it_was_used(world):
    for name, idle in (("used", 1000), ("old", 5 * 3_600_000)):
        world.copy(name, "a", await world.register(name))
        world.agents.states["a", name] = {"idle_ms": idle}
    await world.round()
    world.view.failed(world.view.pods["a"], 1.0)
    world.delta(world.keys.pod("a"), None)
    for name in ("used", "old"):
        del world.agents.states["a", name]
    await world.round()
    assert [model for model, _ in world.agents.loads] == ["used"]


async def test_what_a_dead_pod_had_comes_back_where_its_type_is_taken(world):
    """A model that was lost with its pod is only loaded again in a pod that takes its type, although no copy is left
    that shows the type."""
    world.pod("pod-1", types=("t",))
    for number in range(2, 9):
        world.pod(f"pod-{number}", types=("other",))
    world.pod("pod-9", types=("t",))
    world.copy("used", "pod-1", await world.register("used"))
    world.agents.states["pod-1", "used"] = {"idle_ms": 1000}
    await world.round()
    world.delta(world.keys.copy("used", "pod-1"), None)
    world.delta(world.keys.pod("pod-1"), None)
    await world.round()
    assert world.agents.loads == [("used", "pod-9")]


async def test_a_load_that_does_not_work_rests(world):
    """A failed load is not requested again in the next rounds. An agent that does not answer does not end the round."""
    await world.register("m", limits=CopyLimits(1))
    world.agents.refuse = "NO_ROOM"
    world.agents.silent.add("b")
    for _ in range(3):
        await world.round()
    assert len(world.agents.requests) == 1
    assert world.rounds.carrying.statistics().failures == 1
    assert world.rounds.carrying.resting("m")


async def test_a_pod_that_leaves_is_emptied(world):
    """A draining pod is emptied: models in use are loaded elsewhere, and unused ones are unloaded last."""
    for number in range(5):
        world.copy(f"m{number}", "a", await world.register(f"m{number}"))
        world.agents.states["a", f"m{number}"] = {"idle_ms": 1000 if number else 9 * 3_600_000}
    world.pod("a", state=LEAVING)
    leading = asyncio.ensure_future(world.rounds.lead())
    await until(lambda: not world.view.pods["a"].copies, timeout=20)
    leading.cancel()
    await asyncio.wait({leading})
    assert {model for model, _ in world.agents.loads} == {"m1", "m2", "m3", "m4"}
    assert world.agents.unloads[-1] == ("m0", "a")


async def test_a_key_that_says_nothing_is_tidied_up(world):
    """The key for a model's limits is deleted if the model has no limits or is not registered. Only the second round
    deletes it, in case the limits are just being set."""
    await world.register("m")
    for name in ("m", "gone"):
        await world.etcd.put(world.keys.want(name), b"")
    await world.round()
    assert await world.etcd.get(world.keys.want("m")) is not None
    await world.round()
    assert await world.etcd.get(world.keys.want("m")) is None
    assert await world.etcd.get(world.keys.want("gone")) is None


async def test_free_space_is_filled_with_what_was_used_last(world):
    """After a restart of the mesh, free space is filled with the models that an earlier leader listed as last used,
    latest first. An eighth of each pod stays free, nothing is evicted, and unregistered models are forgotten."""
    for name in ("a", "b", "c"):
        world.pod(name, capacity_bytes=8 * MIB, used_bytes=5 * MIB)
    recency = Recency(world.etcd, world.keys)
    recency.note({f"m{number}": 60_000 * (number + 1) for number in range(9)} | {"gone": 1})
    await recency.save()
    for number in range(9):
        await world.register(f"m{number}")
    leading = asyncio.ensure_future(world.rounds.lead())
    try:
        await until(lambda: len(world.agents.loads) == 6)
        assert sorted(model for model, _ in world.agents.loads) == [f"m{number}" for number in range(6)]
        assert {pod for _, pod in world.agents.loads} == {"a", "b", "c"}
        assert all(request.idle_ms >= 59_000 and "used" in request.reason for request in world.agents.requests)
        await world.rounds.round()
        assert len(world.agents.loads) == 6
    finally:
        leading.cancel()
        await asyncio.gather(leading, return_exceptions=True)
    again = Recency(world.etcd, world.keys)
    await again.load()
    assert "m0" in again
    assert "gone" not in again


async def test_uses_are_noted_as_of_when_their_pod_told_of_them(world, monkeypatch):
    """Uses have the time of their pod's report, although another pod takes a minute to answer."""
    now = 1000.0
    recency = Recency(world.etcd, world.keys, clock=lambda: now)
    monkeypatch.setattr(world.rounds, "_recency", recency)
    for pod, model, idle_ms in (("a", "first", 1000), ("b", "second", 2000)):
        world.pod(pod)
        world.copy(model, pod, await world.register(model))
        world.agents.states[pod, model] = {"idle_ms": idle_ms}
    active = world.agents.active

    async def slow(pod, models, *, timeout):
        nonlocal now
        if pod.name == "b":
            now += 60.0
        return await active(pod, models, timeout=timeout)

    monkeypatch.setattr(world.agents, "active", slow)
    leading = asyncio.ensure_future(world.rounds.lead())
    await until(lambda: "second" in recency)
    leading.cancel()
    await asyncio.gather(leading, return_exceptions=True)
    assert [model for model, _ in recency.newest(2, without=lambda model: False)] == ["second", "first"]


async def test_a_quarantined_or_failing_model_is_not_preloaded(world):
    """A model that is quarantined or has failed lately is not preloaded. A failure of long ago does not count."""
    recency = Recency(world.etcd, world.keys)
    recency.note({"bad": 1000, "failing": 1000, "failed": 2000, "good": 5000})
    await recency.save()
    await world.register("bad", killed=("once", "twice"))
    await world.register("failing", failures=(Failure("a", int(time.time() * 1000), "no such layer"),))
    await world.register("failed", failures=(Failure("a", 1, "long ago"),))
    await world.register("good")
    leading = asyncio.ensure_future(world.rounds.lead())
    try:
        await until(lambda: len(world.agents.loads) == 2)
        await world.rounds.round()
        assert {model for model, _ in world.agents.loads} == {"good", "failed"}
    finally:
        leading.cancel()
        await asyncio.gather(leading, return_exceptions=True)


async def test_a_pod_where_everything_fails_gets_no_more_loads(world):
    """A pod in which all loads fail gets no more loads after the first few, although it is the emptiest one."""
    world.agents.broken = {"a"}
    for name in ("b", "c"):  # fuller than the broken one
        world.pod(name, used_bytes=8 * MIB)
    for number in range(12):
        model = f"m{number}"
        world.copy(model, "b", await world.register(model))
        world.agents.states["b", model] = {"rate": 3000, "peak_rate": 3000}
        await world.round()
    asked = [request.reason for request in world.agents.requests]
    failed = len(asked) - len(world.agents.loads)
    assert UNHEALTHY <= failed < 8
    assert {pod for _, pod in world.agents.loads[-3:]} == {"c"}


async def test_a_pod_whose_rules_forbid_some_models_gets_the_others(world):
    """A pod that allows no code, for example, refuses models that other pods have loaded, and still gets loads."""
    world.agents.broken, world.agents.kind = {"a"}, FailureKind.RULES.value
    for name in ("b", "c"):
        world.pod(name, used_bytes=8 * MIB)
    for number in range(2 * UNHEALTHY):
        model = f"m{number}"
        world.copy(model, "b", await world.register(model))
        world.agents.states["b", model] = {"rate": 3000, "peak_rate": 3000}
        await world.round()
    refused = len(world.agents.requests) - len(world.agents.loads)
    assert refused > UNHEALTHY
    assert world.rounds.carrying.avoided() == {}


async def test_what_was_planned_for_a_pod_that_proves_unhealthy_is_not_sent_there(world):
    world.agents.broken = {"a"}
    for name in ("b", "c"):  # there is room in the broken one only
        world.pod(name, used_bytes=64 * MIB)
    for number in range(40):
        model = f"m{number}"
        world.copy(model, "b", await world.register(model))
        world.agents.states["b", model] = {"rate": 3000, "peak_rate": 3000}
    await world.round()
    assert UNHEALTHY <= len(world.agents.requests) < 2 * UNHEALTHY


async def test_who_leads_again_keeps_what_others_have_noted_meanwhile(world):
    """A leader that is elected again first reads the list of uses from etcd."""

    async def noted() -> Recency:
        found = Recency(world.etcd, world.keys)
        await found.load()
        return found

    async def lead_with(model: str) -> None:
        world.copy(model, "a", await world.register(model))
        leading = asyncio.ensure_future(world.rounds.lead())

        async def told() -> bool:
            return model in await noted()

        await until(told)
        leading.cancel()
        await asyncio.gather(leading, return_exceptions=True)

    await lead_with("before")
    await world.register("theirs")
    other = await noted()
    other.note({"theirs": 1000})
    await other.save()
    await lead_with("after")
    found = await noted()
    assert all(model in found for model in ("before", "theirs", "after"))
