"""The client of a model server's SPI, mmesh.ModelRuntime.

Each life of a server has its own object and its own socket, so that no call meant for a dead server reaches the next
one. Mesh's own server gets additional metadata (the copy that a load makes, and its slot on the use board) and returns
measured sizes in trailers; other servers ignore the metadata and do not send these trailers.

The caller sets the deadlines of loads and unloads. Cancelling a load ends it at the server as well; the SPI requires
that an unload of the same id follows, which is left to the caller.
"""

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc

from mesh.pb import modelruntime_pb2 as pb
from mesh.pb import modelruntime_pb2_grpc
from mesh.statuses import Code
from mesh.wire import headers
from placement.account import Growth
from placement.footprint import NOTHING, Footprint

HOST_BYTES = "mesh-host-bytes"
DEVICE_BYTES = "mesh-device-bytes"
DEVICE_TOTAL, DEVICE_USED = "mesh-device-total", "mesh-device-used"
DISK_BYTES = "mesh-disk-bytes"

_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
)
_PREDICT_TIMEOUT = 0.5  # seconds, as in ModelMesh
_SIZE_TIMEOUT = 30.0  # seconds, ModelMesh's value

Metadata = Sequence[tuple[str, str | bytes]]


class SpiError(Exception):
    """A refusal or failure of the server, or its failure to answer."""

    def __init__(self, code: Code, text: str, *, stuck: bool = False) -> None:
        super().__init__(f"{code.name}: {text}")
        self.code = code
        self.text = text
        self.stuck = stuck  # the load still runs and cannot be ended

    @property
    def lost(self) -> bool:
        """True if the server rather than the model may be the cause: the server has ended, or does not answer."""
        return self.code in (Code.UNAVAILABLE, Code.CANCELLED)


@dataclass(frozen=True, slots=True)
class Status:
    """The status that a server reports."""

    ready: bool
    failing: bool
    capacity_bytes: int
    load_concurrency: int
    load_timeout: float  # seconds
    default_bytes: int
    version: str
    told: dict[str, str]  # Mesh's own metadata: "mesh-device", "mesh-data", ...

    @property
    def device_memory(self) -> tuple[int, int]:
        """The bytes in use on the server's device before any model is loaded, and the device's bytes in total. Both are
        0 if there is no device, or if its memory is unknown."""
        return _number(self.told.get(DEVICE_USED)), _number(self.told.get(DEVICE_TOTAL))


@dataclass(frozen=True, slots=True)
class Size:
    """The size of a model, measured by its server, or as the growth of the server's memory. An empty footprint means
    that the size is unknown."""

    footprint: Footprint
    note: str = ""  # for operators
    disk_bytes: int = 0  # of the files that the server's side has made of the model's, and keeps on the pod's disk
    growth: Growth | None = None  # of the server's memory during the load, if it was observed


