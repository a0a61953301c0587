"""ModelMesh's own tests of virtual models (VModelsTest), with its client's calls, against a complete mesh."""

import asyncio
import json

import grpc
import numpy as np
import pytest
import pytest_asyncio

from mesh.etcd import Etcd
from mesh.pb import inference_pb2
from mesh.pb import modelmesh_pb2 as pb
from mesh.schema.keys import Keys
from tests.support import models
from tests.support.localmesh import LocalMesh, infer_request
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

LOADED, LOADING, NOT_FOUND = (pb.ModelStatusInfo.LOADED, pb.ModelStatusInfo.LOADING, pb.ModelStatusInfo.NOT_FOUND)
DEFINED, TRANSITIONING = pb.VModelStatusInfo.DEFINED, pb.VModelStatusInfo.TRANSITIONING


@pytest_asyncio.fixture(
    scope="module", loop_scope="module", params=["envoy", pytest.param("grpc", marks=pytest.mark.long)]
)
async def mesh(request, tmp_path_factory, etcd_server):
    """A mesh with one pod, behind each kind of edge in turn."""
    async with LocalMesh(tmp_path_factory.mktemp("vmodels"), etcd_server, pods=1, edge=request.param) as mesh:
        yield mesh


async def test_a_move_that_modelmesh_has_begun_is_completed(tmp_path, etcd_server):
    """A mesh that starts on ModelMesh's records, with a vmodel in the middle of a move, completes that move."""
    mesh = LocalMesh(tmp_path, etcd_server, pods=1)
    keys = Keys(mesh.base)
    async with Etcd(etcd_server.settings) as etcd:
        for name, value in (("old", 1.0), ("new", 2.0)):
            path = mesh.write(f"{name}.onnx", models.constant(value)).as_uri()
            record = {"type": "onnx", "mPath": path, "lu": 1, "refs": 1, "autoDel": True, "instanceIds": {"gone": 5}}
            await etcd.put(keys.model(name), json.dumps(record).encode())
        await etcd.put(keys.vmodel("begun"), b'{"o":"ksp","amid":"old","tmid":"new"}')
        async with mesh:
            service = Service(mesh)

            async def moved() -> bool:
                return (await service.status("begun", "ksp")).activeModelId == "new"

            await until(moved, timeout=30, interval=0.1, why="the vmodel has moved")
            assert await service.predict("begun") == 2.0
            assert await service.model_status("old") == NOT_FOUND
            kv = await etcd.get(keys.vmodel("begun"))
            assert kv is not None
            assert kv.value == b'{"o":"ksp","amid":"new","tmid":"new"}'


class Service:
    """ModelMesh's management service, with short names for its calls."""

    def __init__(self, mesh: LocalMesh) -> None:
        self.mesh = mesh
        self.stub = mesh.management()
        self._infer = mesh.channel().unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            inference_pb2.ModelInferRequest.SerializeToString,
            inference_pb2.ModelInferResponse.FromString,
        )

    def info(self, name: str, value: float) -> pb.ModelInfo:
        path = self.mesh.write(f"{name}.onnx", models.constant(value))
        return pb.ModelInfo(type="onnx", path=path.as_uri())

    async def register(self, name: str, value: float) -> None:
        request = pb.RegisterModelRequest(modelId=name, modelInfo=self.info(name, value), loadNow=True, sync=True)
        assert (await self.stub.registerModel(request, timeout=30)).status == LOADED

    async def unregister(self, name: str) -> None:
        await self.stub.unregisterModel(pb.UnregisterModelRequest(modelId=name), timeout=30)

    async def set(self, vmodel: str, target: str, **more: object) -> pb.VModelStatusInfo:
        request = pb.SetVModelRequest(vModelId=vmodel, targetModelId=target, **more)
        return await self.stub.setVModel(request, timeout=60)

    async def status(self, vmodel: str, owner: str = "") -> pb.VModelStatusInfo:
        return await self.stub.getVModelStatus(pb.GetVModelStatusRequest(vModelId=vmodel, owner=owner), timeout=30)

    async def model_status(self, model: str) -> int:
        return (await self.stub.getModelStatus(pb.GetStatusRequest(modelId=model), timeout=30)).status

    async def delete(self, vmodel: str, owner: str = "") -> None:
        reply = await self.stub.deleteVModel(pb.DeleteVModelRequest(vModelId=vmodel, owner=owner), timeout=30)
        assert reply == pb.DeleteVModelResponse()

    async def predict(self, vmodel: str) -> float:
        """Calls a vmodel as ModelMesh's clients do."""
        request = infer_request("", x=np.ones((1, 1), np.float32))
        answer = await self._infer(request, metadata=[("mm-vmodel-id", vmodel)], timeout=30)
        return float(np.frombuffer(answer.raw_output_contents[0], np.float32)[0])


