"""A fake model server without models, which serves the SPI in the test's process.

The test decides what a path means (`sizes`, `failures`) and can make loads and unloads wait (`hold`). The server
records the requests. Like a foreign server, it writes no use board.

Use it for tests of single parts of the agent. For tests of what callers see, use `twin`, a process with the data port
and use board of the real server.
"""

import asyncio
import itertools
import tempfile
from pathlib import Path
from typing import Any

import grpc

from mesh.pb import modelruntime_pb2 as pb
from mesh.pb import modelruntime_pb2_grpc
from mesh.runtime.servers.spi import Spi

_numbers = itertools.count(1)


class FakeModelServer(modelruntime_pb2_grpc.ModelRuntimeServicer):
    """A fake server: `async with FakeModelServer() as server: await server.spi.load(...)`. It also provides what the
    agent's loads need from a server process."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}  # sizes by path; 1000 for other paths
        self.failures: dict[str, tuple[grpc.StatusCode, str]] = {}  # by path
        self.notes: dict[str, str] = {}  # by path: the note that comes with the model's load
        self.unpacked: dict[str, int] = {}  # by path: bytes of the files that the load unpacks
        self.stuck: set[str] = set()  # paths whose failed loads are reported as stuck
        self.on_device = False  # True if models take device memory and no host memory
        self.in_trailers = True  # whether loads return sizes, as the ONNX server's do, or `modelSize` returns them
        self.models: dict[str, str] = {}  # id -> path, of what is loaded
        self.asked: list[tuple[str, str]] = []  # ("load" or "unload", id), in the order they arrived
        self.told: dict[str, dict[str, str]] = {}  # id -> metadata of its load
        self.lives = 1
        self.why_down = ""
        self._held: dict[tuple[str, str], asyncio.Event] = {}
        self._waiting: list[asyncio.Event] = []
        self._folder = tempfile.TemporaryDirectory(prefix="spi-", dir="/tmp")
        self._socket = Path(self._folder.name) / str(next(_numbers))
        self.server: grpc.aio.Server | None = None
        self.spi = Spi(self._socket)

    async def __aenter__(self) -> "FakeModelServer":
        self.server = grpc.aio.server()
        modelruntime_pb2_grpc.add_ModelRuntimeServicer_to_server(self, self.server)
        self.server.add_insecure_port(f"unix:{self._socket}")
        await self.server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        for event in self._waiting:
            event.set()
        await self.spi.close()
        assert self.server is not None
        await self.server.stop(None)
        self._folder.cleanup()

    # --- what a load needs of the agent's minder

    async def ready(self, timeout: float) -> Spi | None:
        return None if self.why_down else self.spi

    async def died(self, life: int, timeout: float) -> bool:
        return self.lives != life

    # --- steering

    def hold(self, what: str, model_id: str) -> asyncio.Event:
        """Makes the next `load` or `unload` of the id wait for the event."""
        event = self._held[what, model_id] = asyncio.Event()
        return event

    async def _wait(self, what: str, model_id: str) -> None:
        self.asked.append((what, model_id))
        event = self._held.pop((what, model_id), None)
        if event is not None:
            self._waiting.append(event)
            await event.wait()

    # --- the SPI

    async def loadModel(self, request: Any, context: Any) -> Any:
        self.told[request.modelId] = dict(context.invocation_metadata())
        await self._wait("load", request.modelId)
        if request.modelPath in self.failures:
            stuck = (("mesh-stuck", "1"),) if request.modelPath in self.stuck else ()
            await context.abort(*self.failures[request.modelPath], stuck)
        self.models[request.modelId] = request.modelPath
        size = self.sizes.get(request.modelPath, 1000)
        if self.in_trailers:
            host, device = (0, size) if self.on_device else (size, 0)
            sizes = (("mesh-host-bytes", str(host)), ("mesh-device-bytes", str(device)))
            note = self.notes.get(request.modelPath)
            disk = (("mesh-disk-bytes", str(self.unpacked.get(request.modelPath, 0))),)
            context.set_trailing_metadata((*sizes, *disk, *((("mesh-note-bin", note.encode()),) if note else ())))
            return pb.LoadModelResponse(sizeInBytes=size)
        return pb.LoadModelResponse()

    async def unloadModel(self, request: Any, context: Any) -> Any:
        await self._wait("unload", request.modelId)
        token = dict(context.invocation_metadata()).get("mesh-copy")
        if token in (None, self.told.get(request.modelId, {}).get("mesh-copy")):  # otherwise another copy is loaded now
            self.models.pop(request.modelId, None)
        return pb.UnloadModelResponse()

    async def modelSize(self, request: Any, context: Any) -> Any:
        if request.modelId not in self.models:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such model")
        return pb.ModelSizeResponse(sizeInBytes=self.sizes.get(self.models[request.modelId], 1000))

    async def runtimeStatus(self, request: Any, context: Any) -> Any:
        self.models.clear()
        kind = pb.RuntimeStatusResponse
        return kind(status=kind.READY, capacityInBytes=1 << 30, maxLoadingConcurrency=2, modelLoadingTimeoutMs=1000)
