"""Python code of users in pods with MLServer, over gRPC and REST, beginning with the example of docs/mlserver.md.

The first pod starts MLServer itself. The second one is beside an MLServer with the command of the chart's preset. Only
these two allow code.
"""

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio

from mesh.modelfiles import guessing
from mesh.pb import inference_pb2 as v2
from mesh.pb import inference_pb2_grpc, modelmesh_pb2
from mesh.process import free_port
from tests.servers.neighbours import neighbour
from tests.support.documented import DOCS
from tests.support.localmesh import LocalMesh

pytestmark = [pytest.mark.timeout(900), pytest.mark.asyncio(loop_scope="module")]

SECTION = (DOCS / "mlserver.md").read_text().partition("## Python code of your own\n")[2].partition("\n## ")[0]
LOADED, FAILED = modelmesh_pb2.ModelStatusInfo.LOADED, modelmesh_pb2.ModelStatusInfo.LOADING_FAILED

PLAIN = """
import numpy as np
from . import helper

class Model:
    def load(self, folder):
        self.calls = 0

    def predict(self, inputs):
        self.calls += 1
        if "fail" in inputs:
            open("/nowhere/at/all")
        if "text" in inputs:
            upper = [one.upper() for one in inputs["text"].ravel()]
            return {"text": np.array(upper).reshape(inputs["text"].shape), "length": np.char.str_len(upper)}
        return {"y": inputs["x"] * helper.FACTOR, "nan": np.array([np.nan, np.inf], np.float32)}
"""
STATED = "class Model:\n    def predict(self, inputs): return inputs['x']\n    def size(self): return 123_456_789\n"


class Served:
    """The mesh, and the folder of its models."""

    def __init__(self, mesh: LocalMesh, folder: Path) -> None:
        self.mesh = mesh
        self.folder = folder
        self.v2 = inference_pb2_grpc.GRPCInferenceServiceStub(mesh.channel())

    async def register(self, model_id: str, kind: str = "python:1", **files: str) -> Any:
        """Writes the files of a model, and loads it."""
        folder = self.folder / model_id
        folder.mkdir(exist_ok=True)
        for name, content in files.items():
            (folder / name.replace("__", ".")).write_text(content)
        return await self.mesh._register(model_id, kind, folder, load=True, sync=True, router=0)

    async def infer(self, model_id: str, *, raw: bool = False, **inputs: Any) -> dict[str, Any]:
        """Calls a model over gRPC, and returns its outputs by name."""
        request = v2.ModelInferRequest(model_name=model_id)
        for name, array in inputs.items():
            text = array.dtype.kind == "U"
            tensor = request.inputs.add(name=name, datatype="BYTES" if text else "FP64", shape=array.shape)
            if text:
                tensor.contents.bytes_contents.extend(one.encode() for one in array.ravel())
            elif raw:
                request.raw_input_contents.append(array.tobytes())
            else:
                tensor.contents.fp64_contents.extend(array.ravel())
        answer = await self.v2.ModelInfer(request, timeout=120)
        kinds = {"FP64": "fp64", "FP32": "fp32", "INT64": "int64", "BYTES": "bytes"}
        raws = {"FP64": "<f8", "FP32": "<f4"}
        found = {}
        for place, output in enumerate(answer.outputs):
            if raw:
                values = np.frombuffer(answer.raw_output_contents[place], raws[output.datatype])
            else:
                values = np.array(list(getattr(output.contents, f"{kinds[output.datatype]}_contents")))
            found[output.name] = values.reshape(list(output.shape)).tolist()
        return found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(environment, etcd_server, tmp_path_factory) -> AsyncIterator[Served]:
    folder = tmp_path_factory.mktemp("python")
    shared, port = folder / "shared", free_port()
    shared.mkdir()
    pod = ["--adapter", "mlserver", "--capacity", "1GiB", "--file-root", str(folder)]
    there = ["--server", f"127.0.0.1:{port}", "--server-models", str(shared)]
    options = {
        "pod-1": [*pod, "--allow-code", "--types", "python:1"],
        "pod-2": [*pod, "--allow-code", "--types", "python:2", *there],
        "pod-3": [*pod, "--egress", "grpc"],
    }
    server = neighbour(environment, shared, folder, port)
    server.start()
    try:
        async with LocalMesh(folder, etcd_server, pods=3, options_of=options) as mesh:
            yield Served(mesh, folder)
    finally:
        await server.stop()


