"""The adapter for TorchServe, which loads models from its model store when its management API says so.

TorchServe takes a folder of the model store as well as a `.mar`, and reads it through a link. So a `.mar` is unpacked
here, within the limits for archives, and nothing is copied: the model's folder has links to the files, a manifest, and
Mesh's handler (`mesh/modelservers/handlers`).

TorchServe has no V2 gRPC that keeps raw contents: that of its Open Inference Protocol drops them, and has a service
name of its own. `V2OverPredictions` therefore puts V2's messages into calls of `Predictions`, and Mesh's handler
answers them.

Models of both types need permission to run code. A `.mar` runs the code of its handler. A TorchScript model cannot run
Python, but it can read and overwrite files: torch.from_file and torch.save are among its functions.
"""

import asyncio
import contextlib
import json
import shutil
import threading
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from mesh.modelfiles import archives, mar, sniffing
from mesh.modelservers import environments
from mesh.pb import modelruntime_pb2 as pb
from mesh.pb import torchserve_inference_pb2 as predictions
from mesh.pb import torchserve_management_pb2 as management
from mesh.pb import torchserve_management_pb2_grpc
from mesh.runtime.relay.adapters import contents, folders, keys, readiness, refusals, sizes
from mesh.runtime.relay.adapters.folders import Folders, ModelFolders
from mesh.runtime.relay.control import Trailers
from mesh.statuses import MeshError, Reason
from mesh.v2 import PREFIX
from mesh.wire import encoding

TORCHSCRIPT, ARCHIVE = "pytorch", "pytorch-mar"
"""The model types: a TorchScript file, and a `.mar`."""

_NAMES = {TORCHSCRIPT: ("model.pt", "model.pth"), ARCHIVE: ("model.mar",)}
_SUFFIXES = {TORCHSCRIPT: (".pt", ".pth", ".ts"), ARCHIVE: (".mar",)}

_HANDLER, _HELPER, _FAILURE = "mesh_handler.py", "mesh_v2.py", "failure.txt"
_OURS = frozenset((_HANDLER, _HELPER, _FAILURE))
_MODEL = "model.pt"
_DEFAULT_BYTES = 250_000_000  # the process of a model: 240 MB with torch 1.13, before the model's own bytes
_RESPONSE_TIMEOUT = 600  # seconds after which TorchServe ends the process of a call
_PAGE = 100  # TorchServe's own limit

_PREDICTIONS = "org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions"
_TRANSLATED = {
    PREFIX + b"ModelInfer": "mesh-v2-infer",
    PREFIX + b"ModelMetadata": "mesh-v2-metadata",
    PREFIX + b"ModelReady": "mesh-v2-ready",
}
"""The names under which Mesh's handler finds V2's messages in the map of a call of `Predictions`."""

_METHODS = dict.fromkeys((*(method.decode()[1:] for method in _TRANSLATED), _PREDICTIONS), (1,))

_REASONS = {3: Reason.BAD_REQUEST, 12: Reason.UNSUPPORTED}
"""The meaning of the codes with which Mesh's handler answers; others stand for INTERNAL."""

_DIED = "Worker died."
_BUSY = "has no worker to serve"


