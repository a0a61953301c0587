"""The cost of TLS per call, by place: towards clients, terminated in Envoy, and inside the mesh, in the processes.

Three meshes that differ only in TLS are measured in turn. The last one also shows where TLS towards clients is cheapest
to terminate: a router's worker does to its pods, per call, what it would have to do towards clients without Envoy.
"""

import ssl
import statistics
from dataclasses import dataclass
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
CONNECTIONS = 400
"""New connections, with a call each: their cost beyond that of a call is that of a handshake."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One of the meshes."""

    mesh: LocalMesh
    trust: Path | None  # the authority of its certificate for clients
    tiers: dict[str, list[int]]  # processes by their role


async def run(etcd: EtcdServer, folder: Path, console: Console) -> None:
    """Measures several rounds, and prints medians of the values and of their ratios."""
    authority = Authority()
    inner = ["--internal-tls", str(Mounted.of(folder / "tls", authority).path)]
    certificate, key = authority.issue("localhost")
    client = Mounted(folder / "client", ca_crt=authority.pem, tls_crt=certificate, tls_key=key).path
    outer = ["--tls-cert", str(client / "tls.crt"), "--tls-key", str(client / "tls.key")]
    more = {"pods": 1, "capacity": "256MiB", "log_level": "info"}
    context = ssl.create_default_context(cadata=authority.pem.decode())
    context.check_hostname = False  # REST calls use the address instead of a name
    async with (
        LocalMesh(folder / "plain", etcd, **more) as plain,
        LocalMesh(folder / "outer", etcd, router_options=outer, trust=context, **more) as edge,
        LocalMesh(folder / "inner", etcd, router_options=inner, runtime_options=inner, **more) as inside,
    ):
        measured = {
            "plain": Measured(plain, None, _tiers(plain)),
            "from clients": Measured(edge, client / "ca.crt", _tiers(edge)),
            "inside": Measured(inside, None, _tiers(inside)),
        }
        for payload, features in (("64 floats", 64), ("16 Ki floats", 16384)):
            await _compare(measured, payload, features, folder, console)


def _tiers(mesh: LocalMesh) -> dict[str, list[int]]:
    below = {pid: command(pid) for pid in children(mesh.routers[0].pid)}
    return {
        "Envoy": [pid for pid, line in below.items() if "envoy" in line.split()[0]],
        "worker": [pid for pid, line in below.items() if "router.process.worker" in line],
        "server": [mesh.server_pid(pod) for pod in mesh.pods],
    }


async def _compare(measured: dict[str, Measured], payload: str, features: int, folder: Path, console: Console) -> None:
    name = f"regression-{features}"
    array = np.linspace(-1, 1, features, dtype=np.float32).reshape(1, features)
    message = infer_request(name, **{models.LOGISTIC_REGRESSION_INPUT: array}).SerializeToString()
    for one in measured.values():
        content = models.logistic_regression(0, features=features)
        path = one.mesh.write(f"{name}.onnx", content)
        body = {"type": "onnx", "path": path.as_uri(), "load": True, "sync": True}
        answer = await one.mesh.rest("PUT", f"/mesh/v1/models/{name}", body)
        assert answer.status in (200, 201), answer.body
    figures: dict[str, dict[str, list[float]]] = {which: {} for which in measured}

    for _ in range(ROUNDS):
        for which, one in measured.items():
            noted = figures[which]

            def note(what: str, value: float, noted: dict[str, list[float]] = noted) -> None:
                noted.setdefault(what, []).append(value)

            address = one.mesh.grpc_address().replace("127.0.0.1", "localhost")
            await throughput(address, message, calls=1_000, folder=folder, trust=one.trust)  # warm
            meter = Meter.begin(one.tiers)
            note("calls/s", await throughput(address, message, calls=CALLS, folder=folder, trust=one.trust))
            spent = {tier: seconds / CALLS * 1e6 for tier, seconds in meter.spent().items()}
            note("CPU a call, routing, us", spent["Envoy"] + spent["worker"])
            for tier, value in spent.items():
                note(f"  {tier}", value)
            meter = Meter.begin(one.tiers)
            await throughput(
                address, message, calls=CONNECTIONS, folder=folder, trust=one.trust, connections=CONNECTIONS, each=1
            )
            fresh = meter.spent()["Envoy"] / CONNECTIONS * 1e6
            note("CPU of Envoy, a call on a new connection, us", fresh)
            times = await latency(address, message, calls=500, trust=one.trust)
            note("one caller, p50 ms", percentile(times, 0.5) * 1e3)
            note("one caller, p99 ms", percentile(times, 0.99) * 1e3)

    others = [which for which in measured if which != "plain"]
    table = Table(title=f"TLS, {payload} a call (load: {generator()})")
    table.add_column("what")
    for heading in ("plain", *(text for which in others for text in (f"TLS {which}", "ratio"))):
        table.add_column(heading, justify="right")
    middle = statistics.median
    for what, values in figures["plain"].items():
        row = [f"{middle(values):,.2f}"]
        for which in others:
            theirs = figures[which][what]
            ratio = middle(b / a if a else 1.0 for a, b in zip(values, theirs, strict=True))
            row += [f"{middle(theirs):,.2f}", f"{ratio:.2f}"]
        table.add_row(what, *row)
    for tier in measured["plain"].tiers:
        sizes = {which: sum(map(resident_bytes, one.tiers[tier])) / 1e6 for which, one in measured.items()}
        cells = [cell for which in others for cell in (f"{sizes[which]:.0f}", "")]
        table.add_row(f"resident, {tier}, MB", f"{sizes['plain']:.0f}", *cells)
    console.print(table)
