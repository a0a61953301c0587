"""A worker's core on fakes: a view of pods, a dictionary instead of etcd, and agents whose answers a test sets."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

import pytest

from mesh.etcd import EtcdUnavailable, KeyValue
from mesh.schema import versions
from mesh.schema.records import Failure, ModelRecord
from mesh.telemetry import metrics
from router.calls.dispatch import Dispatcher
from router.calls.forwarder import Forwarder
from router.calls.meter import Meter
from router.calls.routes import Routes
from router.loads.coldstart import ColdStart
from router.settings import RouterSettings
from router.state.registry import Registry
from router.state.vmodels import Vmodels
from tests.support import fakecalls
from tests.support.fakecalls import FakeAgents, FakeCall, Sent
from tests.support.waiting import until
from tests.support.worlds import World

NOW_MS = 1_700_000_000_000


class FakeEtcd:
    """Reads of keys from a dictionary. `gate` delays reads, and `away` makes them fail."""

    def __init__(self) -> None:
        self.records: dict[bytes, KeyValue] = {}
        self.reads = 0
        self.away = False
        self.revision = 1000  # newer than anything that the feed has delivered
        self.gate = asyncio.Event()
        self.gate.set()

    async def get(self, key: bytes, *, timeout: float | None = None) -> KeyValue | None:
        self.reads += 1
        found = self.records.get(key)  # as it is when the read begins
        await self.gate.wait()
        if self.away:
            raise EtcdUnavailable("etcd is away")
        return found

    async def several(
        self, keys: Sequence[bytes], *, timeout: float | None = None
    ) -> tuple[tuple[KeyValue | None, ...], int]:
        self.reads += 1
        found, revision = tuple(self.records.get(key) for key in keys), self.revision
        await self.gate.wait()
        if self.away:
            raise EtcdUnavailable("etcd is away")
        return found, revision


@dataclass
class Core:
    """The parts of a worker's core, with shorthands for tests."""

    world: World
    etcd: FakeEtcd
    agents: FakeAgents
    registry: Registry
    vmodels: Vmodels
    coldstart: ColdStart
    forwarder: Forwarder
    dispatcher: Dispatcher
    settings: RouterSettings
    counted: metrics.Registry

    def rules(self, **changed: int) -> None:
        """Changes values in the settings of cold starts."""
        flights = self.coldstart._machine._flights
        flights.rules = replace(flights.rules, **changed)

    def register(self, model_id: str = "m", *, created: int = 7, **more: object) -> None:
        """Writes the model's record to etcd."""
        record = replace(ModelRecord("onnx", f"file:///{model_id}"), **more)  # type: ignore[arg-type]
        key = self.world.keys.model(model_id)
        self.etcd.records[key] = KeyValue(key, record.encode(), created, created, 1, 0)
        self.registry.forget(model_id)

    def alias(self, name: str, active: str, *, target: str = "", feed: bool = True, **mesh: object) -> None:
        """Writes the record of a vmodel to etcd. If `feed` is false, the worker does not learn about it."""
        key = self.world.keys.vmodel(name)
        data = {"amid": active, "tmid": target or active, **({"mesh": mesh} if mesh else {})}
        self.etcd.revision += 1
        revision = self.etcd.revision
        self.etcd.records[key] = KeyValue(key, json.dumps(data).encode(), revision, revision, 1, 0)
        if feed:
            self.vmodels.delta(revision, [(key, self.etcd.records[key].value)])

    def remove_alias(self, name: str, *, feed: bool = True) -> None:
        """Deletes the vmodel's record from etcd. If `feed` is false, the worker does not learn about it."""
        key = self.world.keys.vmodel(name)
        self.etcd.revision += 1
        del self.etcd.records[key]
        if feed:
            self.vmodels.delta(self.etcd.revision, [(key, None)])

    def resident(self, model: str, *pods: str, path: str = "") -> None:
        """Registers the model and shows it as loaded in these pods, by default in pod `a`."""
        self.register(model, **({"path": path} if path else {}))
        for pod in pods or ("a",):
            if pod not in self.world.view.pods:
                self.world.pod(pod)
                self.agents.answers[pod] = fakecalls.loaded()
            self.world.copy(model, pod, version=versions.own(path))

    def unregister(self, model_id: str = "m") -> None:
        """Deletes the model's record from etcd, but not from the router's memory."""
        del self.etcd.records[self.world.keys.model(model_id)]

    def failed_in(self, *pods: str, ago_ms: int = 1000) -> tuple[Failure, ...]:
        """Returns failures in these pods, as a model's record contains them."""
        return tuple(Failure(pod, NOW_MS - ago_ms, f"{pod} says no") for pod in pods)

    def frame(self, model_id: str = "m", payload: bytes = b"", version: str = "") -> bytes:
        """Returns the frame of a V2 call of the model. A `payload` becomes its raw input."""
        raw = b"\x0a" + bytes([len(model_id)]) + model_id.encode()
        raw += b"\x12" + bytes([len(version)]) + version.encode() if version else b""
        raw += b"\x3a" + bytes([len(payload)]) + payload if payload else b""
        return b"\0" + len(raw).to_bytes(4, "big") + raw

    def call(
        self,
        model_id: str = "m",
        *,
        payload: bytes = b"",
        version: str = "",
        deadline: float | None = None,
        **more: object,
    ) -> FakeCall:
        """Dispatches a V2 call of the model, and returns the call. Its `deadline` is in seconds from now."""
        when = None if deadline is None else asyncio.get_running_loop().time() + deadline
        call = FakeCall(frame=self.frame(model_id, payload, version), deadline=when, **more)  # type: ignore[arg-type]
        self.dispatcher.dispatch(call)
        return call

    def sent(self, pod: str) -> list[Sent]:
        return self.world.pool(pod).sent

    async def answered(self, call: FakeCall) -> FakeCall:
        """Waits until the call is answered, and returns it."""
        await until(lambda: bool(call.answers), interval=0.001, why="the call is answered")
        return call

    async def reaches(self, pod: str, count: int = 1) -> Sent:
        """Waits until `count` calls have been sent to the pod, and returns the last one."""
        await until(lambda: len(self.sent(pod)) >= count, interval=0.001, why=f"{count} calls reach {pod}")
        return self.sent(pod)[-1]