class TorchServe:
    """The control of one TorchServe, by its management API."""

    def __init__(self, channel: grpc.aio.Channel, root: Path, *, load_timeout: float, allow_code: bool) -> None:
        """Makes the control of a server whose model store is the folder `models` in `root`. `load_timeout` is in
        seconds."""
        self.former = False
        self.takes_versions = False
        self._stub = torchserve_management_pb2_grpc.ManagementAPIsServiceStub(channel)
        self._folders = Folders(root)
        self._load_timeout = load_timeout
        self._allow_code = allow_code

    def resume(self, *, former: bool) -> None:
        """Continues with a server that reported to a former relay: all that is needed is in the folders."""

    def name(self, model_id: str) -> str:
        """Returns the name by which the server knows a model: the id if it is plain, or else a digest. TorchServe takes
        any name, but writes it into its log as it is."""
        return folders.plain(model_id)

    async def status(self, *, timeout: float) -> tuple[pb.RuntimeStatusResponse, Trailers]:
        """Has the server drop all models, and returns READY. Raises AioRpcError if it does not answer."""
        for name in await self._listed(timeout):
            await self._drop(name, timeout)
        await asyncio.to_thread(self._folders.clear)
        status = readiness.ready(
            "TorchServe",  # its gRPC does not tell the version
            _METHODS,
            loads=1,  # so that the growth of its processes is that of one model
            load_timeout=self._load_timeout,
            default_bytes=_DEFAULT_BYTES,
        )
        return status, ()

    async def load(
        self, request: pb.LoadModelRequest, *, timeout: float | None
    ) -> tuple[pb.LoadModelResponse, Trailers]:
        """Makes the model's folder, and has the server start a process for it. Raises AioRpcError if the server cannot
        be reached or is too slow, and MeshError if the model cannot be loaded."""
        model_id = request.modelId
        try:
            async with refusals.within(timeout):
                await self._folders.fill(model_id, partial(self._lay_out, request))
                await self._stub.RegisterModel(
                    management.RegisterModelRequest(
                        model_name=self.name(model_id),
                        url=self._folders.of(model_id).read.name,
                        initial_workers=1,
                        synchronous=True,
                        batch_size=1,
                        response_timeout=_RESPONSE_TIMEOUT,
                        startup_timeout=max(1, int(timeout or self._load_timeout)),
                    ),
                    timeout=timeout,
                )
        except grpc.aio.AioRpcError as error:
            meaning = await asyncio.to_thread(self._meaning, error, request)
            if isinstance(meaning, MeshError):  # otherwise an unload follows
                # A model whose process did not start may stay registered.
                await self.unload(pb.UnloadModelRequest(modelId=model_id), timeout=timeout)
            raise meaning from error
        return pb.LoadModelResponse(), await self._folders.reported(model_id)

    async def unload(self, request: pb.UnloadModelRequest, *, timeout: float | None) -> None:
        """Has the server end the model's process, and removes its folder. An unknown model is no error."""
        await self._drop(self.name(request.modelId), timeout)
        await asyncio.to_thread(self._folders.remove, request.modelId)

    async def _drop(self, name: str, timeout: float | None) -> None:
        try:
            await self._stub.UnregisterModel(management.UnregisterModelRequest(model_name=name), timeout=timeout)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise

    async def size(
        self, request: pb.ModelSizeRequest, *, timeout: float | None
    ) -> tuple[pb.ModelSizeResponse, Trailers]:
        """Returns 0, as the agent observes the server's processes. Raises AioRpcError with NOT_FOUND if the server does
        not have the model."""
        name = self.name(request.modelId)
        await self._stub.DescribeModel(management.DescribeModelRequest(model_name=name), timeout=timeout)
        return pb.ModelSizeResponse(), ()

    async def predict(self, request: pb.PredictModelSizeRequest, *, timeout: float) -> pb.PredictModelSizeResponse:
        """Returns the memory of a process of TorchServe, plus what the size of the model's files suggests, in bytes."""
        own = sizes.predicted(request, default=0).sizeInBytes
        return pb.PredictModelSizeResponse(sizeInBytes=_DEFAULT_BYTES + own)

    async def _listed(self, timeout: float) -> list[str]:
        """Returns the names of all models that the server has. Raises AioRpcError."""
        found: list[str] = []
        token = 0
        while True:
            request = management.ListModelsRequest(limit=_PAGE, next_page_token=token)
            page = json.loads((await self._stub.ListModels(request, timeout=timeout)).msg)
            found += [str(one["modelName"]) for one in page["models"]]
            token = int(page.get("nextPageToken") or 0)
            if not token or not page["models"]:
                return found

    # --- the model's folder

    def _lay_out(self, request: pb.LoadModelRequest, place: ModelFolders, stop: threading.Event) -> None:
        """Fills the folder that the server reads. Raises MeshError and OSError."""
        model_type = keys.type_of(request)
        if model_type not in _NAMES:
            raise contents.unknown_type("TorchServe", _NAMES, model_type)
        pulled = contents.opened(Path(request.modelPath), place.files, stop)
        archive = contents.newest(pulled) if pulled.is_dir() else pulled
        if not archive.is_dir() or not mar.is_unpacked(archive):
            found = contents.find(pulled, _NAMES[model_type], _SUFFIXES[model_type])
            if found.kind is sniffing.TORCHSCRIPT:
                refusals.check_code("a TorchScript model can read and overwrite files", allowed=self._allow_code)
                contents.link(found.path, place.read / _MODEL)
                self._describe(place, request.modelId, {"model": {"serializedFile": _MODEL}})
                return
            archive = _unpacked(found, place, stop)
        refusals.check_code("the handler of a .mar runs code", allowed=self._allow_code)
        try:
            manifest = mar.read(archive)
        except mar.BadManifest as error:
            raise contents.bad(str(error)) from error
        for entry in archive.iterdir():
            if entry.name in _OURS:
                raise contents.bad(f"the archive has a file with the name {entry.name}, which Mesh needs: rename it")
            if entry.is_dir() and entry.name != mar.FOLDER:
                contents.tree_of_links(entry, place.read / entry.name)  # Python writes beside modules
            elif entry.name != mar.FOLDER:
                contents.link(entry, place.read / entry.name)
        manifest.content["model"]["meshHandler"] = manifest.handler
        self._describe(place, request.modelId, manifest.content)

    def _describe(self, place: ModelFolders, model_id: str, manifest: dict[str, Any]) -> None:
        """Writes the manifest by which TorchServe finds Mesh's handler, and the handler itself."""
        manifest["model"] |= {"modelName": self.name(model_id), "modelVersion": "1.0", "handler": _HANDLER}
        manifest.setdefault("runtime", "python")
        folder = place.read / mar.FOLDER
        folder.mkdir()
        (folder / mar.MANIFEST).write_text(json.dumps(manifest))
        for name in (_HANDLER, _HELPER):
            shutil.copyfile(environments.handlers() / name, place.read / name)

    def _meaning(self, error: grpc.aio.AioRpcError, request: pb.LoadModelRequest) -> Exception:
        """Returns the error for a failed load: what Mesh's handler has left, or else the server's own."""
        if refusals.of_the_way(error):
            return error
        place = self._folders.of(request.modelId)
        text = refusals.text_of(error).partition("\n")[0]
        with contextlib.suppress(OSError):
            text = (place.read / _FAILURE).read_text(errors="replace")
        return refusals.cannot_load("TorchServe", text, request, place, place.read.name)


