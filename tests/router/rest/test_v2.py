"""V2 over REST apart from inference, and standard clients."""

import asyncio
import json
import subprocess
import sys
import types

import pytest
from yarl import URL

from mesh.statuses import MeshError, Reason

BODY = {"inputs": [{"name": "x", "shape": [2], "datatype": "INT32", "data": [1, 2]}]}
INFER = "/v2/models/m/infer"


@pytest.fixture(params=["aiohttp", "envoy"])
def carrier(request):
    return request.param


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v2/models/m/infer", 404), ("GET", "/v2/models/", 404), ("GET", "/nothing", 404), ("DELETE", "/v2", 405)],
)
async def test_paths_that_lead_nowhere(http, served, method, path, status):
    async with http.request(method, URL(f"http://127.0.0.1:{served}{path}", encoded=True)) as answer:
        body = await answer.json()
        assert answer.status == status
        assert body["reason"] in ("UNKNOWN_METHOD", "BAD_REQUEST")
        assert body["error"]


async def test_model_metadata_and_readiness(http, worker):
    metadata = worker.dispatcher.metadata
    metadata.platform = "onnx"
    metadata.inputs.add(name="x", datatype="FP32", shape=[-1, 4])
    async with http.get("/v2/models/m/versions/2") as answer:
        assert await answer.json() == {
            "name": "m",
            "versions": [],
            "platform": "onnx",
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
            "outputs": [],
        }
    async with http.get("/v2/models/m/ready") as answer:
        assert (answer.status, await answer.json()) == (200, {"name": "m", "ready": True})
    worker.dispatcher.error = MeshError(Reason.UNKNOWN_MODEL, "no such model")
    for path in ("/v2/models/m", "/v2/models/m/ready"):
        async with http.get(path) as answer:
            assert answer.status == 404


async def test_the_server_is_live_and_ready_or_says_why_not(http, worker):
    async with http.get("/v2/health/live") as answer:
        assert await answer.json() == {"live": True}
    async with http.get("/v2/health/ready") as answer:
        assert (answer.status, await answer.json()) == (200, {"ready": True})
    worker.reason = "no pods yet"
    async with http.get("/v2/health/ready") as answer:
        body = await answer.json()
        assert (answer.status, body["ready"], body["error"]) == (503, False, "no pods yet")
    worker.reason = None
    for pods, reason in (([], "there is no runtime pod"), (["server-down"], "no runtime pod is ready (server-down)")):
        worker.view.pods = {
            f"pod-{state}": types.SimpleNamespace(record=types.SimpleNamespace(state=state)) for state in pods
        }
        async with http.get("/v2/health/ready") as answer:
            assert (answer.status, (await answer.json())["error"]) == (503, reason)
    for path in ("/v2", "/v2/"):
        async with http.get(path) as answer:
            body = await answer.json()
            assert body["name"] == "mesh"
            assert "binary_tensor_data" in body["extensions"]


async def test_models_are_listed_by_pages(http, worker):
    for model_id in ("a", "b", "c"):
        await worker.management.add(model_id, "t", "", "")
    async with http.get("/v2/models?limit=2") as answer:
        assert await answer.json() == {"models": ["a", "b"], "next": "b"}
    async with http.get("/v2/models?limit=2&after=b") as answer:
        assert await answer.json() == {"models": ["c"], "next": None}
    async with http.get("/v2/models?limit=0") as answer:
        assert answer.status == 400


TRITON = """
import sys
import numpy as np
import tritonclient.http as triton

client = triton.InferenceServerClient(sys.argv[1])
assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("m")
assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
assert client.get_model_metadata("m", "1")["name"] == "m"

arrays = {
    "f": np.array([[1.5, -2], [0, 3e30]], np.float32),
    "h": np.array([1.5, 2], np.float16),
    "s": np.array(["text", "\\u00e4", ""], dtype=np.object_),
    "b": np.array([True, False]),
    "u": np.array([2**64 - 1], np.uint64),
    "e": np.zeros((0, 3), np.int8),
}
types = {"f": "FP32", "h": "FP16", "s": "BYTES", "b": "BOOL", "u": "UINT64", "e": "INT8"}

def tensor(name, binary):
    made = triton.InferInput(name, arrays[name].shape, types[name])
    made.set_data_from_numpy(arrays[name], binary_data=binary)
    return made

def same(result, name):
    got = result.as_numpy(name)
    want = arrays[name]
    if types[name] == "BYTES":
        got = np.array([x.decode() if isinstance(x, bytes) else x for x in got.ravel()], dtype=np.object_)
    assert got.shape == want.shape and (got == want).all(), (name, got, want)

for binary_in in (True, False):
    for binary_out in (None, True, False):
        for compression in (None, "gzip", "deflate"):
            names = [n for n in arrays if n != "h" or (binary_in and binary_out is not False)]
            outputs = None
            if binary_out is not None:
                outputs = [triton.InferRequestedOutput(n, binary_data=binary_out) for n in names]
            result = client.infer(
                "m",
                [tensor(n, binary_in) for n in names],
                outputs=outputs,
                request_id="7",
                request_compression_algorithm=compression,
                response_compression_algorithm=compression,
                parameters={"mine": "yes"},
            )
            assert result.get_response()["id"] == "7"
            for name in names:
                same(result, name)

futures = [client.async_infer("m", [tensor("f", True)]) for _ in range(4)]
for future in futures:
    same(future.get_result(), "f")
try:
    client.infer("a/b", [tensor("h", True)], outputs=[triton.InferRequestedOutput("h", binary_data=False)])
except triton.InferenceServerException as error:
    assert error.status() == "400" and "FP16" in error.message(), error
else:
    raise AssertionError("not refused")
"""

KSERVE = """
import asyncio, sys
import numpy as np
from kserve import InferenceRESTClient, RESTConfig, InferRequest, InferInput

async def main():
    base = "http://" + sys.argv[1]
    async with InferenceRESTClient(RESTConfig(protocol="v2")) as client:
        assert await client.is_server_ready(base) and await client.is_server_live(base)
        assert await client.is_model_ready(base, "m")
        array = np.array([[1.5, 2]], np.float32)
        for binary in (False, True):
            tensor = InferInput("x", [1, 2], "FP32")
            tensor.set_data_from_numpy(array, binary_data=binary)
            for everything in (False, True):
                request = InferRequest("m", [tensor], request_id="7", parameters={"binary_data_output": everything})
                answer = await client.infer(base, request, model_name="m")
                assert (answer.outputs[0].as_numpy() == array).all()
                assert answer.id == "7"

asyncio.run(main())
"""


@pytest.mark.parametrize("script", [TRITON, KSERVE], ids=["tritonclient", "kserve"])
async def test_stock_clients_unchanged(served, script):
    """Each client runs in a process of its own, because one patches the interpreter with gevent and both register V2
    messages."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, f"127.0.0.1:{served}", stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    async with asyncio.timeout(90):
        output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()


@pytest.mark.parametrize(
    "head",
    [
        "HTTP/1.0",
        "HTTP/1.0\r\nConnection: Keep-Alive",
        "HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: TLS/1.2",
        "HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk",
        "HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket",
    ],
)
async def test_old_clients_and_offers_to_upgrade_are_served(served, head):
    body = json.dumps(BODY)
    reader, writer = await asyncio.open_connection("127.0.0.1", served)
    writer.write(f"POST {INFER} {head}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
    async with asyncio.timeout(10):
        assert (await reader.readuntil(b"\r\n")).split()[1] == b"200"
    writer.close()
