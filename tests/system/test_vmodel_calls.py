"""Random calls of the vmodel API by many callers through two routers, while the leading router is killed repeatedly.

Twenty callers own one vmodel each, and move it among three models that all of them share. A reference model of the API,
a few lines per call, says which replies are possible, and which records, targets and reference counts etcd must have at
the end. `make test-vmodels` makes 10,000 calls; `make test` makes fewer.
"""

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, replace

import grpc
import pytest

from mesh.etcd import Etcd
from mesh.pb import modelmesh_pb2 as pb
from mesh.pb import modelmesh_pb2_grpc
from mesh.schema import vmodels
from mesh.schema.keys import TOMBSTONE, Keys
from mesh.schema.records import ModelRecord
from tests.support import twin
from tests.support.localmesh import LocalMesh, Program
from tests.support.waiting import until

VMODELS = 20
OWNERS = ("", "", "", "me", "you")
LASTING, SHORT_LIVED, BROKEN = "lasting", "short-lived", "broken"
TARGETS = (LASTING, SHORT_LIVED, BROKEN)

UNKNOWN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)
"""Codes of calls through a router that was killed: they may have been carried out."""


@dataclass(frozen=True)
class Expected:
    """The state that a vmodel must have after the calls so far."""

    target: str
    owner: str = ""


class Wrong(AssertionError):
    """A reply or a state that the reference model excludes."""


class World:
    def __init__(self, mesh: LocalMesh, rng: random.Random) -> None:
        self.mesh, self.rng = mesh, rng
        self.stubs = [modelmesh_pb2_grpc.ModelMeshStub(mesh.channel(router)) for router in range(len(mesh.routers))]
        self.keys = Keys(mesh.base)
        self.infos = {}
        for name, words in ((LASTING, {"load": "0.02s"}), (SHORT_LIVED, {"load": "0.05s"}), (BROKEN, {"fail": "bad"})):
            path = mesh.write(f"{name}/{twin.name(**words)}", twin.content(twin.name(**words)))
            self.infos[name] = pb.ModelInfo(type="fake", path=path.as_uri())
        self.calls: Counter[str] = Counter()
        self.down: set[Program] = set()  # routers that were killed and are not ready again
        self.unknown = 0
        self.deaths = 0

    def stub(self) -> modelmesh_pb2_grpc.ModelMeshStub:
        """Returns the management service of one of the running routers."""
        pairs = zip(self.stubs, self.mesh.routers, strict=True)
        return self.rng.choice([stub for stub, router in pairs if router not in self.down])


