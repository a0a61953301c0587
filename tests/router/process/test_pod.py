"""`python -m router` as a process: serving, healing, draining, reports of failed starts, and a clean end."""

import asyncio
import errno
import os
import re
import signal
import sys
import urllib.error
import urllib.request

import click
import grpc
import pytest
from typer.testing import CliRunner

from mesh.pb import inference_pb2, modelmesh_pb2, modelmesh_pb2_grpc
from mesh.process import free_port
from mesh.wire import framing
from router import __main__ as router_main
from router.process import pod as pod_module
from router.settings import RouterSettings
from tests.support.fakepod import FakePod
from tests.support.localmesh import Program, children, command
from tests.support.waiting import until


class Router(Program):
    """A router process with its ports and its probes."""

    def __init__(self, folder, etcd_server, keys, *options, edge="envoy"):
        self.port, self.rest, self.probe = free_port(), free_port(), free_port()
        argv = [sys.executable, "-m", "router", "--listen", f"127.0.0.1:{self.port}", "--edge", edge]
        argv += ["--rest-listen", f"127.0.0.1:{self.rest}", "--probe", f"127.0.0.1:{self.probe}"]
        argv += ["--base", keys.base, "--etcd", etcd_server.endpoint, *options]
        super().__init__("router", argv, folder)

    async def get(self, path):
        """Returns the status and text of a probe, or the status 0 if nothing listens."""

        def ask():
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.probe}{path}", timeout=5) as answer:
                    return answer.status, answer.read().decode()
            except urllib.error.HTTPError as error:
                return error.code, error.read().decode()
            except OSError as error:
                return 0, str(error)

        return await asyncio.to_thread(ask)

    async def ready(self):
        """Waits until the router is ready."""

        async def is_ready():
            assert self.process.poll() is None, self.tail()
            return (await self.get("/ready"))[0] == 200

        await until(is_ready, timeout=30, interval=0.05, why="the router is ready")

    @property
    def workers(self):
        """Returns the pids of the workers."""
        return [pid for pid in children(self.pid) if "router.process.worker" in command(pid)]

    def channel(self):
        return grpc.aio.insecure_channel(f"127.0.0.1:{self.port}")


@pytest.fixture
def a_router(tmp_path, etcd_server, keys):
    """Yields a function that starts routers. At the end, kills those that still run, and prints the last part of their
    output."""
    made = []

    def make(*options, edge="envoy"):
        made.append(Router(tmp_path, etcd_server, keys, *options, edge=edge))
        made[-1].start()
        return made[-1]

    yield make
    for router in made:
        if router.process.poll() is None:
            router.kill9()
        print(router.tail(60))


async def infer(channel, model_id):
    call = channel.unary_unary(
        "/inference.GRPCInferenceService/ModelInfer",
        request_serializer=lambda request: request.SerializeToString(),
        response_deserializer=inference_pb2.ModelInferResponse.FromString,
    )
    return await call(inference_pb2.ModelInferRequest(model_name=model_id), timeout=20)


async def served(channel):
    """Returns whether five calls in a row get an answer other than UNAVAILABLE, which a call on a killed worker's
    connection may get."""
    try:
        for _ in range(5):
            await infer(channel, "m")
    except grpc.aio.AioRpcError as error:
        return error.code() is not grpc.StatusCode.UNAVAILABLE
    return True


async def who_hangs_is_replaced(router, channel):
    """Stops all workers and Envoy with a signal. Checks that they are replaced, and that the router is not ready until
    then."""
    stopped = [*router.workers, *(pid for pid in children(router.pid) if "envoy" in command(pid).split()[0])]
    assert len(stopped) == 3
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)

    async def says_so():
        status, text = await router.get("/ready")
        return status == 503 and "was stopped by a signal" in text

    await until(says_so, interval=0.02, why="the router is not ready")
    await until(
        lambda: not [pid for pid in stopped if command(pid)], timeout=20, why="the stopped processes were killed"
    )
    await router.ready()
    await until(lambda: served(channel), interval=0.05, why="calls are answered again")
    _, text = await router.get("/metrics")
    assert 'mesh_hung_processes{process="worker"} 2' in text
    assert 'mesh_hung_processes{process="envoy"} 1' in text
    assert (await router.get("/live"))[0] == 200
    assert "process hangs, replacing it" in router.tail(200)


