"""The SPI of this server, `mmesh.ModelRuntime`, by which its agent controls it.

Optional additions to the SPI's own messages:
- `loadModel` reads metadata `mesh-copy` (the copy's token, `mesh.schema.copytoken`), `mesh-slot` (the slot of the use
  board) and `mesh-optimised` (the path of the model's optimised form); `unloadModel` reads `mesh-copy` too, and then
  leaves a copy of that id with another token alone. The deadline of `unloadModel` says how long it waits for calls in
  flight: it ends them in time to answer.
- `loadModel` and `modelSize` return `mesh-host-bytes` and `mesh-device-bytes` as trailing metadata; `sizeInBytes` is
  their sum. `loadModel` returns `mesh-note-bin`, a text for people, if the warm-up call has failed. `runtimeStatus`
  returns `mesh-data` (host:port of the data port), `mesh-device` (cpu or cuda), `mesh-pid`, and for a device with
  memory `mesh-device-total` and `mesh-device-used` (bytes used by all processes, before any model is loaded here).

Failures of `loadModel`: INVALID_ARGUMENT (no model, or one that cannot be served), NOT_FOUND (no such file),
RESOURCE_EXHAUSTED (it needs too much memory), DEADLINE_EXCEEDED (it takes too long), UNAVAILABLE (too many loads cannot
be ended), INTERNAL, with the reason as text. Trailing metadata `mesh-stuck` says that the load still runs and cannot be
ended. DEADLINE_EXCEEDED from `unloadModel` means that a call or load of the model cannot be stopped: only a restart
frees its memory.

`runtimeStatus` unloads all models before it answers, as the SPI demands. It is meant for the start of an agent, not as
a liveness probe; for that, read the use board's `beat_ns`.
"""

from mesh.pb import modelruntime_pb2, modelruntime_pb2_grpc
from mesh.runtime.port import spi
from mesh.runtime.port.copies import Copies
from mesh.runtime.server.calls import dataport
from mesh.runtime.server.copies import ServedCopy
from mesh.runtime.server.loads import loader
from mesh.runtime.server.onnx.device import Device
from mesh.runtime.server.settings import ServerSettings
from mesh.statuses import MeshError, Reason
from mesh.v2 import SERVICE
from mesh.wire import headers

DEFAULT_SIZE = 1 << 20
"""Assumed size of a model about which nothing is known. A small model takes a tenth of it."""

_ID_FIELD = 1  # of all three messages
_METHODS = ("ModelInfer", "ModelMetadata", "ModelReady")


class Spi(modelruntime_pb2_grpc.ModelRuntimeServicer):  # type: ignore[misc]
    """The service that answers the agent. `predictModelSize` is UNIMPLEMENTED, because the agent can read the file
    itself."""

    def __init__(
        self,
        settings: ServerSettings,
        loader: loader.Loader,
        copies: Copies[ServedCopy],
        device: Device,
        *,
        data_address: str,
        pid: int,
    ) -> None:
        self._settings = settings
        self._loader = loader
        self._copies = copies
        self._version = f"mesh-onnx {dataport.VERSION}; {loader.engine}; device={device.name}"
        self._about = (("mesh-data", data_address), ("mesh-device", device.name), ("mesh-pid", str(pid)))
        self._device = device

    async def loadModel(
        self, request: modelruntime_pb2.LoadModelRequest, context: spi.Context
    ) -> modelruntime_pb2.LoadModelResponse:
        """Loads a model, and answers once the copy can serve."""
        async with spi.answered(context):
            told = spi.sent(context)
            slot = spi.slot_of(request, told)
            order = loader.Order(
                model_id=request.modelId,
                path=request.modelPath,
                token=told.get(headers.SPI_COPY, "").encode(),
                slot=slot,
                optimised=told.get(headers.SPI_OPTIMISED, ""),
            )
            copy = await self._loader.load(order)
        note: tuple[tuple[str, str | bytes], ...] = ((headers.SPI_NOTE, copy.note.encode()),) if copy.note else ()
        context.set_trailing_metadata((*_sizes(copy), *note))
        return modelruntime_pb2.LoadModelResponse(sizeInBytes=copy.host_bytes + copy.device_bytes)

    async def unloadModel(
        self, request: modelruntime_pb2.UnloadModelRequest, context: spi.Context
    ) -> modelruntime_pb2.UnloadModelResponse:
        """Unloads a model, and answers once nothing of it is left."""
        async with spi.answered(context):
            token = spi.sent(context).get(headers.SPI_COPY, "").encode()
            grace = spi.unload_grace(context, loader.UNLOAD_GRACE)
            await self._loader.unload(request.modelId, token=token, grace=grace)
        return modelruntime_pb2.UnloadModelResponse()

    async def modelSize(
        self, request: modelruntime_pb2.ModelSizeRequest, context: spi.Context
    ) -> modelruntime_pb2.ModelSizeResponse:
        """Answers with the size that the load measured or estimated, or with NOT_FOUND for a model that is not
        loaded."""
        async with spi.answered(context):
            copy = self._copies.get(request.modelId)
            if copy is None:
                raise MeshError(Reason.UNKNOWN_MODEL, f"{request.modelId!r} is not loaded")
        context.set_trailing_metadata(_sizes(copy))
        return modelruntime_pb2.ModelSizeResponse(sizeInBytes=copy.host_bytes + copy.device_bytes)

    async def runtimeStatus(
        self, request: modelruntime_pb2.RuntimeStatusRequest, context: spi.Context
    ) -> modelruntime_pb2.RuntimeStatusResponse:
        """Unloads all models and answers READY."""
        async with spi.answered(context):
            await self._loader.purge()
        context.set_trailing_metadata((*self._about, *self._device_memory()))
        kind = modelruntime_pb2.RuntimeStatusResponse
        status = kind(
            status=kind.READY,
            capacityInBytes=self._settings.capacity,
            maxLoadingConcurrency=self._settings.load_concurrency,
            modelLoadingTimeoutMs=int(self._settings.load_timeout * 1000),
            defaultModelSizeInBytes=DEFAULT_SIZE,
            runtimeVersion=self._version,
        )
        for method in _METHODS:
            status.methodInfos[f"{SERVICE}/{method}"].idInjectionPath.append(_ID_FIELD)
        return status

    def _device_memory(self) -> tuple[tuple[str, str], ...]:
        used, total = self._device.memory()
        return (("mesh-device-total", str(total)), ("mesh-device-used", str(used))) if total else ()


def _sizes(copy: ServedCopy) -> tuple[tuple[str, str], ...]:
    return (("mesh-host-bytes", str(copy.host_bytes)), ("mesh-device-bytes", str(copy.device_bytes)))