@pytest.mark.parametrize("pod", [1, 2])
async def test_the_example_of_the_docs_answers(served: Served, pod: int) -> None:
    """The class and the call of the docs work as they are written, in an MLServer that the pod starts and in one beside
    the pod."""
    (code,) = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
    assert len(code.splitlines()) == 15
    (weights,) = re.findall(r"echo '(.*?)' > prices/weights.json", SECTION)
    (body,) = re.findall(r"infer -d '(.*?)'", SECTION, re.DOTALL)
    name = f"prices-{pod}"
    status = await served.register(name, f"python:{pod}", model__py=code, weights__json=weights)
    assert status.status == LOADED, status.errors
    guess = guessing.of_file(served.folder / name)
    assert guess is not None
    assert guess.type == "python"
    reply = await served.mesh.rest("POST", f"/v2/models/{name}/infer", json.loads(body))
    assert reply.status == 200, reply.body
    (output,) = reply.json["outputs"]
    rows = np.array([[1, 2, 3], [4, 5, 6]], float)
    assert (output["name"], output["data"]) == ("predict", (rows @ json.loads(weights)).tolist())
    assert await served.infer(name, x=rows) == {"predict": output["data"]}
    assert await served.infer(name, x=rows, raw=True) == {"predict": output["data"]}


async def test_models_with_the_same_files_do_not_clash(served: Served) -> None:
    """Two models whose helper modules have the same name use their own, also after one of them is removed."""
    for number in (3, 5):
        status = await served.register(f"times-{number}", model__py=PLAIN, helper__py=f"FACTOR = {number}")
        assert status.status == LOADED, status.errors
    x = np.array([[1.0, 2.0]])
    for raw in (False, True):
        for number in (3, 5, 3):
            answer = await served.infer(f"times-{number}", x=x, raw=raw)
            assert answer["y"] == (x * number).tolist()
            assert np.array_equal(answer["nan"], [np.nan, np.inf], equal_nan=True)
    gone = modelmesh_pb2.UnregisterModelRequest(modelId="times-3")
    await served.mesh.management(0).unregisterModel(gone, timeout=60)
    assert (await served.infer("times-5", x=x))["y"] == (x * 5).tolist()


async def test_texts_are_arrays_of_str(served: Served) -> None:
    """BYTES reach the code as str, and str is answered as BYTES, over gRPC and REST."""
    await served.register("texts", model__py=PLAIN, helper__py="")
    answer = await served.infer("texts", text=np.array([["ä"], ["bcd"]]))
    assert answer == {"text": [["Ä".encode()], [b"BCD"]], "length": [1, 3]}
    tensor = {"name": "text", "datatype": "BYTES", "shape": [2], "data": ["ä", "bcd"]}
    reply = await served.mesh.rest("POST", "/v2/models/texts/infer", {"inputs": [tensor]})
    assert {one["name"]: one["data"] for one in reply.json["outputs"]} == {"text": ["Ä", "BCD"], "length": [1, 3]}


async def test_an_exception_reaches_the_caller_and_the_log(served: Served) -> None:
    """The caller gets the exception without paths of the pod, and the pod's log has the traceback. Bad inputs are the
    caller's fault. The model stays loaded."""
    await served.register("fails", model__py=PLAIN, helper__py="FACTOR = 1")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await served.infer("fails", fail=np.zeros(1))
    assert error.value.code() is grpc.StatusCode.INTERNAL
    text = "predict failed: FileNotFoundError: [Errno 2] No such file or directory: 'all' (model.py, line 12)"
    assert error.value.details() == text
    tensor = {"name": "fail", "datatype": "FP64", "shape": [1], "data": [0]}
    reply = await served.mesh.rest("POST", "/v2/models/fails/infer", {"inputs": [tensor]})
    assert (reply.status, reply.json["error"]) == (500, text)
    log = served.mesh.pods[0].tail(2000)
    assert "Traceback" in log
    assert 'open("/nowhere/at/all")' in log
    request = v2.ModelInferRequest(model_name="fails")
    request.inputs.add(name="x", datatype="FP64", shape=[1])
    request.outputs.add(name="z")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await served.v2.ModelInfer(request, timeout=60)
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.value.details() == "the input x has 0 values, which do not fill its shape [1]"
    assert (await served.infer("fails", x=np.ones(1)))["y"] == [1]


async def test_code_that_cannot_be_loaded_says_why(served: Served) -> None:
    """The status of the model has the reason, without paths of the pod, and the next model is loaded."""
    for name, code, says in (
        ("none", "class A: ...", "model.py defines no class with a method predict; its classes are A"),
        ("ends", "raise SystemExit(3)", "model.py cannot be imported: SystemExit: 3 (model.py, line 1)"),
    ):
        status = await served.register(name, model__py=code)
        assert status.status == FAILED
        assert any(says in error for error in status.errors), status.errors
        assert not any(str(served.folder) in error for error in status.errors), status.errors
    status = await served.register("after", model__py=STATED)
    assert status.status == LOADED, status.errors


async def test_the_stated_size_is_the_models_size(served: Served) -> None:
    """The pod counts what `size` returns."""
    status = await served.register("sized", model__py=STATED)
    assert status.status == LOADED, status.errors
    (copy,) = (await served.mesh.status("sized"))["copies"]
    assert copy["bytes"] == 123_456_789


async def test_code_is_refused_where_it_is_not_allowed(served: Served) -> None:
    """A pod without `--allow-code` does not take the type, and the status names the option."""
    status = await served.register("refused", "python:3", model__py=STATED)
    assert status.status != LOADED
    told = await served.mesh.status("refused")
    assert any("--allow-code" in note for note in told["notes"]), told
