"""Aliases as a client sees them: names and versions in calls and replies, splits over two routers, models that cannot
be loaded. The tests write the records to etcd as ModelMesh writes them."""

import asyncio
import json
from collections import Counter

import grpc
import numpy as np
import pytest
import pytest_asyncio

from mesh.etcd import Etcd
from mesh.pb import inference_pb2 as pb
from mesh.schema.keys import Keys
from tests.support import models
from tests.support.localmesh import LocalMesh, infer_request
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

ONE = np.ones((1, 1), np.float32)
BODY = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [1.0]}]}
VERSIONS = {"7": "fraud@7", "8": "fraud@8"}


async def put(mesh: LocalMesh, alias: str, active: str, target: str = "", **more: object) -> None:
    record = {"o": "ksp", "amid": active, "tmid": target or active, **({"mesh": more} if more else {})}
    async with Etcd(mesh.etcd.settings) as etcd:
        await etcd.put(Keys(mesh.base).vmodel(alias), json.dumps(record).encode())


class Caller:
    def __init__(self, mesh: LocalMesh, router: int = 0) -> None:
        self._channel = mesh.channel(router)

    def _method(self, name, reply):
        return self._channel.unary_unary(
            f"/inference.GRPCInferenceService/{name}", pb.ModelInferRequest.SerializeToString, reply.FromString
        )

    async def infer(self, name: str, version: str = "", metadata=()) -> pb.ModelInferResponse:
        request = infer_request(name, x=ONE)
        request.model_version = version
        return await self._method("ModelInfer", pb.ModelInferResponse)(request, metadata=metadata, timeout=30)

    async def metadata(self, name: str, version: str = "") -> pb.ModelMetadataResponse:
        request = pb.ModelInferRequest(model_name=name, model_version=version)
        return await self._method("ModelMetadata", pb.ModelMetadataResponse)(request, timeout=30)

    async def ready(self, name: str, version: str = "") -> bool:
        request = pb.ModelInferRequest(model_name=name, model_version=version)
        return (await self._method("ModelReady", pb.ModelReadyResponse)(request, timeout=30)).ready

    async def refused(self, call) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call
        return error.value.code(), error.value.details()


def value(answer: pb.ModelInferResponse) -> float:
    """Returns the number that the model answers, which differs for each model."""
    return float(np.frombuffer(answer.raw_output_contents[0], np.float32)[0])


def names(answer) -> tuple[str, str]:
    return answer.model_name, answer.model_version


async def metric(mesh: LocalMesh, name: str, **labels: str) -> float:
    """Returns the sum of a counter over all routers and over all series that have the labels."""
    total = 0.0
    for router in range(len(mesh.routers)):
        page = (await mesh.get(f"{mesh.probe_url(router)}/metrics")).body.decode()
        for line in page.splitlines():
            if line.startswith(f"{name}{{") and all(f'{label}="{one}"' in line for label, one in labels.items()):
                total += float(line.rsplit(" ", 1)[1])
    return total


async def served(mesh: LocalMesh, alias: str, active: str, **more: object) -> None:
    """Writes an alias's record, and waits until every router has it."""
    await put(mesh, alias, active, **more)
    for router in range(len(mesh.routers)):
        caller = Caller(mesh, router)

        async def known(caller=caller) -> bool:
            versions = (await caller.metadata(alias)).versions
            return list(versions) == list(more.get("versions", versions))

        await until(known, interval=0.05, timeout=20, why=f"the alias reaches router {router}")


@pytest_asyncio.fixture(
    scope="module", loop_scope="module", params=["envoy", pytest.param("grpc", marks=pytest.mark.long)]
)
async def mesh(request, tmp_path_factory, etcd_server):
    """A mesh that finds an alias of ModelMesh in etcd when it starts, behind each kind of edge in turn."""
    mesh = LocalMesh(tmp_path_factory.mktemp("aliases"), etcd_server, pods=1, edge=request.param)
    await put(mesh, "modelmesh's", "fraud__ksp-0123456789")
    async with mesh:
        await mesh.register("fraud__ksp-0123456789", models.constant(5.0))
        for version in ("7", "8"):
            await mesh.register(f"fraud@{version}", models.constant(float(version)))
        yield mesh


@pytest_asyncio.fixture(
    scope="module", loop_scope="module", params=["envoy", pytest.param("grpc", marks=pytest.mark.long)]
)
async def two_routers(request, tmp_path_factory, etcd_server):
    folder = tmp_path_factory.mktemp("aliases")
    async with LocalMesh(folder, etcd_server, pods=1, routers=2, edge=request.param) as mesh:
        for version in ("7", "8"):
            await mesh.register(f"fraud@{version}", models.constant(float(version)), load=True)
        yield mesh


async def test_a_record_of_modelmesh_is_served_from_the_start(mesh):
    """A call by the name of ModelMesh's vmodel is answered under that name; a call with `mm-vmodel-id` is
    answered under the model's id."""
    caller = Caller(mesh)
    answer = await caller.infer("modelmesh's")
    assert (value(answer), *names(answer)) == (5.0, "modelmesh's", "1")
    answer = await caller.infer("", metadata=[("mm-vmodel-id", "modelmesh's")])
    assert (value(answer), *names(answer)) == (5.0, "fraud__ksp-0123456789", "")


