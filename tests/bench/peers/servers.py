"""The compared servers: how each is started, where it listens, and what it runs."""

import importlib.metadata
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mesh.process import free_port
from tests.bench import bodies
from tests.bench.door import Door, Kind
from tests.bench.peers.environments import ROOT
from tests.bench.processes import family
from tests.support.localmesh import LocalMesh, Program

SMALL, LARGE = "regression", "identity"
"""The models: a logistic regression of 64 features, and one that returns its input."""

MODELS = (SMALL, LARGE)


@dataclass(frozen=True, slots=True)
class Payload:
    """One size of a call."""

    name: str
    model: str
    values: np.ndarray
    answer: int  # bytes of tensors in the answer


HERE = Path(__file__).parent

_RAMP = (np.arange(1_000_000) % 1000).astype(np.float32) / 1000  # three digits each, 6 MB as JSON
PAYLOADS = {
    "1 KB": Payload("1 KB", SMALL, np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 64), 20),
    "100 KB": Payload("100 KB", LARGE, _RAMP[:25_000].copy(), 100_000),
    "4 MB": Payload("4 MB", LARGE, _RAMP, 4_000_000),
}
"""The payloads by name. The first has 64 floats: 300 bytes as a gRPC message, 0.8 KB as JSON."""


@dataclass(slots=True)
class Server:
    name: str
    doors: dict[Kind, str]  # addresses
    program: Program | None = None
    roots: Callable[[], list[int]] = list  # ids of processes that, with their descendants, are the server
    binary_rest: bool = False
    headers: Callable[[str, Kind], Mapping[str, str]] = field(default=lambda model, kind: {})

    def door(self, kind: Kind, payload: Payload, *, binary: bool = False) -> Door:
        """Returns the door for a payload. `binary` selects REST with binary tensors."""
        address, headers = self.doors[kind], self.headers(payload.model, kind)
        if kind == "grpc":
            return bodies.grpc(address, payload.model, payload.values, payload.answer, headers)
        # A value takes at least three bytes as JSON, with its comma; the regression's answer has four values.
        answer = payload.answer if binary else payload.answer // 4 * 3
        return bodies.rest(address, payload.model, payload.values, answer, headers, binary=binary)

    def pids(self) -> list[int]:
        return [pid for root in self.roots() for pid in family(root)]


def write_models(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Writes the models for peers, as NAME.onnx."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / f"{name}.onnx").write_bytes(content)


def of_mesh(mesh: LocalMesh) -> Server:
    rest = mesh.rest_url().partition("//")[2]
    return Server(
        "Mesh",
        {"grpc": mesh.grpc_address(), "rest": rest},
        roots=lambda: [program.pid for program in (*mesh.routers, *mesh.pods)],
        binary_rest=True,
    )


def _program(name: str, argv: list[str], folder: Path, *, path: str = str(ROOT), **variables: str) -> Program:
    settings = [f"{key}={value}" for key, value in {"PYTHONPATH": path, **variables}.items()]
    program = Program(name, ["env", *settings, *argv], folder)
    program.start()
    return program


def _started(name: str, program: Program, doors: dict[Kind, str], **more: object) -> Server:
    return Server(name, doors, program, roots=lambda: [program.pid], **more)  # type: ignore[arg-type]


def plain(folder: Path, models: Path) -> Server:
    port = free_port()
    argv = [sys.executable, "-m", "tests.bench.plain", str(port), *(str(models / f"{name}.onnx") for name in MODELS)]
    return _started("plain grpc.aio", _program("plain", argv, folder), {"grpc": f"127.0.0.1:{port}"})


def mlserver(environment: Path, folder: Path, models: Path) -> Server:
    repository = folder / "mlserver"
    rest, grpc, metrics = free_port(), free_port(), free_port()
    for name in MODELS:
        (repository / name).mkdir(parents=True)
        settings = {
            "name": name,
            "implementation": "tests.bench.peers.mlserver_app.OnnxModel",
            "parameters": {"uri": str(models / f"{name}.onnx")},
        }
        (repository / name / "model-settings.json").write_text(json.dumps(settings))
    settings = {
        "host": "127.0.0.1",
        "http_port": rest,
        "grpc_port": grpc,
        "metrics_port": metrics,
        "parallel_workers": 0,
        "debug": False,
        "grpc_max_message_length": 64 << 20,
    }
    (repository / "settings.json").write_text(json.dumps(settings))
    program = _program("mlserver", [str(environment / "bin" / "mlserver"), "start", str(repository)], folder)
    return _started("MLServer", program, {"grpc": f"127.0.0.1:{grpc}", "rest": f"127.0.0.1:{rest}"})


def kserve(environment: Path, folder: Path, models: Path) -> Server:
    rest, grpc = free_port(), free_port()
    argv = [str(environment / "bin" / "python"), str(HERE / "kserve_app.py"), str(rest), str(grpc)]
    argv += [f"{name}={models / name}.onnx" for name in MODELS]
    program = _program("kserve", argv, folder)
    return _started("KServe", program, {"grpc": f"127.0.0.1:{grpc}", "rest": f"127.0.0.1:{rest}"}, binary_rest=True)


def ray(environment: Path, folder: Path, models: Path) -> Server:
    rest, grpc = free_port(), free_port()
    argv = [str(environment / "bin" / "python"), str(HERE / "ray_app.py"), str(rest), str(grpc)]
    argv += [str(models), str(folder / "ray")]
    program = _program(
        "ray",
        argv,
        folder,
        path=f"{ROOT}:{HERE / 'ray_path'}",
        RAY_AUTH_MODE="disabled",  # otherwise it writes a token to the home folder
        RAY_USAGE_STATS_ENABLED="0",
        RAY_worker_niceness="0",  # by default its workers yield to all other processes, including the generator
    )

    def headers(model: str, kind: Kind) -> Mapping[str, str]:
        if kind == "rest":
            return {"serve_multiplexed_model_id": model}
        return {"application": "default", "multiplexed_model_id": model}

    return _started("Ray Serve", program, {"grpc": f"127.0.0.1:{grpc}", "rest": f"127.0.0.1:{rest}"}, headers=headers)


@dataclass(frozen=True, slots=True)
class Peer:
    """A server that must be installed."""

    name: str  # the name in tables
    key: str  # the name of its lock
    start: Callable[[Path, Path, Path], Server]
    package: str
    what: str  # {version} is replaced by the package's version


PEERS = (
    Peer(
        "MLServer",
        "mlserver",
        mlserver,
        "mlserver",
        "MLServer {version}, a custom runtime (`tests/bench/peers/mlserver_app.py`) that decodes with NumpyCodec, runs "
        "onnxruntime and encodes with NumpyCodec; `parallel_workers: 0`, which is faster for models this small",
    ),
    Peer(
        "KServe",
        "kserve",
        kserve,
        "kserve",
        "KServe's Python server {version}, a custom model (`tests/bench/peers/kserve_app.py`) that runs onnxruntime in "
        "the event loop; one worker, no latency log",
    ),
    Peer(
        "Ray Serve",
        "ray",
        ray,
        "ray",
        "Ray Serve {version}, one replica of a multiplexed deployment (`tests/bench/peers/ray_app.py`) that runs "
        "onnxruntime; REST reads and writes JSON with orjson, gRPC is V2's service",
    ),
)


def described(peer: Peer, environment: Path) -> str:
    """Returns what a peer runs, with its version."""
    found = [
        one.version
        for one in importlib.metadata.distributions(
            path=[str(path) for path in environment.glob("lib/*/site-packages")]
        )
        if one.name == peer.package
    ]
    return peer.what.format(version=found[0] if found else "?")
