"""Models of all types over two pods with MLServer, an ONNX pod and a pod with Triton, for runs of troubles
(`tests.foreign.run`).

Models come from a bank of trained ones. The magnitude of an answer gives the model's number. The answer is then
compared with the library's own answers of that model to the same rows. Calls take turns between gRPC with typed
contents, gRPC with raw contents, and REST.
"""

import contextlib
import itertools
import json
import random
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import grpc
import numpy as np
import onnxruntime

from mesh.host import processes
from mesh.pb import inference_pb2 as v2
from mesh.pb import inference_pb2_grpc
from mesh.process import free_port
from mesh.runtime.relay.adapters.repository import Repository
from mesh.statuses import Code
from tests.foreign.fleet import ONNX_SERVER, WRONG, Answer, Fleet
from tests.servers.bank_app import ROWS, STEP, TYPES
from tests.servers.neighbours import neighbour
from tests.support import models
from tests.support.arena import Arena
from tests.support.localmesh import command

CHILD, NEIGHBOUR, ONNX, LAST = "pod-1", "pod-2", "pod-3", "pod-4"
MLSERVERS = (CHILD, NEIGHBOUR)
PYTHON = "triton-python"

DOUBLED = 3
"""Number of models of each type of MLServer that have two copies."""

WIDTH = 200_000
"""Width of an ONNX model's layer, whose weights take 3.2 MB."""

SIZES = {**dict.fromkeys(TYPES, 1_500_000), "onnx": 4_000_000, PYTHON: 24_000_000}
"""Bytes of a model, on average: what the pods' books say after some runs. Triton starts a process for each."""

CALL_TIMEOUT = 60.0
"""Seconds of a call. On a busy machine, Triton takes seconds to start the process of a model."""

_RTOL = 1e-5
_FORMS = ("typed", "raw", "rest")
_NUMBER = re.compile(rb"/bank/(\d+)/")
_DTYPES = {"FP32": "<f4", "FP64": "<f8"}


_CONFIG = """
backend: "python"
max_batch_size: 0
input [ { name: "x", data_type: TYPE_FP64, dims: [ -1, 4 ] } ]
output [ { name: "y", data_type: TYPE_FP64, dims: [ -1 ] } ]
"""
_PYTHON = """
import numpy as np
import triton_python_backend_utils as triton

WEIGHTS, BIAS = np.array({weights}), {bias}


class TritonPythonModel:
    def execute(self, requests):
        return [triton.InferenceResponse([triton.Tensor("y", self.answer(one))]) for one in requests]

    def answer(self, request):
        return triton.get_input_tensor_by_name(request, "x").as_numpy() @ WEIGHTS + BIAS
"""


@dataclass(frozen=True, slots=True)
class Trained:
    path: Path
    type: str
    answer: np.ndarray  # the library's own, for each of ROWS


