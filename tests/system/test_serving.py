"""The mesh as a client sees it: models registered, served on demand, evicted and served again, at both edges."""

import asyncio
import gzip
import json
import struct

import grpc
import numpy as np
import pytest
import pytest_asyncio

from mesh.pb import health_pb2, inference_pb2, modelmesh_pb2, reflection_pb2
from mesh.statuses import Code
from tests.support import models
from tests.support.localmesh import Client, LocalMesh, infer_request

pytestmark = pytest.mark.asyncio(loop_scope="module")

ONE = np.ones((1, 1), np.float32)
FEATURES = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 64)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["envoy", "grpc"])
async def mesh(request, tmp_path_factory, etcd_server):
    """A mesh behind Envoy, then behind grpc.aio, because clients must see no difference."""
    async with LocalMesh(tmp_path_factory.mktemp("serving"), etcd_server, edge=request.param) as mesh:
        yield mesh


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def two_routers(tmp_path_factory, etcd_server):
    """A mesh of two routers, of which each must know what the other has acknowledged."""
    async with LocalMesh(tmp_path_factory.mktemp("serving"), etcd_server, routers=2) as mesh:
        yield mesh


async def test_a_model_is_served_over_every_way_in(mesh):
    """gRPC, REST with JSON and REST with binary data give the same answer, through either edge. Compressed requests,
    metadata and health checks work too."""
    status = await mesh.register("plus", models.constant(7.0))
    assert status.status == modelmesh_pb2.ModelStatusInfo.NOT_LOADED
    client = Client(mesh.channel())
    (answer,) = await client.infer("plus", x=ONE)
    assert answer.tolist() == [[7.0]]

    body = {"id": "q", "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [1.0]}]}
    reply = await mesh.rest("POST", "/v2/models/plus/infer", body)
    assert (reply.status, reply.json["id"], reply.json["model_name"]) == (200, "q", "plus")
    assert np.ravel(reply.json["outputs"][0]["data"]).tolist() == [7.0]

    head = {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "parameters": {"binary_data_size": 4}}],
        "parameters": {"binary_data_output": True},
    }
    text = json.dumps(head).encode()
    reply = await mesh.rest(
        "POST",
        "/v2/models/plus/infer",
        text + struct.pack("<f", 1.0),
        headers={"Inference-Header-Content-Length": str(len(text)), "Content-Type": "application/octet-stream"},
    )
    length = int(reply.headers["Inference-Header-Content-Length"])
    assert reply.body[length:] == struct.pack("<f", 7.0)

    packed = gzip.compress(json.dumps(body).encode())
    reply = await mesh.rest("POST", "/v2/models/plus/infer", packed, headers={"Content-Encoding": "gzip"})
    assert reply.status == 200

    stub = mesh.channel()
    metadata = stub.unary_unary(
        "/inference.GRPCInferenceService/ModelMetadata",
        request_serializer=lambda m: m.SerializeToString(),
        response_deserializer=inference_pb2.ModelMetadataResponse.FromString,
    )
    found = await metadata(inference_pb2.ModelMetadataRequest(name="plus"), timeout=10)
    assert [(tensor.name, tensor.datatype) for tensor in found.inputs] == [("x", "FP32")]
    assert (await mesh.rest("GET", "/v2/models/plus")).json["inputs"][0]["name"] == "x"
    assert (await mesh.rest("GET", "/v2/models/plus/ready")).status == 200
    assert (await mesh.rest("GET", "/v2/health/live")).status == 200
    assert (await mesh.rest("GET", "/v2/health/ready")).status == 200
    assert (await mesh.rest("GET", "/v2")).json["name"]


async def test_health_and_reflection(mesh):
    channel = mesh.channel()
    check = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=lambda m: m.SerializeToString(),
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    answer = await check(health_pb2.HealthCheckRequest(), timeout=10)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    reflect = channel.stream_stream(
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        request_serializer=lambda m: m.SerializeToString(),
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )

    async def questions():
        yield reflection_pb2.ServerReflectionRequest(list_services="")
        yield reflection_pb2.ServerReflectionRequest(file_containing_symbol="inference.GRPCInferenceService")

    answers = [answer async for answer in reflect(questions(), timeout=10)]
    names = {service.name for service in answers[0].list_services_response.service}
    assert {"inference.GRPCInferenceService", "mmesh.ModelMesh", "grpc.health.v1.Health"} <= names
    assert answers[1].file_descriptor_response.file_descriptor_proto


