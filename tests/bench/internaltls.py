"""What mutual TLS inside the mesh costs a call: two meshes that are alike but for it, measured in turn."""

import statistics
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from tests.bench.load import generator, latency, percentile, throughput
from tests.bench.processes import Meter, resident_bytes
from tests.support import models
from tests.support.authority import Authority, Mounted
from tests.support.etcd import EtcdServer
from tests.support.localmesh import LocalMesh, children, command, infer_request

CALLS = 10_000
ROUNDS = 7


async def run(etcd: EtcdServer, folder: Path, console: Console) -> None:
    """Measures several rounds, and prints medians, of ratios too."""
    options = ["--internal-tls", str(Mounted.of(folder / "tls", Authority()).path)]
    more = {"pods": 1, "capacity": "256MiB", "log_level": "info"}
    secure = {"router_options": options, "runtime_options": options}
    async with (
        LocalMesh(folder / "plain", etcd, **more) as plain,
        LocalMesh(folder / "secure", etcd, **more, **secure) as tls,
    ):
        for payload, features in (("64 floats", 64), ("16 Ki floats", 16384)):
            await _compare({"plain": plain, "tls": tls}, payload, features, folder, console)


async def _compare(meshes: dict[str, LocalMesh], payload: str, features: int, folder: Path, console: Console) -> None:
    name = f"regression-{features}"
    array = np.linspace(-1, 1, features, dtype=np.float32).reshape(1, features)
    message = infer_request(name, **{models.LOGISTIC_REGRESSION_INPUT: array}).SerializeToString()
    tiers = {}
    for which, mesh in meshes.items():
        await mesh.register(name, models.logistic_regression(0, features=features), load=True)
        below = {pid: command(pid) for pid in children(mesh.routers[0].pid)}
        tiers[which] = {
            "Envoy": [pid for pid, line in below.items() if "envoy" in line.split()[0]],
            "worker": [pid for pid, line in below.items() if "router.worker" in line],
            "server": [mesh.server_pid(pod) for pod in mesh.pods],
        }
    figures: dict[str, dict[str, list[float]]] = {which: {} for which in meshes}

    def note(which: str, what: str, value: float) -> None:
        figures[which].setdefault(what, []).append(value)

    for _ in range(ROUNDS):
        for which, mesh in meshes.items():
            address = mesh.grpc_address()
            await throughput(address, message, calls=1_000, folder=folder)  # warm
            meter = Meter.begin(tiers[which])
            note(which, "calls/s", await throughput(address, message, calls=CALLS, folder=folder))
            spent = {tier: seconds / CALLS * 1e6 for tier, seconds in meter.spent().items()}
            note(which, "CPU a call, routing, us", spent["Envoy"] + spent["worker"])
            for tier, value in spent.items():
                note(which, f"  {tier}", value)
            times = await latency(address, message, calls=500)
            note(which, "one caller, p50 ms", percentile(times, 0.5) * 1e3)
            note(which, "one caller, p99 ms", percentile(times, 0.99) * 1e3)

    table = Table(title=f"TLS between router and runtime pod, {payload} a call (load: {generator()})")
    for heading in ("what", "plain", "mutual TLS", "ratio"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    middle = statistics.median
    for what, values in figures["plain"].items():
        others = figures["tls"][what]
        ratio = middle(b / a if a else 1.0 for a, b in zip(values, others, strict=True))
        table.add_row(what, f"{middle(values):,.2f}", f"{middle(others):,.2f}", f"{ratio:.2f}")
    for tier in tiers["plain"]:
        sizes = [sum(map(resident_bytes, tiers[which][tier])) / 1e6 for which in meshes]
        table.add_row(f"resident, {tier}, MB", *(f"{size:.0f}" for size in sizes), "")
    console.print(table)
