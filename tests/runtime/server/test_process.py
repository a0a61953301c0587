"""The model server as a process, through its SPI and its data port: kills, signals and misbehaving models."""

import asyncio
import signal
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio

from mesh.identity import Identity
from mesh.pb import modelruntime_pb2
from mesh.runtime.server.onnx import memory
from mesh.runtime.sharedmemory.board import Board
from mesh.runtime.sharedmemory.slot import SlotState
from mesh.statuses import Code
from mesh.wire import framing, headers, metadata
from mesh.wire.client import Pool
from tests.support import models
from tests.support.authority import Authority, Mounted
from tests.support.onnxserver import SERVICE, OnnxServer, arrays, request
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

ONE = np.ones((1, 1), np.float32)
FOREVER = {"iterations": np.array([1 << 60], np.int64)}
LIMIT = 1 << 30


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory):
    """A server shared by all tests that leave it unchanged."""
    options = ("--load-timeout", "1.5", "--threads", "2", "--memory-limit", str(LIMIT), "--capacity", "64MiB")
    async with OnnxServer(tmp_path_factory.mktemp("server"), *options) as server:
        await server.load("good", models.constant(7), slot=0, revision=1)
        yield server


@pytest_asyncio.fixture(loop_scope="module")
async def server(shared):
    """The shared server. After each test it must still be the same process, with a model that answers."""
    assert shared.process is not None
    yield shared
    assert shared.process.returncode is None, f"exit status {shared.process.returncode}\n{shared.log()}"
    assert await shared.value("good", revision=1) == 7


async def refused(call) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value


def code(error: grpc.aio.AioRpcError) -> Code:
    return Code(error.code().value[0])


# -- the SPI


async def test_it_says_what_it_is(server):
    """The server reports everything that an agent must know, in the SPI's message or in the metadata that extends this
    message."""
    status = server.status
    assert status.status == modelruntime_pb2.RuntimeStatusResponse.READY
    assert (status.capacityInBytes, status.maxLoadingConcurrency, status.modelLoadingTimeoutMs) == (64 << 20, 2, 1500)
    assert status.defaultModelSizeInBytes >= 8192
    assert "onnxruntime" in status.runtimeVersion
    assert status.runtimeVersion.endswith(f"device={server.about['mesh-device']}")
    assert int(server.about["mesh-pid"]) == server.pid == server.board.pid
    infos = {name: list(info.idInjectionPath) for name, info in status.methodInfos.items()}
    methods = ("ModelInfer", "ModelMetadata", "ModelReady")
    assert infos == {f"inference.GRPCInferenceService/{method}": [1] for method in methods}


async def test_a_model_is_loaded_called_and_unloaded(server):
    """After a load, the model's size is reported and the board shows it. After its unload, calls are answered *not
    here*."""
    sizes = await server.load("m", models.logistic_regression(3), slot=1, revision=5)
    assert 10_000 < sizes["host"] < 1_000_000
    answer = await server.spi.modelSize(modelruntime_pb2.ModelSizeRequest(modelId="m"), timeout=5)
    assert answer.sizeInBytes == sizes["host"]
    found = arrays(await server.infer("m", revision=5, x=np.zeros((2, 64), np.float32)))
    np.testing.assert_allclose(found["probabilities"].sum(1), 1, rtol=1e-5)
    await until(lambda: server.board.read(1).calls == 1)  # the call is counted after its answer is sent
    use = server.board.read(1)
    assert (use.state, use.revision) == (SlotState.LOADED, 5)
    await server.unload("m", revision=4)
    assert (await server.infer("m", revision=5, x=np.zeros((1, 64), np.float32))).code == 0
    await server.unload("m", revision=5)
    assert server.board.read(1).state is SlotState.FREE
    reply = await server.infer("m", revision=5, x=np.zeros((1, 64), np.float32))
    assert (reply.code, dict(reply.headers)[headers.NOT_HERE]) == (Code.UNAVAILABLE, b"1")
    await server.unload("m")
    error = await refused(server.spi.modelSize(modelruntime_pb2.ModelSizeRequest(modelId="m"), timeout=5))
    assert code(error) is Code.NOT_FOUND


async def test_an_agent_that_knows_no_tokens_and_no_board_is_served_too(server):
    await server.load("plain", models.constant(2))
    assert await server.value("plain") == 2
    await server.unload("plain")


