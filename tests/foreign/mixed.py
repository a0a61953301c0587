"""A mesh of two pods beside the example runtime, one as a child and one as a neighbour, and two ONNX pods.

Its models are of both kinds, half each. Each answers one number, which no other registration answers. The runtime's
models really take memory, and some of them are stated with a wrong size.
"""

import contextlib
import os
import random
import signal
from pathlib import Path
from typing import Any

import grpc

from mesh.host import processes
from mesh.pb import modelruntime_pb2 as pb
from mesh.pb import modelruntime_pb2_grpc
from tests.support import exampleruntime, models
from tests.support.arena import Arena
from tests.support.localmesh import Program, command

CHILD, NEIGHBOUR = "pod-1", "pod-2"
FOREIGN = (CHILD, NEIGHBOUR)
ONNX = ("pod-3", "pod-4")

MIB = 1 << 20
MEAN = 4 * MIB
"""Mean size of a model of the example runtime."""

ONNX_BYTES = 90 << 10
"""Size of one of the smallest models in the ONNX server."""

_LIES = tuple(exampleruntime.LIES)
_INFER = "inference.GRPCInferenceService/ModelInfer"


class Mixed:
    """The mesh: `async with Mixed(folder, count=200) as mixed`. A fifth of `count` models of each kind fits."""

    def __init__(self, folder: Path, *, count: int, lying: bool = True, lie: str = "", routers: int = 1) -> None:
        """Makes the mesh. If `lying`, a tenth of the runtime's models state wrong sizes; with `lie`, its servers tell
        that lie of every model (`exampleruntime.LIES`)."""
        self.examples = [f"e{number}" for number in range(count)]
        self.nets = [f"n{number}" for number in range(count)]
        self.capacity = max(4, count // 10) * MEAN  # of each of the two pods
        self._lying = lying
        self._usual_lie = lie
        self._lie = folder / "lie"
        self.tell("")
        self.diary = folder / "diary"
        said = ["--v2", "--allocate", "--capacity", str(self.capacity), "--method", f"{_INFER}=1"]
        said += ["--lie", str(self._lie), "--diary", str(self.diary)]
        listen = f"unix:/tmp/mesh-foreign-{os.urandom(4).hex()}"
        child = " ".join(exampleruntime.argv("unix:{socket}", *said))
        self.neighbour = Program("neighbour", exampleruntime.argv(listen, *said), folder)
        onnx = ("--capacity", f"{max(4, count // 10) * ONNX_BYTES}")
        self.arena = Arena(
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
        self._bases: dict[int, int] = {}  # memory of servers without models, by process id
        self.most: dict[str, int] = dict.fromkeys(FOREIGN, 0)  # memory beyond the base

    async def __aenter__(self) -> "Mixed":
        self.neighbour.start()
        try:
            await self.arena.__aenter__()
        except BaseException:
            self.neighbour.kill9()
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        try:
            await self.arena.__aexit__(*error)
        finally:
            self.neighbour.kill9()
            print(f"--- neighbour\n{self.neighbour.tail()}")

    # --- models

    def tell(self, lie: str) -> None:
        """Makes the servers tell that lie of all loads from now on, or what they usually tell."""
        self._lie.write_text(lie or self._usual_lie)

    def kind(self, model: str) -> str:
        """Returns the type of a model."""
        return "example" if model.startswith("e") else "onnx"

    def write(self, model: str, number: int, draw: random.Random) -> Path:
        """Writes the file of one registration, whose model answers that number."""
        if model.startswith("n"):
            return self.arena.mesh.write(f"{model}.{number}.onnx", models.constant(float(number)))
        size = int(MEAN * draw.uniform(0.5, 1.5))
        lie = f"_{draw.choice(_LIES)}" if self._lying and draw.random() < 0.1 else ""
        what = f"SIZE_{size}_{draw.choice((0, 5, 20))}_0{lie}"
        return self.arena.mesh.write(f"{model}.{number}.onnx.d/{what}", str(number).encode())

    # --- processes

    def server(self, pod: str) -> int:
        """Returns the process id of a pod's model server, or 0 while there is none."""
        if pod in ONNX:
            found = self.arena.servers(pod)
        elif pod == CHILD:
            found = self.arena.below(pod, exampleruntime.MODULE)
        else:
            process = self.neighbour.process
            found = [process.pid] if process is not None and process.poll() is None else []
        return found[0] if found else 0

    def relay(self, pod: str) -> int:
        """Returns the process id of a pod's relay, or 0 while there is none."""
        found = self.arena.below(pod, "mesh.runtime.relay")
        return found[0] if found else 0

    def kill(self, pid: int) -> None:
        """Kills a process if it still runs."""
        if pid == self.neighbour.pid and self.server(NEIGHBOUR):
            self.neighbour.kill9()
        elif pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def look(self) -> None:
        """Notes how much memory the example runtimes take."""
        for pod in FOREIGN:
            if (pid := self.server(pod)) and (used := processes.private_bytes(pid)):
                base = self._bases[pid] = min(used, self._bases.get(pid, used))
                self.most[pod] = max(self.most[pod], used - base)

    async def forget(self, pod: str, ids: list[str]) -> None:
        """Makes a server drop models behind the mesh's back."""
        words = command(self.server(pod)).split()
        if "--listen" not in words:
            return
        async with grpc.aio.insecure_channel(words[words.index("--listen") + 1]) as channel:
            stub = modelruntime_pb2_grpc.ModelRuntimeStub(channel)
            for model in ids:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await stub.unloadModel(pb.UnloadModelRequest(modelId=model), timeout=2)

    async def figures(self) -> list[dict[str, Any]]:
        """Returns the pods as the mesh shows them."""
        return (await self.arena.mesh.rest("GET", "/mesh/v1/pods")).json["pods"]
