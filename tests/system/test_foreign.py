"""A foreign model server behind a relay in a complete mesh: its calls, its loads, its types and its models' sizes."""

import asyncio

import grpc
import pytest

from mesh.pb import modelmesh_pb2
from tests.support import exampleruntime, models
from tests.support.exampleproto import PredictRequest
from tests.support.foreign import INJECTED, ForeignMesh, answered
from tests.support.waiting import until

MORE = pytest.mark.foreign
"""The mark of variants that only `make test-foreign` runs."""


@pytest.fixture
def foreign(tmp_path, etcd_server):
    """A function that makes a mesh of example runtimes: `async with foreign(edge="grpc", way="child-socket") as it`."""

    def make(*options, **more) -> ForeignMesh:
        return ForeignMesh(tmp_path, etcd_server, *options, **more)

    return make


@pytest.mark.parametrize(
    ("edge", "way"),
    [
        ("envoy", "child-socket"),
        pytest.param("grpc", "child-port", marks=MORE),
        ("grpc", "neighbour-socket"),
        pytest.param("envoy", "neighbour-port", marks=MORE),
    ],
)
async def test_a_foreign_server_is_served_through_the_mesh(foreign, edge, way):
    """Models of a server that speaks the SPI are registered, loaded and called through a mesh, wherever that server
    listens, and whether or not a pod starts it. Ids, metadata, trailers, errors and deadlines are passed on."""
    async with foreign(edge=edge, way=way) as it:
        status = await it.register("a", "SIZE_1000000_0_0", now=True)
        assert status.status == modelmesh_pb2.ModelStatusInfo.LOADED
        for name in ("b", "c é"):
            await it.register(name, "SIZE_2000000_5_0")
        assert (await it.mesh.status("a"))["copies"][0]["bytes"] == 1_000_000
        for name in ("a", "b"):
            response = await it.ask(name, "text", model_name="what the client says")
            assert dict(response.results) == {name: "text"}
            assert response.model_name == name, "the id is spliced into the request"
        bin_id = (("mm-model-id-bin", "c é".encode()),)
        response = await it.predict(PredictRequest(text="x"), metadata=bin_id, timeout=20)
        assert (dict(response.results), response.model_name) == ({"c é": "x"}, "c é")

        call = it.predict(
            PredictRequest(text="x"),
            metadata=(("mm-model-id", "a"), ("own-header", "1"), ("client-bin", b"\0\xff"), ("mm-balanced", "true")),
            timeout=20,
        )
        await call
        initial, trailing = dict(await call.initial_metadata()), dict(await call.trailing_metadata())
        assert initial["example-header"] == "of the server"
        assert trailing["example-trailer"] == "of the server"
        assert trailing["example-bin"] == b"\0\xff"
        names = set(trailing["example-names"].split(","))
        assert {"own-header", "client-bin", "mm-model-id", "mm-model-id-bin"} <= names
        assert not [name for name in names if name.startswith(("mesh-", "mm-balanced", "mm-vmodel"))]

        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await it.ask("a", "fail INVALID_ARGUMENT no such feature")
        assert (failed.value.code(), failed.value.details()) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "no such feature",
        )
        trailers = dict(failed.value.trailing_metadata())
        assert trailers["example-trailer"] == "told"
        assert b"details of the example" in trailers["grpc-status-details-bin"]

        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await it.ask("a", "sleep 30", timeout=0.5)
        assert failed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: it.noted("cancelled a"), why="the server sees that the caller has gone")

        other = it.mesh.channel().unary_unary("/mmesh.ExamplePredictor/other")
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await other(b"", metadata=(("mm-model-id", "a"),), timeout=20)
        assert failed.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert failed.value.details() == "Method not found or not permitted: mmesh.ExamplePredictor/other"
        assert it.noted("load a") == it.noted("load b") == it.noted("load c é") == it.noted("status") == 1


@pytest.mark.foreign
async def test_a_servers_own_unavailability_loads_no_further_copy(foreign, edge):
    """A model whose server answers UNAVAILABLE is not loaded elsewhere. The caller gets INTERNAL with ModelMesh's
    text, and the copy stays."""
    async with foreign(edge=edge, pods=2) as it:
        await it.register("a", now=True)
        for _ in range(3):
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await it.ask("a", "fail UNAVAILABLE too busy")
            text = "ModelRuntime UNAVAILABLE: mmesh.ExamplePredictor/predict: UNAVAILABLE: too busy"
            assert (failed.value.code(), failed.value.details()) == (grpc.StatusCode.INTERNAL, text)
        assert (await it.mesh.status("a"))["status"] == "LOADED"
        assert len((await it.mesh.status("a"))["copies"]) == it.noted("load a") == 1


