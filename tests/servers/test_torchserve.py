"""TorchServe in pods of a mesh, with TorchScript models and `.mar` archives, over gRPC and REST."""

import json
import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio

from mesh.modelservers import torchserve
from mesh.pb import inference_pb2 as v2
from mesh.pb import inference_pb2_grpc, modelmesh_pb2
from mesh.pb import torchserve_inference_pb2 as predictions
from mesh.pb import torchserve_inference_pb2_grpc as predictions_grpc
from tests.support.localmesh import LocalMesh, children, command
from tests.support.waiting import until

pytestmark = [pytest.mark.timeout(900), pytest.mark.asyncio(loop_scope="module")]

NAMES = ("script", "traced", "zipped", "own", "eager")
ROWS = np.array([[0.5, -1.25, 3.0, 0.0], [1e-3, 2.0, -7.5, 1.0], [4.0, 4.0, 4.0, 4.0]], "<f4")  # those of torch_app
LOADED, FAILED = modelmesh_pb2.ModelStatusInfo.LOADED, modelmesh_pb2.ModelStatusInfo.LOADING_FAILED


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Returns the models by name: their paths, their types, and torch's own answers. Skips the tests if this machine
    has no TorchServe."""
    if lacks := torchserve.missing():
        pytest.skip(f"SKIPPED, NO TEST OF TORCHSERVE HAS RUN: {lacks}")
    folder = tmp_path_factory.mktemp("torch")
    argv = [str(torchserve.find().python), "-I", str(Path(__file__).with_name("torch_app.py")), str(folder)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "answers.json").read_text())


def pod(made: dict[str, Any]) -> list[str]:
    root = str(Path(made["script"]["path"]).parent)
    return ["--adapter", "torchserve", "--capacity", "8GiB", "--file-root", root]


class Served:
    """A mesh with one pod of TorchServe."""

    def __init__(self, mesh: LocalMesh, made: dict[str, Any]) -> None:
        self.mesh = mesh
        self.made = made
        self.folder = Path(made["script"]["path"]).parent
        channel = mesh.channel()
        self.v2 = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        self.own = predictions_grpc.InferenceAPIsServiceStub(channel)

    async def register(self, file: str, model_id: str, kind: str) -> Any:
        """Registers a file, and waits for its load."""
        info = modelmesh_pb2.ModelInfo(type=kind, path=(self.folder / file).as_uri())
        request = modelmesh_pb2.RegisterModelRequest(modelId=model_id, modelInfo=info, loadNow=True, sync=True)
        return await self.mesh.management(0).registerModel(request, timeout=200)

    async def loaded(self, name: str, model_id: str) -> None:
        """Registers and loads a model."""
        status = await self.register(self.made[name]["path"], model_id, self.made[name]["type"])
        assert status.status == LOADED, status.errors

    async def over_grpc(self, model_id: str, *, raw: bool = True) -> list[float]:
        """Returns a model's answers to ROWS over gRPC, with raw or typed contents."""
        request = v2.ModelInferRequest(model_name=model_id, id="7")
        tensor = request.inputs.add(name="x", datatype="FP32", shape=ROWS.shape)
        if raw:
            request.raw_input_contents.append(ROWS.tobytes())
        else:
            tensor.contents.fp32_contents.extend(ROWS.ravel())
        response = await self.v2.ModelInfer(request, timeout=120)
        assert (response.model_name, response.id) == (model_id, "7")
        (output,) = response.outputs
        assert list(output.shape) == [3, 3]
        if not raw:
            assert not response.raw_output_contents
            return [*output.contents.fp32_contents, *output.contents.fp64_contents]
        kind = {"FP32": "<f4", "FP64": "<f8"}[output.datatype]
        return np.frombuffer(response.raw_output_contents[0], kind).tolist()

    async def answers(self, model_id: str, name: str) -> bool:
        """Returns whether a model answers. Fails if the answer is wrong."""
        try:
            answer = await self.over_grpc(model_id)
        except grpc.aio.AioRpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE, error
            return False
        assert answer == pytest.approx(self.made[name]["answer"], rel=1e-5)
        return True

    async def over_rest(self, model_id: str) -> list[float]:
        """Returns a model's answers to ROWS over REST."""
        tensor = {"name": "x", "datatype": "FP32", "shape": list(ROWS.shape), "data": ROWS.tolist()}
        reply = await self.mesh.rest("POST", f"/v2/models/{model_id}/infer", {"inputs": [tensor]})
        assert reply.status == 200, reply.body
        (output,) = reply.json["outputs"]
        return [float(value) for value in np.ravel(output["data"])]

    def server(self) -> int:
        """Returns the process id of TorchServe, or 0 if it does not run."""
        found = [pid for pid in children(self.mesh.pods[0].pid) if "org.pytorch.serve" in command(pid)]
        return found[0] if found else 0

    def workers(self) -> set[int]:
        """Returns the process ids of TorchServe's model processes."""
        server = self.server()
        return {pid for pid in children(server) if "model_service_worker" in command(pid)} if server else set()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(made, etcd_server, tmp_path_factory) -> AsyncIterator[Served]:
    options = [*pod(made), "--allow-code"]
    async with LocalMesh(tmp_path_factory.mktemp("mesh"), etcd_server, pods=1, runtime_options=options) as mesh:
        yield Served(mesh, made)


