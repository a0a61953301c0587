"""A stand-in for Triton in the test's own process: the repository extension of V2, as Triton 2.51 answers it.

Like Triton, it knows a model by its folder, answers an unload before the model is gone, and lists every folder of its
repository. It reads descriptions with Protobuf's own parser and Triton's own schema, as Triton does. `make
test-servers` tests the adapter with the real Triton.
"""

import asyncio
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from mesh.pb import inference_pb2 as v2
from mesh.pb import repository_pb2 as pb

SERVICE = "inference.GRPCInferenceService"


class FakeTriton:
    """The server: `async with FakeTriton(root) as server`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.loaded: dict[str, Any] = {}  # descriptions by name
        self.going: dict[str, int] = {}  # by name: looks at the index until an unloaded model is gone
        self.unloads: list[tuple[str, bool]] = []  # names, and whether dependents were to be unloaded too
        self.looks = 0
        self.live = True
        self.slow = 0  # looks at the index for which an unload goes on
        self.fails = ""  # what loads fail with
        self.hangs = False
        self.stuck = False  # unloads are not answered, as by a Triton whose load of the model does not end
        self.ended: list[str] = []  # the names of models whose loads were cancelled while they hung
        self.address = f"unix:{root.parent / 'fake.sock'}"
        self._server = grpc.aio.server()

    async def __aenter__(self) -> "FakeTriton":
        answers = {
            "ServerLive": (self._live, v2.ServerLiveRequest),
            "ServerMetadata": (self._server_metadata, v2.ServerMetadataRequest),
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
        await self._server.stop(None)

    async def _live(self, request: Any, context: Any) -> Any:
        return v2.ServerLiveResponse(live=self.live)

    async def _server_metadata(self, request: Any, context: Any) -> Any:
        return v2.ServerMetadataResponse(name="triton", version="2.51.0")

    async def _metadata(self, request: Any, context: Any) -> Any:
        if request.name not in self.loaded:
            await context.abort(
                grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{request.name}' has no available versions"
            )
        return v2.ModelMetadataResponse(name=request.name)

    async def _index(self, request: Any, context: Any) -> Any:
        self.looks += 1
        index = pb.RepositoryIndexResponse.ModelIndex
        models = [index(name=path.name) for path in self.root.iterdir()]
        models += [index(name=name, version="1", state="READY") for name in self.loaded]
        models += [index(name=name, version="1", state="UNLOADING") for name in self.going]
        for name in list(self.going):
            self.going[name] -= 1
            if self.going[name] <= 0:
                del self.going[name]
        return pb.RepositoryIndexResponse(models=models)

    async def _load(self, request: Any, context: Any) -> Any:
        folder = self.root / request.model_name
        if not folder.is_dir():
            text = f"failed to load '{request.model_name}', failed to poll from model repository"
            await context.abort(grpc.StatusCode.INTERNAL, text)
        if self.hangs:
            try:
                await asyncio.Event().wait()
            finally:
                self.ended.append(request.model_name)
        if self.fails:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, self.fails.format(folder=folder, name=folder.name))
        config = model_config_pb2.ModelConfig()
        file = folder / "config.pbtxt"
        if file.exists():
            text_format.Parse(file.read_text(), config)
        assert config.name in ("", folder.name)
        assert any(entry.name.isdigit() and entry.is_dir() for entry in folder.iterdir()), "no version is available"
        self.loaded[request.model_name] = config
        return pb.RepositoryModelLoadResponse()

    async def _unload(self, request: Any, context: Any) -> Any:
        self.unloads.append((request.model_name, request.parameters["unload_dependents"].bool_param))
        if self.stuck:
            await asyncio.Event().wait()
        if self.loaded.pop(request.model_name, None) is not None and self.slow:
            self.going[request.model_name] = self.slow
        return pb.RepositoryModelUnloadResponse()
