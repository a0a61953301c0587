"""The client of a server's model repository: the repository extension of V2, which MLServer and Triton have."""

from typing import Any

import grpc
from google.protobuf.unknown_fields import UnknownFieldSet

from mesh.pb import inference_pb2 as v2
from mesh.pb import inference_pb2_grpc
from mesh.pb import repository_pb2 as pb

_PARAMETERS = 6
"""The field of a model's metadata with parameters, which our messages lack because its type differs between servers."""

_PATH = "/inference.GRPCInferenceService/"


class Repository:
    """The repository of one server. Timeouts are in seconds. All methods raise AioRpcError."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        self._index = _method(channel, "RepositoryIndex", pb.RepositoryIndexResponse)
        self._load = _method(channel, "RepositoryModelLoad", pb.RepositoryModelLoadResponse)
        self._unload = _method(channel, "RepositoryModelUnload", pb.RepositoryModelUnloadResponse)

    async def live(self, *, timeout: float | None) -> bool:
        """Returns whether the server is live."""
        return bool((await self._stub.ServerLive(v2.ServerLiveRequest(), timeout=timeout)).live)

    async def version(self, *, timeout: float) -> str:
        """Returns the server's name and version."""
        told = await self._stub.ServerMetadata(v2.ServerMetadataRequest(), timeout=timeout)
        return f"{told.name} {told.version}"

    async def index(self, *, timeout: float) -> list[str]:
        """Returns the names of the models in the repository."""
        return [one.name for one in (await self._index(pb.RepositoryIndexRequest(), timeout=timeout)).models]

    async def states(self, *, timeout: float | None) -> dict[str, set[str]]:
        """Returns the states of the versions of each model in the repository. A model that was never loaded has none.
        Only Triton reports states."""
        found: dict[str, set[str]] = {}
        for one in (await self._index(pb.RepositoryIndexRequest(), timeout=timeout)).models:
            found.setdefault(one.name, set()).update(filter(None, (one.state,)))
        return found

    async def load(self, name: str, *, timeout: float | None) -> None:
        """Loads a model."""
        await self._load(pb.RepositoryModelLoadRequest(model_name=name), timeout=timeout)

    async def unload(self, name: str, *, timeout: float | None, dependents: bool = False) -> None:
        """Unloads a model, and with `dependents` also the models that it was loaded with, which Triton can do."""
        request = pb.RepositoryModelUnloadRequest(model_name=name)
        if dependents:
            request.parameters["unload_dependents"].bool_param = True
        await self._unload(request, timeout=timeout)

    async def ready(self, name: str, *, timeout: float | None) -> bool:
        """Returns whether a model is ready for calls."""
        return bool((await self._stub.ModelReady(v2.ModelReadyRequest(name=name), timeout=timeout)).ready)

    async def describe(self, name: str, *, timeout: float | None) -> dict[str, int]:
        """Returns the parameters of a model's metadata, which only MLServer reports, as integers: 0 for a parameter of
        another type. Raises AioRpcError if the server does not have the model."""
        answer = await self._stub.ModelMetadata(v2.ModelMetadataRequest(name=name), timeout=timeout)
        found = {}
        for field in UnknownFieldSet(answer):  # type: ignore[attr-defined]  # the stubs lack it
            if field.field_number == _PARAMETERS:
                entry = v2.ModelInferRequest.ParametersEntry.FromString(field.data)
                found[entry.key] = entry.value.int64_param
        return found


def _method(channel: grpc.aio.Channel, name: str, answer: Any) -> Any:
    return channel.unary_unary(
        _PATH + name,
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=answer.FromString,
    )
