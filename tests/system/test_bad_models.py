"""Bad models and bad requests: the caller gets the right status and an error text, and the pod's other models keep
answering."""

import os

import grpc
import numpy as np
import pytest
import pytest_asyncio

from tests.support import models
from tests.support.localmesh import Client, LocalMesh

pytestmark = pytest.mark.asyncio(loop_scope="module")

ONE = np.ones((1, 1), np.float32)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pod(tmp_path_factory, etcd_server):
    """A mesh shared by the module's tests, with one pod and a good model in it."""
    options = ["--load-timeout", "5"]
    async with LocalMesh(tmp_path_factory.mktemp("bad"), etcd_server, pods=1, runtime_options=options) as mesh:
        await mesh.register("good", models.constant(1.0), load=True)
        yield mesh


@pytest_asyncio.fixture(loop_scope="module")
async def mesh(pod):
    """The module's mesh, whose good model must still answer from the same model server after each test."""
    server = pod.server_pid(pod.pods[0])
    yield pod
    (answer,) = await Client(pod.channel()).infer("good", x=ONE)
    assert answer.item() == 1.0
    assert pod.server_pid(pod.pods[0]) == server, "the model server must not have been restarted"


async def refused(mesh: LocalMesh, model_id: str, **inputs: np.ndarray) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await Client(mesh.channel()).infer(model_id, **(inputs or {"x": ONE}))
    return error.value


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param(b"this is no model", "", id="not-onnx"),
        pytest.param(b"", "empty", id="empty"),
        pytest.param(models.constant(1.0)[:40], "", id="truncated"),
        pytest.param(b"\0" * 4096, "", id="zeros"),
        pytest.param(models.endless_loop(), "5 s", id="endless"),
        pytest.param(models.external_data("../../secret"), "external", id="data-outside-its-folder"),
    ],
)
async def test_a_model_that_cannot_be_loaded(mesh, content, says):
    """A call fails with INTERNAL and an error text, or with 500 over REST. The model's status is LOADING_FAILED."""
    name = f"bad-{os.urandom(3).hex()}"
    await mesh.register(name, content)
    error = await refused(mesh, name)
    assert error.code() is grpc.StatusCode.INTERNAL, error
    assert says in error.details()
    assert error.details()
    reply = await mesh.rest("POST", f"/v2/models/{name}/infer", {"inputs": []})
    assert reply.status == 500
    status = await mesh.status(name)
    assert status["status"] == "LOADING_FAILED"
    assert status["errors"]


async def test_a_model_that_asks_for_gigabytes(mesh):
    """A call fails with RESOURCE_EXHAUSTED, or with 429 over REST, although the file is small."""
    await mesh.register("glutton", models.huge_allocation(40 << 30))
    error = await refused(mesh, "glutton")
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, error
    assert "memory" in error.details()
    assert (await mesh.rest("POST", "/v2/models/glutton/infer", {"inputs": []})).status == 429


async def test_a_path_that_is_not_there(mesh):
    """The error names the file."""
    await mesh.rest("PUT", "/mesh/v1/models/nowhere", {"type": "onnx", "path": f"file://{mesh.models}/none.onnx"})
    error = await refused(mesh, "nowhere")
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "none.onnx" in error.details()


async def test_a_path_outside_the_roots(mesh):
    """A path outside the roots that the operator has configured is refused, and the error mentions the roots."""
    await mesh.rest("PUT", "/mesh/v1/models/escape", {"type": "onnx", "path": f"file://{mesh.models}/../../etc/passwd"})
    error = await refused(mesh, "escape")
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "root" in error.details()


async def test_a_model_larger_than_any_pod(mesh):
    """A call fails with FAILED_PRECONDITION, or with 503 over REST."""
    await mesh.register("elephant", models.weights(0, mebibytes=100))
    error = await refused(mesh, "elephant")
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION, error
    assert (await mesh.rest("POST", "/v2/models/elephant/infer", {"inputs": []})).status == 503


@pytest.mark.parametrize(
    "inputs",
    [
        pytest.param({"y": ONE}, id="wrong-name"),
        pytest.param({"x": ONE.astype(np.int64)}, id="wrong-type"),
        pytest.param({"x": np.ones((1, 1, 1), np.float32)}, id="wrong-rank"),
        pytest.param({"x": ONE, "z": ONE}, id="one-too-many"),
    ],
)
async def test_wrong_inputs(mesh, inputs):
    error = await refused(mesh, "good", **inputs)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error
    assert error.details()


async def test_unknown_and_empty_ids(mesh):
    """Unknown ids fail with NOT_FOUND over gRPC and REST. An empty id fails with INVALID_ARGUMENT over gRPC, and the
    registration of an empty type with 400 over REST."""
    assert (await refused(mesh, "stranger")).code() is grpc.StatusCode.NOT_FOUND
    assert (await refused(mesh, "")).code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (await mesh.rest("POST", "/v2/models/stranger/infer", {"inputs": []})).status == 404
    assert (await mesh.rest("PUT", "/mesh/v1/models/x", {"type": ""})).status == 400


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"inputs": 3}', b'{"inputs":[{"name":"x"}]}', b"\xff\xfe"])
async def test_garbage_over_rest(mesh, body):
    """Garbage gets status 400 and an error text."""
    reply = await mesh.rest("POST", "/v2/models/good/infer", body)
    assert reply.status == 400
    assert reply.json["error"]