async def refused(call) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value.code(), error.value.details()


def without_copies(info: pb.VModelStatusInfo) -> pb.VModelStatusInfo:
    """Returns a status without the copies of the target, which change while the target is loaded."""
    copy = pb.VModelStatusInfo()
    copy.CopyFrom(info)
    del copy.targetModelStatus.modelCopyInfos[:]
    return copy


async def test_the_life_of_a_vmodel(mesh):
    """A vmodel is created on a registered model, moved with and without waiting, and deleted. Models that were
    registered with `autoDeleteTargetModel` are deleted once the vmodel has left them. Other models stay."""
    service = Service(mesh)
    await service.delete("no-such-vmodel")
    await service.register("first", 1.0)
    info = await service.set("life", "first")
    assert (info.status, info.activeModelId, info.targetModelId, info.owner) == (DEFINED, "first", "first", "")
    assert info.activeModelStatus.status == LOADED
    assert not info.HasField("targetModelStatus")
    assert await refused(service.unregister("first")) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "Model first has referents: move or delete the aliases that name it",
    )
    assert await service.predict("life") == 1.0

    second = {
        "modelInfo": service.info("second", 2.0),
        "autoDeleteTargetModel": True,
        "updateOnly": True,
        "sync": True,
        "expectedTargetModelId": "first",
    }
    info = await service.set("life", "second", **second)
    assert (info.status, info.activeModelId, info.targetModelId) == (DEFINED, "second", "second")
    assert info.activeModelStatus.status == LOADED
    assert await service.predict("life") == 2.0
    assert await service.model_status("first") == LOADED, "it was not registered to be deleted"
    await service.unregister("first")
    assert await service.model_status("first") == NOT_FOUND

    assert (await service.set("life", "second", **second)).activeModelId == "second", "repeating it succeeds"
    code, text = await refused(service.set("life", "third", expectedTargetModelId="other"))
    assert (code, text) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "Existing target model second does not match expected other",
    )
    code, _ = await refused(service.set("absent", "second", expectedTargetModelId="other"))
    assert code is grpc.StatusCode.FAILED_PRECONDITION

    slow = mesh.write("third.onnx", models.weights(3.0, mebibytes=8))
    third = {"modelInfo": pb.ModelInfo(type="onnx", path=slow.as_uri()), "autoDeleteTargetModel": True}
    info = await service.set("life", "third", **third)
    assert (info.status, info.activeModelId, info.targetModelId) == (TRANSITIONING, "second", "third")
    assert info.activeModelStatus.status == LOADED
    assert info.targetModelStatus.status == LOADING
    found = await service.status("life")
    assert found.activeModelId == "third" or without_copies(found) == without_copies(info)

    await service.register("fourth", 4.0)
    info = await service.set("life", "fourth", sync=True)
    assert (info.status, info.activeModelId) == (DEFINED, "fourth")
    assert await service.predict("life") == 4.0
    assert await service.model_status("second") == NOT_FOUND
    assert await service.model_status("third") == NOT_FOUND

    await service.delete("life")
    assert await service.status("life") == pb.VModelStatusInfo()
    assert (await service.status("life")).activeModelStatus.status == NOT_FOUND
    assert await service.model_status("fourth") == LOADED
    assert await refused(service.predict("life")) == (grpc.StatusCode.NOT_FOUND, "vmodel not found")


