"""The adapter for Triton in explicit mode, which loads models from its repository folder when its API says so.

Triton knows a model by the name of its folder. The Python backend starts a shell with that name, and Triton takes
slashes in it for folders within each other, so only ids without special characters are names as they are. Other models
have a digest as their name. The relay writes it into requests, and the id into replies.

Triton answers an unload before the model is gone, so this module waits until the index of the repository says so.
"""

import asyncio
import re
import threading
from functools import partial
from pathlib import Path

import grpc

from mesh.pb import modelruntime_pb2 as pb
from mesh.runtime.relay.adapters import contents, keys, readiness, refusals, schemas, sizes, tritonlayout
from mesh.runtime.relay.adapters.folders import Folders, ModelFolders, plain
from mesh.runtime.relay.adapters.repository import Repository
from mesh.runtime.relay.control import Trailers
from mesh.statuses import MeshError
from mesh.telemetry import logs

log = logs.get(__name__)

_PLAIN = re.compile(r"(?![0-9a-f]{32}$)[A-Za-z0-9][A-Za-z0-9._-]{0,127}")  # ids that are names as they are
_ACTIVE = frozenset(("READY", "LOADING"))  # states of versions
_HELD = _ACTIVE | {"UNLOADING"}
_LOADS = 2  # at a time, as in ModelMesh
_GONE = 5.0  # seconds for a model to go: one whose process has died stays UNLOADING, though it can be loaded again
_FIRST, _LONGEST = 0.01, 0.5  # seconds between looks at a model that is being unloaded

_METHODS = {f"inference.GRPCInferenceService/{name}": [1] for name in ("ModelInfer", "ModelMetadata", "ModelReady")}


class Triton:
    """The control of one Triton."""

    def __init__(self, channel: grpc.aio.Channel, root: Path, *, load_timeout: float, allow_code: bool) -> None:
        """Makes the control of a server whose repository is the folder `models` in `root`. `load_timeout` is in
        seconds."""
        self.former = False
        self.takes_versions = False
        self._repository = Repository(channel)
        self._folders = Folders(root, named=self.name)
        self._load_timeout = load_timeout
        self._allow_code = allow_code

    def resume(self, *, former: bool) -> None:
        """Continues with a server that reported to a former relay: all that is needed is in the folders."""

    def name(self, model_id: str) -> str:
        """Returns the name of a model's folder, by which Triton knows the model."""
        return plain(model_id, _PLAIN)

    async def status(self, *, timeout: float) -> tuple[pb.RuntimeStatusResponse, Trailers]:
        """Returns READY if the server is live and has dropped all models, and otherwise STARTING."""
        starting = pb.RuntimeStatusResponse(status=pb.RuntimeStatusResponse.STARTING)
        if not await self._repository.live(timeout=timeout):
            return starting, ()
        held = await self._names(_ACTIVE, timeout)
        for name in held:
            await self._repository.unload(name, timeout=timeout, dependents=True)
        await self._until_gone(held, timeout)
        if await self._names(_ACTIVE, timeout):
            return starting, ()  # the agent asks again
        await asyncio.to_thread(self._folders.clear)
        version = await self._repository.version(timeout=timeout)
        return readiness.ready(version, _METHODS, loads=_LOADS, load_timeout=self._load_timeout), ()

    async def load(
        self, request: pb.LoadModelRequest, *, timeout: float | None
    ) -> tuple[pb.LoadModelResponse, Trailers]:
        """Makes the model's folder, and has the server load it. Raises AioRpcError if the server cannot be reached or
        is too slow, and MeshError if the model cannot be loaded."""
        model_id = request.modelId
        try:
            async with refusals.within(timeout):
                await self._folders.fill(model_id, partial(self._lay_out, request))
                await self._repository.load(self.name(model_id), timeout=timeout)
        except grpc.aio.AioRpcError as error:
            meaning = self._meaning(error, request)
            if isinstance(meaning, MeshError):  # otherwise an unload follows
                await asyncio.to_thread(self._folders.remove, model_id)
            raise meaning from error
        return pb.LoadModelResponse(), await self._folders.reported(model_id)

    async def unload(self, request: pb.UnloadModelRequest, *, timeout: float | None) -> None:
        """Has the server unload a model, waits for a few seconds at most until it is gone, and removes its folder. An
        unknown model is no error. Raises AioRpcError, also if the server does not answer within `timeout` seconds."""
        name = self.name(request.modelId)
        try:
            await self._repository.unload(name, timeout=timeout, dependents=True)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
        await self._until_gone({name}, timeout)
        await asyncio.to_thread(self._folders.remove, request.modelId)

    async def size(
        self, request: pb.ModelSizeRequest, *, timeout: float | None
    ) -> tuple[pb.ModelSizeResponse, Trailers]:
        """Returns 0, as Triton does not know the size of a model. Raises AioRpcError with NOT_FOUND if the server does
        not have the model."""
        await self._repository.describe(self.name(request.modelId), timeout=timeout)
        return pb.ModelSizeResponse(), ()

    async def predict(self, request: pb.PredictModelSizeRequest, *, timeout: float) -> pb.PredictModelSizeResponse:
        """Returns the size that the model's files suggest."""
        return sizes.predicted(request)

    async def _names(self, wanted: frozenset[str], timeout: float | None) -> set[str]:
        """Returns the names of the models with a version in one of these states."""
        return {name for name, states in (await self._repository.states(timeout=timeout)).items() if states & wanted}

    async def _until_gone(self, names: set[str], timeout: float | None) -> None:
        """Waits until the server has dropped models that it was told to unload, for some seconds at most."""
        pause = _FIRST
        ends = asyncio.get_running_loop().time() + _GONE
        while left := names & await self._names(_HELD, timeout):
            if asyncio.get_running_loop().time() > ends:
                log.warning("Triton has not yet unloaded models that now count as unloaded", models=sorted(left))
                return
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST)

    # --- the model's folder

    def _lay_out(self, request: pb.LoadModelRequest, place: ModelFolders, stop: threading.Event) -> None:
        """Fills the folder that the server reads. Raises MeshError and OSError."""
        pulled = contents.opened(Path(request.modelPath), place.files, stop)
        schema = schemas.schema_of(keys.key_of(request))
        tritonlayout.lay_out(keys.type_of(request), schema, pulled, place.read, allow_code=self._allow_code)

    def _meaning(self, error: grpc.aio.AioRpcError, request: pb.LoadModelRequest) -> Exception:
        if refusals.of_the_way(error):
            return error
        place, name = self._folders.of(request.modelId), self.name(request.modelId)
        return refusals.cannot_load("Triton", refusals.text_of(error), request, place, name)
