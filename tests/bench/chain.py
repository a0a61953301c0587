"""Calls per second, CPU per call by process, and one caller's latency, for the complete chain and a plain server."""

import sys
from collections.abc import Sequence
from pathlib import Path

import grpc
import numpy as np

from mesh.process import free_port
from tests.bench.load import generator, latency, percentile, throughput
from tests.bench.processes import Meter, resident_bytes
from tests.bench.results import OURS, Comparison, Results, Row
from tests.support import models
from tests.support.localmesh import Client, LocalMesh, Program, children, command, infer_request
from tests.support.waiting import until

_NAMES = {"router pod": "the router's main process", "server": "model server"}
"""Names of processes in the table, if they differ from those of their tiers."""

CALLS = 10_000
PLAIN = "plain grpc.aio"


async def run(mesh: LocalMesh, folder: Path, results: Results, rounds: int) -> None:
    """Measures both servers alternately, in several rounds."""
    content = models.logistic_regression(0, features=64)
    await mesh.register("regression", content, load=True)
    path = folder / "plain.onnx"
    path.write_bytes(content)
    port = free_port()
    plain = Program("plain", [sys.executable, "-m", "tests.bench.plain", str(port), str(path)], folder)
    plain.start()
    features = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 64)
    name = models.LOGISTIC_REGRESSION_INPUT
    message = infer_request("regression", **{name: features}).SerializeToString()
    addresses = {"mesh": mesh.grpc_address(), "plain": f"127.0.0.1:{port}"}
    for address in addresses.values():
        client = Client(mesh.channel()) if address == addresses["mesh"] else None

        async def answers(address: str = address, client: Client | None = client) -> bool:
            async with grpc.aio.insecure_channel(address) as channel:
                try:
                    await (client or Client(channel)).infer("regression", **{name: features})
                except grpc.aio.AioRpcError:
                    return False
            return True

        await until(answers, timeout=30, why=f"{address} answers")

    router = mesh.routers[0].pid
    below = {pid: command(pid) for pid in children(router)}
    tiers = {
        "Envoy": [pid for pid, line in below.items() if "envoy" in line.split()[0]],
        "worker": [pid for pid, line in below.items() if "router.process.worker" in line],
        "router pod": [router],
        "server": [mesh.server_pid(pod) for pod in mesh.pods],
        "agent": [pod.pid for pod in mesh.pods],
    }
    groups = {"mesh": tiers, "plain": {"server": [plain.pid]}}

    rates: dict[str, list[float]] = {"mesh": [], "plain": []}
    costs: dict[str, dict[str, list[float]]] = {which: {name: [] for name in groups[which]} for which in groups}
    medians: dict[str, list[float]] = {"mesh": [], "plain": []}
    tails: dict[str, list[float]] = {"mesh": [], "plain": []}
    for _ in range(rounds):
        for which, address in addresses.items():
            await throughput(address, message, calls=2_000, folder=folder)  # warm
            meter = Meter.begin(groups[which])
            rates[which].append(await throughput(address, message, calls=CALLS, folder=folder))
            for tier, seconds in meter.spent().items():
                costs[which][tier].append(seconds / CALLS * 1e6)
            times = await latency(address, message, calls=1_000)
            medians[which].append(percentile(times, 0.5) * 1e3)
            tails[which].append(percentile(times, 0.99) * 1e3)

    comparison = Comparison("chain", "The whole chain compared with a plain grpc.aio server", [OURS, PLAIN], PLAIN)

    def row(
        what: str,
        unit: str,
        ours: Sequence[float],
        theirs: Sequence[float],
        *,
        reach: str = "",
        more: bool = False,
        part: bool = False,
    ) -> None:
        figures = {OURS: list(ours), PLAIN: list(theirs)}
        comparison.rows.append(Row(what, unit, figures, more_is_better=more, reach=reach, judged=not part))

    yardstick = costs["plain"]["server"]
    routing = [envoy + worker for envoy, worker in zip(costs["mesh"]["Envoy"], costs["mesh"]["worker"], strict=True)]
    row("calls a second", "calls/s", rates["mesh"], rates["plain"], reach=">= 3.5", more=True)
    row("CPU of a call, Envoy and worker", "us", routing, yardstick, reach="<= 0.25", part=True)
    for tier, values in costs["mesh"].items():
        row(
            f"CPU of a call, {_NAMES.get(tier, tier)}",
            "us",
            values,
            yardstick,
            reach="<= 0.10" if tier == "server" else "",
            part=True,
        )
    row("one caller, p50", "ms", medians["mesh"], medians["plain"], reach="<= 1.05")
    row("one caller, p99", "ms", tails["mesh"], tails["plain"], reach="<= 1.2")
    for tier, pids in tiers.items():
        row(f"resident memory, {_NAMES.get(tier, tier)}", "MB", [sum(map(resident_bytes, pids)) / 1e6], [], part=True)
    comparison.notes = [
        "The model is a logistic regression of 64 floats, called over gRPC.",
        f"{rounds} rounds of {CALLS:,} calls, with 64 calls in flight, alternate between the systems. {generator()} "
        "sends the calls. The latencies of one caller are those of calls that grpc.aio sends one after the other.",
        "The goals for the CPU of a call are shares of the CPU of a call of the plain server.",
    ]
    if generator() != "h2load":
        comparison.notes.append(
            "h2load (nghttp2-client) is not on PATH, so the program that sends the calls limits their number."
        )
    results.add(comparison)
    plain.kill9()