class Caller:
    """The owner of one vmodel, who makes calls one after the other, so that each reply can be predicted."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.expected: Expected | None = None
        self.named: set[str] = set()  # models that the vmodel named after the last reply

    async def run(self, calls: int) -> None:
        for _ in range(calls):
            kind = self.world.rng.choices(("set", "delete", "status", "unregister"), (60, 10, 20, 10))[0]
            await getattr(self, f"_{kind}")()
            self.world.calls[kind] += 1

    async def _set(self) -> None:
        rng, before = self.world.rng, self.expected
        target, owner = rng.choice(TARGETS), rng.choice(OWNERS)
        wrong = rng.choice([one for one in TARGETS if before is None or one != before.target])
        expected = rng.choice(("", "", wrong, before.target if before is not None else wrong))
        request = pb.SetVModelRequest(
            vModelId=self.name,
            targetModelId=target,
            modelInfo=self.world.infos[target] if rng.random() < 0.7 else None,
            autoDeleteTargetModel=target != LASTING,
            updateOnly=rng.random() < 0.2,
            loadNow=rng.random() < 0.3,
            force=rng.random() < 0.2,
            sync=rng.random() < 0.05,
            expectedTargetModelId=expected,
            owner=owner,
        )
        after = self._after_set(request)
        try:
            reply = await self.world.stub().setVModel(request, timeout=40)
        except grpc.aio.AioRpcError as error:
            await self._failed(request, error, before, after)
            return
        if not isinstance(after, Expected):
            raise Wrong(f"{self.name}: {request} succeeded, but {after} was due")
        self.expected = after
        self._seen(reply)

    def _after_set(self, request: pb.SetVModelRequest) -> Expected | grpc.StatusCode:
        """Returns the expected state after a request whose target exists, or the expected error."""
        before, target = self.expected, request.targetModelId
        if request.expectedTargetModelId:
            if before is None and request.expectedTargetModelId != target:
                return grpc.StatusCode.FAILED_PRECONDITION
            if before is not None and request.owner not in ("", before.owner):
                return grpc.StatusCode.ALREADY_EXISTS
            if before is not None and before.target not in (request.expectedTargetModelId, target):
                return grpc.StatusCode.FAILED_PRECONDITION
        if before is not None and request.owner not in ("", before.owner):
            return grpc.StatusCode.ALREADY_EXISTS
        if before is None and request.updateOnly:
            return grpc.StatusCode.NOT_FOUND
        return Expected(target, request.owner) if before is None else replace(before, target=target)

    async def _failed(
        self,
        request: pb.SetVModelRequest,
        error: grpc.aio.AioRpcError,
        before: Expected | None,
        after: Expected | grpc.StatusCode,
    ) -> None:
        code = error.code()
        if code in UNKNOWN:
            await self._settle({before, after} if isinstance(after, Expected) else {before})
        elif code is grpc.StatusCode.NOT_FOUND and not request.HasField("modelInfo"):
            if request.targetModelId in self.named:
                raise Wrong(f"{self.name} names {request.targetModelId}, which is not registered: {error.details()}")
        elif code is not after:
            raise Wrong(f"{self.name}: {request} failed with {code}, {error.details()}; due was {after}")

    async def _delete(self) -> None:
        owner = self.world.rng.choice(OWNERS)
        has_effect = self.expected is not None and owner in ("", self.expected.owner)
        after = None if has_effect else self.expected
        try:
            await self.world.stub().deleteVModel(pb.DeleteVModelRequest(vModelId=self.name, owner=owner), timeout=40)
            self.expected, self.named = after, self.named if after else set()
        except grpc.aio.AioRpcError as error:
            if error.code() not in UNKNOWN:
                raise
            await self._settle({self.expected, after})

    async def _status(self) -> None:
        await self._settle({self.expected}, once=True)

    async def _unregister(self) -> None:
        """Tries to unregister a model. This must fail if the model is this vmodel's target."""
        model = self.world.rng.choice(TARGETS)
        try:
            await self.world.stub().unregisterModel(pb.UnregisterModelRequest(modelId=model), timeout=40)
        except grpc.aio.AioRpcError as error:
            if error.code() not in (grpc.StatusCode.FAILED_PRECONDITION, *UNKNOWN):
                raise
        else:
            # Only its target is certain: the vmodel may have left its active model meanwhile.
            if self.expected is not None and self.expected.target == model:
                raise Wrong(f"{model} was unregistered, but {self.name} names it")

    async def _settle(self, possible: set[Expected | None], *, once: bool = False) -> None:
        """Reads the vmodel and adopts its state, which must be one of `possible`."""
        self.world.unknown += not once
        deadline = time.monotonic() + 60
        while True:
            try:
                reply = await self.world.stub().getVModelStatus(
                    pb.GetVModelStatusRequest(vModelId=self.name), timeout=20
                )
                break
            except grpc.aio.AioRpcError as error:
                if error.code() not in UNKNOWN or time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.1)
        found = Expected(reply.targetModelId, reply.owner) if reply.status else None
        if found not in possible:
            raise Wrong(f"{self.name} is {found}, and may be {possible}")
        self.expected = found
        self._seen(reply)

    def _seen(self, reply: pb.VModelStatusInfo) -> None:
        if self.expected is None:
            self.named = set()
            return
        if (reply.targetModelId, reply.owner) != (self.expected.target, self.expected.owner):
            raise Wrong(f"{self.name}: {reply}, but due is {self.expected}")
        if (reply.status == pb.VModelStatusInfo.DEFINED) != (reply.activeModelId == reply.targetModelId):
            raise Wrong(f"{self.name}: its status does not fit its models: {reply}")
        self.named = {reply.targetModelId}