@pytest.mark.parametrize("edge", ["envoy", "grpc"])
async def test_a_router_serves_heals_drains_and_goes(a_router, etcd, keys, edge):
    """One router is tested from start to end, because starting a router takes seconds."""
    router = a_router("--workers", "2", edge=edge)
    async with FakePod("a", etcd, keys) as pod:
        await router.ready()
        async with router.channel() as channel:
            stub = modelmesh_pb2_grpc.ModelMeshStub(channel)
            info = modelmesh_pb2.ModelInfo(type="onnx", path="file:///m")
            await stub.registerModel(modelmesh_pb2.RegisterModelRequest(modelId="m", modelInfo=info), timeout=20)
            assert (await infer(channel, "m")).id.startswith("a ")

            # A worker dies: another one takes its place.
            first = router.workers
            assert len(first) == 2
            os.kill(first[0], signal.SIGKILL)
            await until(lambda: len(router.workers) == 2 and first[0] not in router.workers, why="two workers again")
            await router.ready()
            await until(lambda: served(channel), interval=0.05, why="both workers' connections are good again")
            status, text = await router.get("/metrics")
            assert status == 200
            assert "mesh_worker_restarts 1" in text
            if edge == "envoy":
                await who_hangs_is_replaced(router, channel)
            assert "modelmesh_api_request_milliseconds" in text
            assert 'process_resident_memory_bytes{process="router-worker1"}' in text
            assert (await router.get("/live"))[0] == 200

            # The router is told to stop during a call: it reports that, and lets the call end.
            calls = []
            pod.on_call = calls.append

            call = asyncio.create_task(infer(channel, "m"))
            await until(lambda: calls)
            below = children(router.pid)
            router.signal(signal.SIGTERM)

            async def says_so():
                status, text = await router.get("/ready")
                return status == 503 and "stopping" in text

            await until(says_so, interval=0.01)
            calls[-1].reply(framing.pack(inference_pb2.ModelInferResponse(id="late").SerializeToString()))
            assert (await call).id == "late"
        assert await asyncio.to_thread(router.process.wait, 15) == 0
        assert not [pid for pid in below if os.path.exists(f"/proc/{pid}")]


async def test_a_worker_that_cannot_be_spawned_is_tried_again(tmp_path, monkeypatch):
    """The first three attempts to spawn a worker fail, as they do when the machine has reached its limit of
    processes."""
    spawned = []

    async def spawn(argv, **options):
        spawned.append(argv)
        if len(spawned) < 4:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return await really(["/bin/sleep", "600"], name=options["name"])

    really = pod_module.process.spawn
    monkeypatch.setattr(pod_module.process, "spawn", spawn)
    router = pod_module.RouterPod(RouterSettings("r", run_dir=str(tmp_path)))
    worker = router._make_worker(0)
    keeping = asyncio.create_task(worker.run())
    try:
        await until(lambda: worker.pid, why="the worker runs")
        assert len(spawned) == 4
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        await worker.stop(0.0)
        await router.stop(grace=0.0)


async def test_a_router_is_not_live_where_nothing_has_served_for_long(tmp_path, monkeypatch):
    """A router that has not served for long is not live, because a new container may help where restarts of workers do
    not. It is live if only etcd is missing, and while it stops."""
    router = pod_module.RouterPod(RouterSettings("r", run_dir=str(tmp_path)))
    try:
        assert router._why_not_live() is None, "nothing has served for a short time only"
        monkeypatch.setattr(pod_module, "_DEAD", 0.0)
        assert "no worker is running" in router._why_not_live()
        monkeypatch.setattr(router._feed, "ready", lambda: {"worker0": "the registry (etcd) has not been read yet"})
        monkeypatch.setattr(pod_module, "_DEAD", 60.0)
        assert router._why_nobody_serves() is None, "another container would not make etcd available"
    finally:
        await router.stop(grace=0.0)
    monkeypatch.setattr(pod_module, "_DEAD", 0.0)
    assert router._why_not_live() is None


