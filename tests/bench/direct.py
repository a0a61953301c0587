"""Calls of other model servers, directly and through the mesh: calls a second, latency, and CPU of a call.

Both ways lead to the same process, which holds the model once, so only the way differs. The models are small: the less
a call costs in the server, the more the way matters. The mesh needs a second core for what it does beside the server.
"""

import asyncio
import contextlib
import json
import random
import subprocess
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mesh.modelservers import environments, machines
from mesh.process import free_port
from mesh.runtime.servers import adapted
from tests.bench import bodies, generators
from tests.bench.direct_app import FEATURES
from tests.bench.door import Door, Kind
from tests.bench.load import latency, percentile
from tests.bench.plan import Plan
from tests.bench.processes import Meter, family
from tests.bench.results import OURS, Comparison, Results, Row
from tests.support.etcd import EtcdServer
from tests.support.localmesh import LocalMesh, Program

CALLERS = 16
ALONE = 200  # calls of a single caller in a round
_PROGRAM = Path(__file__).with_name("direct_app.py")


@dataclass(frozen=True, slots=True)
class Called:
    """One model, and how it is called."""

    what: str
    model: str
    kind: Kind
    values: np.ndarray
    answer: int  # minimum bytes of a good answer


_ONE = np.linspace(-1, 1, FEATURES, dtype=np.float32).reshape(1, FEATURES)
_MANY = np.random.default_rng(0).standard_normal((400, FEATURES)).astype(np.float32)  # 100 KB

MODELS = {"pipeline": ("sklearn", "pipeline.joblib"), "booster": ("xgboost", "booster.ubj")}
"""Types and files of MLServer's models, by their ids."""

MLSERVER = (
    Called("gRPC, scikit-learn, one row", "pipeline", "grpc", _ONE, 8),
    Called("gRPC, XGBoost, one row", "booster", "grpc", _ONE, 4),
    Called("gRPC, scikit-learn, 100 KB", "pipeline", "grpc", _MANY, 3200),
    Called("REST, scikit-learn, one row", "pipeline", "rest", _ONE, 8),
)

TRITON = (
    Called("gRPC, Python backend, one row", "sums", "grpc", _ONE, 4),
    Called("gRPC, Python backend, 100 KB", "sums", "grpc", _MANY, 1600),
)

_CONFIG = """
backend: "python"
max_batch_size: 0
input [ { name: "x", data_type: TYPE_FP32, dims: [ -1, 64 ] } ]
output [ { name: "y", data_type: TYPE_FP32, dims: [ -1 ] } ]
"""
_PYTHON = """
import triton_python_backend_utils as triton


class TritonPythonModel:
    def execute(self, requests):
        inputs = [triton.get_input_tensor_by_name(one, "x").as_numpy() for one in requests]
        return [triton.InferenceResponse([triton.Tensor("y", one.sum(axis=1))]) for one in inputs]
"""


@dataclass(frozen=True, slots=True)
class Way:
    """One way to the server."""

    name: str
    addresses: dict[Kind, str]
    roots: tuple[int, ...]  # ids of processes that, with their descendants, work for a call

    def door(self, called: Called) -> Door:
        """Returns the door for a model."""
        address = self.addresses[called.kind]
        if called.kind == "grpc":
            return bodies.grpc(address, called.model, called.values, called.answer)
        return bodies.rest(address, called.model, called.values, called.answer, binary=False)


async def run(etcd: EtcdServer, folder: Path, results: Results, plan: Plan) -> None:
    """Measures each server that is installed or can be installed, and adds the comparisons."""
    for kind, name, called in (("mlserver", "MLServer", MLSERVER), ("triton", "Triton", TRITON)):
        try:
            if why := machines.lacks(kind):
                raise environments.CannotInstall(why)
            environment = await asyncio.to_thread(environments.install, kind)
        except environments.CannotInstall as error:
            results.lacks(name, str(error))
            continue
        results.described[f"{name}, directly"] = (
            f"{name}, as `mesh up --server {kind}` starts it; through the mesh, the calls pass Envoy, a router's "
            "worker and the pod's relay before they reach the same process"
        )
        models = await asyncio.to_thread(_models, kind, folder, environment)
        async with _ways(etcd, folder / kind, kind, name, models) as ways:
            await _compare(name, called, ways, results, plan)