class Spi:
    """A connection to one life of a model server, over a unix socket."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self._channel = grpc.aio.insecure_channel(f"unix:{socket}", options=_OPTIONS)
        self._stub = modelruntime_pb2_grpc.ModelRuntimeStub(self._channel)

    @property
    def listening(self) -> bool:
        """True if the server's socket exists. (Connecting earlier would cost a back-off.)"""
        return os.path.exists(self.socket)

    async def status(self, *, timeout: float) -> Status:
        """Asks for the status. Use this only at a start, because a server drops all models before it reports that it is
        ready. Raises SpiError."""
        reply, told = await self._call(self._stub.runtimeStatus, pb.RuntimeStatusRequest(), timeout=timeout)
        return Status(
            ready=reply.status == pb.RuntimeStatusResponse.READY,
            failing=reply.status == pb.RuntimeStatusResponse.FAILING,
            capacity_bytes=reply.capacityInBytes,
            load_concurrency=reply.maxLoadingConcurrency,
            load_timeout=reply.modelLoadingTimeoutMs / 1000,
            default_bytes=reply.defaultModelSizeInBytes,
            version=reply.runtimeVersion,
            told=told,
        )

    async def predict(self, model_id: str, model_type: str, path: str, key: str) -> int:
        """Returns the number of bytes that the server expects a model to need, or 0 if the server does not know. Raises
        SpiError."""
        request = pb.PredictModelSizeRequest(modelId=model_id, modelType=model_type, modelPath=path, modelKey=key)
        reply, _ = await self._call(self._stub.predictModelSize, request, timeout=_PREDICT_TIMEOUT)
        return int(reply.sizeInBytes)

    async def load(
        self,
        model_id: str,
        model_type: str,
        path: str,
        key: str,
        *,
        copy: bytes,
        slot: int | None,
        timeout: float,
        optimised: str = "",
    ) -> Size:
        """Loads a model and returns its size once it can serve. `copy` is the copy's token, `slot` its slot on the use
        board, and `optimised` the path of the model's optimised form, or "". Raises SpiError, also after `timeout`
        seconds."""
        metadata: list[tuple[str, str | bytes]] = [(headers.SPI_COPY, copy.decode())]
        if slot is not None:
            metadata.append((headers.SPI_SLOT, str(slot)))
        if optimised:
            metadata.append((headers.SPI_OPTIMISED, optimised))
        request = pb.LoadModelRequest(modelId=model_id, modelType=model_type, modelPath=path, modelKey=key)
        reply, told = await self._call(self._stub.loadModel, request, timeout=timeout, metadata=metadata)
        size = _told_size(told)
        if size is None:
            size = Size(Footprint(reply.sizeInBytes)) if reply.sizeInBytes else await self._size(model_id)
        return replace(size, note=told.get(headers.SPI_NOTE, ""), disk_bytes=_number(told.get(DISK_BYTES)))

    async def _size(self, model_id: str) -> Size:
        try:
            request = pb.ModelSizeRequest(modelId=model_id)
            reply, told = await self._call(self._stub.modelSize, request, timeout=_SIZE_TIMEOUT)
        except SpiError as error:
            if error.lost:
                raise
            return Size(NOTHING)  # the model serves; the prediction stays
        return _told_size(told) or Size(Footprint(reply.sizeInBytes))

    async def holds(self, model_id: str, *, timeout: float) -> bool:
        """Returns False if the server says that it does not have the model. Returns True if it has the model, or does
        not say."""
        try:
            await self._call(self._stub.modelSize, pb.ModelSizeRequest(modelId=model_id), timeout=timeout)
        except SpiError as error:
            return error.code is not Code.NOT_FOUND
        return True

    async def unload(self, model_id: str, *, copy: bytes, timeout: float) -> None:
        """Unloads a copy, and does nothing for an unknown model. `copy` is the copy's token. Raises SpiError, also
        after `timeout` seconds; the model may then still be loaded."""
        metadata = [(headers.SPI_COPY, copy.decode())]
        request = pb.UnloadModelRequest(modelId=model_id)
        try:
            await self._call(self._stub.unloadModel, request, timeout=timeout, metadata=metadata)
        except SpiError as error:
            if error.code is not Code.NOT_FOUND:
                raise

    async def close(self) -> None:
        """Closes the connection. Requests under way end with SpiError."""
        await self._channel.close(None)

    async def _call(
        self, method: Any, request: Any, *, timeout: float, metadata: Metadata = ()
    ) -> tuple[Any, dict[str, str]]:
        call = method(request, timeout=timeout, metadata=tuple(metadata))
        try:
            reply = await call
            return reply, _texts(await call.initial_metadata()) | _texts(await call.trailing_metadata())
        except grpc.aio.AioRpcError as error:
            code = Code(error.code().value[0])
            text = error.details() or code.name.lower().replace("_", " ")
            raise SpiError(code, text, stuck=headers.SPI_STUCK in _texts(error.trailing_metadata())) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # This is how grpc.aio reports a channel closed during a call.
            raise SpiError(Code.UNAVAILABLE, "the connection to the model server was closed") from None


def _texts(metadata: Any) -> dict[str, str]:
    return {
        key: value if isinstance(value, str) else value.decode(errors="replace")
        for key, value in metadata or ()
        if isinstance(value, str) or key == headers.SPI_NOTE
    }


def _number(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else 0


def _told_size(told: dict[str, str]) -> Size | None:
    host, device = _number(told.get(HOST_BYTES)), _number(told.get(DEVICE_BYTES))
    return Size(Footprint(host, device)) if host > 0 or device > 0 else None
