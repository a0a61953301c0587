"""Models in stores, through a complete mesh: from a secret and a path to an answer, including what a user sees on the
way."""

import hashlib
import json
import os
import time

import grpc
import numpy as np
import pytest

from mesh.pb import modelmesh_pb2
from tests.support import models
from tests.support.localmesh import Client, LocalMesh
from tests.support.stores import Moto
from tests.support.waiting import until

ONE = np.ones((1, 1), np.float32)
BUCKET = "models"


@pytest.fixture(scope="module")
def moto(tmp_path_factory):
    server = Moto(tmp_path_factory.mktemp("moto"))
    yield server
    server.stop()


@pytest.fixture
async def bucket(moto, tmp_path):
    """The name of a bucket, and the folder of a storage secret for the bucket."""
    name = f"b{os.urandom(4).hex()}"
    await moto.make(name)
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "mine").write_text(json.dumps(moto.settings(name)))
    return name, secret


async def pod_of(mesh: LocalMesh) -> dict:
    (pod,) = (await mesh.rest("GET", "/mesh/v1/pods")).json["pods"]
    return (await mesh.rest("GET", f"/mesh/v1/pods/{pod['pod']}")).json


async def test_a_model_from_s3_by_modelmeshs_key_and_by_uri(a_mesh, moto, bucket):
    """A model folder with a schema is loaded from S3 by ModelMesh's `modelPath` and `modelKey`. The same file
    named by its URI is not fetched again. The error for a missing file has the URI. A model that is registered again
    gets the new content of its file."""
    name, secret = bucket
    content = models.constant(4.0)
    await moto.put(name, {"fraud/de/model.onnx": content, "fraud/de/_schema.json": b"{}"})
    async with a_mesh(pods=1, runtime_options=["--storage-config", str(secret)]) as mesh:
        stub, client = mesh.management(), Client(mesh.channel())
        key = json.dumps({"storage_key": "mine", "model_type": {"name": "onnx"}})
        info = modelmesh_pb2.ModelInfo(type="onnx", path="fraud/de", key=key)
        await stub.registerModel(modelmesh_pb2.RegisterModelRequest(modelId="de", modelInfo=info), timeout=30)
        (answer,) = await client.infer("de", x=ONE)
        assert answer.item() == 4
        fetched = (await pod_of(mesh))["counters"]["fetched_bytes"]
        assert fetched == len(content) + 2

        body = {"type": "onnx", "path": f"s3://{name}/fraud/de/model.onnx", "key": {"storage_key": "mine"}}
        assert (await mesh.rest("PUT", "/mesh/v1/models/copy", {**body, "load": True, "sync": True})).status == 201
        (answer,) = await client.infer("copy", x=ONE)
        assert answer.item() == 4
        assert (await pod_of(mesh))["counters"]["fetched_bytes"] == fetched

        body["path"] = f"s3://{name}/fraud/none.onnx"
        reply = await mesh.rest("PUT", "/mesh/v1/models/none", {**body, "load": True, "sync": True})
        assert reply.json["status"] == "LOADING_FAILED"
        assert f"s3://{name}/fraud/none.onnx" in reply.json["errors"][0]

        await moto.put(name, {"fraud/de/model.onnx": models.constant(5.0)})
        await stub.unregisterModel(modelmesh_pb2.UnregisterModelRequest(modelId="de"))
        await stub.registerModel(modelmesh_pb2.RegisterModelRequest(modelId="de", modelInfo=info), timeout=30)
        (answer,) = await client.infer("de", x=ONE)
        assert answer.item() == 5


