"""The supported parts of V2: each row of the README's table is tested with both edges."""

import gzip
import json
import re
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from mesh.pb import inference_pb2 as pb
from tests.doors.conftest import Doors

pytestmark = pytest.mark.asyncio(loop_scope="package")

README = Path(__file__).parents[2] / "README.md"
SERVICE = "/inference.GRPCInferenceService/"
JSON = {"name": "x", "datatype": "FP32", "shape": [2], "data": [1, 2]}
RAW = np.array([1, 2], np.float32).tobytes()
ECHO = "/v2/models/a%2Fslash"

Check = Callable[["Caller"], Awaitable[None]]


class Caller:
    """A caller over gRPC and REST, mostly of the model that sends back its input."""

    def __init__(self, doors: Doors) -> None:
        self._mesh = doors.mesh
        self._channel = doors.mesh.channel()

    async def grpc(self, method: str, request: Any = b"", *, headers: Any = (), **how: Any) -> bytes:
        """Sends one message and returns the answer."""
        sent = request if isinstance(request, bytes) else request.SerializeToString()
        call = self._channel.unary_unary(SERVICE + method)
        return await call(sent, timeout=30, metadata=headers, **how)  # type: ignore[no-any-return]

    async def no_grpc(self, method: str, request: Any = b"", *, headers: Any = (), says: str = "") -> None:
        """Asserts that a call is refused as unimplemented."""
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await self.grpc(method, request, headers=headers)
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED, error.value
        assert says in (error.value.details() or "")

    async def infer(self, **more: Any) -> pb.ModelInferResponse:
        return pb.ModelInferResponse.FromString(await self.grpc("ModelInfer", echo(**more)))

    async def rest(
        self, method: str, path: str, body: Any = None, status: int = 200, *, says: str = "", **headers: str
    ) -> Any:
        """Calls over REST, and returns the JSON of the answer, whose status must be `status`."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        reply = await self._mesh.rest(method, path, body, headers=named)
        assert reply.status == status, reply.body
        assert says in reply.body.decode()
        return reply.json

    async def no_rest(self, method: str, path: str, body: Any = None, *, says: str = "") -> None:
        """Asserts that a call is refused as unsupported."""
        answer = await self.rest(method, path, body, 501, says=says)
        assert answer["reason"] == "UNSUPPORTED"

    async def json(self, tensor: Any = None, status: int = 200, **more: Any) -> Any:
        return await self.rest("POST", f"{ECHO}/infer", {"inputs": [tensor or JSON], **more}, status)


def echo(*, typed: bool = False, of_input: Any = None, of_output: Any = None, **more: Any) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="a/slash", **more)
    tensor = request.inputs.add(name="x", datatype="FP32", shape=[2])
    if typed:
        tensor.contents.fp32_contents.extend([1, 2])
    else:
        request.raw_input_contents.append(RAW)
    for name, value in (of_input or {}).items():
        tensor.parameters[name].string_param = value
    for name, value in (of_output or {}).items():
        request.outputs.add(name="y").parameters[name].string_param = value
    return request


async def health(call: Caller) -> None:
    assert pb.ServerLiveResponse.FromString(await call.grpc("ServerLive")).live
    assert pb.ServerReadyResponse.FromString(await call.grpc("ServerReady")).ready
    ready = await call.grpc("ModelReady", pb.ModelReadyRequest(name="seven"))
    assert pb.ModelReadyResponse.FromString(ready).ready
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/seven/ready"):
        await call.rest("GET", path)


async def metadata(call: Caller) -> None:
    server = pb.ServerMetadataResponse.FromString(await call.grpc("ServerMetadata"))
    assert (await call.rest("GET", "/v2"))["extensions"] == list(server.extensions) == ["binary_tensor_data"]
    found = await call.grpc("ModelMetadata", pb.ModelMetadataRequest(name="optional"))
    required = [tensor.name for tensor in pb.ModelMetadataResponse.FromString(found).inputs]
    shown = await call.rest("GET", "/v2/models/optional")
    assert required == [tensor["name"] for tensor in shown["inputs"]] == ["x"]


async def inference(call: Caller) -> None:
    assert list((await call.infer()).raw_output_contents) == [RAW]
    assert list((await call.infer(typed=True)).outputs[0].contents.fp32_contents) == [1, 2]
    assert (await call.json())["outputs"][0]["data"] == [1, 2]
    binary = {"name": "x", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": 8}}
    head = json.dumps({"inputs": [binary]}).encode()
    for body, length in ((head + RAW, len(head)), (RAW, 0)):
        reply = await call._mesh.rest(
            "POST", f"{ECHO}/infer", body, headers={"Inference-Header-Content-Length": str(length)}
        )
        assert reply.status == 200, reply.body
        at = reply.headers.get("Inference-Header-Content-Length")
        assert (reply.body[int(at) :] == RAW) if at else (reply.json["outputs"][0]["data"] == [1, 2])


async def outputs(call: Caller) -> None:
    asked = pb.ModelInferRequest.InferRequestedOutputTensor(name="y")
    assert (await call.infer(id="7", outputs=[asked])).id == "7"
    assert (await call.json(id="7", outputs=[{"name": "y"}]))["id"] == "7"
    await call.json(status=400, outputs=[{"name": "z"}])


async def versions(call: Caller) -> None:
    assert list((await call.infer(model_version="1")).raw_output_contents) == [RAW]
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call.infer(model_version="3")
    assert refused.value.code() == grpc.StatusCode.NOT_FOUND
    for version, status in (("1", 200), ("3", 404)):
        for operation in ("", "/ready"):
            await call.rest("GET", f"{ECHO}/versions/{version}{operation}", status=status)
        await call.rest("POST", f"{ECHO}/versions/{version}/infer", {"inputs": [JSON]}, status=status)


async def parameters(call: Caller) -> None:
    anything = {"priority": "3", "mine": "yes"}
    assert list((await call.infer(of_input=anything, of_output={"mine": "yes"})).raw_output_contents) == [RAW]
    await call.json({**JSON, "parameters": anything}, parameters={"timeout": 5, "mine": True})
    texts = {"name": "x", "datatype": "BYTES", "shape": [1], "data": ["YQ=="], "parameters": {"content_type": "base64"}}
    answer = await call.rest("POST", "/v2/models/texts/infer", {"inputs": [texts]})
    assert answer["outputs"][0]["data"] == ["a"]


async def compressed(call: Caller) -> None:
    for how in (grpc.Compression.Gzip, grpc.Compression.Deflate):
        await call.grpc("ModelInfer", echo(), compression=how)
    body = json.dumps({"inputs": [JSON]}).encode()
    for name, pack in (("gzip", gzip.compress), ("deflate", zlib.compress)):
        await call.rest("POST", f"{ECHO}/infer", pack(body), Content_Encoding=name)


async def sequences(call: Caller) -> None:
    request = echo()
    request.parameters["sequence_id"].int64_param = 1
    request.parameters["sequence_start"].bool_param = True
    await call.grpc("ModelInfer", request)
    await call.json(parameters={"sequence_id": 1, "sequence_start": True})


async def classification(call: Caller) -> None:
    await call.no_grpc("ModelInfer", echo(of_output={"classification": "1"}), says="classification")
    body = {"inputs": [JSON], "outputs": [{"name": "y", "parameters": {"classification": 1}}]}
    await call.no_rest("POST", f"{ECHO}/infer", body, says="classification")


async def shared_memory(call: Caller) -> None:
    for where in ("of_input", "of_output"):
        request = echo(**{where: {"shared_memory_region": "mine"}})
        await call.no_grpc("ModelInfer", request, says="shared_memory_region")
    region = {"parameters": {"shared_memory_region": "mine", "shared_memory_byte_size": 8}}
    for inputs, outputs in (([{**JSON, **region}], []), ([JSON], [{"name": "y", **region}])):
        await call.no_rest("POST", f"{ECHO}/infer", {"inputs": inputs, "outputs": outputs}, says="shared_memory_")
    for kind in ("System", "Cuda"):
        for verb in ("Status", "Register", "Unregister"):
            await call.no_grpc(f"{kind}SharedMemory{verb}", says="shared memory")
        path = f"/v2/{kind.lower()}sharedmemory"
        for method, rest in (("GET", "/status"), ("GET", "/region/mine/status"), ("POST", "/region/mine/register")):
            await call.no_rest(method, path + rest, says="shared memory")


async def repository(call: Caller) -> None:
    for verb in ("Index", "ModelLoad", "ModelUnload"):
        await call.no_grpc(f"Repository{verb}", b"\x12\x05seven", says="management")
    for path in ("index", "models/seven/load", "models/seven/unload"):
        await call.no_rest("POST", f"/v2/repository/{path}", {}, says="/mesh/v1/models")


async def configuration(call: Caller) -> None:
    await call.no_grpc("ModelConfig", b"\x0a\x05seven", says="metadata")
    for path in ("seven", "seven/versions/1"):
        await call.no_rest("GET", f"/v2/models/{path}/config", says="metadata")


async def statistics(call: Caller) -> None:
    await call.no_grpc("ModelStatistics", b"\x0a\x05seven", says="metrics")
    for path in ("stats", "seven/stats", "seven/versions/1/stats"):
        await call.no_rest("GET", f"/v2/models/{path}", says="metrics")


async def trace(call: Caller) -> None:
    await call.no_grpc("TraceSetting", says="trace")
    await call.no_grpc("LogSettings", says="logging")
    for path in ("/v2/trace/setting", "/v2/models/seven/trace/setting", "/v2/logging"):
        for method, body in (("GET", None), ("POST", {})):
            await call.no_rest(method, path, body, says="extension is not supported")


async def streams(call: Caller) -> None:
    await call.no_grpc("ModelStreamInfer", echo(), says="ModelInfer")
    await call.no_grpc("ModelStreamInfer", echo(), headers=[("mm-model-id", "a/slash")], says="unknown method")


async def generate(call: Caller) -> None:
    for path in ("generate", "generate_stream", "versions/1/generate"):
        await call.no_rest("POST", f"/v2/models/seven/{path}", {"text_input": "a"}, says="generate")


async def first_version(call: Caller) -> None:
    await call.rest("POST", "/v1/models/seven:predict", {"instances": [1]}, 404)
    await call.rest("GET", "/v1/models", None, 404)


ROWS: dict[str, Check] = {
    "health": health,
    "metadata": metadata,
    "inference: ": inference,
    "requested outputs": outputs,
    "versions": versions,
    "parameters": parameters,
    "compressed": compressed,
    "sequences": sequences,
    "classification": classification,
    "shared memory": shared_memory,
    "model repository": repository,
    "model configuration": configuration,
    "statistics": statistics,
    "trace": trace,
    "inference by streams": streams,
    "generate": generate,
    "V1": first_version,
}
"""Functions by the beginning of their row in the README's table."""


async def test_each_row_has_a_test() -> None:
    section = re.search(r"### Supported parts of V2\n(.*?)\n\n[A-Z]", README.read_text(), re.DOTALL)
    assert section is not None
    rows = [line.split("|")[1].strip() for line in section[1].splitlines() if line.startswith("|")][2:]
    assert len(rows) == len(ROWS)
    for row, start in zip(rows, ROWS, strict=True):
        assert row.startswith(start)


@pytest.mark.parametrize("row", ROWS)
async def test_the_row_is_true(doors, row):
    await ROWS[row](Caller(doors))


async def test_a_model_may_be_called_like_an_extension(doors):
    """A model id may contain an extension's name as a part of its path, because ids may contain slashes."""
    call = Caller(doors)
    assert (await call.rest("GET", "/v2/models/my/stats"))["name"] == "my/stats"
    assert (await call.rest("GET", "/v2/models/my%2Fstats"))["name"] == "my/stats"