class ServersFleet(Fleet):
    """The mesh: `async with ServersFleet(folder, bank, environment, count=300, triton=True) as fleet`."""

    def __init__(self, folder: Path, bank: Path, environment: Path, *, count: int, triton: bool) -> None:
        """Makes a mesh of `count` models of all types. `bank` is the folder of the trained models, and `environment`
        that of MLServer's environment. Without `triton`, a second ONNX pod takes the place of the pod with Triton."""
        self._written_in = folder / "bank"
        self._trained: dict[int, Trained] = {}
        for number, one in json.loads((bank / "answers.json").read_text()).items():
            self._trained[int(number)] = Trained(Path(one["path"]), one["type"], np.array(one["answer"]))
        self._unused: dict[str, list[int]] = defaultdict(list)
        for number, one in self._trained.items():
            self._unused[one.type].append(number)
        self._listening: set[int] = set()  # process ids
        self._takers = {**dict.fromkeys(TYPES, MLSERVERS), "onnx": (ONNX,) if triton else (ONNX, LAST)}
        if triton:
            self._takers[PYTHON] = (LAST,)
        kinds = itertools.islice(itertools.cycle(self._takers), count)
        self._of_types = {f"{kind}-{place // len(self._takers)}": kind for place, kind in enumerate(kinds)}
        capacities = dict.fromkeys((CHILD, NEIGHBOUR, ONNX, LAST), 0)
        for kind, pods in self._takers.items():
            for pod in pods:
                capacities[pod] += max(2, count // len(self._takers) // 5 // len(pods)) * SIZES[kind]
        shared, self._beside = folder / "neighbour", free_port()
        roots = ["--file-root", str(bank), "--file-root", str(self._written_in)]
        self._written_in.mkdir()
        options = {pod: [*roots, "--capacity", str(capacity)] for pod, capacity in capacities.items()}
        for pod in MLSERVERS:
            options[pod] += ["--adapter", "mlserver", "--allow-code"]
        options[NEIGHBOUR] += ["--server", f"127.0.0.1:{self._beside}", "--server-models", str(shared)]
        options[LAST] += ["--adapter", "triton", "--allow-code"] if triton else []
        arena = Arena(
            folder,
            pods=len(options),
            routers=1,
            ttl=5,
            runtime_options=["--hang-timeout", "4", "--check-interval", "5"],
            router_options=["--unload-wait", "1"],
            options_of=options,
        )
        super().__init__(
            arena,
            dict.fromkeys(MLSERVERS, "mlserver_app")
            | {ONNX: ONNX_SERVER, LAST: "tritonserver" if triton else ONNX_SERVER},
            {NEIGHBOUR: neighbour(environment, shared, folder, self._beside)},
            models=list(self._of_types),
            doubled=[f"{kind}-{number}" for number in range(DOUBLED) for kind in TYPES],
            capacities=capacities,
        )

    async def __aenter__(self) -> "ServersFleet":
        await super().__aenter__()
        self._stub = inference_pb2_grpc.GRPCInferenceServiceStub(self.channel)
        timeout = aiohttp.ClientTimeout(CALL_TIMEOUT)
        self._http = aiohttp.ClientSession(self.arena.mesh.rest_url(), timeout=timeout)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._http.close()
        await super().__aexit__(*error)

    def takers(self, model: str) -> tuple[str, ...]:
        """Returns the pods that can load a model."""
        return self._takers[self.type(model)]

    def type(self, model: str) -> str:
        return self._of_types[model]

    def write(self, model: str, draw: random.Random) -> tuple[int, Path] | None:
        """Returns the number and the path of a model in the bank that was not registered yet, or None if all models of
        the type were."""
        kind = self.type(model)
        if kind not in TYPES:
            return self._written(kind)
        unused = self._unused[kind]
        if not unused:
            return None
        number = unused.pop()
        return number, self._trained[number].path

    def _written(self, kind: str) -> tuple[int, Path]:
        """Writes a linear model for ONNX Runtime or for Triton's Python backend, and runs it without a server."""
        number = len(self._trained) + 1
        folder = self._written_in / str(number)
        folder.mkdir(parents=True)
        weights = np.random.default_rng(number).uniform(0.1, 0.5, ROWS.shape[1])
        if kind == "onnx":
            path = folder / "model.onnx"
            path.write_bytes(models.linear(weights, STEP * number, width=WIDTH))
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            (answer,) = session.run(None, {"x": ROWS.astype(np.float32)})
        else:
            path = folder / "model"
            (path / "1").mkdir(parents=True)
            (path / "config.pbtxt").write_text(_CONFIG)
            (path / "1" / "model.py").write_text(_PYTHON.format(weights=weights.tolist(), bias=STEP * number))
            answer = ROWS @ weights + STEP * number
        self._trained[number] = Trained(path, kind, np.ravel(answer))
        return number, path

    def number_of(self, record: bytes) -> int:
        """Returns the number of the bank's model that a record names, or 0 if it names none."""
        found = _NUMBER.search(record)
        return int(found[1]) if found else 0

    def listens(self, pod: str, pid: int) -> bool:
        """Returns whether a server has imported its libraries, and listens."""
        if pid not in self._listening and processes.behind_port(self._port(pod, pid)) == pid:
            self._listening.add(pid)
        return pid in self._listening

    def _port(self, pod: str, pid: int) -> int:
        """Returns the port of an MLServer or Triton, or 0 if its process has ended."""
        line = command(pid)
        if pod == NEIGHBOUR:
            return self._beside if line else 0
        if found := re.search(r"--grpc-port=(\d+)", line):
            return int(found[1])
        words = line.split()
        return int(json.loads(Path(words[-1]).read_text())["grpc_port"]) if words else 0

    # --- calls

    async def ask(self, model: str, ident: str, draw: random.Random) -> Answer:
        """Calls a model with some of the ROWS, in one of the forms, and returns the outcome."""
        rows = draw.sample(range(len(ROWS)), draw.randint(1, 4))
        datatype = "FP32" if self.type(model) == "onnx" else "FP64"
        form = draw.choice(_FORMS)
        ask = self._over_rest if form == "rest" else self._over_grpc
        return await ask(model, ident, rows, datatype, raw=form == "raw")

    async def _over_grpc(self, model: str, ident: str, rows: list[int], datatype: str, *, raw: bool) -> Answer:
        request = v2.ModelInferRequest(model_name=model, id=ident)
        tensor = request.inputs.add(name="x", datatype=datatype, shape=[len(rows), ROWS.shape[1]])
        values = ROWS[rows].astype(_DTYPES[datatype])
        if raw:
            request.raw_input_contents.append(values.tobytes())
        else:
            getattr(tensor.contents, f"{datatype.lower()}_contents").extend(values.ravel().tolist())
        try:
            answer = await self._stub.ModelInfer(request, timeout=CALL_TIMEOUT)
        except grpc.aio.AioRpcError as error:
            return Answer(None, error.code().name, error.details() or "")
        return self._judged(model, ident, rows, answer.model_name, answer.id, [_values(answer)])

    async def _over_rest(self, model: str, ident: str, rows: list[int], datatype: str, *, raw: bool) -> Answer:
        tensor = {"name": "x", "datatype": datatype, "shape": [len(rows), ROWS.shape[1]], "data": ROWS[rows].tolist()}
        try:
            async with self._http.post(f"/v2/models/{model}/infer", json={"id": ident, "inputs": [tensor]}) as reply:
                told = await reply.json(content_type=None)
        except TimeoutError:
            return Answer(None, Code.DEADLINE_EXCEEDED.name, f"no answer within {CALL_TIMEOUT:g} s")
        if reply.status != 200:
            return Answer(None, Code(told["code"]).name, told["error"])
        found = [np.ravel(output["data"]) for output in told["outputs"]]
        return self._judged(model, ident, rows, told["model_name"], told.get("id", ""), found)

    def _judged(
        self, model: str, ident: str, rows: list[int], named: str, to: str, outputs: list[np.ndarray]
    ) -> Answer:
        """Returns the outcome of a call: the number of the model whose library gives the same answer, or WRONG if there
        is none."""
        if (named, to) != (model, ident):
            return Answer(WRONG, text=f"the answer is of {named!r} to {to!r}")
        (values,) = outputs
        number = int(values[0] // STEP)
        trained = self._trained.get(number)
        if trained is None or trained.type != self.type(model) or len(values) != len(rows):
            return Answer(WRONG, text=f"no model of this type answers {values}")
        expected = trained.answer[rows]
        if not np.allclose(values, expected, rtol=_RTOL, atol=0.0):
            return Answer(WRONG, text=f"{values} instead of {expected}")
        return Answer(float(number))

    async def drop(self, pod: str, models: list[str]) -> None:
        """Makes an MLServer or Triton unload models without the mesh's knowledge."""
        port = self._port(pod, self.server(pod))
        if not port:
            return
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            for model in models:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await Repository(channel).unload(model, timeout=2)


def _values(answer: v2.ModelInferResponse) -> np.ndarray:
    """Returns the values of a response's only output."""
    (output,) = answer.outputs
    if answer.raw_output_contents:
        return np.frombuffer(answer.raw_output_contents[0], _DTYPES[output.datatype])
    return np.array([*output.contents.fp32_contents, *output.contents.fp64_contents])