async def test_management_on_a_port_of_its_own(a_router):
    """With a port for management, the other port serves no management over gRPC or REST, even under unusual spellings
    of a path. Both ports serve V2."""
    port = free_port()
    router = a_router("--management-listen", f"127.0.0.1:{port}")
    await router.ready()

    async def asked(port, target):
        """Returns the status of a request whose target is sent unchanged."""
        return (await answered(port, target))[0]

    async def answered(port, target):
        """Sends a request with this target, and returns the status and the body of the answer."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"GET {target} HTTP/1.1\r\nhost: localhost\r\nmesh-peer: 1.2.3.4\r\n\r\n".encode())
        status = int((await reader.readline()).split()[1])
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(re.search(rb"content-length: (\d+)", head)[1])
        body = await reader.readexactly(length)
        writer.close()
        return status, body

    async def managed(port, service):
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            status = channel.unary_unary(
                f"/{service}/getModelStatus",
                lambda request: request.SerializeToString(),
                modelmesh_pb2.ModelStatusInfo.FromString,
            )
            try:
                await status(modelmesh_pb2.GetStatusRequest(modelId="m"), timeout=20)
            except grpc.aio.AioRpcError as error:
                return error.code().name
            return "OK"

    for target in ("/mesh/v1/models", "/mesh/v1/stats", "/mesh/v1/whoami"):
        assert [await asked(port, target), await asked(router.port, target)] == [200, 404], target
    _, why = await answered(router.port, "/mesh/v1/models")
    assert b"this port does not serve management" in why
    for target in (
        "/%6Desh/v1/models",
        "//mesh/v1/models",
        "/v2/../mesh/v1/models",
        "/mesh/v1/./models",
        "/mesh/v1/models/",
    ):
        assert await asked(router.port, target) in (400, 404), target
    assert await asked(router.port, "http://localhost/mesh/v1/models") == 404
    for service in ("mmesh.ModelMesh", "com.ibm.watson.tas.proto.TasRuntime"):
        assert [await managed(port, service), await managed(router.port, service)] == ["OK", "UNIMPLEMENTED"]
    for one in (port, router.port):
        assert await asked(one, "/v2/health/live") == 200
        assert await asked(one, "/v2/models/m/ready") == 404


async def test_nothing_outlives_a_router_that_is_killed(a_router):
    router = a_router("--workers", "1")
    await router.ready()
    below = children(router.pid)
    assert len(below) >= 2
    router.kill9()
    await until(
        lambda: not [pid for pid in below if os.path.exists(f"/proc/{pid}")], why="the router's children are gone"
    )


@pytest.mark.parametrize("edge", ["envoy", "grpc"])
async def test_a_taken_port_is_a_clear_error(a_router, edge):
    listener = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    router = a_router("--workers", "1", "--listen", f"127.0.0.1:{port}", edge=edge)
    assert await asyncio.to_thread(router.process.wait, 30) == 1
    assert f"127.0.0.1:{port} is taken" in router.tail()
    listener.close()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--edge", "none"], "neither envoy nor grpc"),
        (["--workers", "many"], "neither auto nor a number"),
        (["--listen", "here"], "not an address"),
        (["--max-message", "big"], "not a size"),
        (["--etcd-ca", "/nowhere.pem"], "/nowhere.pem"),
        (["--log-level", "loud"], "loud"),
        (["--dataplane-config", "{}", "--dataplane-config-path", "/x"], "give --dataplane-config or"),
    ],
)
def test_a_bad_option_is_a_clear_error(options, says):
    result = CliRunner().invoke(router_main.app, options)
    assert result.exit_code == 2
    assert says in click.unstyle(result.output).replace("\n", " ")


async def test_without_etcd_it_runs_and_says_that_it_is_not_ready(a_router, own_etcd):
    """When etcd becomes available, the router becomes ready without a restart."""
    own_etcd.kill9()
    router = a_router("--workers", "1", "--etcd", own_etcd.endpoint, "--install-id", "here")

    async def says_so():
        status, text = await router.get("/ready")
        return status == 503 and f"etcd is unavailable: read at {own_etcd.endpoint}" in text

    await until(says_so, timeout=30, interval=0.05)
    assert (await router.get("/live"))[0] == 200
    await own_etcd.start()
    await router.ready()
    assert router.tail(100).count("waiting for etcd") == 1
    assert await router.stop() == 0
