"""A complete mesh of real processes for the system tests: etcd, runtime pods and routers, each of which can be killed.

Every process is started as a user would start it (`python -m router`, `python -m mesh.runtime`), on loopback and a free
port. Its output is kept, and printed when a test fails.
"""

import asyncio
import json
import os
import signal
import ssl
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from mesh.pb import inference_pb2, modelmesh_pb2, modelmesh_pb2_grpc
from mesh.process import free_port, tethered
from tests.support import twin
from tests.support.etcd import EtcdServer
from tests.support.waiting import until

LEASE_TTL = 3
"""Lease time to live, in seconds: short, so that a test of a lost lease takes seconds; etcd grants no less than about
2."""


STOP_TIMEOUT = 40.0
"""Seconds in which a process ends after SIGTERM: longer than the time-out of 20 s (`--drain-timeout`) for which routers
and pods wait for calls and loads under way."""


class Program:
    """One child process, which writes its output to a file."""

    def __init__(self, name: str, argv: list[str], folder: Path) -> None:
        self.name = name
        self.argv = argv
        self.log = folder / f"{name}.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the process, or restarts it after it ended."""
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                tethered(self.argv),
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": _searched()},
            )

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def signal(self, number: int) -> None:
        """Sends a signal to the process, but not to its children."""
        assert self.process is not None
        self.process.send_signal(number)

    def kill9(self) -> None:
        """Sends SIGKILL to the process, and reaps it."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    async def stop(self, timeout: float = STOP_TIMEOUT) -> int:
        """Sends SIGTERM and returns the exit status. If the process does not end in `timeout` seconds, kills it and
        raises AssertionError."""
        if self.process is None or self.process.poll() is not None:
            return self.process.returncode if self.process else 0
        self.process.terminate()
        try:
            return await asyncio.to_thread(self.process.wait, timeout)
        except subprocess.TimeoutExpired:
            self.kill9()
            raise AssertionError(f"{self.name} did not end within {timeout} s of SIGTERM:\n{self.tail()}") from None

    def tail(self, lines: int = 25) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.exists() else ""


def _searched() -> str:
    """Returns where Python searches for modules. A pod starts its `twin` without the current folder, and `twin` is not
    installed."""
    root = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), root)))


def children(pid: int) -> list[int]:
    """Returns the ids of a process's direct children."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == pid and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def command(pid: int) -> str:
    """Returns the command line of a process, or nothing if the process has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


class Reply:
    def __init__(self, status: int, body: bytes, headers: Any) -> None:
        self.status = status
        self.body = body
        self.headers = headers

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class LocalMesh:
    """A complete mesh of real processes: `async with LocalMesh(folder, etcd, pods=3) as mesh: ...`."""

    def __init__(
        self,
        folder: Path,
        etcd: EtcdServer,
        *,
        pods: int = 2,
        routers: int = 1,
        edge: str = "envoy",
        capacity: str = "64MiB",
        base: str | None = None,
        log_level: str = "debug",
        runtime_options: Iterable[str] = (),
        router_options: Iterable[str] = (),
        labels: Mapping[str, str] | None = None,
        options_of: Mapping[str, Iterable[str]] | None = None,
        trust: ssl.SSLContext | None = None,
        key: str = "",
        fake: bool = False,
    ) -> None:
        """Makes a mesh. `labels` are the pods' labels by pod name, separated by commas. `options_of` are further
        options of single pods and routers. With `trust` the routers speak TLS. With `fake` the pods' model servers are
        `twin`s. `key` is the API key of REST calls that name no other key."""
        self.folder = folder
        self.key = key
        self.etcd = etcd
        self.edge = edge
        self.capacity = capacity
        self.log_level = log_level
        self.base = base or f"test/{os.urandom(4).hex()}"
        self.models = folder / "models"
        self.models.mkdir(parents=True, exist_ok=True)
        self.runtime_options = list(runtime_options)
        self.router_options = list(router_options)
        self.labels = labels or {}
        self.options_of = options_of or {}
        self.trust = trust
        self.server = twin.MODULE if fake else "mesh.runtime.server"
        self.pods = [self._pod(f"pod-{number}") for number in range(1, pods + 1)]
        self.routers = [self._router(f"router-{number}") for number in range(1, routers + 1)]
        self.channels: list[grpc.aio.Channel] = []

    def _common(self) -> list[str]:
        return ["--base", self.base, "--etcd", self.etcd.endpoint, "--log-level", self.log_level]

    def _pod(self, name: str) -> Program:
        argv = [sys.executable, "-m", "mesh.runtime", "--name", name, "--capacity", self.capacity]
        argv += ["--data", "127.0.0.1:0", "--control", "127.0.0.1:0", "--probe", "127.0.0.1:0"]
        argv += ["--model-dir", str(self.folder / name), "--file-root", str(self.models), "--http-allow-private"]
        argv += ["--lease-ttl", str(LEASE_TTL), "--server-module", self.server, *self._common(), *self.runtime_options]
        if name in self.labels:
            argv += ["--labels", self.labels[name]]
        argv += self.options_of.get(name, ())
        return Program(name, argv, self.folder)

    def _router(self, name: str) -> Program:
        self.ports = getattr(self, "ports", {})
        self.ports[name] = (free_port(), free_port(), free_port())
        port, rest, probe = self.ports[name]
        argv = [sys.executable, "-m", "router", "--name", name, "--listen", f"127.0.0.1:{port}", "--edge", self.edge]
        argv += ["--rest-listen", f"127.0.0.1:{rest}", "--probe", f"127.0.0.1:{probe}"]
        argv += [*self._common(), *self.router_options, *self.options_of.get(name, ())]
        return Program(name, argv, self.folder)

    def add_pod(self) -> Program:
        """Adds one more pod, without starting it."""
        self.pods.append(self._pod(f"pod-{len(self.pods) + 1}"))
        return self.pods[-1]

    def grpc_address(self, router: int = 0) -> str:
        """Returns host:port for gRPC clients."""
        return f"127.0.0.1:{self.ports[self.routers[router].name][0]}"

    def rest_url(self, router: int = 0) -> str:
        """Returns the base URL for REST clients. REST shares gRPC's port behind Envoy, and has a separate port with
        grpc.aio."""
        name = self.routers[router].name
        port, rest, _ = self.ports[name]
        scheme = "http" if self.trust is None else "https"
        envoy = self.edge == "envoy" and "grpc" not in self.options_of.get(name, ())
        return f"{scheme}://127.0.0.1:{port if envoy else rest}"

    def probe_url(self, router: int = 0) -> str:
        return f"http://127.0.0.1:{self.ports[self.routers[router].name][2]}"

    async def __aenter__(self) -> "LocalMesh":
        try:
            for program in [*self.pods, *self.routers]:
                program.start()
            await self.ready()
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def ready(self, *, pods: int | None = None) -> None:
        """Waits until every router is ready and sees all pods, or at least `pods` of them."""
        for number, router in enumerate(self.routers):
            await until(
                lambda number=number: self._sees(number, len(self.pods) if pods is None else pods),
                timeout=100,  # a busy machine starts the dozen processes slowly
                interval=0.1,
                why=lambda router=router: "\n".join(  # type: ignore[misc]
                    [f"{router.name} ready, with its pods:", *(p.tail() for p in [router, *self.pods])]
                ),
            )

    async def _sees(self, router: int, pods: int) -> bool:
        for program in [self.routers[router]]:
            assert program.process is not None
            assert program.process.poll() is None, f"{program.name} ended:\n{program.tail()}"
        try:
            if (await self.get(f"{self.probe_url(router)}/ready")).status != 200:
                return False
            found = (await self.rest("GET", "/mesh/v1/pods", router=router)).json["pods"]
        except (OSError, KeyError, ValueError):
            return False
        return sum(1 for pod in found if pod["state"] == "ready" and not pod["suspect"]) >= pods

    async def __aexit__(self, *_: object) -> None:
        for channel in self.channels:
            await channel.close()
        try:
            for programs in (
                self.routers,
                self.pods,
            ):  # routers first, so that draining pods do not hand over their models
                ended = await asyncio.gather(*(program.stop() for program in programs), return_exceptions=True)
                for error in ended:
                    if isinstance(error, BaseException):
                        raise error
        finally:
            if self.log_level == "debug":
                for program in [*self.routers, *self.pods]:
                    print(f"--- {program.name}\n{program.tail(60)}")

    # -- clients ---------------------------------------------------------------------------------------------------

    async def get(self, url: str) -> Reply:
        return await asyncio.to_thread(self._request, "GET", url, None, {}, 30)

    async def rest(
        self, method: str, path: str, body: Any = None, *, router: int = 0, headers: dict[str, str] | None = None
    ) -> Reply:
        """Makes a REST call. A body that is not bytes is sent as JSON."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        return await asyncio.to_thread(self._request, method, self.rest_url(router) + path, data, headers or {}, 60)

    def _request(self, method: str, url: str, data: bytes | None, headers: dict[str, str], timeout: float) -> Reply:
        headers = {"Content-Type": "application/json"} | headers
        if self.key:
            headers = {"Authorization": f"Bearer {self.key}"} | headers
        request = urllib.request.Request(url, data=data, method=method, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout, context=self.trust) as answer:
                return Reply(answer.status, answer.read(), answer.headers)
        except urllib.error.HTTPError as error:
            return Reply(error.code, error.read(), error.headers)

    def channel(self, router: int = 0) -> grpc.aio.Channel:
        """Returns a gRPC channel to a router, which is closed with the mesh."""
        self.channels.append(grpc.aio.insecure_channel(self.grpc_address(router)))
        return self.channels[-1]

    def management(self, router: int = 0) -> modelmesh_pb2_grpc.ModelMeshStub:
        return modelmesh_pb2_grpc.ModelMeshStub(self.channel(router))

    def write(self, name: str, content: bytes) -> Path:
        """Writes a model file under the root that the pods may read."""
        path = self.models / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".new")
        temporary.write_bytes(content)
        temporary.replace(path)
        return path

    async def register(
        self, model_id: str, content: bytes, *, load: bool = False, router: int = 0, type: str = "onnx"
    ) -> Any:
        """Writes a model file and registers it. With `load`, waits until the model is loaded."""
        path = self.write(f"{urllib.parse.quote(model_id, safe='')}.{os.urandom(3).hex()}.onnx", content)
        return await self._register(model_id, type, path, load=load, sync=load, router=router)

    async def register_fake(
        self,
        model_id: str,
        *,
        type: str = "fake",
        now: bool = False,
        sync: bool = True,
        last_used_ms: int = 0,
        router: int = 0,
        **words: object,
    ) -> Any:
        """Writes and registers a model of the `twin`, described by the given words. `now` loads it at once, `sync`
        waits for the load."""
        name = twin.name(**words)
        path = self.write(f"{urllib.parse.quote(model_id, safe='')}.{os.urandom(3).hex()}/{name}", twin.content(name))
        return await self._register(
            model_id, type, path, load=now, sync=now and sync, router=router, last_used_ms=last_used_ms
        )

    async def _register(
        self, model_id: str, type: str, path: Path, *, load: bool, sync: bool, router: int, last_used_ms: int = 0
    ) -> Any:
        info = modelmesh_pb2.ModelInfo(type=type, path=path.as_uri())
        request = modelmesh_pb2.RegisterModelRequest(
            modelId=model_id, modelInfo=info, loadNow=load, sync=sync, lastUsedTime=last_used_ms
        )
        # A cold start that finds no pod gives up after 30 s and says why; on a busy machine, a load takes as long.
        return await self.management(router).registerModel(request, timeout=60)

    async def status(self, model_id: str, router: int = 0) -> dict[str, Any]:
        return (await self.rest("GET", f"/mesh/v1/models/{urllib.parse.quote(model_id, safe='')}", router=router)).json

    async def stats(self, router: int = 0) -> dict[str, Any]:
        return (await self.rest("GET", "/mesh/v1/stats", router=router)).json

    def server_pid(self, pod: Program) -> int:
        (server,) = [pid for pid in children(pod.pid) if self.server in command(pid).split()]
        return server


