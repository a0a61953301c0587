"""The behaviour that users of ModelMesh rely on: loads, methods, ids and aliases of a foreign server, over both edges
and however the server is started and reached. `docs/compatibility.md` names these tests row by row.

`make test` runs two combinations of edge and server; `make test-compatibility` runs them all.
"""

import asyncio
import json
import os
import time

import grpc
import pytest
import pytest_asyncio

from mesh.pb import modelmesh_pb2 as pb
from tests.support.exampleproto import SERVICE, PredictRequest, PredictResponse
from tests.support.foreign import ForeignMesh
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

KIND = pb.ModelStatusInfo
RULES = (
    *("--method", f"{SERVICE}/predict=1"),
    *("--method", f"{SERVICE}/predictModel"),  # allowed, without an id
    *("--method", f"{SERVICE}/predictVModel=3.7"),
    *("--method", f"{SERVICE}/predictEach"),
    "--strict-unload",
)
CONFIG = {
    "rpcConfigs": {
        f"{SERVICE}/predict": {},
        f"{SERVICE}/predictModel": {"idExtractionPath": [1]},
        f"{SERVICE}/predictVModel": {"idExtractionPath": [3, 7], "vModelId": True},
        f"{SERVICE}/unlisted": {},
    },
    "allowOtherRpcs": False,
}
FEW = (("envoy", "child-socket"), ("grpc", "neighbour-apart"))
ALL = tuple(
    (edge, way)
    for edge in ("envoy", "grpc")
    for way in ("child-socket", "child-port", "neighbour-socket", "neighbour-port", "neighbour-apart")
)
MB = 1_000_000


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs each test over some combinations of edge and server, or over all with `--every-way`."""
    ways = ALL if metafunc.config.getoption("--every-way") else FEW
    metafunc.parametrize("edge_and_way", ways, ids=map("-".join, ways), indirect=True, scope="module")


@pytest.fixture(scope="module")
def edge_and_way(request):
    return request.param


class Compatible:
    """A running mesh of one example runtime, with a data-plane configuration in a file."""

    def __init__(self, it, config) -> None:
        self.it = it
        self.config = config
        self.mesh = it.mesh

    def name(self) -> str:
        """Returns an id that no other test uses."""
        return f"m{os.urandom(4).hex()}"

    async def register(self, what: str = f"SIZE_{MB}_0_0", *, now: bool = True) -> str:
        """Registers a model under a new id, and returns the id."""
        name = self.name()
        await self.it.register(name, what, now=now)
        return name

    async def alias(self, target: str) -> str:
        name = f"alias-of-{target}"
        await self.mesh.management().setVModel(pb.SetVModelRequest(vModelId=name, targetModelId=target), timeout=20)
        return name

    def method(self, name: str):
        return self.mesh.channel().unary_unary(
            f"/{SERVICE}/{name}",
            request_serializer=PredictRequest.SerializeToString,
            response_deserializer=PredictResponse.FromString,
        )

    async def status(self, name: str):
        return await self.mesh.management().getModelStatus(pb.GetStatusRequest(modelId=name), timeout=20)


async def refused(call) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value.code(), error.value.details() or ""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(edge_and_way, tmp_path_factory, etcd_server):
    """A mesh for all tests of this module, for each combination of edge and server. The program that carries calls at
    the edge also carries them from the relay to the server."""
    edge, way = edge_and_way
    folder = tmp_path_factory.mktemp("compatible")
    config = folder / "dataplane.json"
    config.write_text(json.dumps(CONFIG))
    options = ["--dataplane-config-path", str(config)]
    async with ForeignMesh(folder, etcd_server, *RULES, edge=edge, way=way, egress=edge, router_options=options) as it:
        yield Compatible(it, config)


# --- registrations and loads ---


async def test_an_unknown_model_is_not_found(world):
    """The status of an unknown id is NOT_FOUND without errors. Calls of the id fail with NOT_FOUND; unregistering the
    id succeeds."""
    status = await world.status("nobody")
    assert (status.status, list(status.errors)) == (KIND.NOT_FOUND, [])
    assert await refused(world.it.ask("nobody")) == (grpc.StatusCode.NOT_FOUND, "model not found")
    await world.mesh.management().unregisterModel(pb.UnregisterModelRequest(modelId="nobody"), timeout=20)


async def test_a_call_waits_for_the_load_that_the_registration_began(world):
    """A call right after `registerModel(loadNow)` waits for the load. Afterwards the status is LOADED without
    errors."""
    name, path = world.name(), world.mesh.write(f"late/SIZE_{MB}_300_0", b"an example")
    info = pb.ModelInfo(type="example", path=path.as_uri())
    request = pb.RegisterModelRequest(modelId=name, modelInfo=info, loadNow=True)
    await world.mesh.management().registerModel(request, timeout=20)
    assert dict((await world.it.ask(name)).results) == {name: "hello"}
    status = await world.status(name)
    assert (status.status, list(status.errors)) == (KIND.LOADED, [])
    assert world.it.noted(f"load {name}") == 1


async def test_a_failed_load_is_described(world):
    """The registration is answered with LOADING_FAILED, one error and one failed copy. The model's status says the
    same, and calls fail with the server's text."""
    name, before = world.name(), time.time()
    told = await world.it.register(name, "FAIL_no such layer", now=True)
    for status in (told, await world.status(name)):
        assert status.status == KIND.LOADING_FAILED
        (error,) = status.errors
        assert error.endswith("no such layer")
        (copy,) = status.modelCopyInfos
        assert copy.copyStatus == KIND.LOADING_FAILED
        assert copy.location
        assert abs(copy.time / 1000 - before) < 60
    code, text = await refused(world.it.ask(name))
    assert code is grpc.StatusCode.INTERNAL
    assert text.startswith("no such layer")