async def test_a_digest_that_the_registration_names(a_mesh):
    """The digest in a registration is shown in the status and checked at each load. The error for a wrong digest names
    both digests."""
    async with a_mesh(pods=1) as mesh:
        content = models.constant(7.0)
        path = mesh.write("seven.onnx", content).as_uri()
        right, wrong = hashlib.sha256(content).hexdigest(), "0" * 64
        body = {"type": "onnx", "path": path, "load": True, "sync": True}
        reply = await mesh.rest("PUT", "/mesh/v1/models/right", {**body, "sha256": right})
        assert (reply.json["status"], reply.json["sha256"]) == ("LOADED", right)
        reply = await mesh.rest("PUT", "/mesh/v1/models/wrong", {**body, "sha256": wrong})
        assert reply.json["status"] == "LOADING_FAILED"
        assert right in reply.json["errors"][0]
        assert wrong in reply.json["errors"][0]
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await Client(mesh.channel()).infer("wrong", x=ONE)
        assert error.value.code() is grpc.StatusCode.INTERNAL
        lines = json.dumps({"id": "many", "type": "onnx", "path": path, "sha256": right}) + "\n"
        lines += json.dumps({"id": "bad", "type": "onnx", "path": path, "sha256": "zz"}) + "\n"
        reply = await mesh.rest("POST", "/mesh/v1/models:import", lines.encode())
        assert b"sha256sum" in reply.body
        assert (await mesh.status("many"))["sha256"] == right


@pytest.mark.long
async def test_a_pull_shows_how_far_it_is(a_mesh, moto, bucket):
    """A model's status shows the progress of its pull, which the operator's bandwidth limit slows down here."""
    name, secret = bucket
    await moto.put(name, {"large.onnx": models.weights(3.0, mebibytes=6)})
    options = ["--storage-config", str(secret), "--pull-bandwidth", "1MiB"]
    async with a_mesh(pods=1, runtime_options=options) as mesh:
        body = {"type": "onnx", "path": f"s3://{name}/large.onnx", "key": {"storage_key": "mine"}, "load": True}
        await mesh.rest("PUT", "/mesh/v1/models/large", body)

        async def halfway() -> bool:
            copies = (await mesh.status("large"))["copies"]
            pull = copies[0].get("pull") if copies else None
            return bool(pull) and 0 < pull["bytes"] < pull["of"] and pull["of"] > 6 << 20

        await until(halfway, timeout=30, interval=0.05, why="the status shows a pull under way")

        async def loaded() -> bool:
            return (await mesh.status("large"))["status"] == "LOADED"

        await until(loaded, timeout=60, interval=0.2, why="the model is loaded")


async def test_the_next_load_finds_files_and_optimised_form_on_disk(a_mesh):
    """A slow model's optimised form is made in the background. When the model is registered again, its load uses that
    form and gives the same answer, and the routers know which files a pod has on disk."""
    async with a_mesh(pods=1) as mesh:
        client = Client(mesh.channel())
        path = mesh.write("intricate.onnx", models.intricate(6.0))
        written = os.stat(path).st_ctime_ns
        # A file that was written a moment ago has no version: another write might leave the same time stamp.
        await until(lambda: time.time_ns() - written > 100_000_000)
        body = {"type": "onnx", "path": path.as_uri()}
        await mesh.rest("PUT", "/mesh/v1/models/m", body)
        (answer,) = await client.infer("m", x=ONE)
        assert answer.item() == 6

        async def optimised() -> bool:
            return (await pod_of(mesh))["counters"]["optimised"] == 1

        await until(optimised, timeout=60, interval=0.2, why="the optimised form is made")
        await mesh.rest("DELETE", "/mesh/v1/models/m")
        await mesh.rest("PUT", "/mesh/v1/models/m", body)

        async def known() -> bool:
            ranking = (await mesh.rest("GET", "/mesh/v1/models/m/explain")).json["ranking"]
            return "has the files on disk" in ranking[0]["why"]

        await until(known, timeout=40, interval=0.2, why="the router knows what the pod has on disk")
        (answer,) = await client.infer("m", x=ONE)
        assert answer.item() == 6
        assert "model loaded model=m" in (log := mesh.pods[0].tail(400))
        assert "optimised=True" in log
