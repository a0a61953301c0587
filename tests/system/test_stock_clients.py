"""Unmodified V2 clients against both edges of the router, each client in a separate process.

They cannot share a process, because tritonclient and the kserve SDK both put `inference.*` messages into protobuf's
default pool.
"""

import asyncio
import subprocess
import sys

import pytest

from tests.support import models

TRITON_GRPC = """
import sys, numpy as np, tritonclient.grpc as triton
client = triton.InferenceServerClient(sys.argv[1])
assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("seven")
assert client.get_model_metadata("seven").inputs[0].name == "x"
assert client.get_server_metadata().name
tensor = triton.InferInput("x", [1, 1], "FP32")
tensor.set_data_from_numpy(np.ones((1, 1), np.float32))
answer = client.infer("seven", [tensor], request_id="r1")
assert answer.get_response().id == "r1"
print(answer.as_numpy("y").item())
"""

TRITON_HTTP = """
import sys, numpy as np, tritonclient.http as triton
client = triton.InferenceServerClient(sys.argv[2])
assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("seven")
assert client.get_model_metadata("seven")["inputs"][0]["name"] == "x"
for binary in (True, False):
    for packed in (None, "gzip", "deflate"):
        tensor = triton.InferInput("x", [1, 1], "FP32")
        tensor.set_data_from_numpy(np.ones((1, 1), np.float32), binary_data=binary)
        wanted = triton.InferRequestedOutput("y", binary_data=binary)
        answer = client.infer("seven", [tensor], outputs=[wanted], request_compression_algorithm=packed)
        value = answer.as_numpy("y").item()
        assert value == 7.0, value
print(value)
"""

KSERVE_REST = """
import asyncio, sys, numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig

async def main():
    client = InferenceRESTClient(RESTConfig(protocol="v2"))
    base = "http://" + sys.argv[2]
    assert await client.is_server_live(base) and await client.is_server_ready(base)
    assert await client.is_model_ready(base, "seven")
    for binary in (True, False):
        tensor = InferInput("x", [1, 1], "FP32")
        tensor.set_data_from_numpy(np.ones((1, 1), np.float32), binary_data=binary)
        request = InferRequest(model_name="seven", infer_inputs=[tensor])
        answer = await client.infer(base, request, model_name="seven")
        value = float(answer.outputs[0].as_numpy().item())
        assert value == 7.0, value
    print(value)

asyncio.run(main())
"""

KSERVE_GRPC = """
import asyncio, sys, numpy as np
from kserve import InferenceGRPCClient, InferInput, InferRequest

async def main():
    client = InferenceGRPCClient(sys.argv[1])
    assert await client.is_server_live() and await client.is_server_ready() and await client.is_model_ready("seven")
    tensor = InferInput("x", [1, 1], "FP32")
    tensor.set_data_from_numpy(np.ones((1, 1), np.float32), binary_data=True)
    answer = await client.infer(InferRequest(model_name="seven", infer_inputs=[tensor]))
    print(float(answer.outputs[0].as_numpy().item()))

asyncio.run(main())
"""

CLIENTS = {
    "tritonclient.grpc": TRITON_GRPC,
    "tritonclient.http": TRITON_HTTP,
    "kserve-rest": KSERVE_REST,
    "kserve-grpc": KSERVE_GRPC,
}


@pytest.fixture
async def mesh(a_mesh, edge):
    """A mesh with the model `seven`, which answers 7."""
    async with a_mesh(pods=1, edge=edge) as mesh:
        await mesh.register("seven", models.constant(7.0))
        yield mesh


async def test_stock_clients(mesh):
    async def run(name: str, source: str) -> None:
        argv = [sys.executable, "-c", source, mesh.grpc_address(), mesh.rest_url().removeprefix("http://")]
        done = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, f"{name}:\n{done.stdout}\n{done.stderr[-3000:]}"
        assert done.stdout.split()[-1] == "7.0", f"{name}: {done.stdout}"

    # One after another: their imports alone take seconds of CPU each.
    for name, source in CLIENTS.items():
        await run(name, source)
