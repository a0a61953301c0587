"""The cost of calls by alias, compared with calls by id: plain, with a shadow, and with a shadow that hangs. Also a
canary's share of calls.

The same model is called by its id and by aliases, in turn, in one mesh, so that ratios hold although the speed of the
machine drifts. The shadow that hangs is a fake model that never answers and uses no CPU: with a busy model, the figures
would show the competition for the CPU.
"""

import asyncio
import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from mesh.etcd import Etcd
from mesh.pb import inference_pb2
from mesh.schema.keys import Keys
from tests.bench.load import METHOD, generator, percentile, throughput
from tests.bench.processes import Meter
from tests.support import models
from tests.support.etcd import EtcdServer
from tests.support.localmesh import Client, LocalMesh, children, command, infer_request

CALLS, ROUNDS = 2_000, 25
"""Rounds are short and alternate between id and alias, so that other load on the machine affects both alike."""

BLOCKS, BLOCK = 120, 50
"""Number of blocks of one caller's calls, alternately with and without a shadow, and calls in a block."""

CANARY = 20_000

_VERSIONS = {"7": "fraud@7", "8": "fraud@8"}


async def run(etcd: EtcdServer, folder: Path, console: Console) -> None:
    """Measures calls by alias, calls with a shadow and a canary, in three meshes, and prints the figures."""
    options = {"pods": 1, "capacity": "256MiB", "log_level": "info"}
    async with LocalMesh(folder / "mesh", etcd, **options) as mesh:
        for version, model in _VERSIONS.items():
            await mesh.register(model, models.logistic_regression(int(version), features=64), load=True)
        features = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 64)
        await _cost(mesh, features, folder, console)
        await _shadow(mesh, "shadow at 100 %", "fraud@8", models.LOGISTIC_REGRESSION_INPUT, features, console)
    async with LocalMesh(folder / "fake", etcd, fake=True, **options) as mesh:
        await mesh.register_fake("fraud@7", value=7, now=True)
        await mesh.register_fake("fraud@9", call="3600s", now=True)
        await _shadow(mesh, "shadow that hangs", "fraud@9", "x", np.ones((1, 1), np.float32), console)
    async with LocalMesh(folder / "two", etcd, fake=True, routers=2, **options) as mesh:
        for version, model in _VERSIONS.items():
            await mesh.register_fake(model, value=int(version), now=True)
        await _canary(mesh, console)


async def _alias(mesh: LocalMesh, name: str, array: np.ndarray, input: str, **more: object) -> None:
    record = {"amid": "fraud@7", "tmid": "fraud@7", "mesh": {"versions": _VERSIONS, **more}}
    async with Etcd(mesh.etcd.settings) as etcd:
        await etcd.put(Keys(mesh.base).vmodel(name), json.dumps(record).encode())
    for router in range(len(mesh.routers)):
        await Client(mesh.channel(router)).infer(name, **{input: array})


async def _cost(mesh: LocalMesh, features: np.ndarray, folder: Path, console: Console) -> None:
    """Compares calls by alias with calls by id."""
    await _alias(mesh, "aliased", features, models.LOGISTIC_REGRESSION_INPUT)
    below = {pid: command(pid) for pid in children(mesh.routers[0].pid)}
    tiers = {
        "Envoy": [pid for pid, line in below.items() if "envoy" in line.split()[0]],
        "worker": [pid for pid, line in below.items() if "router.process.worker" in line],
        "server": [mesh.server_pid(pod) for pod in mesh.pods],
    }
    messages = {
        name: infer_request(name, **{models.LOGISTIC_REGRESSION_INPUT: features}).SerializeToString()
        for name in ("fraud@7", "aliased")
    }
    seconds = dict.fromkeys(messages, 0.0)
    spent = {name: dict.fromkeys(tiers, 0.0) for name in messages}
    for turn in range(ROUNDS):
        for name in sorted(messages, reverse=bool(turn % 2)):
            meter = Meter.begin(tiers)
            rate = await throughput(mesh.grpc_address(), messages[name], calls=CALLS, folder=folder)
            if not turn:
                continue  # the first round warms up
            seconds[name] += CALLS / rate
            for tier, used in meter.spent().items():
                spent[name][tier] += used
    calls = (ROUNDS - 1) * CALLS
    table = Table(title=f"Calls by alias beside calls by id (load: {generator()})")
    for heading in ("what", "by alias", "by id", "ratio", "reach"):
        table.add_column(heading, justify="left" if heading == "what" else "right")

    def row(what: str, ours: float, theirs: float, reach: str = "") -> None:
        table.add_row(what, f"{ours:,.1f}", f"{theirs:,.1f}", f"{ours / theirs:.3f}", reach)

    row("calls/s", calls / seconds["aliased"], calls / seconds["fraud@7"], ">= 0.95")
    each = {name: {tier: used / calls * 1e6 for tier, used in parts.items()} for name, parts in spent.items()}
    row("CPU a call, us", sum(each["aliased"].values()), sum(each["fraud@7"].values()), "<= 1.05")
    for tier in tiers:
        row(f"  {tier}", each["aliased"][tier], each["fraud@7"][tier])
    console.print(table)