@pytest.mark.foreign
async def test_a_load_that_fails_is_told_and_passes_by_itself(foreign):
    """After a failed load the caller gets the server's text, exactly one copy has failed, and the server has been asked
    to unload the model."""
    async with foreign(pods=1) as it:
        status = await it.register("bad", "FAIL_no such layer", now=True)
        kind = modelmesh_pb2.ModelStatusInfo
        assert status.status == kind.LOADING_FAILED
        assert len(status.errors) == 1
        assert status.errors[0].endswith("no such layer")
        (copy,) = status.modelCopyInfos
        assert copy.copyStatus == kind.LOADING_FAILED
        assert copy.location
        assert it.noted("unload bad") == 1


async def test_types_decide_which_pods_hold_a_model(foreign):
    """In a mesh of an ONNX pod and a pod with a foreign server, each model goes to the pod that takes its type. A model
    whose type no pod takes is registered with a note, and calls of it are refused with the reason."""
    async with foreign(onnx_pods=1, types="example") as it:
        for number in range(3):
            await it.register(f"example-{number}", now=True)
            status = await it.mesh.register(f"net-{number}", models.constant(float(number)), load=True)
            assert status.status == modelmesh_pb2.ModelStatusInfo.LOADED
        for number in range(3):
            assert [copy["pod"] for copy in (await it.mesh.status(f"example-{number}"))["copies"]] == ["pod-1"]
            assert [copy["pod"] for copy in (await it.mesh.status(f"net-{number}"))["copies"]] == ["pod-2"]
        path = it.mesh.write("trees/model.json", b"{}")
        body = {"type": "xgboost", "path": path.as_uri()}
        reply = await it.mesh.rest("PUT", "/mesh/v1/models/trees", body)
        note = "no pod accepts models of type xgboost: the pods of this mesh accept example, onnx"
        assert (reply.status, reply.json["notes"]) == (201, [note])
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await it.ask("trees")
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "takes only models of type onnx" in refused.value.details()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param((), exampleruntime.SIZE, id="by modelSize", marks=MORE),
        pytest.param(("--no-model-size",), exampleruntime.SIZE, id="with the load"),
        pytest.param(("--no-sizes",), exampleruntime.DEFAULT_SIZE, id="the default"),
        pytest.param(("--no-sizes", "--predict", "70000000"), 70_000_000, id="predicted", marks=MORE),
    ],
)
async def test_a_models_size_is_what_its_server_knows(foreign, options, expected):
    """A model's recorded size is the size that its server reports. Without a report, and while the server's memory is
    not observed, it is the size that the server predicts, or else its default. When the server is full, the least
    recently used model is unloaded."""
    room = 2 * expected + 1000
    unseen = ["--server-memory", "none"]
    async with foreign(*INJECTED, *options, "--capacity", str(room), runtime_options=unseen) as it:
        for name in ("a", "b"):
            await it.register(name, now=True)
            assert (await it.mesh.status(name))["copies"][0]["bytes"] == expected
        await it.ask("a")
        await it.register("c", now=True)
        assert (await it.mesh.status("b"))["status"] == "NOT_LOADED"
        assert [(await it.mesh.status(name))["status"] for name in ("a", "c")] == ["LOADED", "LOADED"]
        assert it.noted("unload b") == 1
        (pod,) = (await it.mesh.rest("GET", "/mesh/v1/pods")).json["pods"]
        assert (pod["unobserved"], pod["factor"]) == ("--server-memory is none", 1.0)


@pytest.mark.foreign
@pytest.mark.parametrize("way", ["child-socket", pytest.param("neighbour-port", marks=MORE)])
async def test_a_model_of_unstated_size_counts_for_what_it_takes(foreign, way):
    """If a model's server states no size for the model, or an impossible one, the growth of the server's memory counts
    as the model's size. A full server unloads models by these sizes to make room for others."""
    size = 24 << 20
    options = ("--no-model-size", "--allocate", "--capacity", str(5 * size), "--predict", "1000")
    async with foreign(*INJECTED, *options, way=way) as it:
        names = [f"m{number}" for number in range(4)]
        for name, lie in zip(names, ("zero", "negative", "huge", "zero"), strict=True):
            status = await it.register(name, f"SIZE_{size}_0_0_{lie}", now=True)
            assert status.status == modelmesh_pb2.ModelStatusInfo.LOADED
        assert [(await it.mesh.status(name))["status"] for name in names] == ["LOADED"] * 4

        async def observed() -> bool:
            (pod,) = (await it.mesh.rest("GET", "/mesh/v1/pods")).json["pods"]
            return pod["observed"] >= 4 * size - (8 << 20)

        await until(observed, timeout=30, why="the pod shows the memory of its server")
        more = [f"n{number}" for number in range(6)]
        await asyncio.gather(*(it.register(name, f"SIZE_{size}_0_0_zero", now=True) for name in more))
        for name in more:
            assert dict((await it.ask(name)).results) == {name: "hello"}
        (pod,) = (await it.mesh.rest("GET", "/mesh/v1/pods")).json["pods"]
        told = (await it.mesh.rest("GET", f"/mesh/v1/pods/{pod['pod']}")).json
        assert int(told["observed_bytes"]) <= 6 * size + (32 << 20)
        assert "process" in told["observed"]
        assert it.noted("unload m0") + it.noted("unload m1") >= 1


