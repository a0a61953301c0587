"""Messages that are small on the wire and large once decompressed, or that take long to parse, do no harm."""

import asyncio
import gzip
from collections.abc import AsyncIterator

import grpc
import pytest
import pytest_asyncio

from mesh.pb import inference_pb2
from tests.attack.siege import HOT, HOT_VALUE, MIB, Siege
from tests.support import models
from tests.support.etcd import EtcdServer
from tests.support.localmesh import LocalMesh

pytestmark = [pytest.mark.attack, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]

UNPACKED = 256 * MIB  # 16 times what a message may have
ZIPPED = gzip.compress(b" " * UNPACKED, compresslevel=6)  # a quarter of a megabyte
AT_ONCE = 4


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory, etcd_server: EtcdServer) -> AsyncIterator[LocalMesh]:
    """One pod, and one router with a single worker, so a request that blocks the worker blocks every caller."""
    folder = tmp_path_factory.mktemp("compressed")
    options = ["--workers", "1"]
    async with LocalMesh(folder, etcd_server, pods=1, log_level="info", router_options=options) as mesh:
        await mesh.register(HOT, models.constant(HOT_VALUE), load=True)
        yield mesh


@pytest.mark.parametrize(
    ("method", "path"),
    [
        pytest.param("POST", "/mesh/v1/models:import", id="import"),
        pytest.param("POST", f"/v2/models/{HOT}/infer", id="infer"),
        pytest.param("PUT", "/mesh/v1/models/new", id="register"),
        pytest.param("PUT", "/mesh/v1/settings/type_limits", id="settings"),
    ],
)
async def test_bodies_over_rest(mesh: LocalMesh, method: str, path: str) -> None:
    """Bodies that decompress to 256 MiB do no harm, and errors about them are short."""
    async with Siege(mesh, growth=300 * MIB):
        headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
        replies = await asyncio.gather(
            *(mesh.rest(method, path, ZIPPED, headers=headers) for _ in range(AT_ONCE)),
        )
        # An import answers 200 and reports errors in its lines.
        allowed = {400, 413, 415, 429} | ({200} if path.endswith(":import") else set())
        assert {reply.status for reply in replies} <= allowed, [reply.body[:200] for reply in replies]
        assert all(len(reply.body) < 8192 for reply in replies)


@pytest.mark.parametrize(
    "method",
    [
        "/inference.GRPCInferenceService/ModelInfer",
        "/inference.GRPCInferenceService/ModelMetadata",
        "/mmesh.ModelMesh/registerModel",
        "/invented.Service/Method",
    ],
)
@pytest.mark.parametrize("named", [False, True], ids=["id in the message", "id in the metadata"])
async def test_messages_over_grpc(mesh: LocalMesh, method: str, named: bool) -> None:
    """Messages of 64 MiB that gRPC's own compression has made small are refused. Only ModelMetadata may answer them."""
    message = b"\x0a\x03hot" + b"\x12\x80\x80\x80\x20" + b" " * (UNPACKED // 4)
    metadata = [("mm-model-id", HOT)] if named else []
    options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]

    def send() -> str:
        # In a thread: the compression takes this process a second, and the hot callers run in its event loop.
        with grpc.insecure_channel(mesh.grpc_address(), options, compression=grpc.Compression.Gzip) as channel:
            try:
                channel.unary_unary(method)(message, timeout=60, metadata=metadata)
            except grpc.RpcError as error:
                assert len(error.details() or "") < 8192
                return error.code().name
        return "OK"

    async with Siege(mesh, growth=300 * MIB):
        codes = set(await asyncio.gather(*(asyncio.to_thread(send) for _ in range(AT_ONCE))))
        # ModelMetadata may succeed, because the router reads nothing of the message but the id.
        allowed = {"RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED", "NOT_FOUND"}
        assert codes <= allowed | ({"OK"} if method.endswith("ModelMetadata") else set()), codes


async def test_a_hundred_thousand_parameters(mesh: LocalMesh) -> None:
    """A request, an input or an output with a hundred thousand parameters does no harm, although maps take longer to
    parse than lists."""
    requests = [inference_pb2.ModelInferRequest(model_name=HOT) for _ in range(3)]
    requests[1].inputs.add(name="x", datatype="FP32", shape=[1, 1])
    requests[2].outputs.add(name="y")
    for owner in (requests[0], requests[1].inputs[0], requests[2].outputs[0]):
        for number in range(100_000):
            owner.parameters[f"parameter {number}"].int64_param = number
    async with Siege(mesh, growth=300 * MIB):
        async with grpc.aio.insecure_channel(mesh.grpc_address()) as channel:
            call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")

            async def send(frame: bytes) -> str:
                try:
                    await call(frame, timeout=60)
                except grpc.aio.AioRpcError as error:
                    return error.code().name
                return "OK"

            frames = [request.SerializeToString() for request in requests]
            codes = set(await asyncio.gather(*(send(frame) for frame in frames * 3)))
        assert codes <= {"OK", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"}, codes