async def test_a_registration_is_callable_through_any_router_at_once(two_routers):
    """No router remembers a negative answer: a model that was unknown is callable through one router once it is
    registered through another."""
    mesh = two_routers
    clients = [Client(mesh.channel(0)), Client(mesh.channel(1))]
    for number in range(20):
        name = f"model/{number} é"
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await clients[1].infer(name, x=ONE)
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
        await mesh.register(name, models.constant(float(number)), router=0)
        (answer,) = await clients[1].infer(name, x=ONE)
        assert answer.item() == number


async def test_the_least_recently_used_goes_and_comes_back(a_mesh):
    """One pod with room for a few models serves many by evicting the least recently used one. Each answer comes from
    the called model."""
    big = [models.weights(number, mebibytes=4) for number in range(8)]
    async with a_mesh(pods=1, capacity="24MiB") as mesh:
        for number, content in enumerate(big):
            await mesh.register(f"m{number}", content)
        client = Client(mesh.channel())
        for _ in range(2):
            for number in range(8):
                (answer,) = await client.infer(f"m{number}", x=ONE)
                assert answer.item() == pytest.approx(number)
        states = [(await mesh.status(f"m{number}"))["status"] for number in range(8)]
        assert states[-1] == "LOADED"
        assert states[0] == "NOT_LOADED"
        pods = (await mesh.rest("GET", "/mesh/v1/pods")).json["pods"]
        assert pods[0]["used"] <= pods[0]["capacity"] == 24 << 20


async def test_management_over_grpc(mesh):
    """The four calls of ModelMesh's management API work, with ModelMesh's texts."""
    stub = mesh.management()
    path = mesh.write("a.onnx", models.constant(1.0))
    info = modelmesh_pb2.ModelInfo(type="onnx", path=f"file://{path}")
    request = modelmesh_pb2.RegisterModelRequest(modelId="a", modelInfo=info, loadNow=True, sync=True)
    answer = await stub.registerModel(request, timeout=30)
    assert answer.status == modelmesh_pb2.ModelStatusInfo.LOADED
    assert (await stub.registerModel(request, timeout=30)).status == modelmesh_pb2.ModelStatusInfo.LOADED
    with pytest.raises(grpc.aio.AioRpcError) as conflict:
        await stub.registerModel(
            modelmesh_pb2.RegisterModelRequest(modelId="a", modelInfo=modelmesh_pb2.ModelInfo(type="other"))
        )
    assert conflict.value.code() is grpc.StatusCode.ALREADY_EXISTS
    assert conflict.value.details() == "Model already exists with different attribute values"
    for call in (stub.registerModel(modelmesh_pb2.RegisterModelRequest(modelInfo=info)),):
        with pytest.raises(grpc.aio.AioRpcError) as empty:
            await call
        assert empty.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    unknown = await stub.getModelStatus(modelmesh_pb2.GetStatusRequest(modelId="nobody"))
    assert unknown.status == modelmesh_pb2.ModelStatusInfo.NOT_FOUND
    with pytest.raises(grpc.aio.AioRpcError) as missing:
        await stub.ensureLoaded(modelmesh_pb2.EnsureLoadedRequest(modelId="nobody"))
    assert (missing.value.code(), missing.value.details()) == (grpc.StatusCode.NOT_FOUND, "model not found")
    await stub.unregisterModel(modelmesh_pb2.UnregisterModelRequest(modelId="nobody"))
    await stub.unregisterModel(modelmesh_pb2.UnregisterModelRequest(modelId="a"))
    gone = await stub.getModelStatus(modelmesh_pb2.GetStatusRequest(modelId="a"))
    assert gone.status == modelmesh_pb2.ModelStatusInfo.NOT_FOUND


async def test_bulk_registration_and_paged_listing(two_routers):
    """A bulk registration of thousands of lines registers the good ones and names the bad ones. The models are then
    listed page by page."""
    mesh = two_routers
    path = mesh.write("one.onnx", models.constant(3.0))
    lines = [
        json.dumps({"id": f"bulk-{number:05}", "type": "onnx", "path": f"file://{path}"}) for number in range(3000)
    ]
    lines.insert(10, "not json")
    lines.insert(20, json.dumps({"id": "", "type": "onnx"}))
    reply = await mesh.rest("POST", "/mesh/v1/models:import", "\n".join(lines).encode())
    answers = [json.loads(line) for line in reply.body.splitlines()]
    assert {answer["error"]["line"] for answer in answers if "error" in answer} == {11, 21}
    assert (answers[-1]["finished"], answers[-1]["created"], answers[-1]["failed"]) == (True, 3000, 2)
    found, after = [], ""
    while after is not None:
        page = (await mesh.rest("GET", f"/mesh/v1/models?prefix=bulk-&limit=1000&after={after}")).json
        found += [model["id"] for model in page["models"]]
        after = page["next"]
    assert found == [f"bulk-{number:05}" for number in range(3000)]
    (answer,) = await Client(mesh.channel()).infer("bulk-02999", x=ONE)
    assert answer.item() == 3.0