async def test_versions_over_grpc(mesh):
    """Each version of an alias answers under the alias's name and its own number. Metadata lists the versions, and an
    unknown version is not found."""
    await served(mesh, "fraud", "fraud@8", versions=VERSIONS)
    caller = Caller(mesh)
    for version, expected in (("", "8"), ("7", "7"), ("8", "8")):
        answer = await caller.infer("fraud", version)
        assert (value(answer), *names(answer)) == (float(expected), "fraud", expected)
        found = await caller.metadata("fraud", version)
        assert (found.name, list(found.versions)) == ("fraud", ["7", "8"])
        assert await caller.ready("fraud", version)
    text = "fraud has no version 99; its versions: 7, 8"
    for call in (caller.infer("fraud", "99"), caller.metadata("fraud", "99"), caller.ready("fraud", "99")):
        assert await caller.refused(call) == (grpc.StatusCode.NOT_FOUND, text)


async def test_versions_over_rest(mesh):
    """Over REST, paths with `/versions/V` reach each version of an alias, and an unknown version is not found."""
    await served(mesh, "fraud", "fraud@8", versions=VERSIONS)
    for path, expected in (("fraud", "8"), ("fraud/versions/7", "7"), ("fraud/versions/8", "8")):
        reply = await mesh.rest("POST", f"/v2/models/{path}/infer", BODY)
        found = reply.json
        assert (reply.status, found["model_name"], found["model_version"]) == (200, "fraud", expected)
        assert np.ravel(found["outputs"][0]["data"]).tolist() == [float(expected)]
        found = (await mesh.rest("GET", f"/v2/models/{path}")).json
        assert (found["name"], found["versions"]) == ("fraud", ["7", "8"])
        assert (await mesh.rest("GET", f"/v2/models/{path}/ready")).status == 200
    for method, path, body in (("POST", "/infer", BODY), ("GET", "", None), ("GET", "/ready", None)):
        reply = await mesh.rest(method, f"/v2/models/fraud/versions/99{path}", body)
        assert (reply.status, reply.json["reason"]) == (404, "UNKNOWN_VERSION")
        assert "its versions: 7, 8" in reply.json["error"]


async def test_a_plain_model_has_the_version_of_its_folder(mesh):
    """A model that is called by its id has one version: the number of its folder, or 1. Other versions are not
    found."""
    path = mesh.write("numbered/12/model.onnx", models.constant(1.0))
    await mesh._register("numbered", "onnx", path, load=False, sync=False, router=0)
    await mesh.register("single", models.constant(1.0))
    caller = Caller(mesh)
    for name, own in (("numbered", "12"), ("single", "1")):
        for _ in range(2):
            assert names(await caller.infer(name, own)) == (name, "")
            assert names(await caller.infer(name)) == (name, "")
            code, text = await caller.refused(caller.infer(name, "99"))
            assert (code, text) == (grpc.StatusCode.NOT_FOUND, f"{name} has no version 99; its versions: {own}")
        assert list((await caller.metadata(name)).versions) == [own]
        assert (await mesh.rest("POST", f"/v2/models/{name}/versions/{own}/infer", BODY)).status == 200
        assert (await mesh.rest("POST", f"/v2/models/{name}/versions/99/infer", BODY)).status == 404


async def test_a_name_that_is_neither_model_nor_alias_is_not_found(mesh):
    """The texts are ModelMesh's. A call that names both a model and an alias is refused."""
    caller = Caller(mesh)
    assert await caller.refused(caller.infer("nothing")) == (grpc.StatusCode.NOT_FOUND, "model not found")
    refused = await caller.refused(caller.infer("", metadata=[("mm-vmodel-id", "nothing")]))
    assert refused == (grpc.StatusCode.NOT_FOUND, "vmodel not found")
    both = [("mm-vmodel-id", "a"), ("mm-model-id", "b")]
    assert (await caller.refused(caller.infer("", metadata=both)))[0] is grpc.StatusCode.INVALID_ARGUMENT


async def test_an_alias_is_callable_through_any_router_once_it_is_written(two_routers):
    """The test calls each of twenty aliases through both routers right after it has written the alias's record, perhaps
    before the routers' feeds deliver it."""
    callers = [Caller(two_routers, router) for router in range(2)]
    for number in range(20):
        await put(two_routers, f"alias-{number}", f"fraud@{7 + number % 2}")
        for caller in callers:
            answer = await caller.infer(f"alias-{number}")
            assert (value(answer), answer.model_name) == (7.0 + number % 2, f"alias-{number}")


