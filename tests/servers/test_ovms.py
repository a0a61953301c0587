"""OVMS's adapter in a pod of a mesh. No package registry has OVMS, so a process that follows its documentation stands
in."""

import os
import sys
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from mesh import process
from mesh.pb import inference_pb2 as v2
from mesh.pb import inference_pb2_grpc, modelmesh_pb2
from tests.support.localmesh import LocalMesh, children, command
from tests.support.waiting import until

pytestmark = [pytest.mark.timeout(600), pytest.mark.asyncio(loop_scope="module")]

XML = "<?xml version='1.0'?><net name='m' version='11'><layers>"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mesh(etcd_server, tmp_path_factory) -> AsyncIterator[LocalMesh]:
    """Runs a mesh with a pod of the stand-in, which is a child of the pod."""
    rest = process.free_port("127.0.0.1")
    root = Path(__file__).resolve().parents[2]
    server = f"env PYTHONPATH={root} {sys.executable} -P -m tests.support.fakeovms --port {{port}} --rest_port {rest}"
    options = ["--adapter", "ovms", "--capacity", "1GiB", "--disk-budget", "1MiB", "--server-rest", f"127.0.0.1:{rest}"]
    options += ["--server-command", f"{server} --config_path {{models}}/model_config_list.json"]
    folder = tmp_path_factory.mktemp("mesh")
    async with LocalMesh(folder, etcd_server, pods=1, runtime_options=options) as mesh:
        for number in range(5):
            model = mesh.models / str(number)
            model.mkdir()
            (model / "m.xml").write_text(XML)
            (model / "m.bin").write_text("broken" if number == 4 else str(number + 1))
        yield mesh


async def load(mesh: LocalMesh, number: int) -> modelmesh_pb2.ModelStatusInfo:
    """Registers and loads a model that multiplies by `number` + 1."""
    return await load_from(mesh, f"by {number + 1}", mesh.models / str(number))


async def load_from(mesh: LocalMesh, model_id: str, path: Path, *, now: bool = True) -> modelmesh_pb2.ModelStatusInfo:
    """Registers a model, and loads it unless `now` is False."""
    info = modelmesh_pb2.ModelInfo(type="openvino_ir", path=path.as_uri())
    request = modelmesh_pb2.RegisterModelRequest(modelId=model_id, modelInfo=info, loadNow=now, sync=now)
    return await mesh.management().registerModel(request, timeout=120)


async def times(mesh: LocalMesh, factor: int) -> float:
    """Returns the answer of the model that multiplies by `factor` to the input 1."""
    request = v2.ModelInferRequest(model_name=f"by {factor}")
    request.inputs.add(name="x", datatype="FP32", shape=[1])
    request.raw_input_contents.append(np.array([1], "<f4").tobytes())
    response = await inference_pb2_grpc.GRPCInferenceServiceStub(mesh.channel()).ModelInfer(request, timeout=120)
    assert response.model_name == request.model_name
    return float(np.frombuffer(response.raw_output_contents[0], "<f4")[0])


def server_of(mesh: LocalMesh) -> int:
    """Returns the process id of the stand-in, or 0 if it does not run."""
    found = [pid for pid in children(mesh.pods[0].pid) if "fakeovms" in command(pid)]
    return found[0] if found else 0


async def test_models_answer_over_grpc_and_rest(mesh: LocalMesh) -> None:
    """Each id answers from its own files, over gRPC and REST, and is ready. The reason of a failed load reaches
    the caller."""
    for number in range(4):
        status = await load(mesh, number)
        assert status.status == modelmesh_pb2.ModelStatusInfo.LOADED, status.errors
    assert [await times(mesh, factor) for factor in range(1, 5)] == [1.0, 2.0, 3.0, 4.0]
    tensor = {"name": "x", "datatype": "FP32", "shape": [1], "data": [2]}
    reply = await mesh.rest("POST", "/v2/models/by%203/infer", {"inputs": [tensor]})
    assert reply.json["outputs"][0]["data"] == [6.0]
    assert (await mesh.rest("GET", "/v2/models/by%203/ready")).status == 200
    status = await load(mesh, 4)
    assert status.status == modelmesh_pb2.ModelStatusInfo.LOADING_FAILED
    assert any("OVMS cannot load the model: LOADING" in error for error in status.errors), status.errors
    assert await times(mesh, 1) == 1.0


async def test_a_server_that_is_killed_loses_nothing_for_long(mesh: LocalMesh) -> None:
    """After kill -9 of the server, a model that was loaded in it answers again."""
    await load(mesh, 1)
    former = server_of(mesh)
    os.kill(former, 9)
    await until(lambda: server_of(mesh) not in (0, former), timeout=60, why="it is started again")
    assert await times(mesh, 2) == 2.0


async def test_unpacked_archives_count_in_the_disk_budget(mesh: LocalMesh) -> None:
    """Two archives of a few kilobytes unpack to more than the budget together. The next call of another model then
    evicts the one that was used least recently."""
    for number in (11, 12):
        with zipfile.ZipFile(mesh.models / f"{number}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in (("m.xml", XML), ("m.bin", str(number)), ("padding", "0" * 600_000)):
                archive.writestr(name, content)
        status = await load_from(mesh, f"by {number}", mesh.models / f"{number}.zip")
        assert status.status == modelmesh_pb2.ModelStatusInfo.LOADED, status.errors
        assert await times(mesh, number) == float(number)
    await load_from(mesh, "by 3", mesh.models / "2", now=False)
    assert await times(mesh, 3) == 3.0
    states = {number: (await mesh.status(f"by {number}"))["status"] for number in (11, 12)}
    assert states == {11: "NOT_LOADED", 12: "LOADED"}