@pytest.mark.parametrize("name", NAMES)
async def test_every_layout_answers_as_torch_does(served: Served, name: str) -> None:
    """A model of each layout gives torch's own answers, over gRPC with raw and typed contents, and over REST,
    and V2's ModelReady says that it is ready."""
    model_id = f"all/{name} é"  # TorchServe's log would not keep such a name in one line
    await served.loaded(name, model_id)
    expected = pytest.approx(served.made[name]["answer"], rel=1e-5)
    assert await served.over_grpc(model_id) == expected
    assert await served.over_grpc(model_id, raw=False) == expected
    assert await served.over_rest(f"all%2F{name}%20%C3%A9") == expected
    assert (await served.mesh.rest("GET", f"/v2/models/all%2F{name}%20%C3%A9/ready")).status == 200
    await served.mesh.rest("DELETE", f"/mesh/v1/models/all%2F{name}%20%C3%A9")


async def test_all_made_models_are_tested(made: dict[str, Any]) -> None:
    assert sorted(NAMES) == sorted(made)


async def test_inputs_go_to_the_arguments_of_their_names(served: Served) -> None:
    """Inputs with unknown names go to the arguments in their order. A request may ask for one of several outputs."""
    assert (await served.register("pair.pt", "pair", "pytorch")).status == LOADED
    left, right = np.array([5, 6], "<i8"), np.array([1, 4], "<i8")

    async def asked(*given: tuple[str, np.ndarray], output: str = "") -> Any:
        request = v2.ModelInferRequest(model_name="pair")
        for name, values in given:
            request.inputs.add(name=name, datatype="INT64", shape=[2])
            request.raw_input_contents.append(values.tobytes())
        if output:
            request.outputs.add(name=output)
        return await served.v2.ModelInfer(request, timeout=60)

    for given in ((("right", right), ("left", left)), (("a", left), ("b", right))):
        response = await asked(*given)
        assert [(one.name, one.datatype) for one in response.outputs] == [("output_0", "INT64"), ("output_1", "BOOL")]
        assert np.frombuffer(response.raw_output_contents[0], "<i8").tolist() == [3, -2]
        assert response.raw_output_contents[1] == b"\1\0"
    only = await asked(("left", left), ("right", right), output="output_1")
    assert [one.name for one in only.outputs] == ["output_1"]


async def test_a_request_that_does_not_fit_is_the_callers_error(served: Served) -> None:
    """The caller gets status 400 and torch's own reason, and the model answers the next call."""
    await served.loaded("script", "fits")
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}
    reply = await served.mesh.rest("POST", "/v2/models/fits/infer", {"inputs": [tensor]})
    assert reply.status == 400
    assert "shapes cannot be multiplied" in reply.json["error"]
    assert await served.over_grpc("fits") == pytest.approx(served.made["script"]["answer"], rel=1e-5)


async def test_torchserves_own_calls_reach_the_archives_handler(served: Served) -> None:
    """TorchServe's clients can call `Predictions` through the mesh. They name the model in the metadata."""
    await served.loaded("own", "native")
    request = predictions.PredictionsRequest(model_name="whatever", input={"data": b"abc\xff"})
    answer = await served.own.Predictions(request, timeout=60, metadata=(("mm-model-id", "native"),))
    assert answer.prediction == b"\xffcba"


async def test_an_archive_that_does_not_load_says_why(served: Served) -> None:
    """The reason of a failed load is what the archive's handler raised, which TorchServe itself only writes to its
    log."""
    status = await served.register("broken.mar", "broken", "pytorch-mar")
    assert status.status == FAILED
    assert any("ValueError: these weights are of another model" in error for error in status.errors), status.errors
    status = await served.register("pickled.pt", "pickled", "pytorch")
    assert any("save the model as TorchScript" in error for error in status.errors), status.errors


async def test_torchscript_can_overwrite_files(served: Served) -> None:
    """A TorchScript model can write a file of the pod when it is called, which is why TorchScript counts as code."""
    (served.folder / "written").write_bytes(bytes(16))
    status = await served.register("writes.pt", "writes", "pytorch")
    assert status.status == LOADED, status.errors
    request = v2.ModelInferRequest(model_name="writes")
    request.inputs.add(name="x", datatype="FP32", shape=[4])
    request.raw_input_contents.append(ROWS[2].tobytes())
    await served.v2.ModelInfer(request, timeout=60)
    assert (served.folder / "written").read_bytes() == ROWS[2].tobytes()


async def test_nothing_is_loaded_where_code_is_not_allowed(made: dict[str, Any], etcd_server, tmp_path: Path) -> None:
    """A pod without `--allow-code` refuses TorchScript and archives, and names the option that permits them."""
    options = [*pod(made), "--types", "pytorch,pytorch-mar"]
    async with LocalMesh(tmp_path, etcd_server, pods=1, runtime_options=options) as mesh:
        tame = Served(mesh, made)
        for name in ("script", "own"):
            status = await tame.register(made[name]["path"], name, made[name]["type"])
            assert status.status == FAILED
            assert any("--allow-code" in error for error in status.errors), status.errors
        assert not tame.workers()


async def test_a_killed_process_of_a_model_is_started_again(served: Served) -> None:
    """When a model's process is killed, TorchServe starts another one, and the model answers again without an
    operator's action."""
    before = served.workers()
    await served.loaded("script", "worker")
    (worker,) = served.workers() - before
    os.kill(worker, 9)

    await until(lambda: served.answers("worker", "script"), timeout=240, why="the model answers again")


async def test_a_server_that_is_killed_loses_nothing_for_long(served: Served) -> None:
    """After kill -9 of TorchServe, an empty server takes its place, and the models answer as before."""
    await served.loaded("own", "killed")
    former = served.server()
    os.kill(former, 9)
    await until(lambda: served.server() not in (0, former), timeout=120, why="it is started again")
    await until(lambda: served.answers("killed", "own"), timeout=240, why="the model answers again")
