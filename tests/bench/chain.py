"""Calls a second, CPU a call by process, and one caller's latency: the whole chain beside a plain server."""

import asyncio
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import grpc
import numpy as np
from rich.console import Console
from rich.table import Table

from mesh.process import free_port
from tests.bench.load import generator, latency, percentile, throughput
from tests.bench.processes import Meter, resident_bytes
from tests.support import models
from tests.support.localmesh import Client, LocalMesh, Program, children, command, infer_request
from tests.support.waiting import until

CALLS = 10_000
ROUNDS = 7
"""Short rounds, each with a ratio of its own, because the machine's speed drifts more within a minute than within a
round."""


async def run(mesh: LocalMesh, folder: Path, console: Console) -> None:
    """Measures both in turn, several rounds, and prints medians, of ratios too."""
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
    for _ in range(ROUNDS):
        for which, address in addresses.items():
            await throughput(address, message, calls=2_000, folder=folder)  # warm
            meter = Meter.begin(groups[which])
            rates[which].append(await throughput(address, message, calls=CALLS, folder=folder))
            for tier, seconds in meter.spent().items():
                costs[which][tier].append(seconds / CALLS * 1e6)
            times = await latency(address, message, calls=1_000)
            medians[which].append(percentile(times, 0.5) * 1e3)
            tails[which].append(percentile(times, 0.99) * 1e3)

    middle = statistics.median

    def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
        return f"{middle(a / b for a, b in zip(ours, theirs, strict=True)):.2f}"

    yardstick = costs["plain"]["server"]
    routing = [envoy + worker for envoy, worker in zip(costs["mesh"]["Envoy"], costs["mesh"]["worker"], strict=True)]
    table = Table(title=f"The whole chain beside a plain grpc.aio + onnxruntime server (load: {generator()})")
    for heading in ("what", "mesh", "plain server", "ratio", "reach"):
        table.add_column(heading, justify="left" if heading == "what" else "right")

    def row(what: str, ours: Sequence[float], theirs: Sequence[float], digits: int, reach: str = "") -> None:
        figures = f"{middle(ours):,.{digits}f}", f"{middle(theirs):,.{digits}f}"
        table.add_row(what, *figures, ratio(ours, theirs), reach)

    row("calls/s", rates["mesh"], rates["plain"], 0, ">= 2.5")
    row("CPU a call, routing, us", routing, yardstick, 1, "<= 0.35")
    for tier, values in costs["mesh"].items():
        row(f"  {tier}", values, yardstick, 1, "<= 0.15" if tier == "server" else "")
    row("one caller, p50 ms", medians["mesh"], medians["plain"], 3, "<= 1.1")
    row("one caller, p99 ms", tails["mesh"], tails["plain"], 3)
    for tier, pids in tiers.items():
        table.add_row(f"resident, {tier}, MB", f"{sum(map(resident_bytes, pids)) / 1e6:.0f}", "", "", "")
    console.print(table)
    if generator() != "h2load":
        console.print(
            "[yellow]h2load (nghttp2-client) is not on PATH: calls/s above are bounded by the load generator."
        )
    plain.kill9()
    await asyncio.sleep(0)
