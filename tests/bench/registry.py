"""Many registered models: the speed of their import, their cost for a router, and the time of its restart."""

import asyncio
import json
import time
import urllib.request
from collections.abc import Iterator

import grpc
import numpy as np
from rich.console import Console
from rich.table import Table

from tests.bench.load import percentile
from tests.bench.processes import resident_bytes
from tests.support.localmesh import Client, LocalMesh, children, command

COUNT = 100_000


def _lines(count: int) -> Iterator[bytes]:
    for number in range(count):
        yield json.dumps({"id": f"bulk-{number:07}", "type": "onnx", "path": "file:///none/x.onnx"}).encode() + b"\n"


async def run(mesh: LocalMesh, console: Console, *, count: int = COUNT) -> None:
    """Imports `count` models, restarts the router, calls unknown ids, and prints how long each takes."""
    body = b"".join(_lines(count))
    started = time.perf_counter()
    request = urllib.request.Request(
        f"{mesh.rest_url()}/mesh/v1/models:import", data=body, method="POST", headers={"X-Mesh-Request": "bench"}
    )
    answer = await asyncio.to_thread(lambda: urllib.request.urlopen(request, timeout=300).read())
    seconds = time.perf_counter() - started
    last = json.loads(answer.splitlines()[-1])
    if last.get("created") != count:
        raise RuntimeError(f"import ended with {last}")

    await mesh.routers[0].stop()
    began = time.perf_counter()
    mesh.routers[0].start()
    await mesh.ready()
    restart = time.perf_counter() - began
    workers = [pid for pid in children(mesh.routers[0].pid) if "router.process.worker" in command(pid)]

    client = Client(mesh.channel())
    times = []
    for number in range(500):
        began = time.perf_counter()
        try:
            await client.infer(f"stranger-{number}", x=np.ones((1, 1), np.float32))
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
        times.append(time.perf_counter() - began)

    table = Table(title=f"{count:,} registered models")
    for heading in ("what", "measured", "reach"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    table.add_row("registered in bulk, models/s", f"{count / seconds:,.0f}", ">= 15,000")
    table.add_row("router started again, s", f"{restart:.2f}", "< 2")
    table.add_row("largest worker, MB", f"{max(map(resident_bytes, workers)) / 1e6:.0f}", "< 100")
    table.add_row("unregistered id refused, p50 ms", f"{percentile(times, 0.5) * 1e3:.2f}", "")
    table.add_row("unregistered id refused, p99 ms", f"{percentile(times, 0.99) * 1e3:.2f}", "")
    console.print(table)