async def kill_leaders(world: World, etcd: Etcd, done: asyncio.Event) -> None:
    """Kills the leading router and starts it again, then does the same to each next leader."""
    killed = 0  # revision at which the last victim became the leader
    while not done.is_set():
        leader = await etcd.get(world.keys.leader)
        if leader is None or leader.create_revision == killed or sum(world.calls.values()) < 4 * VMODELS:
            await asyncio.sleep(0.1)
            continue
        killed = leader.create_revision
        (router,) = [router for router in world.mesh.routers if router.name == leader.value.decode()]
        router.kill9()
        world.down.add(router)
        world.deaths += 1
        await asyncio.sleep(world.rng.uniform(0.1, 2))
        router.start()
        await world.mesh.ready()
        world.down.clear()


async def settled(world: World, etcd: Etcd, callers: list[Caller]) -> None:
    """Waits until etcd agrees with what the callers expect. Raises Wrong with the differences if that takes too
    long."""
    wrong: list[str] = []

    async def judged() -> bool:
        wrong[:] = await judge(world, etcd, callers)
        return not wrong

    try:
        await until(judged, timeout=90, interval=0.5, why="records and counts are as they must be")
    except AssertionError:
        raise Wrong("\n".join(wrong)) from None


async def judge(world: World, etcd: Etcd, callers: list[Caller]) -> list[str]:
    """Returns the differences between etcd and what the callers expect."""
    wrong = []
    prefix = world.keys.vmodels
    records = {kv.key[len(prefix) :].decode(): vmodels.decode(kv.value) async for kv in etcd.scan(prefix)}
    for caller in callers:
        record = records.pop(caller.name, None)
        found = None if record is None else Expected(record.target, record.owner)
        if found != caller.expected:
            wrong.append(f"{caller.name} is {found}, but must be {caller.expected}")
        if record is not None and record.moving and not (record.target == BROKEN and record.failed):
            wrong.append(f"{caller.name} has not moved: {record}")
        records |= {caller.name: record} if record is not None else {}
    prefix = world.keys.registry
    models = {kv.key[len(prefix) :].decode(): ModelRecord.decode(kv.value) async for kv in etcd.scan(prefix)}
    named = Counter(model for record in records.values() for model in record.names())
    for model in TARGETS:
        if model not in models:
            if named[model]:
                wrong.append(f"{model} is not registered, but {named[model]} vmodels name it")
            continue
        if models[model].refs != named[model]:
            wrong.append(f"{model} has {models[model].refs} references, but {named[model]} vmodels name it")
        if not named[model] and models[model].auto_delete:
            wrong.append(f"{model} should have gone with its last reference")
    async for kv in etcd.scan(world.keys.all_copies):
        model, pod = world.keys.copy_of(kv.key)
        if model not in models:
            wrong.append(f"{model} is not registered, but {pod} has a copy, or it has a tombstone ({TOMBSTONE})")
    return wrong


@pytest.mark.timeout(1200)
async def test_random_calls_leave_what_a_model_of_the_api_says(tmp_path, own_etcd, pytestconfig):
    """Random calls of 20 callers through two routers, while the leader is killed repeatedly, are answered as a
    reference model of the API predicts. Records, targets and reference counts agree with it too."""
    calls = pytestconfig.getoption("--vmodel-calls", 150)
    seed = pytestconfig.getoption("--vmodel-seed", None) or random.randrange(1 << 32)
    async with LocalMesh(
        tmp_path,
        own_etcd,
        pods=1,
        routers=2,
        edge="grpc",
        fake=True,
        log_level="info",
        router_options=["--workers", "1"],
    ) as mesh:
        world = World(mesh, random.Random(seed))
        callers = [Caller(world, f"v{number}") for number in range(VMODELS)]
        done = asyncio.Event()
        async with Etcd(own_etcd.settings) as etcd:
            killing = asyncio.ensure_future(kill_leaders(world, etcd, done))
            began = time.monotonic()
            try:
                await asyncio.gather(*(caller.run(calls // VMODELS) for caller in callers))
            except BaseException as error:
                error.add_note(f"--vmodel-seed {seed} --vmodel-calls {calls}")
                raise
            finally:
                done.set()
            took = time.monotonic() - began
            await killing
            await settled(world, etcd, callers)
    print(
        f"{dict(world.calls)} in {took:.0f} s, {world.deaths} leaders died, {world.unknown} outcomes unknown, {seed=}"
    )
    assert world.deaths
    assert sum(world.calls.values()) == calls // VMODELS * VMODELS