@pytest.fixture
def settings() -> RouterSettings:
    """Returns the settings of the router under test. A test can override this fixture."""
    return RouterSettings("router", verify_timeout=0.2)


@pytest.fixture
async def core(settings: RouterSettings) -> AsyncIterator[Core]:
    """Yields a worker's core without the processes around it. At the end, checks that no call is left."""
    world, etcd, agents = World(), FakeEtcd(), FakeAgents()
    counted = metrics.Registry()
    meter = Meter(counted)
    vmodels = Vmodels(world.keys)
    registry = Registry(etcd, world.keys, vmodels=vmodels)  # type: ignore[arg-type]
    coldstart = ColdStart(
        view=world.view, registry=registry, agents=agents, meter=meter, settings=settings, wall=lambda: NOW_MS
    )
    forwarder = Forwarder(
        view=world.view,
        coldstart=coldstart,
        registry=registry,
        meter=meter,
        counted=counted,
        vmodels=vmodels,
        settings=settings,
    )
    dispatcher = Dispatcher(forwarder, Routes())
    yield Core(world, etcd, agents, registry, vmodels, coldstart, forwarder, dispatcher, settings, counted)
    etcd.gate.set()
    await coldstart.close()
    await forwarder.close()
    await registry.close()
    assert forwarder.in_flight == 0, "every call was answered or cancelled, and counted so"
    assert coldstart.statistics().waiters == coldstart.statistics().bytes == 0
    assert not any(pod.in_flight for pod in world.view.pods.values())
    assert not forwarder.timed