async def test_a_server_that_drops_a_model_gets_it_again(world):
    """A model that the server has dropped is loaded again by the next call, which succeeds. The test does this
    twice."""
    name, other = await world.register(), await world.register()
    for number in (1, 2):
        await world.it.ask(name, "drop")
        assert dict((await world.it.ask(name)).results) == {name: "hello"}
        assert world.it.noted(f"load {name}") == 1 + number
    assert world.it.noted(f"load {other}") == 1


async def test_a_server_that_purges_its_models_gets_them_again(world):
    """When the server has dropped all models, each is loaded again by its next call."""
    names = [await world.register() for _ in range(3)]
    await world.it.ask(names[0], "purge")
    answers = await asyncio.gather(*(world.it.ask(name) for name in names))
    assert [dict(answer.results) for answer in answers] == [{name: "hello"} for name in names]


async def test_a_full_server_drops_exactly_the_oldest(world):
    """In a full server, each further model takes the place of the least recently used one, whose status is then
    NOT_LOADED. This also holds if several models are registered at the same time."""
    size = 170 * MB  # six fit into the server's 1 GiB
    for _ in range(3):
        await world.register(f"SIZE_{size}_0_0")
    names = [await world.register(f"SIZE_{size}_0_0") for _ in range(7)]
    await only_loaded(world, names, names[1:])
    more = await asyncio.gather(*(world.register(f"SIZE_{size}_0_0") for _ in range(3)))
    await only_loaded(world, [*names, *more], [*names[4:], *more])
    for name in (*names, *more):
        await world.mesh.management().unregisterModel(pb.UnregisterModelRequest(modelId=name), timeout=20)


async def only_loaded(world, names, expected) -> None:
    """Waits until the router knows that exactly the expected models of these are loaded. The others must not have
    failed."""

    async def known() -> bool:
        found = [(await world.status(name)).status for name in names]
        assert set(found) <= {KIND.LOADED, KIND.NOT_LOADED}
        return [name for name, status in zip(names, found, strict=True) if status == KIND.LOADED] == expected

    await until(known, timeout=20, why=f"only {expected} of {names} are loaded")


# --- methods and ids ---


async def test_the_id_is_put_into_the_request(world):
    """The model's id replaces what the client wrote at the method's path. A call without an id is refused."""
    name = await world.register()
    answer = await world.it.ask(name, model_name="of the client")
    assert (answer.model_name, dict(answer.results)) == (name, {name: "hello"})
    assert await refused(world.it.predict(PredictRequest(text="hello"), timeout=20)) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "must include mm-model-id header",
    )


async def test_the_id_is_taken_from_the_request(world):
    """The id at the configured path names the model and overrides the headers. If the field is missing, the headers
    count."""
    name, other = await world.register(), await world.register()
    predict = world.method("predictModel")
    for request, metadata, expected in (
        (PredictRequest(model_name=name), (), name),
        (PredictRequest(model_name=name), (("mm-model-id", other),), name),
        (PredictRequest(), (("mm-model-id", other),), other),
        (PredictRequest(), (("mm-model-id-bin", other.encode()),), other),
    ):
        answer = await predict(request, metadata=metadata, timeout=20)
        assert dict(answer.results) == {expected: ""}
        assert answer.model_name == request.model_name, "no path for the server, so the request is unchanged"


async def test_an_alias_is_taken_from_the_request_and_the_models_id_put_into_it(world):
    """With `vModelId`, the id in the request is an alias's. The server gets the concrete model's id in its place."""
    name = await world.register()
    alias = await world.alias(name)
    predict = world.method("predictVModel")
    answer = await predict(PredictRequest(inner={"model_name": alias}, text="x" * 200), timeout=20)
    assert (answer.inner_model_name, set(answer.results)) == (name, {name})
    for metadata in ((("mm-vmodel-id", alias),), (("mm-vmodel-id-bin", alias.encode()),)):
        answer = await predict(PredictRequest(), metadata=metadata, timeout=20)
        assert (answer.inner_model_name, set(answer.results)) == (name, {name})