async def _compare(server: str, calls: Sequence[Called], ways: list[Way], results: Results, plan: Plan) -> None:
    """Measures all calls by all ways in several rounds, each in random order."""
    names = [way.name for way in ways]

    def row(what: str, unit: str, **more: object) -> Row:
        return Row(what, unit, {name: [] for name in names}, **more)  # type: ignore[arg-type]

    rates = [row(one.what, "calls/s", more_is_better=True, reach=">= 0.9") for one in calls]
    costs = [row(one.what, "us") for one in calls]
    alone = [row(one.what, "ms") for one in calls if one.kind == "grpc"]
    turns = [(number, way) for number in range(len(calls)) for way in ways]
    order = random.Random(server)
    for turn in range(plan.direct):
        order.shuffle(turns)
        for number, way in turns:
            called, door = calls[number], way.door(calls[number])
            meter = Meter.begin({"all": [pid for root in way.roots for pid in family(root)]})
            try:
                if not turn:
                    await asyncio.to_thread(generators.throughput, door, seconds=1.0, callers=CALLERS)
                    meter = Meter.begin(meter.pids)
                done = await asyncio.to_thread(
                    generators.throughput, door, seconds=plan.closed_seconds, callers=CALLERS
                )
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                results.console.print(f"[bold red]{called.what}: {way.name} FAILED: {error}")
                continue
            rates[number].figures[way.name].append(done.rate)
            costs[number].figures[way.name].append(meter.spent()["all"] / done.calls * 1e6)
            if called.kind == "grpc":
                times = await latency(door.address, door.body, calls=ALONE)
                alone[number].figures[way.name].append(percentile(times, 0.5) * 1e3)
    rounds = f"{plan.direct} rounds of {plan.closed_seconds:.0f} s, alternating, {CALLERS} callers"
    doors = [ways[0].door(one) for one in calls]
    notes = [rounds, f"generators: {', '.join(dict.fromkeys(map(generators.named, doors)))}"]
    base, key = names[-1], server.lower()
    title = f"{server} through the mesh"
    results.add(Comparison(f"{key}-rates", f"{title}: calls a second", names, base, rates, notes))
    notes = ["all processes on the way, and the server", "in the same rounds"]
    results.add(Comparison(f"{key}-cpu", f"{title}: CPU of a call", names, base, costs, notes))
    notes = ["one caller, median of a call"]
    results.add(Comparison(f"{key}-latency", f"{title}: latency", names, base, alone, notes))


def _models(kind: str, folder: Path, environment: Path) -> dict[str, tuple[str, Path]]:
    """Writes the models of a server. Returns their types and paths, by their ids."""
    if kind == "mlserver":
        argv = [str(environments.python_of(environment)), "-I", str(_PROGRAM), str(folder)]
        subprocess.run(argv, check=True, timeout=300)
        return {model_id: (model_type, folder / file) for model_id, (model_type, file) in MODELS.items()}
    model = folder / "sums"
    (model / "1").mkdir(parents=True)
    (model / "config.pbtxt").write_text(_CONFIG)
    (model / "1" / "model.py").write_text(_PYTHON)
    return {"sums": ("triton-python", model)}


@contextlib.asynccontextmanager
async def _ways(
    etcd: EtcdServer, folder: Path, kind: str, name: str, models: dict[str, tuple[str, Path]]
) -> AsyncIterator[list[Way]]:
    """Starts a server, and a mesh with a pod that finds the server running. Yields the ways to the server: through the
    mesh, and directly."""
    server = folder / "server"
    server.mkdir(parents=True)
    started = adapted.begin(kind, server, threads=1, types=[model_type for model_type, _ in models.values()])
    direct: dict[Kind, str] = {"grpc": started.address}
    if kind == "mlserver":
        settings, port = Path(started.words[-1]), free_port()
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"http_port": port}))
        direct["rest"] = f"127.0.0.1:{port}"
    variables = [f"{name}={value}" for name, value in started.variables.items()]
    program = Program(kind, ["env", *variables, *started.words], folder)
    program.start()
    options = ["--adapter", kind, "--server", started.address, "--server-models", str(server), "--allow-code"]
    for _, path in models.values():
        options += ["--file-root", str(path.parent)]
    try:
        async with LocalMesh(
            folder, etcd, pods=1, capacity="256MiB", log_level="info", runtime_options=options
        ) as mesh:
            for model_id, (model_type, path) in models.items():
                await mesh._register(model_id, model_type, path, load=True, sync=True, router=0)
            ours: dict[Kind, str] = {"grpc": mesh.grpc_address(), "rest": mesh.rest_url().partition("//")[2]}
            roots = tuple(one.pid for one in (*mesh.routers, *mesh.pods, program))
            yield [Way(OURS, ours, roots), Way(f"{name}, directly", direct, (program.pid,))]
    finally:
        program.kill9()
