"""The management of a foreign server: its status, and its loads and unloads, in the terms of the SPI.

All servers have the same interface. `SpiControl` manages a server that speaks the SPI itself; for other servers,
`adapters` has one module each. What a server reports about its device is in trailers (`reported`).

The methods raise AioRpcError with the server's own status, or MeshError if the control itself refuses. If the server
does not have the model, the error is NOT_FOUND, or one of the other forms that `verdicts` recognises.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import grpc

from mesh.pb import modelruntime_pb2 as pb
from mesh.pb import modelruntime_pb2_grpc
from mesh.telemetry import logs

log = logs.get(__name__)

Trailers = Sequence[tuple[str, str | bytes]]

_FORMER_NAME = "/com.ibm.watson.tas.internal.proto.ModelServer/"


class Control(Protocol):
    """The management of one server. Timeouts are in seconds; None means no limit."""

    former: bool
    """True if the server speaks the SPI only under the former name of its service."""

    takes_versions: bool
    """True if the relay leaves the version that a V2 call names in the call. A server with an adapter would take it for
    a version of its own."""

    def resume(self, *, former: bool) -> None:
        """Continues with a server that reported to an earlier relay that it is ready. `former` is the value that the
        attribute `former` had there."""

    def name(self, model_id: str) -> str:
        """Returns the name by which the server knows a model. The same id has the same name in every relay."""

    async def status(self, *, timeout: float) -> tuple[pb.RuntimeStatusResponse, Trailers]:
        """Returns the server's status. A server that is READY has dropped all its models."""

    async def load(
        self, request: pb.LoadModelRequest, *, timeout: float | None
    ) -> tuple[pb.LoadModelResponse, Trailers]:
        """Loads a model. If the load fails or is cancelled, the caller must unload the model."""

    async def unload(self, request: pb.UnloadModelRequest, *, timeout: float | None) -> None:
        """Unloads a model, even one whose load has only begun. May raise NOT_FOUND for an unknown model."""

    async def size(
        self, request: pb.ModelSizeRequest, *, timeout: float | None
    ) -> tuple[pb.ModelSizeResponse, Trailers]:
        """Returns the size of a loaded model in bytes, or 0 if the server does not know it, and the trailers of the
        answer."""

    async def predict(self, request: pb.PredictModelSizeRequest, *, timeout: float) -> pb.PredictModelSizeResponse:
        """Returns the number of bytes that a model will probably need."""


class SpiControl:
    """The management of a server that speaks the SPI."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.former = False
        self.takes_versions = True
        self._channel = channel
        self._stub = modelruntime_pb2_grpc.ModelRuntimeStub(channel)

    def resume(self, *, former: bool) -> None:
        """Continues with a server that reported to an earlier relay that it is ready. With `former`, calls the SPI by
        the former name of its service."""
        if former:
            self._use_former_name()

    def name(self, model_id: str) -> str:
        """Returns the id, as the SPI has no other name for a model."""
        return model_id

    async def status(self, *, timeout: float) -> tuple[pb.RuntimeStatusResponse, Trailers]:
        """Returns the server's status. If the server does not implement `mmesh.ModelRuntime`, calls the SPI by the
        former name of its service, now and later."""
        request = pb.RuntimeStatusRequest()
        try:
            return await _answer(self._stub.runtimeStatus(request, timeout=timeout))
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNIMPLEMENTED or self.former:
                raise
            log.info("model server does not implement mmesh.ModelRuntime: trying the former name of this service")
            self._use_former_name()
            return await _answer(self._stub.runtimeStatus(request, timeout=timeout))

    async def load(
        self, request: pb.LoadModelRequest, *, timeout: float | None
    ) -> tuple[pb.LoadModelResponse, Trailers]:
        """Loads a model."""
        return await _answer(self._stub.loadModel(request, timeout=timeout))

    async def unload(self, request: pb.UnloadModelRequest, *, timeout: float | None) -> None:
        """Unloads a model."""
        await self._stub.unloadModel(request, timeout=timeout)

    async def size(
        self, request: pb.ModelSizeRequest, *, timeout: float | None
    ) -> tuple[pb.ModelSizeResponse, Trailers]:
        """Returns the size that the server states, in bytes."""
        return await _answer(self._stub.modelSize(request, timeout=timeout))

    async def predict(self, request: pb.PredictModelSizeRequest, *, timeout: float) -> pb.PredictModelSizeResponse:
        """Returns the number of bytes that the server expects a model to need."""
        response: pb.PredictModelSizeResponse = await self._stub.predictModelSize(request, timeout=timeout)
        return response

    def _use_former_name(self) -> None:
        """Calls the SPI by the former name of its service from now on. The messages are the same."""
        self.former = True
        self._stub = modelruntime_pb2_grpc.ModelRuntimeStub(_FormerName(self._channel))


class _FormerName:
    """A channel for a stub of `mmesh.ModelRuntime`, which calls the methods by the former name of their service."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel

    def unary_unary(self, method: str, *args: Any, **more: Any) -> Any:
        return self._channel.unary_unary(_FORMER_NAME + method.rpartition("/")[2], *args, **more)


async def _answer(call: Any) -> tuple[Any, Trailers]:
    response = await call
    return response, tuple(await call.trailing_metadata() or ())
