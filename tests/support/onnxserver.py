"""A real ONNX model server in a separate process, which tests drive as its agent and the routers do."""

import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np

from mesh.pb import inference_pb2, modelruntime_pb2, modelruntime_pb2_grpc
from mesh.runtime.sharedmemory.board import OPEN_ENDED, Board
from mesh.wire import framing, headers
from mesh.wire.client import Pool, Reply
from placement.fence import Mode
from tests.support.waiting import until

SERVICE = b"/inference.GRPCInferenceService/"
INCARNATION = "agent-1"

_DATATYPES = {"float32": "FP32", "float64": "FP64", "int64": "INT64", "int32": "INT32", "bool": "BOOL"}


class OnnxServer:
    """A server that is started and has been asked for its status once: `async with OnnxServer(folder) as server`.

    `module` is the module to run, so that the `twin` can replace the real server.
    """

    def __init__(self, folder: Path, *options: str, slots: int = 64, module: str = "mesh.runtime.server") -> None:
        self.module = module
        self.folder = folder
        self.options = options
        self.slots = slots
        self._short = tempfile.TemporaryDirectory(prefix="mesh-")  # unix socket paths are short
        self.spi_path = Path(self._short.name) / "spi"
        self.board_path = folder / "board"
        self.log_path = folder / "server.log"
        self.process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        self.board = Board.create(self.board_path, self.slots, incarnation=INCARNATION)
        self.board.permit(OPEN_ENDED, Mode.PROVEN)
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.disconnect()
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()
        self.board.close()
        self._short.cleanup()
        if kind is not None:
            print(self.log())

    async def start(self) -> None:
        """Starts the process. A later process uses the same use board."""
        with self.log_path.open("ab") as out:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", self.module),
                *("--spi", str(self.spi_path), "--data", "127.0.0.1:0", "--board", str(self.board_path)),
                *("--incarnation", INCARNATION, "--log-level", "debug"),
                *self.options,
                stdout=out,
                stderr=out,
            )
        self.channel = grpc.aio.insecure_channel(f"unix:{self.spi_path}")
        self.spi = modelruntime_pb2_grpc.ModelRuntimeStub(self.channel)
        self.status, self.about = await self.runtime_status()
        self.pool = Pool(self.about["mesh-data"], max_connections=64, connect_timeout=5.0, max_message=64 << 20)

    async def runtime_status(self) -> tuple[Any, dict[str, str]]:
        """Returns the server's status and the trailing metadata. The request makes the server drop its models."""
        call = self.spi.runtimeStatus(modelruntime_pb2.RuntimeStatusRequest(), wait_for_ready=True, timeout=20)
        status = await call
        return status, dict(await call.trailing_metadata())

    async def disconnect(self) -> None:
        self.pool.close()
        await self.channel.close()

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    async def kill9(self) -> None:
        """Sends SIGKILL to the process, and waits for its end."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        await self.process.wait()
        await self.disconnect()

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def resident(self) -> int:
        """Returns the resident memory of the process, in bytes, without file-backed memory."""
        _, total, shared, *_ = Path(f"/proc/{self.pid}/statm").read_text().split()
        return (int(total) - int(shared)) * os.sysconf("SC_PAGE_SIZE")

    def write(self, name: str, content: bytes) -> Path:
        """Writes a file into a separate folder, as the puller lays files out."""
        path = self.folder / "models" / name / "model.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    # -- the SPI

    def token(self, revision: int) -> str:
        return f"{INCARNATION}.{revision}"

    async def load(
        self,
        name: str,
        content: bytes | Path,
        *,
        slot: int | None = None,
        revision: int | None = None,
        timeout: float = 20,
    ) -> dict[str, int]:
        """Loads a model and returns its host and device bytes. Slot and revision may be omitted, as by an agent that
        knows neither slots nor tokens."""
        path = content if isinstance(content, Path) else self.write(name, content)
        metadata = []
        if revision is not None:
            metadata.append((headers.SPI_COPY, self.token(revision)))
        if slot is not None:
            metadata.append((headers.SPI_SLOT, str(slot)))
        request = modelruntime_pb2.LoadModelRequest(modelId=name, modelType="onnx", modelPath=str(path))
        call = self.spi.loadModel(request, metadata=metadata, timeout=timeout)
        answer = await call
        sizes = dict(await call.trailing_metadata())
        assert answer.sizeInBytes == int(sizes["mesh-host-bytes"]) + int(sizes["mesh-device-bytes"])
        return {"host": int(sizes["mesh-host-bytes"]), "device": int(sizes["mesh-device-bytes"])}

    async def unload(self, name: str, *, revision: int | None = None, timeout: float = 20) -> None:
        metadata = [] if revision is None else [(headers.SPI_COPY, self.token(revision))]
        request = modelruntime_pb2.UnloadModelRequest(modelId=name)
        await self.spi.unloadModel(request, metadata=metadata, timeout=timeout)

    # -- the data port

    async def call(
        self, method: str, message: bytes, *, timeout: float = 10, metadata: Iterable[tuple[bytes, bytes]] = ()
    ) -> Reply:
        return await self.pool.call(SERVICE + method.encode(), list(metadata), framing.pack(message), timeout=timeout)

    async def infer(
        self, name: str, *, revision: int | None = None, timeout: float = 10, **inputs: np.ndarray
    ) -> Reply:
        metadata = [(headers.MODEL_ID, name.encode())]
        if revision is not None:
            metadata.append((headers.COPY, self.token(revision).encode()))
        return await self.call("ModelInfer", request(name, **inputs), timeout=timeout, metadata=metadata)

    async def value(self, name: str, *, revision: int | None = None) -> float:
        """Returns the answer of `models.constant`, or of any model that takes one float and answers one."""
        reply = await self.infer(name, revision=revision, x=np.ones((1, 1), np.float32))
        assert reply.code == 0, reply.text
        return float(arrays(reply)["y"].item())

    async def running(self, slot: int) -> None:
        """Waits until a call runs in the model of that slot."""
        await until(lambda: self.board.read(slot).running, why=f"a call runs in slot {slot}")


def request(name: str, **inputs: np.ndarray) -> bytes:
    """Returns an encoded ModelInferRequest with raw contents."""
    message = inference_pb2.ModelInferRequest(model_name=name, id="42")
    for tensor, array in inputs.items():
        message.inputs.add(name=tensor, datatype=_DATATYPES[array.dtype.name], shape=array.shape)
        message.raw_input_contents.append(array.tobytes())
    return message.SerializeToString()


def response(reply: Reply) -> inference_pb2.ModelInferResponse:
    assert reply.code == 0, reply.text
    assert reply.frame is not None
    return inference_pb2.ModelInferResponse.FromString(framing.unpack(reply.frame, limit=64 << 20))


def arrays(reply: Reply) -> dict[str, np.ndarray]:
    message = response(reply)
    dtypes = {datatype: dtype for dtype, datatype in _DATATYPES.items()}
    return {
        output.name: np.frombuffer(raw, dtypes[output.datatype]).reshape(output.shape)
        for output, raw in zip(message.outputs, message.raw_output_contents, strict=True)
    }
