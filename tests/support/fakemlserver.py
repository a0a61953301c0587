"""A stand-in for MLServer in the test's own process: the repository extension of V2, as MLServer 1.7 answers it.

Like MLServer, it searches its whole repository for `model-settings.json` at each load, links included, loads every
model of the name that it finds, and answers NOT_FOUND if it finds none. `make test-servers` tests the adapter with the
real MLServer.
"""

import asyncio
import glob
import json
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc

from mesh.pb import inference_pb2 as v2
from mesh.pb import repository_pb2 as pb

SERVICE = "inference.GRPCInferenceService"


class FakeMLServer:
    """The server: `async with FakeMLServer(root) as server`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.loaded: dict[str, dict[str, Any]] = {}  # settings by name
        self.found: list[list[str]] = []  # the names of all models in the repository, at each load
        self.unloads: list[str] = []
        self.stated = 0  # the size that a user's code states, in bytes
        self.live = True
        self.asked = 0  # times that it was asked whether it is live
        self.unblocked = asyncio.Event()  # while it is cleared, a prediction blocks the event loop
        self.unblocked.set()
        self.fails = ""  # what loads fail with
        self.hangs = False
        self.ended: list[str] = []  # the names of models whose loads were cancelled while they hung
        self.ready = True  # whether loaded models are ready
        self.address = f"unix:{root.parent / 'fake.sock'}"
        self._server = grpc.aio.server()

    async def __aenter__(self) -> "FakeMLServer":
        answers = {
            "ServerLive": (self._live, v2.ServerLiveRequest),
            "ServerMetadata": (self._server_metadata, v2.ServerMetadataRequest),
            "ModelReady": (self._ready, v2.ModelReadyRequest),
            "ModelMetadata": (self._metadata, v2.ModelMetadataRequest),
            "RepositoryIndex": (self._index, pb.RepositoryIndexRequest),
            "RepositoryModelLoad": (self._load, pb.RepositoryModelLoadRequest),
            "RepositoryModelUnload": (self._unload, pb.RepositoryModelUnloadRequest),
        }
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                answer, kind.FromString, lambda message: message.SerializeToString()
            )
            for name, (answer, kind) in answers.items()
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        self._server.add_insecure_port(self.address)
        await self._server.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Ends the server, with its calls."""
        await self._server.stop(None)

    def settings(self) -> list[dict[str, Any]]:
        return [
            json.loads(Path(path).read_text())
            for path in glob.glob(f"{self.root}/**/model-settings.json", recursive=True)
        ]

    async def _live(self, request: Any, context: Any) -> Any:
        self.asked += 1
        await self.unblocked.wait()
        return v2.ServerLiveResponse(live=self.live)

    async def _server_metadata(self, request: Any, context: Any) -> Any:
        return v2.ServerMetadataResponse(name="mlserver", version="1.7.1")

    async def _ready(self, request: Any, context: Any) -> Any:
        return v2.ModelReadyResponse(ready=self.ready and request.name in self.loaded)

    async def _metadata(self, request: Any, context: Any) -> Any:
        if request.name not in self.loaded:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"Model {request.name} not found")
        answer = v2.ModelMetadataResponse(name=request.name)
        if self.stated:  # in field 6, as MLServer has it
            entry = v2.ModelInferRequest.ParametersEntry(key="size_bytes", value={"int64_param": self.stated})
            answer.MergeFromString(b"\x32" + bytes([entry.ByteSize()]) + entry.SerializeToString())
        return answer

    async def _index(self, request: Any, context: Any) -> Any:
        models = [pb.RepositoryIndexResponse.ModelIndex(name=one["name"]) for one in self.settings()]
        return pb.RepositoryIndexResponse(models=models)

    async def _load(self, request: Any, context: Any) -> Any:
        there = self.settings()
        self.found.append([one["name"] for one in there])
        named = [one for one in there if one["name"] == request.model_name]
        if not named:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"Model {request.model_name} not found")
        if self.hangs:
            try:
                await asyncio.Event().wait()
            finally:
                self.ended.append(request.model_name)
        if self.fails:
            await context.abort(grpc.StatusCode.INTERNAL, self.fails.format(uri=named[0]["parameters"]["uri"]))
        assert len(named) == 1, named
        self.loaded[request.model_name] = named[0]
        return pb.RepositoryModelLoadResponse()

    async def _unload(self, request: Any, context: Any) -> Any:
        self.unloads.append(request.model_name)
        if self.loaded.pop(request.model_name, None) is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"Model {request.model_name} not found")
        return pb.RepositoryModelUnloadResponse()
