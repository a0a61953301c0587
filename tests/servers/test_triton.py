"""Triton in pods of a mesh, with models of its Python backend, over gRPC and REST.

The first pod starts Triton itself. The second pod uses Triton as a neighbour, which the test starts. Only these two
pods allow code.
"""

import os
import re
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio

from mesh.modelservers import environments
from mesh.pb import inference_pb2 as v2
from mesh.pb import inference_pb2_grpc, modelmesh_pb2
from mesh.runtime.relay.adapters.repository import Repository
from mesh.runtime.servers import adapted
from tests.servers import triton_models
from tests.servers.triton_models import ROWS, Written
from tests.support import models
from tests.support.localmesh import LocalMesh, Program, children, command
from tests.support.waiting import until

pytestmark = [pytest.mark.timeout(900), pytest.mark.asyncio(loop_scope="module")]

TYPE = "triton-python"
LOADED = modelmesh_pb2.ModelStatusInfo.LOADED
LAYOUTS = ("repository", "versions", "folder", "numbered", "file")
PACKED = ("zip", "gztar")


class Served:
    """The mesh, and the models on disk."""

    def __init__(
        self, mesh: LocalMesh, written: dict[str, Written], others: dict[str, Path], neighbour: Program
    ) -> None:
        self.mesh = mesh
        self.written = written
        self.others = others
        self.neighbour = neighbour
        self.v2 = inference_pb2_grpc.GRPCInferenceServiceStub(mesh.channel())

    async def register(self, model_id: str, path: Path, kind: str = TYPE) -> Any:
        return await self.mesh._register(model_id, kind, path, load=True, sync=True, router=0)

    async def infer(self, model_id: str, *, raw: bool = True, version: str = "", outputs: tuple[str, ...] = ()) -> Any:
        request = v2.ModelInferRequest(model_name=model_id, model_version=version, id="7")
        tensor = request.inputs.add(name="x", datatype="FP32", shape=ROWS.shape)
        for name in outputs:
            request.outputs.add(name=name)
        if raw:
            request.raw_input_contents.append(ROWS.tobytes())
        else:
            tensor.contents.fp32_contents.extend(ROWS.ravel().tolist())
        response = await self.v2.ModelInfer(request, timeout=120)
        assert (response.model_name, response.id) == (model_id, "7")
        return response

    async def answers(self, model_id: str, *, raw: bool = True, version: str = "") -> dict[str, list[float]]:
        """Returns the numbers of a model's outputs over gRPC."""
        response = await self.infer(model_id, raw=raw, version=version)
        return {
            output.name: np.frombuffer(content, {"FP32": "<f4", "FP64": "<f8"}[output.datatype]).tolist()
            for output, content in zip(response.outputs, response.raw_output_contents, strict=True)
        }

    async def over_rest(self, model_id: str) -> dict[str, list[float]]:
        """Returns the numbers of a model's outputs over REST."""
        tensor = {"name": "x", "datatype": "FP32", "shape": list(ROWS.shape), "data": ROWS.tolist()}
        reply = await self.mesh.rest("POST", f"/v2/models/{model_id}/infer", {"inputs": [tensor]})
        assert reply.status == 200, reply.body
        return {output["name"]: np.ravel(output["data"]).tolist() for output in reply.json["outputs"]}

    def server_of(self, pod: int) -> int:
        """Returns the process id of a pod's own Triton, or 0 if it does not run."""
        found = [pid for pid in children(self.mesh.pods[pod].pid) if "tritonserver" in command(pid).split(" ")[0]]
        return found[0] if found else 0

    async def placed(self, model_id: str, path: Path, pod: int) -> None:
        """Loads a model in the first or second pod, which take different versions of the type."""
        status = await self.register(model_id, path, f"{TYPE}:{pod}")
        assert status.status == LOADED, status.errors
        assert holders(status) == {f"pod-{pod}"}


def holders(status: Any) -> set[str]:
    """Returns the pods that can answer for a model."""
    return {copy.location for copy in status.modelCopyInfos if copy.copyStatus == LOADED}


def expected(plus: float = 0.0) -> dict[str, list[float]]:
    """Returns the answers to ROWS of a model that adds `plus` to each number of its answers."""
    return {"sum": (ROWS.sum(axis=1) + plus).tolist(), "twice": (ROWS * 2.0 + plus).ravel().tolist()}