async def _shadow(mesh: LocalMesh, what: str, shadow: str, input: str, array: np.ndarray, console: Console) -> None:
    """Compares one caller's latency with a shadow and without one, and prints the shadow's metrics."""
    await _alias(mesh, "alone", array, input)
    await _alias(mesh, "shadowed", array, input, mirror={"target": shadow, "share": 100})
    messages = {name: infer_request(name, **{input: array}).SerializeToString() for name in ("alone", "shadowed")}
    times: dict[str, list[float]] = {name: [] for name in messages}
    call = mesh.channel().unary_unary(METHOD)
    for turn in range(BLOCKS):
        for name in sorted(messages, reverse=bool(turn % 2)):
            for _ in range(BLOCK):
                started = time.perf_counter()
                await call(messages[name], timeout=30)
                times[name].append(time.perf_counter() - started)
    table = Table(title=f"One caller's latency, {what}")
    for heading in ("what", "with", "without", "ratio", "reach"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for share, reach in ((0.5, ""), (0.9, ""), (0.99, "<= 1.15")):
        with_, without = (percentile(times[name], share) * 1e3 for name in ("shadowed", "alone"))
        table.add_row(f"p{share * 100:g} ms", f"{with_:.3f}", f"{without:.3f}", f"{with_ / without:.2f}", reach)
    console.print(table)
    page = (await mesh.get(f"{mesh.probe_url()}/metrics")).body.decode()
    told = [
        line
        for line in page.splitlines()
        if line.startswith(("mesh_mirror_calls", "mesh_mirror_part")) and 'alias="shadowed"' in line
    ]
    console.print("\n".join(told))


async def _canary(mesh: LocalMesh, console: Console) -> None:
    """Counts the calls that a canary at 10 % gets through two routers, and the sticky keys that change their model."""
    array = np.ones((1, 1), np.float32)
    weights = {"fraud@7": 90, "fraud@8": 10}
    await _alias(mesh, "canary", array, "x", weights=weights)
    await _alias(mesh, "sticky", array, "x", weights=weights, sticky="x-user")
    call = [
        mesh.channel(router).unary_unary(
            METHOD, inference_pb2.ModelInferRequest.SerializeToString, inference_pb2.ModelInferResponse.FromString
        )
        for router in range(2)
    ]
    got: Counter[str] = Counter()
    found: dict[int, set[str]] = {}

    async def caller(first: int) -> None:
        for number in range(first, CANARY, 32):
            got[(await call[number // 32 % 2](infer_request("canary", x=array), timeout=30)).model_version] += 1
            if number < CANARY // 5:
                user = number % 400
                answer = await call[number // 400 % 2](
                    infer_request("sticky", x=array), metadata=[("x-user", str(user))], timeout=30
                )
                found.setdefault(user, set()).add(answer.model_version)

    await asyncio.gather(*(caller(first) for first in range(32)))
    moved = sum(len(versions) > 1 for versions in found.values())
    table = Table(title="A canary at 10 % over two routers")
    for heading in ("what", "is", "reach"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    table.add_row(f"share of {CANARY:,} calls, %", f"{got['8'] / CANARY * 100:.2f}", "9 to 11")
    table.add_row(f"of {len(found)} sticky keys, changed their model", str(moved), "0")
    console.print(table)
