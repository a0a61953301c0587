"""The adapter for OpenVINO Model Server (OVMS), which reads its models from a configuration file.

The file lists all models. A change takes effect when OVMS is told over REST to read the file again, and the answer says
for each model whether it is available. Loads and unloads that arrive together are one change (`Reloads`). An unload is
answered only once OVMS has read the file without the model, because only then its memory is free.

OVMS answers V2 over gRPC as it is.
"""

import asyncio
import secrets
import threading
from functools import partial
from pathlib import Path

import grpc

from mesh.modelfiles import sniffing
from mesh.pb import inference_pb2 as v2
from mesh.pb import inference_pb2_grpc
from mesh.pb import modelruntime_pb2 as pb
from mesh.runtime.relay.adapters import contents, keys, readiness, refusals, sizes
from mesh.runtime.relay.adapters.folders import Folders, ModelFolders, plain
from mesh.runtime.relay.adapters.ovmsconfig import OvmsRest, Reloads
from mesh.runtime.relay.control import Trailers
from mesh.statuses import MeshError, Reason

OPENVINO, ONNX = "openvino_ir", "onnx"
"""The model types: OpenVINO's own format, and ONNX, which OVMS converts when it loads a model."""

_NAMES = {OPENVINO: ("model.xml",), ONNX: ("model.onnx",)}
_SUFFIXES = {OPENVINO: (".xml",), ONNX: (".onnx",)}

_LOADS = 4  # that may share one change of the file; a pod that measures sizes runs one at a time

_METHODS = {
    "inference.GRPCInferenceService/ModelInfer": [1],
    "inference.GRPCInferenceService/ModelMetadata": [1],
    "inference.GRPCInferenceService/ModelReady": [1],
    "tensorflow.serving.PredictionService/Predict": [1, 1],
}


class Ovms:
    """The control of one OVMS."""

    def __init__(self, channel: grpc.aio.Channel, root: Path, *, load_timeout: float, rest: str) -> None:
        """Makes the control of a server whose configuration file is `models/model_config_list.json` in `root`, and
        whose REST port is `rest`. `load_timeout` is in seconds."""
        self.former = False
        self.takes_versions = False
        self._stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        self._folders = Folders(root)
        self._reloads = Reloads(root, OvmsRest(rest, timeout=load_timeout or None))
        self._load_timeout = load_timeout

    def resume(self, *, former: bool) -> None:
        """Continues with a server that reported to a former relay: the file says which models it has."""
        self._reloads.resume()

    def name(self, model_id: str) -> str:
        """Returns the name by which the server knows a model: the id if it is plain, or else a digest."""
        return plain(model_id)

    async def status(self, *, timeout: float) -> tuple[pb.RuntimeStatusResponse, Trailers]:
        """Has the server drop all models, and returns READY. Raises MeshError or AioRpcError if it does not answer."""
        await self._reloads.clear(timeout)
        await asyncio.to_thread(self._folders.clear)
        told = await self._stub.ServerMetadata(v2.ServerMetadataRequest(), timeout=timeout)
        version = f"{told.name} {told.version}"
        return readiness.ready(version, _METHODS, loads=_LOADS, load_timeout=self._load_timeout), ()

    async def load(
        self, request: pb.LoadModelRequest, *, timeout: float | None
    ) -> tuple[pb.LoadModelResponse, Trailers]:
        """Makes the model's folder, and has the server load it with the next change. Raises MeshError."""
        model_id, name = request.modelId, self.name(request.modelId)
        async with refusals.within(timeout):
            base = await self._folders.fill(model_id, partial(self._lay_out, request))
            state = await self._reloads.put(name, base)
        if not state.available:
            await self.unload(pb.UnloadModelRequest(modelId=model_id), timeout=timeout)
            raise refusals.cannot_load("OVMS", state.why, request, self._folders.of(model_id), name)
        return pb.LoadModelResponse(), await self._folders.reported(model_id)

    async def unload(self, request: pb.UnloadModelRequest, *, timeout: float | None) -> None:
        """Has the server drop a model with the next change, and removes its folder. An unknown model is no error.
        Raises MeshError."""
        try:
            async with asyncio.timeout(timeout):
                await self._reloads.drop(self.name(request.modelId))
        except TimeoutError:
            raise MeshError(Reason.DEADLINE, f"OVMS did not drop the model within {timeout:g} s") from None
        await asyncio.to_thread(self._folders.remove, request.modelId)

    async def size(
        self, request: pb.ModelSizeRequest, *, timeout: float | None
    ) -> tuple[pb.ModelSizeResponse, Trailers]:
        """Returns 0, as OVMS does not know the size of a model. Raises AioRpcError with NOT_FOUND, or MeshError, if the
        server does not have the model."""
        name = self.name(request.modelId)
        told = await self._stub.ModelReady(v2.ModelReadyRequest(name=name), timeout=timeout)
        if not told.ready:
            raise MeshError(Reason.UNKNOWN_MODEL, f"the model {request.modelId!r} is not available in OVMS")
        return pb.ModelSizeResponse(), ()

    async def predict(self, request: pb.PredictModelSizeRequest, *, timeout: float) -> pb.PredictModelSizeResponse:
        """Returns an estimate of the model's memory from the size of its files, as ModelMesh does."""
        return sizes.predicted(request)

    # --- the model's folder

    def _lay_out(self, request: pb.LoadModelRequest, place: ModelFolders, stop: threading.Event) -> Path:
        """Fills the folder that the server reads, and returns its path. Raises MeshError and OSError."""
        # Another name for each load: OVMS ignores new files in a folder that it knows.
        base = place.read / secrets.token_hex(8)
        base.mkdir()
        self._fill(request, contents.opened(Path(request.modelPath), place.files, stop), base)
        return base

    def _fill(self, request: pb.LoadModelRequest, pulled: Path, base: Path) -> None:
        """Fills the folder that the server reads with the highest version of the model. Raises MeshError and
        OSError."""
        model_type = keys.type_of(request)
        if model_type not in _NAMES:
            raise contents.unknown_type("OVMS", _NAMES, model_type)
        newest = contents.newest(pulled) if pulled.is_dir() else pulled
        version = base / (newest.name if newest != pulled and int(newest.name) > 0 else "1")
        found = contents.find(newest, _NAMES[model_type], _SUFFIXES[model_type])
        kind = found.kind
        if kind is not None and kind.type != model_type and kind not in (sniffing.XML,):
            raise contents.bad(f"the file is {kind.what}, not a model of type {model_type}")
        if model_type == ONNX and not newest.is_dir():
            version.mkdir()
            contents.link(found.path, version / "model.onnx")
            return
        if model_type == OPENVINO:
            weights = found.path.with_suffix(".bin")
            if not newest.is_dir():
                raise contents.one_openvino_file()
            if not weights.is_file():
                raise contents.bad(f"the folder lacks {weights.name}, the weights of {found.path.name}: add this file")
        contents.tree_of_links(newest, version)
