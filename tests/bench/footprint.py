"""The resources that a mesh takes: memory of each empty process and of each registered or loaded model; CPU time and
use of etcd per load.

Resident memory includes files and shared memory (some 30 MB of each Python process), which count against the limit of a
container that has these processes alone.
"""

import asyncio
import json
import urllib.request
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from mesh.etcd import Etcd
from tests.bench.processes import Meter, resident_bytes
from tests.support import models
from tests.support.etcd import EtcdServer
from tests.support.localmesh import Client, LocalMesh, children, command

SMALL, LARGE = 400, 60
LARGE_MIB = 20
REGISTERED = 20_000


async def run(etcd: EtcdServer, folder: Path, console: Console) -> None:
    """Measures one router and one pod: idle, with small models, with large models, and with many models that are only
    registered."""
    async with LocalMesh(folder, etcd, pods=1, capacity="4GiB", log_level="info") as mesh:
        router, pod = mesh.routers[0].pid, mesh.pods[0]
        below = {pid: command(pid) for pid in children(router)}
        pids = {
            "Envoy": [pid for pid, line in below.items() if "envoy" in line.split()[0]],
            "worker": [pid for pid, line in below.items() if "router.process.worker" in line],
            "router": [router],
            "agent": [pod.pid],
            "server": [mesh.server_pid(pod)],
            "etcd": [etcd.pid],
        }
        workers = len(pids["worker"])

        def now() -> dict[str, float]:
            return {name: sum(map(resident_bytes, group)) / len(group) for name, group in pids.items()}

        idle = now()
        content = models.logistic_regression(0, features=64)
        await _load(mesh, "small", SMALL, content, {models.LOGISTIC_REGRESSION_INPUT: np.zeros((1, 64), np.float32)})
        small = now()
        meter, revision = Meter.begin(pids), await _revision(etcd)
        content = models.weights(1.0, mebibytes=LARGE_MIB)
        await _load(mesh, "large", LARGE, content, {"x": np.ones((1, 1), np.float32)})
        large, spent, revisions = now(), meter.spent(), await _revision(etcd) - revision
        ledger = float((await mesh.rest("GET", "/mesh/v1/pods")).json["pods"][0]["used"])
        before = await _database(etcd)
        await _register(mesh, REGISTERED)
        registered, after = now(), await _database(etcd)

    table = Table(title=f"Resident memory (router with {workers} workers)")
    table.add_column("process")
    for heading in ("idle, MB", "a small model, KB", f"one of {LARGE_MIB} MiB, MB", "a registered one, KB"):
        table.add_column(heading, justify="right")
    for name in pids:
        table.add_row(
            name,
            f"{idle[name] / 1e6:.0f}",
            f"{(small[name] - idle[name]) / SMALL / 1e3:.1f}",
            f"{(large[name] - small[name]) / LARGE / 1e6:.2f}",
            f"{(registered[name] - large[name]) / REGISTERED / 1e3:.2f}",
        )
    console.print(table)
    console.print(
        f"small: a regression of {len(models.logistic_regression(0, features=64)):,} bytes; the pod's own sum of sizes "
        f"{ledger / 1e6:,.0f} MB, its server grew by {(large['server'] - idle['server']) / 1e6:,.0f} MB"
    )
    cpu = sum(spent.values()) - spent["etcd"]
    console.print(
        f"registered, loaded and called, one of {LARGE_MIB} MiB: {cpu / LARGE * 1e3:.0f} ms of CPU, "
        f"{revisions / LARGE:.1f} revisions of etcd, {spent['etcd'] / LARGE * 1e3:.1f} ms of its CPU"
    )
    console.print(f"etcd's database, a registered model: {(after - before) / REGISTERED:,.0f} bytes")


async def _load(mesh: LocalMesh, name: str, count: int, content: bytes, inputs: dict[str, np.ndarray]) -> None:
    client = Client(mesh.channel())
    for number in range(count):
        await mesh.register(f"{name}-{number}", content)
        await client.infer(f"{name}-{number}", **inputs)


async def _register(mesh: LocalMesh, count: int) -> None:
    lines = (
        json.dumps({"id": f"idle-{number:05}", "type": "onnx", "path": f"s3://models/{number}/model.onnx", "key": "s"})
        for number in range(count)
    )
    url = f"{mesh.rest_url()}/mesh/v1/models:import"
    request = urllib.request.Request(
        url, data="\n".join(lines).encode(), method="POST", headers={"X-Mesh-Request": "bench"}
    )
    answer = await asyncio.to_thread(lambda: urllib.request.urlopen(request, timeout=300).read())
    last = json.loads(answer.splitlines()[-1])
    if last.get("created") != count:
        raise RuntimeError(f"import ended with {last}")


async def _revision(etcd: EtcdServer) -> int:
    async with Etcd(etcd.settings) as client:
        return (await client.status()).revision


async def _database(etcd: EtcdServer) -> int:
    await etcd.compact()
    async with Etcd(etcd.settings) as client:
        return (await client.status()).db_used_bytes
