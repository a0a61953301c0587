"""Inference calls as clients make them: V2 over gRPC and REST, in every encoding that the protocol has for tensors.

This module shares only tables with the server (datatypes and statuses), and no code that encodes or decodes, so that an
error in the server is not hidden by the same error here.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Protocol
from urllib.parse import quote

import aiohttp
import grpc
import numpy as np
import numpy.typing as npt

from mesh.pb import inference_pb2
from mesh.statuses import Code, Reason
from mesh.v2 import SERVICE
from mesh.v2.datatypes import DATATYPES, OF_NAME

Array = npt.NDArray[Any]

_INFER = f"/{SERVICE}/ModelInfer"
_LENGTH_HEADER = "Inference-Header-Content-Length"
_NAMES = {kind.dtype: kind.name for kind in DATATYPES if kind.name not in ("BF16", "BYTES")}
_RETRIED = {reason.http: reason.code for reason in (Reason.UNAVAILABLE, Reason.OVERLOADED)}


class CallFailed(Exception):
    """A failed call. `code` is the gRPC code, over REST too. `retry_after` is the pause that the mesh asks for, in
    seconds, or None if the mesh asks for none."""

    def __init__(self, code: int, text: str, *, retry_after: float | None = None) -> None:
        super().__init__(f"{code_name(code)}: {text}")
        self.code = code
        self.retry_after = retry_after


class Caller(Protocol):
    """A way to call the mesh. Concurrent calls are safe."""

    name: str

    async def infer(self, model_id: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Returns the outputs by name. Raises CallFailed; ValueError, KeyError or TypeError for an answer that is not
        V2."""