@pytest.mark.parametrize(
    ("content", "expected", "says"),
    [
        pytest.param(b"nothing of the kind", Code.INVALID_ARGUMENT, "", id="not-onnx"),
        pytest.param(b"", Code.INVALID_ARGUMENT, "empty", id="empty"),
        pytest.param(models.constant(1)[:40], Code.INVALID_ARGUMENT, "", id="truncated"),
        pytest.param(models.external_data("../../secret"), Code.INVALID_ARGUMENT, "external", id="above-its-folder"),
        pytest.param(models.external_data("/etc/hostname"), Code.INVALID_ARGUMENT, "external", id="absolute"),
        pytest.param(models.endless_loop(), Code.DEADLINE_EXCEEDED, "1.5 s", id="endless"),
        pytest.param(models.huge_allocation(40 << 30), Code.RESOURCE_EXHAUSTED, "memory", id="asks-for-gigabytes"),
    ],
)
async def test_what_cannot_be_loaded_says_why(server, content, expected, says):
    """Each failed load has a status code and a text, and its slot is free again."""
    error = await refused(server.load("bad", content, slot=2, revision=1))
    assert code(error) is expected, error
    assert error.details()
    assert says in error.details()
    await until(lambda: server.board.read(2).state is SlotState.FREE, why="the slot is free")


async def test_orders_that_make_no_sense_are_refused(server):
    """Loads without an id, with a missing path or with an invalid slot are refused."""
    error = await refused(server.spi.loadModel(modelruntime_pb2.LoadModelRequest(modelPath="/x"), timeout=5))
    assert code(error) is Code.INVALID_ARGUMENT
    gone = server.folder / "gone.onnx"
    error = await refused(server.load("gone", gone))
    assert (code(error), str(gone) in error.details()) == (Code.NOT_FOUND, True)
    assert code(await refused(server.load("m", models.constant(1), slot=64))) is Code.INVALID_ARGUMENT
    load = modelruntime_pb2.LoadModelRequest(modelId="m", modelPath="/x")
    error = await refused(server.spi.loadModel(load, metadata=((headers.SPI_SLOT, "-1"),), timeout=5))
    assert code(error) is Code.INVALID_ARGUMENT


async def test_a_load_that_the_agent_gives_up_leaves_nothing(server):
    """A load leaves nothing behind when the agent gives it up as the SPI prescribes, by cancelling it and then
    unloading the id."""
    path = server.write("endless", models.endless_loop())
    load = modelruntime_pb2.LoadModelRequest(modelId="endless", modelPath=str(path))
    call = server.spi.loadModel(load, metadata=((headers.SPI_SLOT, "3"),))
    await until(lambda: server.board.read(3).state is SlotState.LOADING, why="the load is on the board")
    call.cancel()
    await server.unload("endless")
    assert server.board.read(3).state is SlotState.FREE


# -- the data port


async def test_a_model_that_asks_for_gigabytes_on_demand_fails_its_call_alone(server):
    """If a model asks for gigabytes during a call, only that call fails, with RESOURCE_EXHAUSTED, and the process does
    not keep the memory."""
    await server.load("hungry", models.huge_on_demand(), slot=4)
    small = await server.infer("hungry", count=np.array([1000], np.int64))
    assert small.code == 0
    before = server.resident()
    for count in (10**10, 10**9):
        reply = await server.infer("hungry", count=np.array([count], np.int64))
        assert reply.code == Code.RESOURCE_EXHAUSTED, reply.text
        assert "memory" in reply.text
    assert (await server.infer("hungry", count=np.array([1000], np.int64))).code == 0
    assert server.resident() < before + (64 << 20)
    await server.unload("hungry")


async def test_callers_that_go_away_free_their_threads(server):
    """When a caller disconnects or its deadline passes, its runs end. Other callers are answered meanwhile."""
    await server.load("slow", models.slow(), slot=5)
    frame = framing.pack(request("slow", **FOREVER))

    class Sink:
        """A sink that expects no reply."""

        def on_reply(self, reply):
            raise AssertionError(f"an endless call was answered: {reply}")

        takes_pieces = False
        on_stream = on_lost = on_reply

    exchanges = [
        server.pool.send(SERVICE + b"ModelInfer", [(headers.MODEL_ID, b"slow")], frame, Sink()) for _ in range(3)
    ]
    await until(lambda: server.board.read(5).in_flight == 3, why="all have arrived")
    await server.running(5)
    assert await server.value("good", revision=1) == 7
    for exchange in exchanges:
        exchange.cancel()
    await until(lambda: server.board.read(5).in_flight == 0, why="all are ended")
    try:  # the deadline passes first in the server or in the client
        assert (await server.infer("slow", timeout=0.3, **FOREVER)).code == Code.DEADLINE_EXCEEDED
    except TimeoutError:
        pass
    await until(lambda: server.board.read(5).in_flight == 0, why="the call that missed its deadline is ended")
    short = await server.infer("slow", iterations=np.array([3], np.int64))
    assert arrays(short)["y"].item() == 3
    await server.unload("slow")