async def test_methods_that_are_not_allowed_are_refused(world):
    """A method that the configuration or the server does not allow is UNIMPLEMENTED, and so is the server's management
    API. Calls of methods that the configuration does not allow load no model."""
    name = await world.register(now=False)
    metadata = (("mm-model-id", name),)
    for method in (
        f"{SERVICE}/predictEach",
        "inference.GRPCInferenceService/ModelInfer",
        "mmesh.ModelRuntime/unloadModel",
    ):
        call = world.mesh.channel().unary_unary(f"/{method}")(b"", metadata=metadata, timeout=20)
        assert await refused(call) == (
            grpc.StatusCode.UNIMPLEMENTED,
            f"Method not found or not permitted: {method}",
        )
    assert world.it.noted(f"load {name}") == 0
    call = world.method("unlisted")(PredictRequest(), metadata=metadata, timeout=20)
    assert await refused(call) == (
        grpc.StatusCode.UNIMPLEMENTED,
        f"Method not found or not permitted: {SERVICE}/unlisted",
    )


async def test_several_models_answer_one_call(world):
    """A call with several ids gets one merged answer. Unknown ids are left out, unless all ids are required or none is
    known. Each alias is resolved separately."""
    names = [await world.register(now=number != 1) for number in range(3)]
    aliases = [await world.alias(name) for name in names]
    everything = dict.fromkeys(names, "hello")

    def call(header, ids, *more):
        metadata = [*((header, one.encode() if header.endswith("-bin") else one) for one in ids), *more]
        return world.it.predict(PredictRequest(text="hello"), metadata=metadata, timeout=20)

    assert dict((await call("mm-model-id", names)).results) == everything
    assert dict((await call("mm-model-id-bin", names)).results) == everything
    assert dict((await call("mm-vmodel-id", aliases)).results) == everything
    assert dict((await call("mm-model-id", [*names, "nobody"])).results) == everything
    assert await refused(call("mm-model-id", [*names, "nobody"], ("mm-required", "all"))) == (
        grpc.StatusCode.NOT_FOUND,
        "model not found: nobody (mm-required: all)",
    )
    assert await refused(call("mm-model-id", ["nobody", "noone"])) == (
        grpc.StatusCode.NOT_FOUND,
        "none of the requested models were found",
    )


async def test_the_meshs_own_headers_are_not_passed_on(world):
    """The server gets the client's headers and the model's id, but none of the headers for the mesh."""
    name = await world.register()
    sent = (
        ("mm-model-id", name),
        ("mm-balanced", "true"),
        ("mm-required", "all"),
        ("tas-model-id", "other"),
        ("own-header", "1"),
        ("client-bin", "é".encode()),
    )
    call = world.it.predict(PredictRequest(text="hello"), metadata=sent, timeout=20)
    assert dict((await call).results) == {name: "hello"}
    trailers = dict(await call.trailing_metadata())
    assert trailers["example-bin"] == "é".encode()
    got = set(trailers["example-names"].split(","))
    assert {"own-header", "client-bin", "mm-model-id", "mm-model-id-bin"} <= got
    assert {one for one in got if one.startswith(("mm-", "tas-", "mesh-"))} == {"mm-model-id", "mm-model-id-bin"}


async def test_the_old_header_and_large_messages(world):
    """`tas-model-id` names the model if no other header does. Messages of 2 MB pass in both directions."""
    name = await world.register()
    text = "x" * (2 * MB)
    for _ in range(5):
        request = PredictRequest(text=text)
        answer = await world.it.predict(request, metadata=(("tas-model-id", name),), timeout=20)
        assert dict(answer.results) == {name: text}


async def test_the_configuration_is_watched(world):
    """A changed file takes effect without a restart. Content that cannot be used is reported, and changes nothing."""
    name = await world.register()
    metadata = (("mm-model-id", name),)

    async def allowed() -> bool:
        call = world.mesh.channel().unary_stream(f"/{SERVICE}/predictEach", PredictRequest.SerializeToString)
        try:
            async for _ in call(PredictRequest(texts=["a"]), metadata=metadata, timeout=20):
                pass
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.UNIMPLEMENTED
            return False
        return True

    async def reported() -> bool:
        return "not JSON" in (await world.mesh.stats())["dataplane"]["error"]

    assert not await allowed()
    try:
        world.config.write_text("{")
        await until(reported, timeout=30, why="the router reports the content that it cannot use")
        assert not await allowed()
        assert dict((await world.it.ask(name)).results) == {name: "hello"}
        new = world.config.with_suffix(".new")
        new.write_text(json.dumps({**CONFIG, "allowOtherRpcs": True}))
        new.replace(world.config)
        await until(allowed, timeout=30, why="the new content is in force")
        assert (await world.mesh.stats())["dataplane"]["error"] == ""
    finally:
        world.config.write_text(json.dumps(CONFIG))
