"""MLServer in pods of a mesh, with models of all its types, over gRPC and REST."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio

from mesh.pb import inference_pb2 as v2
from mesh.pb import inference_pb2_grpc, modelmesh_pb2
from tests.servers.trained_app import INPUT, ROWS
from tests.support import models
from tests.support.localmesh import LocalMesh, children, command
from tests.support.waiting import until

pytestmark = [pytest.mark.timeout(900), pytest.mark.asyncio(loop_scope="module")]

NAMES = (
    *("joblib", "joblib-gzip", "pickle", "xgboost-json", "xgboost-ubj", "xgboost-bst", "xgboost-classes"),
    *("xgboost-ranker", "xgboost-native", "lightgbm", "lightgbm-pickle", "catboost", "catboost-regressor"),
    *("catboost-poisson", "catboost-ranker", "mlflow", "mlflow-pickled", "mlflow-sklearn", "mlflow-zip"),
    *("own-settings", "own-settings-tar"),
)


STUCK = """
import time

from mlserver import MLModel


class Stuck(MLModel):
    async def predict(self, payload):
        while True:
            time.sleep(1)
"""


class Served:
    """A mesh with two pods with MLServer, of which the first allows code, and an ONNX pod."""

    def __init__(self, mesh: LocalMesh, trained: dict[str, Any]) -> None:
        self.mesh = mesh
        self.trained = trained
        self.v2 = inference_pb2_grpc.GRPCInferenceServiceStub(mesh.channel())

    async def register(self, name: str, model_id: str, *, kind: str = "", load: bool = True) -> Any:
        """Registers a trained model, and waits for its load unless `load` is false."""
        model = self.trained[name]
        path = Path(model["path"])
        return await self.mesh._register(model_id, kind or model["type"], path, load=load, sync=load, router=0)

    async def over_grpc(self, model_id: str) -> list[float]:
        """Returns a model's answers to ROWS over gRPC, with typed contents."""
        request = v2.ModelInferRequest(model_name=model_id)
        tensor = request.inputs.add(name=INPUT, datatype="FP64", shape=ROWS.shape)
        tensor.contents.fp64_contents.extend(ROWS.ravel())
        response = await self.v2.ModelInfer(request, timeout=120)
        assert response.model_name == model_id
        (output,) = response.outputs
        found = output.contents
        values = [*found.int64_contents, *found.int_contents, *found.fp32_contents, *found.fp64_contents]
        assert values, output
        return [float(value) for value in values]

    async def over_rest(self, model_id: str) -> list[float]:
        """Returns a model's answers to ROWS over REST."""
        tensor = {"name": INPUT, "datatype": "FP64", "shape": list(ROWS.shape), "data": ROWS.tolist()}
        reply = await self.mesh.rest("POST", f"/v2/models/{model_id}/infer", {"inputs": [tensor]})
        assert reply.status == 200, reply.body
        (output,) = reply.json["outputs"]
        return [float(value) for value in np.ravel(output["data"])]

    def server_of(self, pod: int) -> int:
        """Returns the process id of a pod's MLServer, or 0 if it does not run."""
        found = [pid for pid in children(self.mesh.pods[pod].pid) if "mlserver_app" in command(pid)]
        return found[0] if found else 0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(trained, etcd_server, tmp_path_factory) -> AsyncIterator[Served]:
    folder = tmp_path_factory.mktemp("mesh")
    pod = ["--adapter", "mlserver", "--capacity", "2GiB", "--file-root", str(Path(trained["joblib"]["path"]).parent)]
    options = {"pod-1": [*pod, "--allow-code"], "pod-2": [*pod, "--egress", "grpc"]}
    async with LocalMesh(folder, etcd_server, pods=3, options_of=options) as mesh:
        yield Served(mesh, trained)


