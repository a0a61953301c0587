"""The welcome text of `mesh up`: it registers sample models, and its commands work as printed."""

import json
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest

from mesh.cli import welcome
from mesh.cli.client import Client
from mesh.demo import samples as sample_models
from mesh.demo.fleet import Tensor
from mesh.local.settings import UpSettings
from mesh.pb import inference_pb2 as v2
from tests.cli.conftest import failure


@pytest.fixture
def samples(monkeypatch, tmp_path):
    """Makes two sample models without training any."""

    def sample(name, width):
        inputs = (Tensor("X", "FP32", (-1, width)),)
        path = tmp_path / f"{name}.onnx"
        return SimpleNamespace(id=name, type="onnx", path=path, inputs=inputs, sha256=f"of-{name}")

    made = (sample("w", 64), sample("a b", 4))

    async def prepare(folder):
        return made

    monkeypatch.setattr(sample_models, "prepare", prepare)
    return made


def settings(mesh):
    return UpSettings(listen=mesh.endpoint.removeprefix("http://"), data_dir=Path("/data"))


async def test_samples_are_registered_and_the_lines_call_one(mesh, samples):
    """Both samples are registered. The printed curl command is complete, and calls the sample whose input is short
    enough to print."""
    text = await welcome.text(settings(mesh), capacity=2**30, samples=True)
    assert set(mesh.models) == {"w", "a b"}
    assert mesh.models["a b"]["path"] == str(samples[1].path)
    assert "2 sample models: w, a b" in text
    (curl,) = [shlex.split(line) for line in text.splitlines() if line.startswith("  curl")]
    assert curl[2] == f"{mesh.endpoint}/v2/models/a%20b/infer"
    body = json.loads(curl[4])
    assert body["inputs"][0]["shape"] == [1, 4]
    assert len(body["inputs"][0]["data"]) == 4
    assert any("infer 'a b'" in line for line in text.splitlines())


async def test_a_sample_whose_file_has_moved_is_registered_again(mesh, samples):
    """If a sample's id is registered with another path, it is unregistered and then registered again."""
    answers = [failure(409, "CONFLICT", "registered with another path"), None]

    async def conflict_once():
        answer = answers.pop(0)
        if answer is not None:
            return answer
        mesh.answers.pop("/mesh/v1/models/w")
        return mesh._model("DELETE", "w", "", None)

    mesh.answer("/mesh/v1/models/w", make=conflict_once)
    async with Client(mesh.endpoint) as client:
        assert await welcome.register_samples(client, samples) == ["w", "a b"]
    assert [method for method, path, _ in mesh.requests if path.endswith("/w")] == ["PUT", "DELETE", "PUT"]
    assert "w" in mesh.models


async def test_a_sample_that_was_made_again_is_reloaded(mesh, samples):
    """A sample whose file was made again under the same path is reloaded. A sample whose file is unchanged is not."""
    mesh.models["w"] = {"digest": "another"}
    mesh.models["a b"] = {"digest": samples[1].sha256}
    mesh.answer("/mesh/v1/models/w/reload", {"id": "w"})
    mesh.answer("/mesh/v1/models/w", {"id": "w", "digest": "another"})
    mesh.answer("/mesh/v1/models/a%20b", {"id": "a b", "digest": samples[1].sha256})
    async with Client(mesh.endpoint) as client:
        await welcome.register_samples(client, samples)
    assert [path for method, path, _ in mesh.requests if method == "POST"] == ["/mesh/v1/models/w/reload"]


async def test_a_mesh_without_samples_is_up_all_the_same(mesh, monkeypatch):
    """If samples cannot be made, the welcome text does not mention them."""

    async def prepare(folder):
        raise sample_models.NoSamples("scikit-learn is not installed")

    monkeypatch.setattr(sample_models, "prepare", prepare)
    text = await welcome.text(settings(mesh), capacity=2**30, samples=True)
    assert mesh.endpoint in text
    assert "curl" in text
    assert "sample models" not in text


async def test_an_installation_without_the_demo_has_no_samples(mesh, monkeypatch):
    """If the demo is not installed, as in the container image, there are no samples."""
    monkeypatch.setitem(sys.modules, "mesh.demo", None)
    text = await welcome.text(settings(mesh), capacity=2**30, samples=True)
    assert mesh.endpoint in text
    assert "sample models" not in text


def test_the_grpc_line_works_as_printed(monkeypatch):
    """The printed gRPC command works in a shell, against a server of that service."""
    monkeypatch.setattr(welcome.shutil, "which", lambda name: None)
    seen = []

    def infer(request, context):
        seen.append(request)
        return v2.ModelInferResponse(model_name="answered")

    handler = grpc.unary_unary_rpc_method_handler(
        infer, v2.ModelInferRequest.FromString, lambda message: message.SerializeToString()
    )
    server = grpc.server(ThreadPoolExecutor(1))
    service = "inference.GRPCInferenceService"
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"ModelInfer": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        request = {
            "model": 'it\'s "a" $model',
            "inputs": [{"name": "X", "datatype": "FP32", "shape": [1, 2], "data": [0.5, -1.0]}],
        }
        line = welcome.lines_to_try(UpSettings(listen=f"127.0.0.1:{port}"), request)[1]
        done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=60)
    finally:
        server.stop(0).wait()
    assert done.returncode == 0, done.stderr
    assert "answered" in done.stdout
    assert seen[0].model_name == request["model"]
    assert list(seen[0].inputs[0].contents.fp32_contents) == [0.5, -1.0]