@pytest.fixture(scope="module")
def triton() -> Path:
    """Returns the folder of Triton's environment. Skips the tests if it is not installed."""
    folder = environments.installed("triton")
    if folder is None:
        pytest.skip("SKIPPED, NO TEST OF TRITON HAS RUN: run `mesh servers install triton`")
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(triton, etcd_server, tmp_path_factory) -> AsyncIterator[Served]:
    folder = tmp_path_factory.mktemp("triton")
    written = triton_models.write(folder / "written")
    for kind in PACKED:
        packed = shutil.make_archive(str(folder / "written" / "packed"), kind, folder / "written", "repository")
        written[kind] = Written(Path(packed))
    started = adapted.begin("triton", folder / "neighbour", threads=1, types=[TYPE])
    argv = ["env", *(f"{name}={value}" for name, value in started.variables.items()), *started.words]
    neighbour = Program("neighbour", argv, folder)
    pod = ["--adapter", "triton", "--capacity", "1GiB", "--file-root", str(folder), "--hang-timeout", "4"]
    shared = ["--server-models", str(folder / "neighbour")]
    options = {
        "pod-1": [*pod, "--allow-code", "--types", f"{TYPE}:1", "--egress", "grpc"],
        "pod-2": [*pod, "--allow-code", "--types", f"{TYPE}:2", "--server", started.address, *shared],
        "pod-3": [*pod, "--types", f"triton,{TYPE}:3", "--egress", "grpc"],
    }
    neighbour.start()
    try:
        async with LocalMesh(folder, etcd_server, pods=4, options_of=options) as mesh:
            yield Served(mesh, written, triton_models.write_others(folder / "others"), neighbour)
    finally:
        await neighbour.stop()


@pytest.mark.parametrize("layout", [*LAYOUTS, *PACKED])
async def test_every_layout_answers(served: Served, layout: str) -> None:
    """A model of each layout gives its program's answers, with typed and raw contents, and over REST. Its id contains a
    slash, a space and an umlaut."""
    model_id = f"all/ä {layout}"
    status = await served.register(model_id, served.written[layout].path)
    assert status.status == LOADED, status.errors
    answers = expected(served.written[layout].plus)
    assert await served.answers(model_id) == answers
    assert await served.answers(model_id, raw=False) == answers
    assert await served.over_rest(f"all%2F%C3%A4%20{layout}") == answers
    assert not list(served.written[layout].path.parent.rglob("__pycache__")), "what was pulled is not changed"


async def test_only_the_outputs_that_a_call_names_are_returned(served: Served) -> None:
    await served.register("some", served.written["repository"].path)
    response = await served.infer("some", outputs=("twice",))
    assert [output.name for output in response.outputs] == ["twice"]


async def test_metadata_names_the_model_by_its_id(served: Served) -> None:
    """Metadata and errors contain the model's id, not the name that Triton uses."""
    await served.register("meta/data", served.written["versions"].path)
    assert (await served.v2.ModelReady(v2.ModelReadyRequest(name="meta/data"), timeout=60)).ready
    answer = await served.v2.ModelMetadata(v2.ModelMetadataRequest(name="meta/data"), timeout=60)
    assert (answer.name, answer.platform, list(answer.versions)) == ("meta/data", "python", ["1", "2"])
    assert [tensor.name for tensor in answer.outputs] == ["sum", "twice"]
    request = v2.ModelInferRequest(model_name="meta/data")
    request.inputs.add(name="y", datatype="FP32", shape=ROWS.shape).contents.fp32_contents.extend(ROWS.ravel().tolist())
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await served.v2.ModelInfer(request, timeout=60)
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "meta/data" in (error.value.details() or "")


async def test_the_highest_version_answers(served: Served) -> None:
    """A folder with several versions answers with the highest one. Versions in calls are Mesh's, which Triton does not
    mistake for its own."""
    await served.register("versions", served.written["versions"].path)
    for version in ("", "1"):
        assert await served.answers("versions", version=version) == expected(20.0), version
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await served.answers("versions", version="2")
    assert error.value.code() is grpc.StatusCode.NOT_FOUND


async def test_texts_pass_unchanged(served: Served) -> None:
    """BYTES tensors reach the model and come back, over gRPC and REST."""
    status = await served.register("words", served.others["words"])
    assert status.status == LOADED, status.errors
    request = v2.ModelInferRequest(model_name="words")
    tensor = request.inputs.add(name="words", datatype="BYTES", shape=[2])
    tensor.contents.bytes_contents.extend([b"abc", b""])
    response = await served.v2.ModelInfer(request, timeout=60)
    assert response.raw_output_contents[0] == b"\x03\0\0\0ABC\0\0\0\0"
    body = {"inputs": [{"name": "words", "datatype": "BYTES", "shape": [2], "data": ["one", "two"]}]}
    reply = await served.mesh.rest("POST", "/v2/models/words/infer", body)
    assert reply.json["outputs"][0]["data"] == ["ONE", "TWO"], reply.body


