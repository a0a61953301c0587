"""A complete mesh whose pods each use an example runtime, as a child or a neighbour, and a client of its models."""

import os
from pathlib import Path
from typing import Any

import grpc

from mesh.process import free_port
from tests.support import exampleruntime
from tests.support.etcd import EtcdServer
from tests.support.exampleproto import PREDICT, PredictRequest, PredictResponse
from tests.support.localmesh import LocalMesh, Program, children, command
from tests.support.waiting import until

INJECTED = ("--method", "mmesh.ExamplePredictor/predict=1")


class Foreign:
    """A running mesh of example runtimes, and a client of their predictor."""

    def __init__(self, mesh: LocalMesh, diary: Path, servers: list[Program]) -> None:
        self.mesh = mesh
        self.diary = diary
        self.servers = servers  # neighbours; none if they are the pods' children
        self.predict = mesh.channel().unary_unary(
            PREDICT,
            request_serializer=PredictRequest.SerializeToString,
            response_deserializer=PredictResponse.FromString,
        )

    async def register(
        self, model_id: str, what: str = "model", *, now: bool = False, content: bytes = b"an example"
    ) -> Any:
        """Registers a model of the example runtime. `what` is the last element of its path, which says what the model
        does."""
        path = self.mesh.write(f"{model_id}.{os.urandom(3).hex()}/{what}", content)
        return await self.mesh._register(model_id, "example", path, load=now, sync=now, router=0)

    async def ask(self, model_id: str, text: str = "hello", *, timeout: float = 20.0, **request: Any) -> Any:
        """Makes one prediction, and returns the response."""
        metadata = (("mm-model-id", model_id),)
        return await self.predict(PredictRequest(text=text, **request), timeout=timeout, metadata=metadata)

    def noted(self, line: str) -> int:
        """Returns how often the runtimes have received that request."""
        return self.diary.read_text().splitlines().count(line) if self.diary.exists() else 0


def child_of(mesh: LocalMesh, module: str, pod: int = 0) -> int:
    """Returns the process id of a pod's child that runs the module, or 0 if no child does."""
    found = [pid for pid in children(mesh.pods[pod].pid) if module in command(pid).split()]
    return found[0] if found else 0


class ForeignMesh:
    """A mesh of example runtimes: `async with ForeignMesh(folder, etcd, edge="grpc", way="child-socket") as it`."""

    def __init__(
        self,
        folder: Path,
        etcd: EtcdServer,
        *options: str,
        edge: str = "envoy",
        way: str = "child-socket",
        pods: int = 1,
        onnx_pods: int = 0,
        types: str = "any",
        egress: str = "auto",
        direct: bool = True,
        **more: Any,
    ) -> None:
        """Makes a mesh whose servers get `options`. `way` says how the servers are started and reached: child-socket,
        child-port, neighbour-socket, neighbour-port, or neighbour-apart, which answers calls at another address than
        the SPI. `types` are the model types that their pods take. `egress` is the program that carries calls to the
        servers; with `direct`, relays send calls of one message themselves. `onnx_pods` is the number of additional
        ONNX pods."""
        self.diary = folder / "diary"
        said = [*(options or INJECTED), "--diary", str(self.diary)]
        self.servers: list[Program] = []
        options_of = {}
        for number in range(1, pods + 1):
            options_of[f"pod-{number}"] = ["--types", types, "--egress", egress]
            options_of[f"pod-{number}"] += [] if direct else ["--no-direct-calls"]
            if way.startswith("child"):
                listen = "unix:{socket}" if way == "child-socket" else "127.0.0.1:{port}"
                line = " ".join(exampleruntime.argv(listen, *said))
                options_of[f"pod-{number}"] += ["--server-command", line]
            else:
                path = f"/tmp/mesh-example-{os.urandom(4).hex()}"
                listen = f"127.0.0.1:{free_port()}" if way == "neighbour-port" else f"unix:{path}"
                apart = f"127.0.0.1:{free_port()}" if way == "neighbour-apart" else ""
                argv = exampleruntime.argv(listen, "--calls", apart, *said)
                self.servers.append(Program(f"server-{number}", argv, folder))
                options_of[f"pod-{number}"] += ["--server-calls", apart] if apart else []
                options_of[f"pod-{number}"] += ["--server", listen]
        for number in range(pods + 1, pods + onnx_pods + 1):
            options_of[f"pod-{number}"] = ["--capacity", "64MiB"]
        self.mesh = LocalMesh(
            folder, etcd, pods=pods + onnx_pods, edge=edge, capacity="auto", options_of=options_of, **more
        )

    async def __aenter__(self) -> Foreign:
        for server in self.servers:
            server.start()
        await self.mesh.__aenter__()
        return Foreign(self.mesh, self.diary, self.servers)

    async def __aexit__(self, *error: Any) -> None:
        try:
            await self.mesh.__aexit__(*error)
        finally:
            for server in self.servers:
                print(f"--- {server.name}\n{server.tail()}")
                server.kill9()


async def answered(it: Foreign, model_id: str) -> Any:
    """Returns the first answer of a model whose pod is restarting."""
    answer = None

    async def asked() -> bool:
        nonlocal answer
        try:
            answer = await it.ask(model_id, timeout=5)
        except grpc.aio.AioRpcError as error:
            assert error.code() in (
                grpc.StatusCode.UNAVAILABLE,
                grpc.StatusCode.DEADLINE_EXCEEDED,
                grpc.StatusCode.FAILED_PRECONDITION,
            ), error
            return False
        return True

    await until(asked, timeout=60, interval=0.2, why=f"{model_id} answers again")
    return answer