@pytest.mark.parametrize("name", NAMES)
async def test_every_type_answers_as_its_library_does(served: Served, name: str) -> None:
    """A model of each type and layout gives its library's own answers, over gRPC and REST, and V2's ModelReady says
    that it is ready."""
    model_id = f"all/{name}"
    status = await served.register(name, model_id)
    assert status.status == modelmesh_pb2.ModelStatusInfo.LOADED, status.errors
    expected = pytest.approx(served.trained[name]["answer"], rel=1e-5)
    assert await served.over_grpc(model_id) == expected
    assert await served.over_rest(model_id.replace("/", "%2F")) == expected
    assert (await served.mesh.rest("GET", f"/v2/models/all%2F{name}/ready")).status == 200


async def test_all_trained_models_are_tested(trained: dict[str, Any]) -> None:
    assert sorted(NAMES) == sorted(trained)


async def test_pickles_are_refused_where_code_is_not_allowed(served: Served) -> None:
    """A pickle is loaded only by the pod that allows code, even if other pods take models of its type."""
    for name in ("joblib", "lightgbm-pickle"):
        status = await served.register(name, f"code/{name}")
        assert status.status == modelmesh_pb2.ModelStatusInfo.LOADED, status.errors
        loaded = modelmesh_pb2.ModelStatusInfo.LOADED
        holders = {copy.location for copy in status.modelCopyInfos if copy.copyStatus == loaded}
        assert holders == {"pod-1"}, holders


async def test_a_server_that_is_killed_loses_nothing_for_long(served: Served) -> None:
    """After kill -9 of MLServer, its models answer again without an operator's action, and with the same answers."""
    await served.register("lightgbm", "killed")
    expected = await served.over_grpc("killed")
    (copy,) = (await served.mesh.status("killed"))["copies"]
    pod = int(copy["pod"].removeprefix("pod-")) - 1
    former = served.server_of(pod)
    os.kill(former, 9)
    await until(lambda: served.server_of(pod) not in (0, former), timeout=60, why="it is started again")
    assert await served.over_grpc("killed") == expected


async def test_a_prediction_that_never_ends_blocks_its_server_only_for_a_while(served: Served) -> None:
    """MLServer runs predictions in its event loop. The pod replaces a server whose loop is blocked, the other models
    answer again without an operator's action, and only the model that blocked the loop is suspect."""
    folder = Path(served.trained["joblib"]["path"]).parent / "stuck"
    folder.mkdir()
    (folder / "stuck.py").write_text(STUCK)
    (folder / "model-settings.json").write_text(json.dumps({"implementation": "stuck.Stuck"}))
    served.trained["stuck"] = {"path": str(folder), "type": "sklearn"}
    try:
        status = await served.register("stuck", "stuck")
    finally:
        del served.trained["stuck"]
    assert status.status == modelmesh_pb2.ModelStatusInfo.LOADED, status.errors
    await served.register("joblib", "beside")
    expected = await served.over_grpc("beside")
    former = served.server_of(0)
    request = v2.ModelInferRequest(model_name="stuck")
    request.inputs.add(name=INPUT, datatype="FP64", shape=[1]).contents.fp64_contents.append(1.0)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await served.v2.ModelInfer(request, timeout=5)
    assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    behind = asyncio.ensure_future(served.over_grpc("beside"))  # V2's calls may be repeated
    try:
        await until(lambda: served.server_of(0) not in (0, former), timeout=60, why="the server is replaced")
        assert await behind == expected
    finally:
        behind.cancel()
    assert await served.over_grpc("beside") == expected
    told = served.mesh.pods[0].tail(2000)
    suspects = [line for line in told.splitlines() if "this model may have killed the model server" in line]
    assert suspects, told
    assert all("model=stuck" in line for line in suspects), suspects


async def test_onnx_models_are_not_loaded_by_mlserver(served: Served) -> None:
    status = await served.mesh.register("onnx", models.constant(4.0), load=True)
    assert [copy.location for copy in status.modelCopyInfos] == ["pod-3"]
