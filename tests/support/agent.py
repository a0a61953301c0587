"""A real runtime pod for tests: `python -m mesh.runtime` with its model server, on loopback and free ports.

async with AgentProcess(etcd_server.settings, keys, tmp_path) as pod:
    created = await pod.register("m", models.constant(1.0))
    reply = await pod.load("m", created)
"""

import asyncio
import os
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
import numpy as np

from mesh.etcd import Etcd
from mesh.identity import rpc
from mesh.options.etcdsettings import EtcdSettings
from mesh.pb import agent_pb2, agent_pb2_grpc, inference_pb2
from mesh.process import Process, spawn
from mesh.schema.keys import Keys
from mesh.schema.records import CopyRecord, ModelRecord, PodRecord
from mesh.wire.client import Pool
from mesh.wire.framing import pack, unpack
from tests.support.waiting import until

ONE = np.ones((1, 1), np.float32)


class AgentProcess:
    """One runtime pod. `options` are further arguments of its command line. The pod may read the folder `models` next
    to its own folder."""

    def __init__(
        self,
        etcd: EtcdSettings,
        keys: Keys,
        folder: Path,
        *options: str,
        name: str = "pod-1",
        capacity: str = "64MiB",
        lease_ttl: int = 3,
    ) -> None:
        self.name = name
        self.keys = keys
        self.models = folder / "models"
        self.models.mkdir(exist_ok=True)
        self.model_dir = folder / name
        self.lines: list[str] = []
        self.etcd = Etcd(etcd)
        self._argv = [
            *(sys.executable, "-m", "mesh.runtime", "--name", name, "--base", keys.base, "--capacity", capacity),
            *("--etcd", ",".join(etcd.endpoints), "--lease-ttl", str(lease_ttl), "--log-level", "debug"),
            *("--model-dir", str(self.model_dir), "--file-root", str(self.models), "--drain-timeout", "5", *options),
        ]
        self._process: Process | None = None
        self._channel: grpc.aio.Channel | None = None
        self._pool: Pool | None = None
        self.record: PodRecord | None = None

    # --- the process ---

    @property
    def process(self) -> Process:
        assert self._process is not None, "the pod is not started"
        return self._process

    async def launch(self) -> None:
        """Starts the pod without waiting."""
        self._process = await spawn(self._argv, name=self.name, on_line=self.lines.append)

    async def start(self) -> None:
        """Starts the pod and waits until it has published its record."""
        before = self.record.incarnation if self.record else ""
        await self.launch()

        async def published() -> PodRecord | None:
            assert self.process.returncode is None, f"{self.name} ended:\n" + "\n".join(self.lines[-20:])
            record = await self.published()
            return record if record is not None and record.incarnation != before else None

        self.record = await until(published, timeout=40, why=f"{self.name} published")
        await self._disconnect()
        self._channel = grpc.aio.insecure_channel(self.record.control_address)
        self._pool = Pool(self.record.data_address, max_connections=64, connect_timeout=2.0, max_message=16 << 20)

    async def stop(self) -> int:
        """Sends SIGTERM and returns the exit status."""
        return await self.process.terminate(20.0)

    def kill9(self) -> None:
        """Kills the agent without its model server, which must end by itself."""
        self.process.send_signal(signal.SIGKILL)

    @property
    def server_pid(self) -> int:
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and _parent(entry) == self.process.pid and _is_server(entry):
                return int(entry.name)
        raise AssertionError("no model server")

    async def __aenter__(self) -> "AgentProcess":
        try:
            await self.start()
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._disconnect()
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.send_signal(signal.SIGINT)
            await self._process.terminate(10.0)
        await self.etcd.close()
        print(f"--- {self.name}", *self.lines[-80:], sep="\n")

    async def _disconnect(self) -> None:
        if self._channel is not None:
            await self._channel.close(None)
        if self._pool is not None:
            self._pool.close()

    # --- what is asked of it ---

    @property
    def stub(self) -> agent_pb2_grpc.AgentStub:
        return agent_pb2_grpc.AgentStub(self._channel)

    @property
    def shown(self) -> tuple[tuple[str, str], ...]:
        """The metadata with the token that the pod's control port demands."""
        assert self.record is not None
        return rpc.shown(self.record.token)

    async def register(self, model_id: str, content: bytes, **known: Any) -> int:
        """Writes a model's file and its record, as a router does, and returns the record's create revision."""
        path = self.models / f"{abs(hash(model_id)):x}-{os.urandom(3).hex()}.onnx"
        path.write_bytes(content)
        return await self.register_path(model_id, str(path), **known)

    async def register_path(self, model_id: str, path: str, **known: Any) -> int:
        """Writes a model's record without a file, replacing any existing record, and returns its create revision."""
        await self.etcd.delete(self.keys.model(model_id))
        return await self.etcd.put(self.keys.model(model_id), ModelRecord(type="onnx", path=path, **known).encode())

    async def model(self, model_id: str) -> ModelRecord:
        kv = await self.etcd.get(self.keys.model(model_id))
        assert kv is not None
        return ModelRecord.decode(kv.value)

    async def load(self, model_id: str, created: int = 0, *, timeout: float = 30, **fields: Any) -> agent_pb2.LoadReply:
        """Asks the agent to load a model as it is registered. By default, `created` is the create revision of its
        record."""
        kv = await self.etcd.get(self.keys.model(model_id))
        record = ModelRecord(type="onnx") if kv is None else ModelRecord.decode(kv.value)
        fields = {"model_path": record.path, "model_key": record.key, "host_bytes": record.host_bytes, **fields}
        return await self.ask(model_id, created or (kv.create_revision if kv else 1), timeout=timeout, **fields)

    async def ask(self, model_id: str, created: int, *, timeout: float = 30, **fields: Any) -> agent_pb2.LoadReply:
        """Asks the agent to load a model with the given fields, whatever etcd holds."""
        request = agent_pb2.LoadRequest(model_id=model_id, create_revision=created, model_type="onnx", **fields)
        return await self.stub.Load(request, timeout=timeout, metadata=self.shown)

    async def loaded(self, model_id: str, content: bytes, **fields: Any) -> int:
        """Registers and loads a model, which must succeed, and returns the registration's create revision."""
        created = await self.register(model_id, content)
        reply = await self.load(model_id, created, **fields)
        assert reply.WhichOneof("outcome") == "loaded", reply
        return created

    async def unload(self, model_id: str, created: int = 0) -> bool:
        """Unloads a model. Returns whether there was a copy."""
        request = agent_pb2.UnloadRequest(model_id=model_id, create_revision=created)
        return (await self.stub.Unload(request, timeout=30, metadata=self.shown)).had_copy

    async def describe(self, model_id: str = "") -> agent_pb2.DescribeReply:
        return await self.stub.Describe(agent_pb2.DescribeRequest(model_id=model_id), timeout=10, metadata=self.shown)

    async def infer(
        self,
        model_id: str,
        created: int,
        *said: bytes,
        timeout: float = 10,
        incarnation: str = "",
        **inputs: np.ndarray,
    ) -> "Answer":
        """Makes one V2 call to a copy on the data port. `said` are names of headers that are sent with the value 1."""
        assert self._pool is not None
        assert self.record is not None
        request = inference_pb2.ModelInferRequest(model_name=model_id)
        names = {"float32": "FP32", "int64": "INT64", "int32": "INT32"}
        for name, array in (inputs or {"x": ONE}).items():
            request.inputs.add(name=name, datatype=names[array.dtype.name], shape=array.shape)
            request.raw_input_contents.append(array.tobytes())
        token = f"{incarnation or self.record.incarnation}.{created}".encode()
        reply = await self._pool.call(
            b"/inference.GRPCInferenceService/ModelInfer",
            [(b"mm-model-id", model_id.encode()), (b"mesh-copy", token), *((name, b"1") for name in said)],
            pack(request.SerializeToString()),
            timeout=timeout,
        )
        return Answer(reply)

    # --- what stands in etcd and on its probe ---

    async def published(self) -> PodRecord | None:
        """Returns the record that the pod has published, or None."""
        kv = await self.etcd.get(self.keys.pod(self.name))
        return None if kv is None else PodRecord.decode(kv.value)

    async def copy(self, model_id: str) -> CopyRecord | None:
        """Returns the record of the pod's copy in etcd, or None."""
        kv = await self.etcd.get(self.keys.copy(model_id, self.name))
        return None if kv is None else CopyRecord.decode(kv.value)

    async def probe(self, path: str, port: int = 0) -> tuple[int, str]:
        """Returns the status and text of /ready, /live or /metrics. `port` is for a pod that has not published its
        record yet; if nothing listens on that port, the status is 0."""
        address = f"127.0.0.1:{port}" if port else self.record.probe_address if self.record else ""

        def get() -> tuple[int, str]:
            try:
                with urllib.request.urlopen(f"http://{address}{path}", timeout=5) as answer:
                    return answer.status, answer.read().decode()
            except urllib.error.HTTPError as error:
                return error.code, error.read().decode()
            except OSError as error:
                if not port:
                    raise
                return 0, str(error)

        return await asyncio.to_thread(get)


AnAgent = Callable[..., AgentProcess]
"""The type of the fixture `an_agent`."""


class Answer:
    """A reply of the data port: the `value` of the first output, or `code` and `text`. `not_here` and `verify_first`
    are the headers that routers act on."""

    def __init__(self, reply: Any) -> None:
        self.code: int = reply.code
        self.text: str = reply.text
        names = {name for name, _ in (*reply.headers, *reply.trailers)}
        self.not_here = b"mesh-not-here" in names
        self.verify_first = b"mesh-verify-first" in names
        self.value: float | None = None
        if reply.code == 0 and reply.frame is not None:
            response = inference_pb2.ModelInferResponse.FromString(unpack(reply.frame, reply.encoding, limit=16 << 20))
            self.value = float(np.frombuffer(response.raw_output_contents[0], np.float32)[0])

    def __repr__(self) -> str:
        return f"<Answer {self.value if self.code == 0 else f'{self.code} {self.text!r}'}>"


def _parent(entry: Path) -> int:
    try:
        fields = (entry / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] == "Z" else int(fields[1])


def _is_server(entry: Path) -> bool:
    try:
        return b"mesh.runtime.server" in (entry / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