async def test_owners(mesh):
    """A vmodel has no owner by default. Requests may repeat or omit a recorded owner, but not name another one."""
    service = Service(mesh)
    await service.register("owned", 1.0)
    assert (await service.set("free", "owned")).owner == ""
    assert (await service.set("mine", "owned", owner="me")).owner == "me"
    assert (await service.set("mine", "owned", owner="me")).owner == "me"
    assert (await service.set("mine", "owned")).owner == "me"
    assert await refused(service.set("mine", "owned", owner="you")) == (
        grpc.StatusCode.ALREADY_EXISTS,
        'vmodel mine already exists with different owner "me"',
    )
    assert await service.status("mine", "you") == pb.VModelStatusInfo()
    assert (await service.status("mine", "me")).activeModelId == "owned"
    await service.delete("mine", "you")
    assert (await service.status("mine")).status == DEFINED
    await service.delete("mine", "me")
    await service.delete("free")
    assert (await service.status("mine")).status == pb.VModelStatusInfo.NOT_FOUND
    await service.unregister("owned")


async def test_a_target_that_cannot_be_loaded_leaves_calls_where_they_are(mesh):
    """A move to a file that is not a model fails with the reason, and calls still reach the active model. Going back
    ends the failed move."""
    service = Service(mesh)
    await service.register("good", 1.0)
    await service.set("tried", "good")
    bad = pb.ModelInfo(type="onnx", path=mesh.write("bad.onnx", b"this is no model").as_uri())
    info = await service.set("tried", "bad", modelInfo=bad, autoDeleteTargetModel=True, sync=True)
    assert (info.status, info.activeModelId) == (pb.VModelStatusInfo.TRANSITION_FAILED, "good")
    assert info.targetModelStatus.status == pb.ModelStatusInfo.LOADING_FAILED
    assert info.targetModelStatus.errors
    assert await service.predict("tried") == 1.0
    assert (await service.set("tried", "bad")).status == pb.VModelStatusInfo.TRANSITION_FAILED
    assert (await service.set("tried", "good")).status == DEFINED
    assert await service.model_status("bad") == NOT_FOUND
    await service.delete("tried")


async def test_an_alias_over_rest(mesh):
    """Over REST, an alias moves to new versions once they are loaded, and back. Unknown versions and attributes are
    refused."""
    for version in ("7", "8", "9"):
        path = mesh.write(f"rest/{version}.onnx", models.constant(float(version)))
        body = {"version": version, "model": {"type": "onnx", "path": path.as_uri()}, "sync": True}
        reply = await mesh.rest("PUT", "/mesh/v1/aliases/rest", body)
        assert reply.status == (201 if version == "7" else 200), reply.body
        assert (reply.json["status"], reply.json["version"]) == ("DEFINED", version)
        assert reply.json["models"][0]["status"] == "LOADED"
    reply = await mesh.rest("POST", "/mesh/v1/aliases/rest/rollback", {"sync": True})
    assert (reply.json["active"], list(reply.json["versions"])) == ("rest@8", ["7", "8", "9"])
    service = Service(mesh)
    assert await service.predict("rest") == 8.0
    reply = await mesh.rest("POST", "/mesh/v1/aliases/rest/rollback", {"version": "5"})
    assert (reply.status, reply.json["reason"]) == (404, "UNKNOWN_VERSION")
    reply = await mesh.rest("PUT", "/mesh/v1/aliases/rest", {"verison": "9"})
    assert (reply.status, "verison: no such attribute" in reply.json["error"]) == (400, True)
    listed = (await mesh.rest("GET", "/mesh/v1/aliases?prefix=re")).json["aliases"]
    assert [alias["id"] for alias in listed] == ["rest"]
    assert (await mesh.rest("DELETE", "/mesh/v1/aliases/rest")).json["existed"]
    for version in ("7", "8", "9"):
        assert await service.model_status(f"rest@{version}") == NOT_FOUND


async def test_a_client_that_leaves_does_not_end_the_move(mesh):
    """When a client cancels a request that waits for a move, the move continues."""
    service = Service(mesh)
    await service.register("stays", 1.0)
    await service.set("left", "stays")
    large = mesh.write("comes.onnx", models.weights(2.0, mebibytes=8))
    comes = {"modelInfo": pb.ModelInfo(type="onnx", path=large.as_uri()), "autoDeleteTargetModel": True}
    waiting = asyncio.ensure_future(service.set("left", "comes", sync=True, **comes))

    async def begun() -> bool:
        return (await service.status("left")).targetModelId == "comes"

    await until(begun, timeout=30, why="the move has begun")
    waiting.cancel()

    async def moved() -> bool:
        return (await service.status("left")).activeModelId == "comes"

    await until(moved, timeout=30, interval=0.05, why="the vmodel has moved")
    await service.delete("left")
    await service.unregister("stays")
