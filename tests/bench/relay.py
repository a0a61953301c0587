"""The cost of the way to a foreign model server: CPU per call of the relay, with each egress, beside an Envoy alone.

The same calls go in turn through three meshes with a foreign server: one whose relay sends them itself, and one for
each egress, whose relay sends no call itself. They also go through a mesh with an ONNX server, and through a single
Envoy to the same kind of foreign server. The foreign server is the example runtime; its CPU is not the subject here. An
Envoy alone is the least that a hop of real gRPC costs: HTTP/2 in, HTTP/2 out, and no checks of copies, ids or fences.

To see whether our own server has become slower, name a checkout of an earlier commit in `MESH_BENCH_BEFORE`: a mesh of
that code is then measured in turn with the others, so that both run under the same conditions.
"""

import asyncio
import contextlib
import json
import os
import statistics
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import grpc
import numpy as np
from rich.console import Console
from rich.table import Table

from mesh.envoy.egress import EgressSettings, bootstrap
from mesh.pb import modelruntime_pb2, modelruntime_pb2_grpc
from mesh.process import find_binary, free_port
from mesh.wire.metadata import encode_bin
from tests.bench.load import METHOD, generator, latency, percentile, throughput
from tests.bench.processes import Meter
from tests.support import exampleruntime, models
from tests.support.etcd import EtcdServer
from tests.support.foreign import ForeignMesh, child_of
from tests.support.localmesh import LocalMesh, Program, children, command, infer_request
from tests.support.waiting import until

CALLS, ROUNDS, ALONE = 3_000, 6, 300
"""Calls of a round, rounds of which the first warms up, and calls of a single caller in a round."""

V2 = ("--v2", "--method", "inference.GRPCInferenceService/ModelInfer=1")
MODEL = "regression"

_OWN, _BEFORE = "own server", "own, before"
_RELAYS = ("direct", "envoy", "grpc")


@dataclass
class Way:
    """One way to a server, and what its calls cost."""

    address: str
    pids: Callable[[], dict[str, list[int]]]  # by part; a process that was replaced has another id
    rates: list[float] = field(default_factory=list)
    medians: list[float] = field(default_factory=list)  # seconds
    spent: dict[str, list[float]] = field(default_factory=dict)  # CPU seconds a call, by part


async def run(etcd: EtcdServer, folder: Path, console: Console) -> None:
    """Measures several rounds, and prints their medians."""
    features = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 64)
    message = infer_request(MODEL, **{models.LOGISTIC_REGRESSION_INPUT: features}).SerializeToString()
    async with contextlib.AsyncExitStack() as stack:
        ways: dict[str, Way] = {}
        for egress in _RELAYS:
            ways[f"relay, {egress}"] = await stack.enter_async_context(_relayed(etcd, folder / egress, egress))
        ways["Envoy alone"] = await stack.enter_async_context(_envoy(folder / "alone"))
        ways[_OWN] = await stack.enter_async_context(_own(etcd, folder / "own"))
        if before := os.environ.get("MESH_BENCH_BEFORE"):
            with _code_of(Path(before).resolve()):
                ways[_BEFORE] = await stack.enter_async_context(_own(etcd, folder / "before"))
        for turn in range(ROUNDS):
            for name in sorted(ways, reverse=bool(turn % 2)):
                await _round(ways[name], message, folder, warm=not turn)
    _print(ways, console)


async def _round(way: Way, message: bytes, folder: Path, *, warm: bool) -> None:
    meter = Meter.begin(way.pids())
    rate = await throughput(way.address, message, calls=CALLS, folder=folder)
    spent = meter.spent()
    times = await latency(way.address, message, calls=ALONE)
    if warm:
        return
    way.rates.append(rate)
    way.medians.append(percentile(times, 0.5))
    for part, seconds in spent.items():
        way.spent.setdefault(part, []).append(seconds / CALLS)


def _print(ways: dict[str, Way], console: Console) -> None:
    table = Table(title=f"Ways to a model server (load: {generator()}; medians of {ROUNDS - 1} rounds)")
    for heading in ("what", *ways):
        table.add_column(heading, justify="left" if heading == "what" else "right")

    def row(what: str, values: dict[str, list[float]], scale: float = 1.0) -> None:
        cells = [f"{statistics.median(values[name]) * scale:,.1f}" if values.get(name) else "" for name in ways]
        table.add_row(what, *cells)

    row("calls/s", {name: way.rates for name, way in ways.items()})
    row("one caller, p50 ms", {name: way.medians for name, way in ways.items()}, 1e3)
    for part in dict.fromkeys(part for way in ways.values() for part in way.spent):
        row(f"CPU a call, us: {part}", {name: way.spent.get(part, []) for name, way in ways.items()}, 1e6)
    hop = {
        name: [
            sum(parts)
            for parts in zip(*(way.spent[part] for part in ("relay", "egress") if part in way.spent), strict=True)
        ]
        for name, way in ways.items()
    }
    row("CPU a call, us: relay and egress", hop, 1e6)
    console.print(table)
    if _BEFORE in ways:
        ratios = [now / before for now, before in zip(ways[_OWN].rates, ways[_BEFORE].rates, strict=True)]
        console.print(f"{_OWN}: {statistics.median(ratios):.3f} times the calls/s of before")
    least = statistics.median(hop["Envoy alone"])
    for name in (f"relay, {egress}" for egress in _RELAYS):
        console.print(f"{name}: {statistics.median(hop[name]) / least:.2f} times the CPU of Envoy alone")