class GrpcCaller:
    """gRPC calls with raw or typed tensors."""

    def __init__(self, channel: grpc.aio.Channel, *, typed: bool, timeout: float) -> None:
        self.name = "gRPC typed" if typed else "gRPC raw"
        self._typed = typed
        self._timeout = timeout
        self._call = channel.unary_unary(
            _INFER,
            request_serializer=inference_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=inference_pb2.ModelInferResponse.FromString,
        )

    async def infer(self, model_id: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Sends one ModelInfer request, and returns the outputs by name."""
        request = inference_pb2.ModelInferRequest(model_name=model_id)
        for name, array in inputs.items():
            tensor = request.inputs.add(name=name, datatype=datatype(array), shape=array.shape)
            if self._typed:
                getattr(tensor.contents, OF_NAME[tensor.datatype].field).extend(array.ravel().tolist())
            else:
                request.raw_input_contents.append(array.tobytes())
        try:
            reply = await self._call(request, timeout=self._timeout)
        except grpc.aio.AioRpcError as error:
            raise CallFailed(error.code().value[0], error.details() or "") from None
        raw = reply.raw_output_contents
        if raw and len(raw) != len(reply.outputs):
            raise ValueError(f"the reply has {len(raw)} raw contents for {len(reply.outputs)} outputs")
        outputs: dict[str, Array] = {}
        for index, tensor in enumerate(reply.outputs):
            if raw:
                values: Array = _unpack(tensor.datatype, raw[index])
            else:
                typed = getattr(tensor.contents, OF_NAME[tensor.datatype].field)
                values = np.array(list(typed), OF_NAME[tensor.datatype].dtype)
            outputs[tensor.name] = values.reshape(list(tensor.shape))
        return outputs


class RestCaller:
    """REST calls with tensors in JSON, or in binary after the JSON. `base` is a URL without a trailing slash."""

    def __init__(self, session: aiohttp.ClientSession, base: str, *, binary: bool, timeout: float) -> None:
        self.name = "REST binary" if binary else "REST JSON"
        self._session = session
        self._base = base
        self._binary = binary
        self._timeout = aiohttp.ClientTimeout(total=timeout)

    async def infer(self, model_id: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Sends one POST request, and returns the outputs by name."""
        body, headers = self._request(inputs)
        url = f"{self._base}/v2/models/{quote(model_id, safe='')}/infer"
        try:
            async with self._session.post(url, data=body, headers=headers, timeout=self._timeout) as response:
                content = await response.read()
                if response.status >= Reason.BAD_REQUEST.http:
                    raise _failure(response, content)
                length = int(response.headers.get(_LENGTH_HEADER, len(content)))
        except TimeoutError:
            raise CallFailed(Code.DEADLINE_EXCEEDED, "the mesh did not answer in time") from None
        except aiohttp.ClientError as error:
            raise CallFailed(Code.UNAVAILABLE, f"{type(error).__name__}: {error}") from None
        return _outputs(json.loads(content[:length]), content[length:])

    def _request(self, inputs: Mapping[str, Array]) -> tuple[bytes, dict[str, str]]:
        blobs: list[bytes] = []
        tensors: list[dict[str, Any]] = []
        for name, array in inputs.items():
            tensor: dict[str, Any] = {"name": name, "shape": list(array.shape), "datatype": datatype(array)}
            if self._binary:
                blobs.append(array.tobytes())
                tensor["parameters"] = {"binary_data_size": len(blobs[-1])}
            else:
                tensor["data"] = array.ravel().tolist()
            tensors.append(tensor)
        if not self._binary:
            return json.dumps({"inputs": tensors}).encode(), {"Content-Type": "application/json"}
        head = json.dumps({"inputs": tensors, "parameters": {"binary_data_output": True}}).encode()
        headers = {"Content-Type": "application/octet-stream", _LENGTH_HEADER: str(len(head))}
        return b"".join((head, *blobs)), headers


def datatype(array: Array) -> str:
    """Returns the V2 name of an array's type."""
    return _NAMES[array.dtype.newbyteorder("<")]


def code_name(code: int) -> str:
    """Returns the name of a gRPC code, or its number."""
    try:
        return Code(code).name
    except ValueError:
        return str(code)


def _failure(response: aiohttp.ClientResponse, content: bytes) -> CallFailed:
    retry_after = response.headers.get("Retry-After", "")
    wait = float(retry_after) if retry_after.isdigit() else None
    try:
        body = json.loads(content)
        return CallFailed(int(body["code"]), str(body["error"]), retry_after=wait)
    except (ValueError, KeyError, TypeError):  # sent by a proxy in front of the mesh, not by the mesh
        code = _RETRIED.get(response.status, Code.UNKNOWN)
        text = content[:200].decode(errors="replace") or "no text"
        return CallFailed(code, f"HTTP status {response.status}: {text}", retry_after=wait)


def _outputs(reply: dict[str, Any], blob: bytes) -> dict[str, Array]:
    outputs: dict[str, Array] = {}
    start = 0
    for tensor in reply["outputs"]:
        size = (tensor.get("parameters") or {}).get("binary_data_size")
        if size is None:
            values: Array = np.array(tensor["data"], OF_NAME[tensor["datatype"]].dtype)
        else:
            if start + size > len(blob):
                raise ValueError("the binary part of the reply is shorter than announced")
            values = _unpack(tensor["datatype"], blob[start : start + size])
            start += size
        outputs[tensor["name"]] = values.reshape(tensor["shape"])
    if start != len(blob):
        raise ValueError("the binary part of the reply is longer than announced")
    return outputs


def _unpack(name: str, raw: bytes) -> Array:
    if name != "BYTES":
        return np.frombuffer(raw, OF_NAME[name].dtype)
    items: list[bytes] = []
    position = 0
    while position < len(raw):
        (length,) = struct.unpack_from("<I", raw, position)
        position += 4 + length
        if position > len(raw):
            raise ValueError("a string is longer than the rest of its tensor")
        items.append(raw[position - length : position])
    return _objects(items)


def _objects(items: Sequence[bytes]) -> Array:
    array = np.empty(len(items), np.object_)
    array[:] = items
    return array