def infer_request(model_id: str, **inputs: np.ndarray) -> inference_pb2.ModelInferRequest:
    """Returns a V2 request with raw contents."""
    request = inference_pb2.ModelInferRequest(model_name=model_id)
    names = {"float32": "FP32", "int64": "INT64", "float64": "FP64", "int32": "INT32", "bool": "BOOL"}
    for name, array in inputs.items():
        request.inputs.add(name=name, datatype=names[array.dtype.name], shape=array.shape)
        request.raw_input_contents.append(array.tobytes())
    return request


PAUSE = 0.02
"""Seconds between two calls of a caller that only keeps a mesh busy, which leaves CPU time to the processes under test
that start, load and drain."""


class Client:
    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._infer = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=lambda request: request.SerializeToString(),
            response_deserializer=inference_pb2.ModelInferResponse.FromString,
        )

    async def infer(
        self, model_id: str, *, timeout: float = 30, wait_for_ready: bool = False, **inputs: np.ndarray
    ) -> list[np.ndarray]:
        """Calls a model, and returns the outputs as arrays."""
        request = infer_request(model_id, **inputs)
        response = await self._infer(request, timeout=timeout, wait_for_ready=wait_for_ready)
        kinds = {"FP32": np.float32, "INT64": np.int64, "FP64": np.float64, "INT32": np.int32, "BOOL": np.bool_}
        return [
            np.frombuffer(raw, kinds[output.datatype]).reshape(tuple(output.shape))
            for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
        ]


def freeze(pid: int) -> None:
    """Stops a process (SIGSTOP), as if its machine had stalled."""
    os.kill(pid, signal.SIGSTOP)


def thaw(pid: int) -> None:
    os.kill(pid, signal.SIGCONT)