@contextlib.contextmanager
def _code_of(tree: Path) -> Iterator[None]:
    """Makes the processes that start within this block run the code of another checkout."""
    with contextlib.chdir(tree), mock.patch.dict(os.environ, PYTHONPATH=str(tree)):
        yield


@contextlib.asynccontextmanager
async def _relayed(etcd: EtcdServer, folder: Path, egress: str) -> AsyncIterator[Way]:
    """Starts a mesh with a pod whose relay has that egress, or, for "direct", sends the calls itself."""
    folder.mkdir()
    direct = egress == "direct"
    async with ForeignMesh(
        folder, etcd, *V2, egress="envoy" if direct else egress, direct=direct, log_level="info"
    ) as it:
        path = it.mesh.write(MODEL, b"1.5")
        await it.mesh._register(MODEL, "example", path, load=True, sync=True, router=0)

        def pids() -> dict[str, list[int]]:
            relay = child_of(it.mesh, "mesh.runtime.relay")
            server = child_of(it.mesh, exampleruntime.MODULE)
            return {**_router(it.mesh), "relay": [relay], "egress": children(relay), "server": [server]}

        yield Way(it.mesh.grpc_address(), pids)


@contextlib.asynccontextmanager
async def _own(etcd: EtcdServer, folder: Path) -> AsyncIterator[Way]:
    """Starts a mesh with an ONNX pod."""
    folder.mkdir()
    async with LocalMesh(folder, etcd, pods=1, capacity="256MiB", log_level="info") as mesh:
        await mesh.register(MODEL, models.logistic_regression(0, features=64), load=True)
        yield Way(mesh.grpc_address(), lambda: {**_router(mesh), "server": [mesh.server_pid(mesh.pods[0])]})


@contextlib.asynccontextmanager
async def _envoy(folder: Path) -> AsyncIterator[Way]:
    """Starts an Envoy in front of an example runtime, without a mesh."""
    folder.mkdir()
    model = folder / MODEL
    model.write_bytes(b"1.5")
    listen, port = f"127.0.0.1:{free_port()}", free_port()
    server = Program("server", exampleruntime.argv(listen, *V2), folder)
    settings = EgressSettings(listen="/unused", admin_socket=f"{folder}/admin", server=listen)
    config = bootstrap(settings)
    (listener,) = config["static_resources"]["listeners"]
    listener["address"] = {"socket_address": {"address": "127.0.0.1", "port_value": port}}
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    manager["codec_type"] = "AUTO"
    named = {"header": {"key": "mm-model-id-bin", "value": encode_bin(MODEL.encode()).decode()}}
    manager["route_config"]["virtual_hosts"][0]["request_headers_to_add"] = [named]  # as the relay does
    (folder / "envoy.json").write_text(json.dumps(config))
    argv = [find_binary("envoy"), "--config-path", str(folder / "envoy.json"), "--concurrency", "1"]
    envoy = Program("envoy", [*argv, "--disable-hot-restart", "--log-level", "warning"], folder)
    server.start()
    envoy.start()
    try:
        await _load(listen, model)
        message = infer_request(MODEL, x=np.ones((1, 1), np.float32)).SerializeToString()

        async def answers() -> bool:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                try:
                    await channel.unary_unary(METHOD)(message, timeout=5)
                except grpc.aio.AioRpcError:
                    return False
            return True

        await until(answers, timeout=30, why="Envoy answers")
        yield Way(f"127.0.0.1:{port}", lambda: {"egress": [envoy.pid], "server": [server.pid]})
    finally:
        envoy.kill9()
        server.kill9()


async def _load(address: str, path: Path) -> None:
    """Loads the model into a server without a mesh, once it listens."""
    request = modelruntime_pb2.LoadModelRequest(modelId=MODEL, modelType="example", modelPath=str(path))
    async with grpc.aio.insecure_channel(address) as channel:
        await asyncio.wait_for(channel.channel_ready(), 30)
        await modelruntime_pb2_grpc.ModelRuntimeStub(channel).loadModel(request)


def _router(mesh: LocalMesh) -> dict[str, list[int]]:
    below = {pid: command(pid) for pid in children(mesh.routers[0].pid)}
    return {
        "edge Envoy": [pid for pid, line in below.items() if "envoy" in line.split()[0]],
        "worker": [pid for pid, line in below.items() if "router.process.worker" in line],
    }
