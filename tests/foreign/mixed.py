"""A mesh of two pods with the example runtime, one as a child and one as a neighbour, and two ONNX pods.

Half of its models are of each kind. The runtime's models really take memory, and for some of them the server states a
wrong size.
"""

import contextlib
import itertools
import os
import random
import re
import struct
from pathlib import Path

import grpc

from mesh.pb import inference_pb2, modelruntime_pb2_grpc
from mesh.pb import modelruntime_pb2 as pb
from tests.foreign.fleet import CALL_TIMEOUT, ONNX_SERVER, WRONG, Answer, Fleet
from tests.support import exampleruntime, models
from tests.support.arena import Arena
from tests.support.localmesh import Program, command

CHILD, NEIGHBOUR = "pod-1", "pod-2"
FOREIGN = (CHILD, NEIGHBOUR)
ONNX = ("pod-3", "pod-4")

MIB = 1 << 20
MEAN = 4 * MIB
"""Mean size of a model of the example runtime, in bytes."""

ONNX_BYTES = 90 << 10
"""Size of one of the smallest models in the ONNX server, in bytes."""

DOUBLED = 8
"""Number of models of each kind that have two copies."""

_LIES = tuple(exampleruntime.LIES)
_INFER = "inference.GRPCInferenceService/ModelInfer"
_NUMBER = re.compile(rb"/[en]\d+\.(\d+)\.onnx")


class Mixed(Fleet):
    """The mesh: `async with Mixed(folder, count=200) as mixed`. It has room for a fifth of the `count` models of each
    kind."""

    lies = _LIES

    def __init__(self, folder: Path, *, count: int, lying: bool = True, lie: str = "", routers: int = 1) -> None:
        """Makes the mesh. With `lying`, the runtime states wrong sizes for a tenth of its models. With `lie`, it states
        this kind of wrong size for every model (`exampleruntime.LIES`)."""
        examples = [f"e{number}" for number in range(count)]
        nets = [f"n{number}" for number in range(count)]
        capacity = max(4, count // 10) * MEAN
        self._lying = lying
        self._usual_lie = lie
        self._lie = folder / "lie"
        self._numbers = itertools.count(1)
        self.tell("")
        said = ["--v2", "--allocate", "--capacity", str(capacity), "--method", f"{_INFER}=1"]
        said += ["--lie", str(self._lie), "--diary", str(folder / "diary")]
        listen = f"unix:/tmp/mesh-foreign-{os.urandom(4).hex()}"
        child = " ".join(exampleruntime.argv("unix:{socket}", *said))
        onnx = ("--capacity", f"{max(4, count // 10) * ONNX_BYTES}")
        arena = Arena(
            folder,
            pods=4,
            routers=routers,
            ttl=5,
            capacity="auto",
            runtime_options=["--hang-timeout", "4", "--check-interval", "5"],
            router_options=["--unload-wait", "1"],
            options_of={
                CHILD: ("--types", "example", "--server-command", child),
                NEIGHBOUR: ("--types", "example", "--server", listen),
                **dict.fromkeys(ONNX, onnx),
            },
        )
        servers = dict.fromkeys(FOREIGN, exampleruntime.MODULE) | dict.fromkeys(ONNX, ONNX_SERVER)
        neighbour = Program("neighbour", exampleruntime.argv(listen, *said), folder)
        super().__init__(
            arena,
            servers,
            {NEIGHBOUR: neighbour},
            models=[*examples, *nets],
            doubled=[*examples[:DOUBLED], *nets[:DOUBLED]],
            capacities=dict.fromkeys(FOREIGN, capacity),
        )

    async def __aenter__(self) -> "Mixed":
        await super().__aenter__()
        self._infer = self.channel.unary_unary(
            f"/{_INFER}",
            request_serializer=inference_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=inference_pb2.ModelInferResponse.FromString,
        )
        return self

    def tell(self, lie: str) -> None:
        self._lie.write_text(lie or self._usual_lie)

    def takers(self, model: str) -> tuple[str, ...]:
        return FOREIGN if model.startswith("e") else ONNX

    def type(self, model: str) -> str:
        return "example" if model.startswith("e") else "onnx"

    def write(self, model: str, draw: random.Random) -> tuple[int, Path]:
        number = next(self._numbers)
        if model.startswith("n"):
            return number, self.arena.mesh.write(f"{model}.{number}.onnx", models.constant(float(number)))
        size = int(MEAN * draw.uniform(0.5, 1.5))
        lie = f"_{draw.choice(_LIES)}" if self._lying and draw.random() < 0.1 else ""
        what = f"SIZE_{size}_{draw.choice((0, 5, 20))}_0{lie}"
        return number, self.arena.mesh.write(f"{model}.{number}.onnx.d/{what}", str(number).encode())

    def number_of(self, record: bytes) -> int:
        found = _NUMBER.search(record)
        return int(found[1]) if found else 0

    async def ask(self, model: str, ident: str, draw: random.Random) -> Answer:
        request = inference_pb2.ModelInferRequest(model_name=model, id=ident)
        request.inputs.add(name="x", datatype="FP32", shape=[1, 1])
        request.raw_input_contents.append(struct.pack("<f", 1.0))
        try:
            answer = await self._infer(request, timeout=CALL_TIMEOUT)
        except grpc.aio.AioRpcError as error:
            return Answer(None, error.code().name, error.details() or "")
        if (answer.model_name, answer.id) != (model, ident):
            return Answer(WRONG, text=f"the answer is of {answer.model_name!r} to {answer.id!r}")
        return Answer(struct.unpack("<f", answer.raw_output_contents[0])[0])

    async def drop(self, pod: str, models: list[str]) -> None:
        words = command(self.server(pod)).split()
        if "--listen" not in words:
            return
        async with grpc.aio.insecure_channel(words[words.index("--listen") + 1]) as channel:
            stub = modelruntime_pb2_grpc.ModelRuntimeStub(channel)
            for model in models:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await stub.unloadModel(pb.UnloadModelRequest(modelId=model), timeout=2)