async def test_a_hundred_callers_of_two_routers_load_a_cold_model_once(a_mesh):
    """When a hundred callers of two routers call a cold model in a full mesh, it is loaded once, and room is made for
    one load only."""
    async with a_mesh(pods=3, routers=2, capacity="24MiB") as mesh:
        fillers = [f"filler-{number}" for number in range(12)]
        for number, name in enumerate(fillers):
            await mesh.register(name, models.weights(number, mebibytes=4))
        client = Client(mesh.channel())
        for name in fillers:
            await client.infer(name, x=ONE)
        before = [(await mesh.status(name))["status"] for name in fillers].count("LOADED")
        await mesh.register("wanted", models.weights(99, mebibytes=4))
        clients = [Client(mesh.channel(number % 2)) for number in range(10)]
        answers = await asyncio.gather(*(clients[n % 10].infer("wanted", x=ONE) for n in range(100)))
        assert {answer.item() for (answer,) in answers} == {99.0}
        assert len((await mesh.status("wanted"))["copies"]) == 1
        after = [(await mesh.status(name))["status"] for name in fillers].count("LOADED")
        assert before - after <= 1
        loads = 0
        for pod in (await mesh.rest("GET", "/mesh/v1/pods")).json["pods"]:
            text = (await mesh.get(f"http://{pod['probe']}/metrics")).body.decode()
            (line,) = [line for line in text.splitlines() if line.startswith("modelmesh_loadmodel_milliseconds_count")]
            loads += float(line.split()[-1])
        evicted = 12 - before
        assert loads == 12 + 1, f"{loads} loads; {evicted} fillers had gone before"


async def test_an_id_registered_again_never_answers_from_its_former_life(two_routers):
    """An id that is unregistered and registered again with another file, under traffic through two routers, never
    answers from its former registration."""
    mesh = two_routers
    clients = [Client(mesh.channel(0)), Client(mesh.channel(1))]
    wrong: list[tuple[float, float]] = []
    floor = 0.0
    stop = False

    async def ask(client: Client) -> None:
        while not stop:
            at_least = floor
            try:
                (answer,) = await client.infer("again", x=ONE)
            except grpc.aio.AioRpcError as error:
                if error.code() not in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAVAILABLE):
                    raise
                await asyncio.sleep(0.005)
                continue
            if answer.item() < at_least:
                wrong.append((answer.item(), at_least))

    await mesh.register("again", models.constant(0.0))
    askers = [asyncio.create_task(ask(client)) for client in clients for _ in range(4)]
    try:
        for life in range(1, 15):
            await mesh.management().unregisterModel(modelmesh_pb2.UnregisterModelRequest(modelId="again"))
            await mesh.register("again", models.constant(float(life)), router=life % 2)
            floor = float(life)
    finally:
        stop = True
        results = await asyncio.gather(*askers, return_exceptions=True)
    assert not wrong
    assert not [result for result in results if result is not None]


async def test_internal_headers_are_removed_and_a_call_without_an_id_is_refused(mesh):
    """The id in the message names the model, and internal headers are removed: a client can neither address a copy nor
    see the mesh's own metadata. A call without an id is refused."""
    await mesh.register("plain", models.constant(2.0))
    infer = mesh.channel().unary_unary(
        "/inference.GRPCInferenceService/ModelInfer",
        request_serializer=lambda m: m.SerializeToString(),
        response_deserializer=inference_pb2.ModelInferResponse.FromString,
    )
    call = infer(infer_request("plain", x=ONE), metadata=(("mesh-copy", "nonsense.1"),), timeout=20)
    assert (await call).raw_output_contents[0] == struct.pack("<f", 2.0)
    names = {name for name, _ in [*await call.initial_metadata(), *await call.trailing_metadata()]}
    assert not {name for name in names if name.startswith("mesh-")}
    with pytest.raises(grpc.aio.AioRpcError) as nameless:
        await infer(infer_request("", x=ONE), timeout=20)
    assert nameless.value.code().value[0] == Code.INVALID_ARGUMENT
