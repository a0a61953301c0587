"""A storm of cold models while a hot one is called: 200 are called at once in a mesh with room for 65.

It shows how much the storm slows calls of the hot model (their p99 divided by that of a quiet time), and how many cold
calls are answered within their deadline of a minute.
"""

import asyncio
import collections
import time
from pathlib import Path

import grpc
import numpy as np
from rich.console import Console
from rich.table import Table

from tests.bench.load import percentile
from tests.support import models
from tests.support.etcd import EtcdServer
from tests.support.localmesh import Client, LocalMesh
from tests.support.waiting import until

MODELS = 200
ROOM = 65
DEADLINE = 60.0  # seconds of a cold call
QUIET = 1500  # hot calls
PAUSE = 0.002  # seconds between two hot calls


async def run(etcd: EtcdServer, folder: Path, console: Console) -> None:
    """Measures one storm, and prints it."""
    size = await _size(etcd, folder / "one")
    capacity = f"{(ROOM + 1) * size // 2}"
    async with LocalMesh(folder / "storm", etcd, pods=2, capacity=capacity, log_level="info") as mesh:
        await mesh.register("hot", models.logistic_regression(0), load=True)
        for number in range(MODELS):
            await mesh.register(f"cold{number}", models.logistic_regression(number + 1))
        client = Client(mesh.channel())
        features = {models.LOGISTIC_REGRESSION_INPUT: np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 64)}
        over = asyncio.Event()

        async def hot() -> list[float]:
            times = []
            while not over.is_set():
                started = time.perf_counter()
                await client.infer("hot", **features)
                times.append(time.perf_counter() - started)
                await asyncio.sleep(PAUSE)
            return times

        async def cold(number: int) -> tuple[str, float]:
            started = time.perf_counter()
            try:
                await client.infer(f"cold{number}", timeout=DEADLINE, **features)
            except grpc.aio.AioRpcError as error:
                return error.code().name, time.perf_counter() - started
            return "answered", time.perf_counter() - started

        quiet = []
        caller = asyncio.create_task(hot())
        await asyncio.sleep(QUIET * PAUSE * 2)
        over.set()
        quiet = await caller
        over.clear()
        caller = asyncio.create_task(hot())
        ended = await asyncio.gather(*map(cold, range(MODELS)))
        over.set()
        busy = await caller
    _print(console, quiet, busy, ended)


async def _size(etcd: EtcdServer, folder: Path) -> int:
    """Returns the bytes that one cold model takes, as its pod counts them."""
    async with LocalMesh(folder, etcd, pods=1, capacity="64MiB", log_level="info") as mesh:
        await mesh.register("one", models.logistic_regression(0), load=True)

        async def measured() -> int:
            return int((await mesh.status("one"))["host_bytes"])

        return await until(measured, timeout=30, why="the model is measured")


def _print(console: Console, quiet: list[float], busy: list[float], ended: list[tuple[str, float]]) -> None:
    table = Table(title=f"{MODELS} cold models called at once, with room for {ROOM}, beside a hot one")
    for title in ("what", "p50 ms", "p99 ms"):
        table.add_column(title, justify="left" if title == "what" else "right")
    for name, times in (("hot call, quiet", quiet), ("hot call, in the storm", busy)):
        table.add_row(f"{name} ({len(times)})", *(f"{percentile(times, share) * 1000:.2f}" for share in (0.5, 0.99)))
    for outcome, count in collections.Counter(outcome for outcome, _ in ended).items():
        times = [took for other, took in ended if other == outcome]
        shown = [f"{percentile(times, share) * 1000:.0f}" for share in (0.5, 0.99)] if count > 1 else ["", ""]
        table.add_row(f"cold call, {outcome} ({count})", *shown)
    table.add_row("hot p99, storm over quiet (reach 2)", "", f"{percentile(busy, 0.99) / percentile(quiet, 0.99):.1f}")
    console.print(table)