async def test_messages_above_the_limit_are_refused(server):
    """Messages above the default limit of 16 MiB are refused."""
    reply = await server.infer("good", revision=1, x=np.zeros((5 << 20, 1), np.float32))
    assert reply.code == Code.RESOURCE_EXHAUSTED


async def test_the_event_loop_says_that_it_turns(server):
    """While the event loop runs, it keeps writing a time and the counts of calls to the board."""
    before = server.board.beat_ns
    await server.value("good", revision=1)
    await until(lambda: server.board.beat_ns > before, why="the event loop beats again")
    assert server.board.beat_ns <= time.monotonic_ns()
    assert {series.method for series in server.board.calls()} >= {"ModelInfer"}


# -- lives


async def test_the_board_knows_after_a_kill_what_was_going_on(tmp_path):
    """After a kill, the board shows running and loading copies as suspects, but not idle ones. The next life of the
    server starts on the same board."""
    async with OnnxServer(tmp_path, "--load-timeout", "30") as server:
        await server.load("idle", models.constant(1), slot=0, revision=1)
        await server.load("busy", models.slow(), slot=1, revision=2)
        await server.value("idle", revision=1)
        running = asyncio.create_task(server.infer("busy", revision=2, timeout=30, **FOREVER))
        loading = asyncio.create_task(server.load("endless", models.endless_loop(), slot=2, revision=3))
        await server.running(1)
        await until(lambda: server.board.read(2).state is SlotState.LOADING, why="the load is on the board")
        await until(lambda: server.board.calls(), why="the counts are on the board")
        await server.kill9()
        suspects = {slot: (use.state, use.revision, use.running) for slot, use in server.board.suspects()}
        assert suspects == {1: (SlotState.LOADED, 2, 1), 2: (SlotState.LOADING, 3, 0)}
        assert server.board.read(0).calls == 1
        await asyncio.gather(running, loading, return_exceptions=True)
        await server.start()
        assert server.board.suspects() == []
        assert server.board.pid == server.pid, "another life of the server has attached to the board"
        await server.load("idle", models.constant(9), slot=0, revision=1)
        assert await server.value("idle", revision=1) == 9
        calls = {(series.method, series.code): sum(series.buckets) for series in server.board.calls()}
        assert calls[("ModelInfer", 0)] >= 1

        # The status request purges the server: an agent that starts again starts from nothing.
        await server.runtime_status()
        assert list(server.board.uses()) == []
        assert (await server.infer("idle", revision=1, x=ONE)).code == Code.UNAVAILABLE

        # SIGINT, which a terminal sends to all its processes, does not end the server. On SIGTERM, the server answers
        # calls in flight, or ends them after a while.
        await server.load("slow", models.slow(), slot=3)
        server.process.send_signal(signal.SIGINT)
        ending = asyncio.create_task(server.infer("slow", **models.slow_inputs(0.5)))
        endless = asyncio.create_task(server.infer("slow", timeout=30, **FOREVER))
        await until(lambda: server.board.read(3).running == 2, why="both calls run")
        server.process.send_signal(signal.SIGTERM)
        assert (await ending).code == 0
        assert await asyncio.wait_for(server.process.wait(), 20) == 0
        await asyncio.gather(endless, return_exceptions=True)


async def test_what_keeps_it_from_starting_is_said(tmp_path):
    """A server that cannot start gives the reason without a traceback, and exits with status 1."""
    import onnxruntime

    Board.create(tmp_path / "board", 1, incarnation="another").close()
    spi = ["--spi", str(tmp_path / "spi")]
    cases = [
        (["--board", str(tmp_path / "board")], "agent 'another'"),
        (["--memory-limit", "1MiB"], "memory limit"),
        (["--internal-tls", str(tmp_path)], f"{tmp_path}/ca.crt cannot be read"),
    ]
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        cases.append((["--device", "cuda"], "--device cuda does not work: the installed onnxruntime has no CUDA"))
    started = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "mesh.runtime.server", *spi, *options), stderr=asyncio.subprocess.PIPE
        )
        for options, _ in cases
    ]
    for process, (_, says) in zip(started, cases, strict=True):
        _, err = await asyncio.wait_for(process.communicate(), 30)
        assert process.returncode == 1
        assert says in err.decode()
        assert "Traceback" not in err.decode()