async def test_a_canary_gets_its_share_over_two_routers(two_routers):
    """A canary at 10 % gets between 26 and 94 of 600 calls: 60, give or take four standard deviations. Every reply
    names the version that it comes from."""
    await served(two_routers, "canary", "fraud@7", versions=VERSIONS, weights={"fraud@7": 90, "fraud@8": 10})
    callers = [Caller(two_routers, router) for router in range(2)]
    got: Counter[str] = Counter()
    for _ in range(30):
        for answer in await asyncio.gather(*(callers[number % 2].infer("canary") for number in range(20))):
            assert value(answer) == float(answer.model_version)
            got[answer.model_version] += 1
    assert 26 <= got["8"] <= 94, got


async def test_a_sticky_key_has_one_model_in_both_routers(two_routers):
    """All calls of one user reach the same model, through either router and over gRPC or REST. Both models have
    users."""
    await served(
        two_routers,
        "sticky",
        "fraud@7",
        versions=VERSIONS,
        weights={"fraud@7": 50, "fraud@8": 50},
        sticky="x-user",
    )
    callers = [Caller(two_routers, router) for router in range(2)]
    got: dict[str, set[str]] = {}
    for user in map(str, range(16)):
        answers = [await caller.infer("sticky", metadata=[("x-user", user)]) for caller in (*callers, *callers)]
        got[user] = {answer.model_version for answer in answers}
        reply = await two_routers.rest("POST", "/v2/models/sticky/infer", BODY, headers={"X-User": user})
        got[user].add(reply.json["model_version"])
    assert all(len(versions) == 1 for versions in got.values()), got
    assert set().union(*got.values()) == {"7", "8"}


@pytest.mark.parametrize("sticky", ["", "x-user"])
async def test_a_canary_that_cannot_be_loaded_costs_no_call(two_routers, sticky):
    """Every call is answered although half of the calls are drawn for a file that is not a model. The metrics count the
    diverted calls."""
    name = f"broken-{sticky or 'random'}"
    await two_routers.register(f"{name}@9", b"this is no model")
    await served(
        two_routers, name, "fraud@7", weights={"fraud@7": 50, f"{name}@9": 50}, **({"sticky": sticky} if sticky else {})
    )
    callers = [Caller(two_routers, router) for router in range(2)]
    for number in range(60):
        answer = await callers[number % 2].infer(name, metadata=[("x-user", str(number))])
        assert (value(answer), answer.model_name) == (7.0, name)
    assert await metric(two_routers, "mesh_alias_diverted", alias=name, model=f"{name}@9") > 10


async def test_a_shadow_gets_the_calls_and_its_answers_are_compared(two_routers):
    """One shadow gives the same outputs as the model that serves, and another one does not. Callers notice neither; the
    metrics count equal and different answers."""
    await two_routers.register("fraud@7-again", models.constant(7.0), load=True)
    callers = [Caller(two_routers, router) for router in range(2)]
    for alias, shadow, outcome in (("same", "fraud@7-again", "equal"), ("other", "fraud@8", "different")):
        await served(two_routers, alias, "fraud@7", mirror={"target": shadow, "share": 100})
        for number in range(40):
            answer = await callers[number % 2].infer(alias)
            assert (value(answer), answer.model_name) == (7.0, alias)

        async def counted(alias=alias, shadow=shadow, outcome=outcome) -> bool:
            return await metric(two_routers, "mesh_mirror_calls", alias=alias, model=shadow, outcome=outcome) >= 5

        await until(counted, interval=0.1, timeout=20, why=f"answers of {shadow} are compared")
        for wrong in {"equal", "different", "failed"} - {outcome}:
            assert not await metric(two_routers, "mesh_mirror_calls", alias=alias, outcome=wrong)


SHADOWS = {"hang": {"call": "3600s"}, "refuse": {"error": "no answer today"}, "unloadable": {"fail": "no such layer"}}


@pytest.mark.long
@pytest.mark.parametrize("shadows", [SHADOWS, {"crash": {"error": "crash"}}], ids=" ".join)
async def test_a_shadow_that_hangs_or_fails_leaves_callers_alone(a_mesh, shadows):
    """Callers get their answers from the model that serves, even if its shadow hangs, fails, cannot be loaded, or kills
    the server of both. Calls that are not sent to the shadow are counted as shed."""
    async with a_mesh(pods=2, fake=True, capacity="64MiB") as mesh:
        await mesh.register_fake("fraud@7", value=7, now=True)
        for alias, words in shadows.items():
            await mesh.register_fake(f"{alias}@9", **words)
            await served(mesh, alias, "fraud@7", mirror={"target": f"{alias}@9", "share": 100})
        caller = Caller(mesh)

        async def counted(alias: str) -> bool:
            assert value(await caller.infer(alias)) == 7.0
            outcomes = ("shed",) if alias == "unloadable" else ("failed", "shed")
            return all([await metric(mesh, "mesh_mirror_calls", alias=alias, outcome=one) for one in outcomes])

        async def all_counted() -> bool:
            return all([await counted(alias) for alias in shadows])

        await until(all_counted, interval=0.02, timeout=60, why="calls of the shadows fail and are shed")
        for number in range(100):
            assert value(await caller.infer([*shadows][number % len(shadows)])) == 7.0
