"""Four ways to send the same tensors to a mesh: gRPC with raw or typed contents, REST with JSON or binary data.

Each way returns the outputs, or raises `Refusal` with the text of the error.
"""

import asyncio
import json
import struct
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

import grpc
import numpy as np

from mesh.pb import inference_pb2 as pb
from tests.support.localmesh import LocalMesh

from .cases import Tensor

DTYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "FP16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(object),
    **{
        f"{sign}INT{bits}": np.dtype(f"<{sign.lower() or 'i'}{bits // 8}")
        for sign in ("", "U")
        for bits in (8, 16, 32, 64)
    },
}
_FIELDS = {
    "BOOL": "bool_contents",
    **{f"INT{bits}": "int_contents" for bits in (8, 16, 32)},
    **{f"UINT{bits}": "uint_contents" for bits in (8, 16, 32)},
    "INT64": "int64_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
_TIMEOUT = 60


class Refusal(Exception):
    """An error answer. `status` is gRPC's code or HTTP's status."""

    def __init__(self, status: str, text: str) -> None:
        super().__init__(f"{status}: {text}")
        self.status = status
        self.text = text


def to_raw(array: np.ndarray) -> bytes:
    """Returns an array as raw contents."""
    if not array.dtype.hasobject:
        return array.tobytes()
    return b"".join(struct.pack("<I", len(text.encode())) + text.encode() for text in array.ravel())


def from_raw(datatype: str, shape: Sequence[int], raw: bytes) -> np.ndarray:
    """Returns raw contents as an array."""
    if datatype != "BYTES":
        return np.frombuffer(raw, DTYPES[datatype]).reshape(tuple(shape))
    texts, at = [], 0
    while at < len(raw):
        (size,) = struct.unpack_from("<I", raw, at)
        texts.append(raw[at + 4 : at + 4 + size].decode())
        at += 4 + size
    return _objects(texts, shape)


def _objects(texts: Sequence[str], shape: Sequence[int]) -> np.ndarray:
    array = np.empty(len(texts), object)
    array[:] = list(texts)
    return array.reshape(tuple(shape))


class Ways:
    """The ways into one mesh, for example `await ways.all()["gRPC raw"](model, inputs)`."""

    def __init__(self, mesh: LocalMesh) -> None:
        self._mesh = mesh
        self._infer = mesh.channel().unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=lambda request: request.SerializeToString(),
            response_deserializer=pb.ModelInferResponse.FromString,
        )

    def all(self) -> dict[str, Any]:
        """Returns all ways by name."""
        return {
            "gRPC raw": lambda model, inputs: self.grpc(model, inputs, typed=False),
            "gRPC typed": lambda model, inputs: self.grpc(model, inputs, typed=True),
            "REST JSON": lambda model, inputs: self.rest(model, inputs, binary=False),
            "REST binary": lambda model, inputs: self.rest(model, inputs, binary=True),
        }

    async def grpc(self, model: str, inputs: Sequence[Tensor], *, typed: bool) -> list[Tensor]:
        """Calls over gRPC with raw or typed contents in both directions, as far as the datatypes allow it."""
        request = pb.ModelInferRequest(model_name=model)
        for tensor in inputs:
            one = request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.array.shape)
            if not typed:
                request.raw_input_contents.append(to_raw(tensor.array))
            elif (field := _FIELDS.get(tensor.datatype)) is not None:
                values = tensor.array.ravel().tolist()
                getattr(one.contents, field).extend(
                    [text.encode() for text in values] if tensor.datatype == "BYTES" else values
                )
        try:
            answer = await self._infer(request, timeout=_TIMEOUT)
        except grpc.aio.AioRpcError as error:
            raise Refusal(error.code().name, error.details() or "") from error
        found = []
        for index, output in enumerate(answer.outputs):
            shape = tuple(output.shape)
            if answer.raw_output_contents:
                array = from_raw(output.datatype, shape, answer.raw_output_contents[index])
            else:
                values = getattr(output.contents, _FIELDS[output.datatype])
                if output.datatype == "BYTES":
                    array = _objects([value.decode() for value in values], shape)
                else:
                    array = np.array(values, DTYPES[output.datatype]).reshape(shape)
            found.append(Tensor(output.name, output.datatype, array))
        return found

    async def rest(self, model: str, inputs: Sequence[Tensor], *, binary: bool) -> list[Tensor]:
        """Calls over REST with all data as JSON or all data binary, in both directions."""
        document: dict[str, Any] = {"inputs": []}
        blobs = b""
        for tensor in inputs:
            one: dict[str, Any] = {
                "name": tensor.name,
                "datatype": tensor.datatype,
                "shape": list(tensor.array.shape),
            }
            if binary:
                blob = to_raw(tensor.array)
                blobs += blob
                one["parameters"] = {"binary_data_size": len(blob)}
            else:
                one["data"] = tensor.array.ravel().tolist()
            document["inputs"].append(one)
        if binary:
            document["parameters"] = {"binary_data_output": True}
        head = json.dumps(document).encode()
        headers = {"content-type": "application/octet-stream" if binary else "application/json"}
        if binary:
            headers["Inference-Header-Content-Length"] = str(len(head))
        reply = await self._mesh.rest(
            "POST", f"/v2/models/{urllib.parse.quote(model, safe='')}/infer", head + blobs, headers=headers
        )
        length = int(reply.headers.get("Inference-Header-Content-Length") or len(reply.body))
        answer = json.loads(reply.body[:length])
        if reply.status != 200:
            raise Refusal(str(reply.status), str(answer.get("error", "")))
        found, at = [], length
        for output in answer["outputs"]:
            shape, datatype = tuple(output["shape"]), output["datatype"]
            size = output.get("parameters", {}).get("binary_data_size")
            if size is not None:
                array = from_raw(datatype, shape, reply.body[at : at + size])
                at += size
            elif datatype == "BYTES":
                array = _objects(output["data"], shape)
            else:
                array = np.array(output["data"], DTYPES[datatype]).reshape(shape)
            found.append(Tensor(output["name"], datatype, array))
        return found


async def in_turn(tasks: Sequence[Any], at_once: int) -> None:
    """Awaits all tasks, `at_once` of them at a time."""
    turns = asyncio.Semaphore(at_once)

    async def one(task: Any) -> None:
        async with turns:
            await task

    await asyncio.gather(*(one(task) for task in tasks))
