import types

import grpc
import pytest
from google.protobuf import descriptor_pb2

from mesh.pb import health_pb2, inference_pb2, reflection_pb2, reflection_v1alpha_pb2
from router.inference.server import V2Server
from router.services import health, reflection, v2server
from tests.support.access import open_guard
from tests.support.waiting import until


class Host:
    """The parts of a worker and its dispatcher that the services need."""

    def __init__(self):
        self.reason = None
        self.pods = {}
        server = V2Server(types.SimpleNamespace(pods=self.pods), self.ready)
        self.health = health.Health(self.ready)
        self.handlers = {**self.health.methods(), **reflection.METHODS, **v2server.methods(server, open_guard())}

    def ready(self):
        return self.reason

    def pod(self, name, state):
        """Puts a pod into the view. If `state` is None, only copies of the pod are known."""
        self.pods[name] = types.SimpleNamespace(record=state and types.SimpleNamespace(state=state))

    def handler(self, call):
        self.handlers[call.method](call)


@pytest.fixture
def host():
    return Host()


@pytest.fixture
async def channel(connect, host):
    return await connect(host.handler)


def unary(channel, method, request, reply):
    call = channel.unary_unary(
        method, request_serializer=type(request).SerializeToString, response_deserializer=reply.FromString
    )
    return call(request, timeout=20)


async def check(channel, service=""):
    request = health_pb2.HealthCheckRequest(service=service)
    reply = await unary(channel, "/grpc.health.v1.Health/Check", request, health_pb2.HealthCheckResponse)
    return health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)


async def test_health_says_whether_the_worker_is_ready(channel, host):
    for service in sorted(health.KNOWN):
        assert await check(channel, service) == "SERVING"
    host.reason = "no pods"
    assert await check(channel) == "NOT_SERVING"


async def test_health_of_a_service_that_is_not_ours_is_not_found(channel):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await check(channel, "other.Service")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_health_that_is_no_message_is_a_bad_request(channel):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary("/grpc.health.v1.Health/Check")(b"\xff", timeout=20)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_watching_health_tells_each_change(channel, host, monkeypatch):
    monkeypatch.setattr(health, "_LOOK", 0.01)
    watch = channel.unary_stream(
        "/grpc.health.v1.Health/Watch",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    call = watch(health_pb2.HealthCheckRequest(), timeout=20)
    seen = []
    for reason in ("no pods", None):
        seen.append((await call.read()).status)
        host.reason = reason
    seen.append((await call.read()).status)
    kinds = health_pb2.HealthCheckResponse
    assert seen == [kinds.SERVING, kinds.NOT_SERVING, kinds.SERVING]
    call.cancel()
    other = watch(health_pb2.HealthCheckRequest(service="other"), timeout=20)
    assert (await other.read()).status == kinds.SERVICE_UNKNOWN
    other.cancel()


async def test_only_so_many_watch(channel, host, monkeypatch):
    """The number of watchers is bounded, because each costs some work every second."""
    monkeypatch.setattr(health, "MAX_WATCHES", 2)
    watch = channel.unary_stream(
        "/grpc.health.v1.Health/Watch",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    calls = [watch(health_pb2.HealthCheckRequest(), timeout=20) for _ in range(2)]
    for call in calls:
        await call.read()
    refused = watch(health_pb2.HealthCheckRequest(), timeout=20)
    assert await refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    calls.pop().cancel()
    await until(lambda: host.health.watches == 1, why="the one that left makes room")
    again = watch(health_pb2.HealthCheckRequest(), timeout=20)
    assert (await again.read()).status == health_pb2.HealthCheckResponse.SERVING
    for call in (*calls, again):
        call.cancel()
    await until(lambda: not host.health.watches)


async def test_the_server_part_of_v2(channel, host):
    prefix = "/inference.GRPCInferenceService/"
    pb = inference_pb2
    assert (await unary(channel, prefix + "ServerLive", pb.ServerLiveRequest(), pb.ServerLiveResponse)).live

    async def ready():
        return (await unary(channel, prefix + "ServerReady", pb.ServerReadyRequest(), pb.ServerReadyResponse)).ready

    for state in (None, "server-down", "leaving", "starting"):
        assert not await ready(), "the mesh is not ready without a runtime pod"
        assert await check(channel) == "SERVING", "the router, which a load balancer asks about, can serve"
        host.pod("a", state)
    host.pod("b", "ready")
    assert await ready()
    host.reason = "it is stopping"
    assert not await ready()
    found = await unary(channel, prefix + "ServerMetadata", pb.ServerMetadataRequest(), pb.ServerMetadataResponse)
    assert found.name == "mesh"
    assert "binary_tensor_data" in found.extensions


@pytest.fixture(params=[reflection_pb2, reflection_v1alpha_pb2], ids=["v1", "v1alpha"])
async def ask(request, channel):
    """Opens a reflection stream, and yields a function that sends a question and returns the answer."""
    pb = request.param
    call = channel.stream_stream(
        f"/{pb.DESCRIPTOR.package}.ServerReflection/ServerReflectionInfo",
        request_serializer=pb.ServerReflectionRequest.SerializeToString,
        response_deserializer=pb.ServerReflectionResponse.FromString,
    )(timeout=20)

    async def ask(**question):
        await call.write(pb.ServerReflectionRequest(host="h", **question))
        return await call.read()

    yield ask
    await call.done_writing()
    assert await call.code() is grpc.StatusCode.OK


async def test_reflection_tells_services_and_their_files(ask):
    listed = await ask(list_services="")
    names = {service.name for service in listed.list_services_response.service}
    assert names == {
        "inference.GRPCInferenceService",
        "mmesh.ModelMesh",
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    for name in names:
        reply = await ask(file_containing_symbol=name)
        assert reply.valid_host == "h"
        (encoded,) = reply.file_descriptor_response.file_descriptor_proto
        file = descriptor_pb2.FileDescriptorProto.FromString(encoded)
        assert name in {f"{file.package}.{service.name}" for service in file.service}
        again = await ask(file_by_filename=file.name)
        assert again.file_descriptor_response.file_descriptor_proto[0] == encoded


async def test_reflection_finds_messages_and_methods(ask):
    for symbol in (
        "inference.ModelInferRequest.InferInputTensor",
        "inference.GRPCInferenceService.ModelInfer",
        "mmesh.ModelMesh.registerModel",
    ):
        assert (await ask(file_containing_symbol=symbol)).file_descriptor_response.file_descriptor_proto, symbol
    reply = await ask(all_extension_numbers_of_type="inference.ModelInferRequest")
    assert reply.all_extension_numbers_response.base_type_name == "inference.ModelInferRequest"


async def test_reflection_refuses_what_is_not_there_or_not_for_clients(ask):
    for question in (
        {"file_containing_symbol": "no.such.Thing"},
        {"file_by_filename": "no.proto"},
        {"file_by_filename": "agent.proto"},
        {"file_containing_symbol": "mesh.agent.v1.Agent"},
        {"file_containing_symbol": ""},
        {"file_containing_extension": {"containing_type": "x", "extension_number": 1}},
        {"all_extension_numbers_of_type": "no.such.Thing"},
    ):
        assert (await ask(**question)).error_response.error_code == 5, question
    assert (await ask()).error_response.error_code == 3