# -- memory


@pytest.mark.long
async def test_500_loads_and_unloads_leave_memory_as_it_was(server):
    """After 500 loads and unloads, resident memory is less than 5 % above what it was after the first 50."""

    async def cycles(count: int) -> None:
        for number in range(count):
            await server.load("cycle", path, slot=6, revision=number)
            await server.unload("cycle", revision=number)

    path = server.write("cycle", models.logistic_regression(5))
    await cycles(50)
    before = await settled(server)
    await cycles(500)
    after = await settled(server)
    assert after < 1.05 * before, f"{before} bytes before, {after} after"


async def test_connections_by_tls_take_nothing_from_the_models(tmp_path):
    """The memory limit is raised by what TLS connections merely reserve, and lowered again when they close."""
    folder = Mounted.of(tmp_path / "tls", Authority()).path
    options = ("--memory-limit", str(LIMIT), "--capacity", "64MiB", "--internal-tls", str(folder))
    async with OnnxServer(tmp_path, *options) as server:

        def limit() -> int:
            (line,) = [line for line in Path(f"/proc/{server.pid}/limits").read_text().splitlines() if "data" in line]
            return int(line.split()[3])

        before = limit()
        pool = Pool(server.about["mesh-data"], identity=Identity(folder), connect_timeout=5)
        streams = [pool.open(b"/inference.GRPCInferenceService/ServerLive", ()) for _ in range(40)]
        await until(lambda: pool.statistics().connections == 40, why="all are connected")
        await until(lambda: limit() == before + 40 * memory.TLS_CONNECTION, why="the limit has grown")
        for stream in streams:
            stream.cancel()
        await until(lambda: limit() == before, why="the limit is as it was")
        pool.abort()


async def settled(server: OnnxServer) -> int:
    """Waits until freed memory has been returned to the system, and returns the resident bytes."""
    lowest = server.resident()
    steady = 0
    while steady < 5:  # samples without a new minimum
        await asyncio.sleep(0.1)
        now = server.resident()
        steady = steady + 1 if now >= lowest else 0
        lowest = min(lowest, now)
    return lowest


async def test_bodies_have_a_total(tmp_path):
    """While a stalled request occupies a large part of the budget for bodies, another large request is refused. Small
    calls are answered."""
    size = 1 << 20
    async with OnnxServer(tmp_path, "--max-message", str(size), "--max-body-bytes", str(3 * size)) as server:
        await server.load("good", models.constant(7))
        pool, headers_ = server.pool, [(headers.MODEL_ID, b"good")]
        head = framing.prefix(size - 10)

        def stall() -> tuple[Any, asyncio.Task[None], asyncio.Task[Any]]:
            stream = pool.open(SERVICE + b"ModelInfer", headers_, timeout=metadata.format_timeout(30))
            sending = asyncio.create_task(stream.write(head + bytes(size // 2)))
            return stream, sending, asyncio.create_task(stream.first())

        async def large() -> Code:
            reply = await server.call("ModelInfer", bytes(size - 10), metadata=headers_)
            if reply.code == Code.RESOURCE_EXHAUSTED:
                assert "--max-body-bytes" in reply.text
                assert any(name == metadata.DETAILS for name, _ in (*reply.headers, *reply.trailers))
            return Code(reply.code)

        stalled, sending, answer = stall()

        async def full() -> bool:
            nonlocal stalled, sending, answer
            if answer.done():  # the call arrived while another large one was read, and was refused in its place
                await asyncio.gather(sending, answer, return_exceptions=True)
                stalled, sending, answer = stall()
            return await large() is Code.RESOURCE_EXHAUSTED

        await until(full, why="what the stalled one has announced is counted")
        assert await server.value("good") == 7
        await until(lambda: "requests are refused" in server.log(), why="the log says that requests are refused")
        await sending
        stalled.cancel()
        await asyncio.gather(answer, return_exceptions=True)

        async def free() -> bool:
            return await large() is Code.INVALID_ARGUMENT  # the bytes are no request, but were read

        await until(free, why="what the stalled one held is given back")
