"""Fixtures for tests of the model server: its parts in this process, with a real onnxruntime, and calls that the test
makes."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mesh.pb import inference_pb2 as pb
from mesh.runtime.port.copies import Copies
from mesh.runtime.server.calls.dataport import DataPort
from mesh.runtime.server.calls.runs import Runs
from mesh.runtime.server.calls.watch import CallWatch
from mesh.runtime.server.copies import ServedCopy
from mesh.runtime.server.loads.loader import Loader, Order
from mesh.runtime.server.onnx import device
from mesh.runtime.sharedmemory.board import Board
from mesh.wire import framing, headers
from tests.support.fakecalls import FakeCall
from tests.support.onnxserver import SERVICE, request

ONE = np.ones((1, 1), np.float32)


@dataclass
class Parts:
    """A model server without a separate process and without sockets."""

    folder: Path
    board: Board
    copies: Copies[ServedCopy]
    watch: CallWatch
    runs: Runs
    loader: Loader
    port: DataPort

    def write(self, name: str, content: bytes) -> str:
        """Writes a model to disk and returns its path."""
        path = self.folder / name / "model.onnx"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return str(path)

    async def load(self, name: str, content: bytes, *, token: bytes = b"", slot: int | None = None) -> ServedCopy:
        """Writes a model and loads it."""
        return await self.loader.load(Order(name, self.write(name, content), token, slot))

    def send(
        self,
        message: bytes,
        *more: tuple[bytes, bytes],
        method: str = "ModelInfer",
        deadline: float | None = None,
        seconds: float | None = None,
    ) -> FakeCall:
        """Sends a call to the data port. `deadline` is a time of the event loop's clock; `seconds` sets it relative to
        now."""
        if seconds is not None:
            deadline = asyncio.get_running_loop().time() + seconds
        call = FakeCall(SERVICE + method.encode(), list(more), framing.pack(message), deadline=deadline)
        self.port.handle(call)
        return call

    def infer(self, name: str, *, seconds: float | None = None, **inputs: np.ndarray) -> FakeCall:
        """Sends a ModelInfer call with raw contents."""
        return self.send(request(name, **inputs), (headers.MODEL_ID, name.encode()), seconds=seconds)

    def send_to(self, name: str, token: bytes, **inputs: np.ndarray) -> FakeCall:
        """Sends a ModelInfer call that is meant for one copy."""
        return self.send(request(name, **inputs), (headers.MODEL_ID, name.encode()), (headers.COPY, token))

    async def value(self, name: str) -> float:
        """Returns the output of a model that takes and gives one float."""
        (array,) = await outputs(self.infer(name, x=ONE))
        return float(array.item())


async def answered(call: FakeCall) -> FakeCall:
    """Waits until the call is answered, and returns it."""
    assert call.answered is not None
    await asyncio.wait_for(call.answered.wait(), 20)
    return call


async def reply(call: FakeCall) -> pb.ModelInferResponse:
    """Returns the reply to a call that must succeed."""
    await answered(call)
    ((code, text, frame, _, _),) = call.answers
    assert code == 0, text
    assert frame is not None
    return pb.ModelInferResponse.FromString(frame[5:])


async def outputs(call: FakeCall) -> list[np.ndarray]:
    """Returns the raw outputs of a call that must succeed."""
    dtypes: dict[str, Any] = {"FP32": np.float32, "INT64": np.int64, "FP64": np.float64}
    message = await reply(call)
    return [
        np.frombuffer(raw, dtypes[output.datatype]).reshape(output.shape)
        for output, raw in zip(message.outputs, message.raw_output_contents, strict=True)
    ]


Make = Callable[..., Parts]


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    """Makes the parts of a model server with the test's settings: `make(threads=1, timeout=0.5)`."""
    made = []

    def put(
        *,
        threads: int = 2,
        timeout: float = 20.0,
        concurrency: int = 2,
        on: device.Device = device.CPU,
        max_message: int = 1 << 20,
    ) -> Parts:
        board, copies, watch = Board.private(8), Copies(), CallWatch()
        runs = Runs(board, threads=threads)
        loader = Loader(copies, board, runs, on, timeout=timeout, concurrency=concurrency)
        port = DataPort(copies, board, runs, watch, max_message=max_message)
        made.append(Parts(tmp_path, board, copies, watch, runs, loader, port))
        return made[-1]

    yield put
    for parts in made:
        await parts.port.close()
        await parts.runs.close()
        await parts.loader.purge()
        parts.loader.close()
        parts.watch.close()


@pytest.fixture
async def parts(make: Make) -> Parts:
    """The parts of a model server with default settings."""
    return make()