def _unpacked(found: contents.FoundModel, place: ModelFolders, stop: threading.Event) -> Path:
    """Returns the folder of an unpacked `.mar`. Raises MeshError and OSError."""
    kind = found.kind
    if kind is sniffing.TORCH:
        text = "the file is a PyTorch checkpoint, whose classes TorchServe does not know: save the model as "
        raise contents.bad(f"{text}TorchScript (torch.jit.script), or make a .mar with torch-model-archiver")
    try:
        if kind is not sniffing.MAR and not (kind is not None and kind.archive and archives.is_archive(found.path)):
            what = f"the file is {kind.what}, and so neither" if kind is not None else "the file is neither"
            raise contents.bad(f"{what} TorchScript nor a .mar, the only formats that TorchServe takes")
        return archives.unpack(found.path, place.files / "mar", stop=stop)
    except archives.BadArchive as error:
        raise contents.bad(str(error)) from error


class V2OverPredictions:
    """The translation of V2's calls into calls of `Predictions` that Mesh's handler answers."""

    def method(self, method: bytes) -> bytes | None:
        """Returns the method `Predictions` for V2's ModelInfer, ModelMetadata and ModelReady, which Mesh's handler
        answers, and None for others."""
        return b"/" + _PREDICTIONS.encode() if method in _TRANSLATED else None

    def request(self, method: bytes, message: bytes) -> bytes:
        """Returns a call of `Predictions` that contains V2's message. Its model is that of the message, into which the
        relay has written the server's name for the model. Raises MeshError."""
        name = b""
        try:
            for tag, start, end in encoding.fields(memoryview(message)):
                if tag == 0x0A:  # field 1, a text
                    name = message[start:end]
            text = name.decode()
        except ValueError as error:
            raise MeshError(Reason.BAD_REQUEST, f"the request is not a message of V2: {error}") from None
        request = predictions.PredictionsRequest(model_name=text, input={_TRANSLATED[method]: message})
        return request.SerializeToString()

    def reply(self, method: bytes, message: bytes) -> bytes:
        """Returns the message that the answer of Mesh's handler holds. Raises MeshError if it holds an error."""
        answer = predictions.PredictionResponse.FromString(message).prediction
        if not answer or answer[0]:
            text = answer[1:].decode(errors="replace") or "TorchServe's answer is empty"
            raise MeshError(_REASONS.get(answer[0] if answer else 0, Reason.INTERNAL), text)
        return answer[1:]

    def status(self, code: int, text: str) -> MeshError | None:
        """Returns the error for a call during which the model's process has died, or that the model's queue in
        TorchServe did not accept; None for others."""
        if text.startswith(_DIED):
            return MeshError(Reason.LOST, "the model's process in TorchServe ended during the call")
        if _BUSY in text:
            why = "the model's queue in TorchServe is full, or its process is being started again: try again later"
            return MeshError(Reason.OVERLOADED, why)
        return None
