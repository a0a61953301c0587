"""V2 calls of `mesh infer`, over gRPC or REST.

The classes for both protocols have the same interface, which takes and returns arrays.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

import grpc
from google.protobuf.message import DecodeError, Message

from mesh.cli import tensors
from mesh.cli.client import Client
from mesh.cli.exits import CommandError, MeshRefusal, MeshUnreachable
from mesh.cli.tensors import Array
from mesh.cli.trust import SYSTEM, Trust
from mesh.pb import details_pb2, inference_pb2
from mesh.v2 import SERVICE

MAX_MESSAGE = 2**31 - 1
"""gRPC's limit on messages, in bytes. The mesh has a limit of its own, whose error names the option; gRPC's default of
4 MiB would hide that error."""


@dataclass(slots=True)
class InferRequest:
    """An inference request that is not yet encoded for gRPC or REST."""

    model: str
    inputs: dict[str, Array] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    parameters: dict[str, Any] = field(default_factory=dict)


class Carrier(Protocol):
    """A client of V2 over one protocol: gRPC or REST."""

    async def metadata(self, model: str) -> dict[str, Any]:
        """Returns the model's inputs, as in V2's JSON."""

    async def infer(self, request: InferRequest) -> dict[str, Array]:
        """Returns the outputs by name. Raises CommandError."""

    async def close(self) -> None:
        """Closes the connection."""


class Rest:
    """V2 over REST. Sends inputs as JSON if JSON can represent them. Requests outputs as binary data."""

    def __init__(self, client: Client, timeout: float) -> None:
        self._client = client
        self._timeout = timeout

    async def close(self) -> None:
        """Does nothing, because the command closes the client."""

    async def metadata(self, model: str) -> dict[str, Any]:
        """Returns the model's inputs, as in V2's JSON."""
        return await self._client.request("GET", f"/v2/models/{quote(model, safe='')}", timeout=self._timeout)

    async def infer(self, request: InferRequest) -> dict[str, Array]:
        """Sends the request as JSON and binary data, and returns the outputs by name."""
        inputs = [tensors.to_rest(name, array) for name, array in request.inputs.items()]
        body: dict[str, Any] = {"inputs": [shown for shown, _ in inputs]}
        if request.outputs:
            body["outputs"] = [{"name": name} for name in request.outputs]
        body["parameters"] = request.parameters | {"binary_data_output": True}
        path = f"/v2/models/{quote(request.model, safe='')}/infer"
        data = b"".join(raw for _, raw in inputs)
        return tensors.from_rest(*await self._client.tensors(path, body, data, timeout=self._timeout))


class Grpc:
    """V2 over gRPC."""

    def __init__(self, endpoint: str, timeout: float, trust: Trust = SYSTEM) -> None:
        url = urlsplit(endpoint if "://" in endpoint else f"http://{endpoint}")
        self.address = url.netloc if url.port else f"{url.netloc}:{443 if url.scheme == 'https' else 80}"
        self._timeout = timeout
        self._metadata = tuple(trust.authorization().items())
        channel_options = [(f"grpc.max_{way}_message_length", MAX_MESSAGE) for way in ("send", "receive")]
        if url.scheme == "https":
            credentials = trust.credentials()
            self._channel = grpc.aio.secure_channel(self.address, credentials, options=channel_options)
        else:
            self._channel = grpc.aio.insecure_channel(self.address, options=channel_options)

    async def close(self) -> None:
        """Closes the channel."""
        await self._channel.close(None)

    async def metadata(self, model: str) -> dict[str, Any]:
        """Returns the model's inputs, as in V2's JSON."""
        answer = await self._call(
            "ModelMetadata", inference_pb2.ModelMetadataRequest(name=model), inference_pb2.ModelMetadataResponse
        )
        inputs = [{"name": t.name, "datatype": t.datatype, "shape": list(t.shape)} for t in answer.inputs]
        return {"inputs": inputs}

    async def infer(self, request: InferRequest) -> dict[str, Array]:
        """Sends the request with raw contents and returns the outputs by name."""
        message = tensors.to_grpc(request.model, request.inputs, request.outputs)
        for name, value in request.parameters.items():
            _set_parameter(message.parameters[name], value)
        return tensors.from_grpc(await self._call("ModelInfer", message, inference_pb2.ModelInferResponse))

    async def _call(self, method: str, request: Message, answer: Any) -> Any:
        call = self._channel.unary_unary(
            f"/{SERVICE}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=answer.FromString,
        )
        try:
            return await call(request, timeout=self._timeout, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise _failure(error, self.address) from error


def _failure(error: Any, address: str) -> CommandError:
    """Returns the error for a failed call. Its reason is the mesh's reason if the trailers contain one, or else the
    gRPC code."""
    text = error.details() or ""
    for name, value in error.trailing_metadata() or ():
        if name == "grpc-status-details-bin":
            return MeshRefusal(text, reason=_reason(value))
    code = error.code().name
    if code == "UNAVAILABLE" and ("failed to connect" in text.lower() or "Connection refused" in text):
        return MeshUnreachable(
            f"nothing answers gRPC at {address}: is the mesh up? "
            "Start one with `mesh up`, or set --endpoint or MESH_ENDPOINT to another"
        )
    return CommandError(f"{code}: {text}", reason=code)


def _reason(details: bytes) -> str:
    """Returns the reason in a google.rpc.ErrorInfo, or "" without one."""
    status = details_pb2.Status()
    info = details_pb2.ErrorInfo()
    try:
        status.ParseFromString(details)
        for detail in status.details:
            if detail.type_url.endswith("google.rpc.ErrorInfo"):
                info.ParseFromString(detail.value)
                return info.reason
    except DecodeError:
        pass  # the text says enough without it
    return ""


def _set_parameter(parameter: inference_pb2.InferParameter, value: Any) -> None:
    if isinstance(value, bool):
        parameter.bool_param = value
    elif isinstance(value, int):
        parameter.int64_param = value
    elif isinstance(value, float):
        parameter.double_param = value
    else:
        parameter.string_param = str(value)
