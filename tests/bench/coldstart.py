"""Cold starts: how much longer a caller waits for a model without a copy than making the model's session alone
takes."""

import time

import numpy as np
import onnxruntime
from rich.console import Console
from rich.table import Table

from tests.bench.load import percentile
from tests.support import models
from tests.support.localmesh import Client, LocalMesh

COUNT = 200
_PARTS = ("mesh_pull_milliseconds", "modelmesh_loadmodel_milliseconds", "mesh_load_milliseconds")


async def run(mesh: LocalMesh, console: Console) -> None:
    """Measures first and second calls of models that were never loaded, one at a time, and sessions alone in this
    process for comparison."""
    name = models.LOGISTIC_REGRESSION_INPUT
    features = np.zeros((1, 64), np.float32)
    contents = [models.logistic_regression(number, features=64) for number in range(COUNT)]
    for number, content in enumerate(contents):
        await mesh.register(f"cold-{number}", content)
    client = Client(mesh.channel())
    cold, warm, sessions = [], [], []
    before = await _sums(mesh)
    for number, content in enumerate(contents):
        began = time.perf_counter()
        await client.infer(f"cold-{number}", **{name: features})
        cold.append(time.perf_counter() - began)
        began = time.perf_counter()
        await client.infer(f"cold-{number}", **{name: features})
        warm.append(time.perf_counter() - began)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        began = time.perf_counter()
        onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        sessions.append(time.perf_counter() - began)
    table = Table(title=f"Cold start of {COUNT} small models, ms")
    for heading in ("what", "p50", "p99"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for what, times in (("cold call", cold), ("same call, resident", warm), ("session alone", sessions)):
        table.add_row(what, f"{percentile(times, 0.5) * 1e3:.2f}", f"{percentile(times, 0.99) * 1e3:.2f}")
    over = [a - b for a, b in zip(cold, sessions, strict=True)]
    table.add_row(
        "cold call over session (reach 10, 50)",
        f"{percentile(over, 0.5) * 1e3:.2f}",
        f"{percentile(over, 0.99) * 1e3:.2f}",
    )
    console.print(table)
    after = await _sums(mesh)
    pull, session, load = ((after[name] - before[name]) / COUNT for name in _PARTS)
    first, whole = sum(warm) / COUNT * 1e3, sum(cold) / COUNT * 1e3
    split = Table(title="A cold call in parts, mean ms")
    for heading in ("part", "ms"):
        split.add_column(heading, justify="left" if heading == "part" else "right")
    for part, ms in (
        ("resolve: record, choice, way to the agent and back", whole - load - first),
        ("claim, room, bookkeeping beside the two below", load - pull - session),
        ("pull", pull),
        ("session, warm-up included", session),
        ("first inference", first),
    ):
        split.add_row(part, f"{ms:.2f}")
    console.print(split)


async def _sums(mesh: LocalMesh) -> dict[str, float]:
    """Returns the sums of the agent's histograms in `_PARTS`, in milliseconds."""
    (pod,) = (await mesh.rest("GET", "/mesh/v1/pods")).json["pods"]
    text = (await mesh.get(f"http://{pod['probe']}/metrics")).body.decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(values[f"{name}_sum"]) for name in _PARTS}
