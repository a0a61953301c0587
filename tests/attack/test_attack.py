"""Protection from one caller, one store or one broken model that could harm all others.

Each test attacks a mesh of real processes while others call a loaded model. None of their calls fails (where the test
stops or kills a process, callers may retry), no process grows without bound, memory comes back, and no innocent model
is quarantined (`siege`). docs/limits.md lists the limits of each interface.
"""

import asyncio
import collections
import contextlib
import gzip
import json
import mmap
import os
import signal
from collections.abc import AsyncIterator, Iterator

import grpc
import numpy as np
import pytest
import pytest_asyncio

from mesh.pb import inference_pb2
from tests.attack.siege import HOT, HOT_VALUE, MIB, Siege, resident
from tests.support import models
from tests.support.etcd import EtcdServer
from tests.support.localmesh import Client, LocalMesh, children, command, freeze, thaw
from tests.support.waiting import until

pytestmark = [pytest.mark.attack, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

INFER = "/inference.GRPCInferenceService/ModelInfer"
LARGE = 14 * MIB  # below the 16 MiB that a message may have


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(tmp_path_factory: pytest.TempPathFactory, etcd_server: EtcdServer) -> AsyncIterator[LocalMesh]:
    folder = tmp_path_factory.mktemp("attack")
    options = ["--workers", "2", "--load-wait", "60"]
    async with LocalMesh(
        folder, etcd_server, pods=2, capacity="256MiB", log_level="info", router_options=options
    ) as mesh:
        await mesh.register(HOT, models.constant(HOT_VALUE), load=True)
        await mesh.register("shout", models.shout(), load=True)
        yield mesh


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Stops a process with SIGSTOP until the block ends. The process may be killed and replaced meanwhile."""
    freeze(pid)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            thaw(pid)


async def connect(mesh: LocalMesh) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = mesh.grpc_address().rpartition(":")
    return await asyncio.open_connection(host, int(port))


def rest_head(path: str, length: int, *more: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: mesh", "Content-Type: application/json", f"Content-Length: {length}"]
    return "\r\n".join([*lines, *more, "", ""]).encode()


async def status_of(reader: asyncio.StreamReader) -> int:
    """Returns the status of an HTTP answer, or 0 if the connection ended without one."""
    line = await reader.readline()
    return int(line.split()[1]) if line.startswith(b"HTTP/1.1 ") else 0


def _leaf(mesh: LocalMesh, word: str) -> list[int]:
    """Returns the process ids of the router's children whose command line contains a word."""
    return [pid for pid in children(mesh.routers[0].pid) if word in command(pid)]


# --- bodies ---


async def test_bodies_that_stop_before_their_end(mesh: LocalMesh) -> None:
    """Each of 200 requests announces 15 MiB and stops after 14 MiB. The router refuses more than half of them, because
    it would need 2.7 GiB to hold them all."""
    async with Siege(mesh, growth=500 * MIB):
        ends: collections.Counter[str] = collections.Counter()

        async def attack() -> None:
            reader, writer = await connect(mesh)
            answer = asyncio.create_task(status_of(reader))
            writer.write(rest_head(f"/v2/models/{HOT}/infer", LARGE + MIB))
            try:
                async with asyncio.timeout(30):
                    for _ in range(LARGE // MIB):
                        if answer.done():
                            break
                        writer.write(b" " * MIB)
                        await writer.drain()
                    ends[str(await answer)] += 1
            except (OSError, TimeoutError) as error:
                ends[type(error).__name__] += 1
            answer.cancel()
            writer.transport.abort()

        await asyncio.gather(*(attack() for _ in range(200)))
        # A client that continues to send may lose the answer to the reset that follows it.
        refused = ends["429"] + ends["ConnectionResetError"] + ends["BrokenPipeError"]
        assert ends["429"], f"no request got 429: {ends}"
        assert refused > 100, f"too few of the bodies were refused: {ends}"


async def test_grpc_requests_that_stop_before_their_end(mesh: LocalMesh) -> None:
    """Sixty gRPC requests that send a message of 13 MiB and never end do no harm."""
    async with Siege(mesh, growth=500 * MIB):
        channels = [grpc.aio.insecure_channel(mesh.grpc_address(), [("grpc.use_local_subchannel_pool", 1)])] * 60

        async def messages() -> AsyncIterator[bytes]:
            yield b"\x0a\x03hot" + b"\0" * (13 * MIB)
            await asyncio.sleep(3600)

        calls = [channel.stream_unary(INFER)(messages(), timeout=20) for channel in channels]
        await asyncio.wait([asyncio.ensure_future(_ended(call)) for call in calls], timeout=25)
        await channels[0].close()


async def _ended(call: object) -> None:
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
        await call  # type: ignore[misc]


async def test_replies_that_nobody_reads(mesh: LocalMesh) -> None:
    """Sixty clients that each send and request 12 MiB, and read nothing, do no harm."""
    await mesh.register("echo", models.identity(), load=True)
    count = 3 * MIB
    head = json.dumps(
        {
            "inputs": [
                {"name": "x", "shape": [count], "datatype": "FP32", "parameters": {"binary_data_size": 4 * count}}
            ],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    body = head + b"\0" * (4 * count)
    async with Siege(mesh, growth=600 * MIB):
        connections = []
        for _ in range(60):
            reader, writer = await connect(mesh)
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            connections.append((reader, writer))

        async def ask(writer: asyncio.StreamWriter) -> None:
            writer.write(
                rest_head("/v2/models/echo/infer", len(body), f"Inference-Header-Content-Length: {len(head)}") + body
            )
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(20):
                    await writer.drain()

        await asyncio.gather(*(ask(writer) for _, writer in connections))
        for _, writer in connections:
            writer.transport.abort()


# --- encodings ---


async def test_large_json(mesh: LocalMesh) -> None:
    """Eight concurrent requests of 13 MB of JSON each, with replies of about the same size, are answered or refused
    with 429, and the mesh's memory stays bounded."""
    await mesh.register("echo64", models.identity("FP64"), load=True)
    number = 1_200_000
    body = json.dumps(
        {"inputs": [{"name": "x", "shape": [number], "datatype": "FP64", "data": [0.1234567] * number}]}
    ).encode()
    async with Siege(mesh, growth=900 * MIB):
        replies = await asyncio.gather(*(mesh.rest("POST", "/v2/models/echo64/infer", body) for _ in range(8)))
        assert {reply.status for reply in replies} <= {200, 429}
        assert any(reply.status == 200 for reply in replies)


@pytest.mark.parametrize(
    "request_of",
    [
        pytest.param(
            lambda: inference_pb2.ModelInferRequest(
                model_name="shout",
                inputs=[
                    {
                        "name": "x",
                        "datatype": "BYTES",
                        "shape": [3_000_000],
                        "contents": {"bytes_contents": [b""] * 3_000_000},
                    }
                ],
            ),
            id="empty strings",
        ),
        pytest.param(
            lambda: inference_pb2.ModelInferRequest(
                model_name="shout", inputs=[{"name": "x", "datatype": "BYTES", "shape": [1] * 3_000_000}]
            ),
            id="dimensions",
        ),
        pytest.param(
            lambda: inference_pb2.ModelInferRequest(
                model_name="shout", inputs=[{"name": "x", "datatype": "FP32", "shape": [1]}] * 200_000
            ),
            id="inputs",
        ),
        pytest.param(
            lambda: inference_pb2.ModelInferRequest(
                model_name="shout",
                inputs=[{"name": "x" * 1_000_000, "datatype": "F" * 1_000_000, "shape": [1]}],
                id="i" * 1_000_000,
            ),
            id="names",
        ),
    ],
)
async def test_small_elements(mesh: LocalMesh, request_of: object) -> None:
    """Five concurrent messages of millions of empty strings or dimensions, of 200,000 inputs, or with names of a
    megabyte do no harm, and errors about them are short."""
    message = request_of().SerializeToString()  # type: ignore[operator]
    assert len(message) < 16 * MIB
    async with Siege(mesh, growth=900 * MIB):
        async with grpc.aio.insecure_channel(mesh.grpc_address()) as channel:
            call = channel.unary_unary(INFER)

            async def send() -> str:
                try:
                    await call(message, timeout=60)
                except grpc.aio.AioRpcError as error:
                    assert len(error.details() or "") < 8192
                    return error.code().name
                return "OK"

            codes = await asyncio.gather(*(send() for _ in range(5)))
        assert set(codes) <= {"OK", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"}, codes


async def test_an_import_of_a_million_bad_lines(mesh: LocalMesh) -> None:
    """Three concurrent imports of a million bad lines each, 2 KB on the wire, do no harm."""
    body = gzip.compress(b"x\n" * 1_000_000)
    async with Siege(mesh):
        headers = {"Content-Encoding": "gzip", "Content-Type": "application/x-ndjson"}
        replies = await asyncio.gather(
            *(mesh.rest("POST", "/mesh/v1/models:import", body, headers=headers) for _ in range(3))
        )
        assert {reply.status for reply in replies} <= {200, 413, 429}


async def test_invented_methods(mesh: LocalMesh) -> None:
    """After 3,000 calls of invented methods, the metrics still have less than 512 KiB, and still name the method
    ModelInfer."""
    async with Siege(mesh):
        async with grpc.aio.insecure_channel(mesh.grpc_address()) as channel:

            async def call(number: int) -> None:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    method = channel.unary_unary(f"/invented.Service{number}/Method{'x' * 200}{number}")
                    await method(b"", timeout=20, metadata=[("mm-model-id", HOT)])

            for start in range(0, 3000, 100):
                await asyncio.gather(*(call(number) for number in range(start, start + 100)))
        metrics = await mesh.get(f"{mesh.probe_url()}/metrics")
        assert len(metrics.body) < 512 * 1024
        assert b'method="ModelInfer"' in metrics.body


# --- models ---


async def test_loads_and_warm_ups_that_never_end(mesh: LocalMesh) -> None:
    """While loads and warm-ups run forever, good cold models are still loaded, and none of them is quarantined."""
    endless = [f"endless{number}" for number in range(4)]
    unfolding = [f"unfolding{number}" for number in range(4)]
    for name in endless:
        await mesh.register(name, models.endless_loop())
    for name in unfolding:
        await mesh.register(name, models.nested_functions(26))
    for number in range(12):
        await mesh.register(f"good{number}", models.constant(float(number)))
    async with Siege(mesh, blamed=(*endless, *unfolding), growth=400 * MIB):
        client = Client(mesh.channel())
        bad = [
            asyncio.create_task(_ended(client.infer(name, x=np.ones((1, 1), np.float32), timeout=45)))
            for name in (*endless, *unfolding)
        ]
        for number in range(12):
            (answer,) = await client.infer(f"good{number}", x=np.ones((1, 1), np.float32), timeout=45)
            assert answer.ravel()[0] == number
        for task in bad:
            task.cancel()
        await asyncio.gather(*bad, return_exceptions=True)
        for name in (*endless, *unfolding):
            await mesh.rest("DELETE", f"/mesh/v1/models/{name}")


async def test_one_slow_model_with_a_thousand_callers(mesh: LocalMesh) -> None:
    """While 1,200 callers wait for a slow model, callers of the hot model still get their answers."""
    await mesh.register("slow", models.slow(), load=True)
    inputs = models.slow_inputs(0.5)
    async with Siege(mesh, growth=400 * MIB):
        channels = [
            grpc.aio.insecure_channel(mesh.grpc_address(), [("grpc.use_local_subchannel_pool", 1)]) for _ in range(15)
        ]
        clients = [Client(channel) for channel in channels]
        callers = [
            asyncio.create_task(_ended(clients[number % 15].infer("slow", timeout=15, **inputs)))
            for number in range(1200)
        ]
        await asyncio.wait(callers, timeout=60)
        for channel in channels:
            await channel.close()


# --- stores ---


async def test_stores_that_hang_and_drip(mesh: LocalMesh) -> None:
    """Models on the disk are loaded while a store has 40 other models to deliver, more than may be pulled at the same
    time. It sends nothing of half of them, and one byte per second of the others."""
    held: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held.append(writer)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            request = await reader.readuntil(b"\r\n\r\n")
            if b"drip" in request:
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
                while not writer.is_closing():
                    writer.write(b"x")
                    await writer.drain()
                    await asyncio.sleep(1)
            await reader.read()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    names = [f"{'drip' if number % 2 else 'hang'}{number}" for number in range(40)]
    for name in names:
        path = f"http://127.0.0.1:{port}/{name}.onnx"
        reply = await mesh.rest("PUT", f"/mesh/v1/models/{name}", {"type": "onnx", "path": path})
        assert reply.status == 201, reply.body
    for number in range(8):
        await mesh.register(f"local{number}", models.constant(float(number)))
    try:
        async with Siege(mesh):
            client = Client(mesh.channel())
            waiting = [
                asyncio.create_task(_ended(client.infer(name, x=np.ones((1, 1), np.float32), timeout=40)))
                for name in names
            ]
            await until(lambda: len(held) >= 4, timeout=20, why="pods ask the store")
            for number in range(8):
                (answer,) = await client.infer(f"local{number}", x=np.ones((1, 1), np.float32), timeout=15)
                assert answer.ravel()[0] == number
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
    finally:
        for name in names:
            await mesh.rest("DELETE", f"/mesh/v1/models/{name}")
        server.close()
        for writer in held:
            writer.transport.abort()


# --- processes that stand still ---


async def replaced(mesh: LocalMesh, pid: int) -> None:
    """Waits until a stopped process has been killed, but not until a new one has started."""
    await until(lambda: not os.path.exists(f"/proc/{pid}"), timeout=20, why=f"process {pid} is replaced")


@pytest.mark.parametrize("kind", ["router.process.worker", "envoy"])
async def test_a_worker_or_envoy_that_stands_still_is_replaced(mesh: LocalMesh, kind: str) -> None:
    pid = _leaf(mesh, kind)[0]
    async with Siege(mesh, retry=True, timeout=5.0) as siege:
        with stopped(pid):
            await replaced(mesh, pid)
        await until(lambda: len(_leaf(mesh, kind)) >= (2 if kind == "router.process.worker" else 1), timeout=20)
        await siege.more(20)


async def test_a_model_server_that_stands_still_is_replaced(mesh: LocalMesh) -> None:
    """A stopped model server is replaced, its pod is ready again, and no model is quarantined."""
    pid = mesh.server_pid(mesh.pods[0])
    async with Siege(mesh, retry=True, timeout=5.0) as siege:
        with stopped(pid):
            await replaced(mesh, pid)
        await mesh.ready()
        await siege.more(20)


async def test_an_agent_that_stands_still_is_done_without(mesh: LocalMesh) -> None:
    """Callers of the hot model who retry get answers while an agent is stopped, and after it continues."""
    agent = mesh.pods[0].pid
    async with Siege(mesh, retry=True, timeout=5.0) as siege:
        with stopped(agent):
            await siege.more(40)
        await mesh.ready()
        await siege.more(10)


async def test_a_killed_server_is_nobodys_fault(mesh: LocalMesh) -> None:
    """No model is quarantined when each pod's model server is killed from outside during calls of a slow model."""
    await mesh.register("busy", models.slow(), load=True)
    inputs = models.slow_inputs(0.2)
    async with Siege(mesh, retry=True, timeout=5.0) as siege:
        client = Client(mesh.channel())
        callers = [asyncio.create_task(_ended(client.infer("busy", timeout=20, **inputs))) for _ in range(20)]
        for pod in mesh.pods:
            os.kill(mesh.server_pid(pod), signal.SIGKILL)
            await mesh.ready()
        await asyncio.gather(*callers)
        await siege.more(10)
        (answer,) = await client.infer("busy", timeout=30, **inputs)
        assert answer.size


def test_memory_is_read_of_this_process() -> None:
    before = resident(os.getpid())
    held = mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE)  # fresh memory: a heap may have kept some
    held.write(b"x" * len(held))
    assert resident(os.getpid()) - before > 60 * MIB
    held.close()