async def test_a_models_own_error_reaches_the_caller(served: Served) -> None:
    """An error in the model's program reaches the caller, and the model stays loaded."""
    await served.register("fails", served.others["fails"])
    for _ in range(2):
        with pytest.raises(grpc.aio.AioRpcError, match="no answer today"):
            await served.infer("fails")
    assert holders(await served.register("fails", served.others["fails"]))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("raises", "no weights at"),
        ("unreadable", "config.pbtxt cannot be read: line"),
        ("unknown", "no_such_field|failed to load"),
        ("missing", "the version 1 lacks the file model.py"),
        ("elsewhere", "Triton cannot load the model"),
    ],
)
async def test_a_model_that_cannot_be_loaded_says_why(served: Served, name: str, says: str) -> None:
    """The status of a model that cannot be loaded contains the reason, without paths of the pod."""
    status = await served.register(f"bad/{name}", served.others[name])
    assert status.status != LOADED
    text = " ".join(status.errors)
    assert re.search(says, text), text
    assert "/mesh-pod-" not in text


async def test_code_is_refused_where_it_is_not_allowed(served: Served) -> None:
    """A pod without `--allow-code` refuses programs, even in a folder that is registered as another type."""
    for name in ("repository", "file"):
        status = await served.register(f"code/{name}", served.written[name].path)
        assert status.status == LOADED, status.errors
        assert holders(status) <= {"pod-1", "pod-2"}
    status = await served.register("code/hidden", served.written["repository"].path, "triton")
    assert status.status != LOADED
    assert "--allow-code" in " ".join(status.errors)


async def test_a_server_that_is_killed_loses_nothing_for_long(served: Served) -> None:
    """After kill -9 of Triton, its models answer again without an operator's action. No processes and no shared memory
    of the killed server are left."""
    await served.placed("killed", served.written["repository"].path, 1)
    former = served.server_of(0)
    stubs = children(former)
    assert stubs
    os.kill(former, signal.SIGKILL)
    await until(lambda: served.server_of(0) not in (0, former), timeout=60, why="it is started again")
    await until(lambda: not any(command(pid) for pid in stubs), timeout=60, why="the models' processes have ended")
    assert await served.answers("killed") == expected()
    shared = [path.name for path in Path("/dev/shm").glob(f"mesh-triton-{served.mesh.pods[0].pid}-*")]
    assert len(shared) <= len(children(served.server_of(0))) + 1, shared


async def test_a_frozen_server_is_replaced(served: Served) -> None:
    """A Triton that no longer answers is killed, and its models answer again."""
    await served.placed("frozen", served.written["repository"].path, 1)
    former = served.server_of(0)
    os.kill(former, signal.SIGSTOP)
    await until(lambda: served.server_of(0) not in (0, former), timeout=120, why="it is started again")
    assert await served.answers("frozen") == expected()


async def test_a_model_whose_process_is_killed_is_loaded_again(served: Served) -> None:
    """Triton does not restart the process of a model. The call that meets the loss fails, because it may have killed
    the process itself, and the next call loads the model."""
    await served.placed("process", served.written["repository"].path, 1)
    (stub,) = [pid for pid in children(served.server_of(0)) if "/process/" in command(pid)]
    os.kill(stub, signal.SIGKILL)

    with pytest.raises(grpc.aio.AioRpcError, match="is not healthy"):
        await served.answers("process")
    assert await served.answers("process") == expected()


async def test_a_neighbour_that_was_restarted_empty_gets_its_models_again(served: Served) -> None:
    """If a neighbour is replaced by a server without models, its models are loaded again."""
    await served.placed("neighbour", served.written["folder"].path, 2)
    served.neighbour.kill9()
    served.neighbour.start()
    assert await served.answers("neighbour") == expected()


async def test_a_model_that_was_dropped_behind_the_back_is_loaded_again(served: Served) -> None:
    """If Triton has dropped a model without the mesh's knowledge, the next call loads the model."""
    await served.placed("dropped/model", served.written["folder"].path, 2)
    options = list(served.mesh.options_of["pod-2"])
    address = options[options.index("--server") + 1]
    async with grpc.aio.insecure_channel(address) as channel:
        repository = Repository(channel)
        for name, states in (await repository.states(timeout=10)).items():
            if "READY" in states:
                await repository.unload(name, timeout=30)
    assert await served.answers("dropped/model") == expected()


async def test_an_unregistered_model_leaves_nothing(served: Served) -> None:
    """When a model is unregistered, its process ends."""
    await served.placed("leaves", served.written["repository"].path, 1)
    (stub,) = [pid for pid in children(served.server_of(0)) if "/leaves/" in command(pid)]
    reply = await served.mesh.rest("DELETE", "/mesh/v1/models/leaves")
    assert reply.status < 300, reply.body
    await until(lambda: not command(stub), timeout=60, why="the model's process has ended")


async def test_onnx_models_are_not_loaded_by_triton(served: Served) -> None:
    status = await served.mesh.register("onnx", models.constant(4.0), load=True)
    assert [copy.location for copy in status.modelCopyInfos] == ["pod-4"]