@pytest.mark.foreign
async def test_a_device_that_a_server_reports_is_counted(foreign):
    """If a server reports a device's memory, its models are counted and evicted by that memory. Its pod has the label
    gpu, and shows the device memory in use."""
    size, total = 100 << 20, 400 << 20
    async with foreign(*INJECTED, "--device", str(total)) as it:
        (pod,) = (await it.mesh.rest("GET", "/mesh/v1/pods")).json["pods"]
        assert 3 * size < pod["device_capacity"] < total
        assert "gpu" in pod["labels"]
        for name in "abcd":
            status = await it.register(name, f"SIZE_{size}_0_0", now=True)
            assert status.status == modelmesh_pb2.ModelStatusInfo.LOADED
        assert [(await it.mesh.status(name))["status"] for name in "abcd"] == ["NOT_LOADED", *["LOADED"] * 3]
        told = (await it.mesh.rest("GET", f"/mesh/v1/pods/{pod['pod']}")).json
        assert (int(told["device_used_bytes"]), int(told["used_bytes"])) == (3 * size, 3000)


@pytest.mark.foreign
async def test_a_load_that_does_not_end_fails_and_is_unloaded(foreign):
    """A load that exceeds the server's own time limit fails, and the server is asked to unload the model. Other models
    are served meanwhile."""
    async with foreign(*INJECTED, "--load-timeout-ms", "1500") as it:
        await it.register("good", now=True)
        loading = asyncio.ensure_future(it.register("endless", "HANG", now=True))
        assert dict((await it.ask("good")).results) == {"good": "hello"}
        status = await loading
        assert status.status == modelmesh_pb2.ModelStatusInfo.LOADING_FAILED
        assert "the load took longer than 1.5 s" in status.errors[0]
        assert it.noted("unload endless") > 0
        assert it.noted("load good") == 1


@pytest.mark.foreign
async def test_a_load_that_blocks_the_server_is_blamed_and_no_call(foreign):
    """A server that does not answer after a load was ended is killed. The model whose load blocked the server is
    blamed, and not the model whose call was in flight."""
    async with foreign(*INJECTED, "--load-timeout-ms", "1500", way="child-socket") as it:
        await it.register("good", now=True)
        calling = asyncio.ensure_future(it.ask("good", "sleep 60", timeout=100))
        await until(lambda: it.noted("predict good"), why="the call is in the server")
        status = await it.register("blocking", "BLOCK", now=True)
        assert status.status == modelmesh_pb2.ModelStatusInfo.LOADING_FAILED
        assert "did not answer for 10 s after a load that was ended" in status.errors[0]
        assert dict((await answered(it, "good")).results) == {"good": "hello"}
        await asyncio.wait({calling})
        assert calling.exception() is not None
        assert (await it.mesh.status("blocking"))["killed"]
        assert not (await it.mesh.status("good"))["killed"]


@pytest.mark.foreign
async def test_a_model_whose_calls_kill_servers_is_quarantined_after_three(foreign):
    """The mesh cannot tell the requests of a foreign server apart: it names and refuses none, and counts each death as
    caused by another request."""
    async with foreign(way="child-socket") as it:
        await it.register("killer", now=True)
        for deaths in (1, 2, 3):
            await answered(it, "killer")
            with pytest.raises(grpc.aio.AioRpcError):
                await it.ask("killer", "crash")

            async def noted(deaths: int = deaths) -> bool:
                return len((await it.mesh.status("killer"))["killed"]) == deaths

            await until(noted, timeout=20, why="the death is noted")
            status = await it.mesh.status("killer")
            assert status["quarantined"] is (deaths == 3)
            assert all("while it was running this model" in line for line in status["killed"])
            assert not any("request" in line for line in status["killed"])


@pytest.mark.foreign
async def test_a_model_that_kills_its_server_in_a_load_is_blamed_alone(foreign):
    """A model whose load ends the server is blamed, even though the relay ends as well. The other models come back
    without blame."""
    async with foreign() as it:
        await it.register("good", now=True)
        status = await it.register("killer", "CRASH", now=True)
        assert status.status == modelmesh_pb2.ModelStatusInfo.LOADING_FAILED
        assert "while it loaded this model" in status.errors[0]

        async def accused() -> bool:
            return bool((await it.mesh.status("killer"))["killed"])

        await until(accused, timeout=20, why="the killer is noted")
        assert dict((await answered(it, "good")).results) == {"good": "hello"}
        assert not (await it.mesh.status("good"))["killed"]
