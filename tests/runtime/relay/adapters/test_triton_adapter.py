"""The adapter for Triton, against a stand-in that reads descriptions with Triton's own schema."""

import json
import pickle
import re
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from mesh.pb import modelruntime_pb2 as pb
from mesh.runtime.relay.adapters import triton
from mesh.runtime.relay.adapters.triton import Triton
from mesh.statuses import MeshError, Reason
from tests.support.faketriton import FakeTriton
from tests.support.waiting import until

ONNX = b"\x08\x08\x12\x05torch"
XML = b'<?xml version="1.0"?><net name="m"><layers></layers></net>'
PYTHON = 'backend: "python"'
FIL = 'name: "theirs" backend: "fil" max_batch_size: 8 # theirs\ninput [{name: "x" data_type: TYPE_FP32 dims: [4]}]'


class Served:
    """A stand-in for Triton, its control, and the files that an agent has pulled."""

    def __init__(self, folder: Path, server: FakeTriton, channel: grpc.aio.Channel) -> None:
        self.folder = folder
        self.server = server
        self.channel = channel
        self.control = self.managed()

    def managed(self, *, allow_code: bool = True) -> Triton:
        """Returns another control of the same server, as the next relay would have."""
        return Triton(self.channel, self.server.root.parent, load_timeout=5.0, allow_code=allow_code)

    def write(self, files: dict[str, bytes | str]) -> None:
        """Writes files as if an agent had pulled them."""
        for name, content in files.items():
            path = self.folder / "pulled" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    async def load(self, path: str, kind: str, model_id: str = "m", **key: Any) -> dict[str, str]:
        """Loads a model, and returns the paths in its folder with the pulled files to which they lead."""
        request = pb.LoadModelRequest(
            modelId=model_id, modelType=kind, modelPath=str(self.folder / "pulled" / path), modelKey=json.dumps(key)
        )
        await self.control.load(request, timeout=5.0)
        folder = self.server.root / self.control.name(model_id)
        pulled = (self.folder / "pulled").resolve()
        return {
            str(entry.relative_to(folder)): str(entry.resolve().relative_to(pulled))
            for entry in sorted(folder.rglob("*"))
            if entry.is_symlink()
        }

    async def refused(self, path: str, kind: str, **key: Any) -> MeshError:
        """Returns the error of a load that must fail, and checks that nothing of the model is left."""
        with pytest.raises(MeshError) as error:
            await self.load(path, kind, **key)
        root = self.server.root.parent
        assert not [*root.glob("models/*"), *root.glob("files/*"), *root.glob("ids/*")]
        assert str(self.folder) not in error.value.text, "callers learn nothing of the pod's disk"
        return error.value


@pytest_asyncio.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    """Runs a stand-in for Triton, with an empty repository."""
    root = tmp_path / "server" / "models"
    root.mkdir(parents=True)
    async with FakeTriton(root) as server, grpc.aio.insecure_channel(server.address) as channel:
        yield Served(tmp_path, server, channel)


@pytest.mark.parametrize(
    ("files", "path", "kind", "links"),
    [
        ({"a.onnx": ONNX}, "a.onnx", "onnx", {"1/model.onnx": "a.onnx"}),
        ({"net.ts": b"x"}, "net.ts", "mt:pytorch:1", {"1/model.pt": "net.ts"}),
        ({"e.engine": b"x"}, "e.engine", "tensorrt", {"1/model.plan": "e.engine"}),
        ({"g.pb": b"x"}, "g.pb", "tensorflow", {"1/model.graphdef": "g.pb"}),
        ({"p.py": ""}, "p.py", "triton-python", {"1/model.py": "p.py"}),
        ({"d/x.onnx": ONNX, "d/_schema.json": "{}"}, "d", "onnx", {"1/model.onnx": "d/x.onnx"}),
        ({"d/model.onnx": ONNX, "d/weights": b""}, "d", "onnx", {"1/model.onnx": "d"}),
        (
            {"d/x.onnx": ONNX, "d/weights": b""},
            "d",
            "onnx",
            {"1/model.onnx/model.onnx": "d/x.onnx", "1/model.onnx/weights": "d/weights"},
        ),
        ({"d/saved_model.pb": b"", "d/variables/v": b""}, "d", "tensorflow", {"1/model.savedmodel": "d"}),
        ({"d/in/saved_model.pb": b""}, "d", "keras", {"1/model.savedmodel": "d/in"}),
        (
            {"d/model.savedmodel/saved_model.pb": b"", "d/labels.txt": ""},
            "d",
            "tensorflow",
            {"1/model.savedmodel": "d/model.savedmodel"},
        ),
        (
            {"d/model.pt": b"x", "d/extra.txt": ""},
            "d",
            "pytorch",
            {"1/model.pt": "d/model.pt", "1/extra.txt": "d/extra.txt"},
        ),
        (
            {"d/net.pth": b"x", "d/extra.txt": ""},
            "d",
            "pytorch",
            {"1/model.pt": "d/net.pth", "1/extra.txt": "d/extra.txt"},
        ),
        ({"d/n.xml": XML, "d/n.bin": b""}, "d", "openvino_ir", {"1/model.xml": "d/n.xml", "1/model.bin": "d/n.bin"}),
        (
            {"d/model.py": "", "d/lib/a.py": ""},
            "d",
            "triton-python",
            {"1/model.py": "d/model.py", "1/lib/a.py": "d/lib/a.py"},
        ),
        ({"v/2/x.onnx": ONNX, "v/10/y.onnx": ONNX}, "v", "onnx", {"10/model.onnx": "v/10/y.onnx"}),
        ({"v/3/saved_model.pb": b"", "v/3/a/b": b""}, "v", "tensorflow", {"3/model.savedmodel": "v/3"}),
        ({"t/1/model.onnx": ONNX}, "t", "triton", {"1/model.onnx": "t/1/model.onnx"}),
        ({"t/4/model.py": ""}, "t", "triton", {"4/model.py": "t/4/model.py"}),
    ],
)
async def test_each_layout_becomes_a_folder_of_the_repository(
    served: Served, files: dict[str, Any], path: str, kind: str, links: dict[str, str]
) -> None:
    """Files and folders get the names that Triton's backends expect. Without a schema, only models of the Python
    backend need a description."""
    served.write(files)
    assert await served.load(path, kind) == links
    python = any(link.endswith("model.py") for link in links)
    assert served.server.loaded["m"] == model_config_pb2.ModelConfig(backend="python" if python else "")


async def test_a_folder_of_a_repository_keeps_its_description(served: Served) -> None:
    """Only the name in the description changes. All versions are kept, and the pulled files are not changed."""
    served.write({"r/config.pbtxt": FIL, "r/1/xgboost.json": b"", "r/2/xgboost.json": b"", "r/labels.txt": b""})
    links = await served.load("r", "triton")
    assert links == {name: f"r/{name}" for name in ("1/xgboost.json", "2/xgboost.json", "labels.txt")}
    expected = text_format.Parse(FIL, model_config_pb2.ModelConfig())
    expected.ClearField("name")
    assert served.server.loaded["m"] == expected
    assert (served.folder / "pulled/r/config.pbtxt").read_text() == FIL
    # What a server writes beside the files, as Python does, does not reach what was pulled.
    (served.server.root / "m/1/__pycache__").mkdir()
    assert not (served.folder / "pulled/r/1/__pycache__").exists()


async def test_a_schema_becomes_inputs_and_outputs(served: Served) -> None:
    """The schema that was pulled with a model describes its inputs and outputs, or replaces those in the model's own
    description. If the model takes batches, the dimension of the batch is left out."""
    tensors = {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}],
        "outputs": [{"name": "y", "datatype": "BYTES", "shape": [-1]}],
    }
    served.write({"a.onnx": ONNX, "s.json": json.dumps(tensors), "r/config.pbtxt": FIL, "r/1/f": b""})
    schema = {"schema_path": str(served.folder / "pulled/s.json")}
    await served.load("a.onnx", "onnx", "a", **schema)
    text = 'input {name: "x" data_type: TYPE_FP32 dims: [-1, 3]} output {name: "y" data_type: TYPE_STRING dims: -1}'
    text += 'backend: "onnxruntime"'
    assert served.server.loaded["a"] == text_format.Parse(text, model_config_pb2.ModelConfig())
    await served.load("r", "triton", "r", **schema)
    config = served.server.loaded["r"]
    assert [list(one.dims) for one in (*config.input, *config.output)] == [[3], []]
    assert (config.backend, config.max_batch_size) == ("fil", 8)


@pytest.mark.parametrize(
    ("files", "path", "kind", "says"),
    [
        ({"d/README": ""}, "d", "triton-python", "lacks the file model.py; it has README"),
        ({"d/README": "", "d/x": ""}, "d", "triton-python", "lacks the file model.py; it has README, x"),
        ({"d/a": "", "d/b": ""}, "d", "tensorflow", "lacks the file saved_model.pb; it has a, b"),
        ({"d/a": "", "d/b": ""}, "d", "pytorch", r"lacks the model's file \(model.pt.*has a, b"),
        ({"d/n.xml": XML, "d/b": ""}, "d", "openvino_ir", "lacks the file n.bin, which belongs to n.xml"),
        ({"n.xml": XML}, "n.xml", "openvino_ir", "a folder with an .xml and a .bin file"),
        ({"k.h5": b"\x89HDF\r\n\x1a\n"}, "k.h5", "keras", "export the model as a SavedModel"),
        ({"w.pt": pickle.dumps("torch")}, "w.pt", "pytorch", "a PyTorch checkpoint: save the model as TorchScript"),
        ({"a.pt": ONNX}, "a.pt", "pytorch", "is an ONNX model: register it with --type onnx"),
        ({"m.zip": b"PK\x03\x04 damaged"}, "m.zip", "onnx", "a zip archive, but cannot be read"),
        ({"x": ""}, "x", "sklearn", "models of type sklearn need a folder with config.pbtxt"),
        ({"d/1/weights": ""}, "d", "triton", "no config.pbtxt, and has no file by whose name"),
        ({"d/a": "", "d/b": ""}, "d", "onnx", r"lacks the model's file \(model.onnx.*has a, b"),
        (
            {"r/config.pbtxt": PYTHON, "r/x": ""},
            "r",
            "triton-python",
            "lacks a folder for the model's version, such as 1; it has config.pbtxt, x",
        ),
        ({"r/config.pbtxt": PYTHON, "r/2/x": ""}, "r", "triton-python", "the version 2 lacks the file model.py"),
        ({"r/config.pbtxt": "backend: 'pyth", "r/1/x": ""}, "r", "triton", "config.pbtxt cannot be read: line 1"),
        ({"r/config.pbtxt": b"\xff\xfe", "r/1/x": ""}, "r", "triton", "cannot be read: it is not UTF-8"),
        ({"r/config.pbtxt": 'platform: "ensemble"', "r/1/x": ""}, "r", "triton", "describes an ensemble"),
        ({"r/config.pbtxt": "ensemble_scheduling {}", "r/1/x": ""}, "r", "triton", "describes an ensemble"),
        ({"r/config.pbtxt": 'backend: "fil" backend: "python"', "r/1/x": ""}, "r", "triton", "gives backend more than"),
        (
            {"r/config.pbtxt": 'backend: "fil" default_model_filename: "../x"', "r/1/x": ""},
            "r",
            "triton",
            "out of the model's",
        ),
        (
            {"r/config.pbtxt": 'output {label_filename: "/etc/passwd"}', "r/1/x": ""},
            "r",
            "triton",
            "out of the model's",
        ),
        ({"r/config.pbtxt": b"#" * (1 << 20) + b"#", "r/1/x": ""}, "r", "triton", "more than 1,048,576 bytes"),
    ],
)
async def test_what_cannot_be_loaded_is_refused_with_the_reason(
    served: Served, files: dict[str, Any], path: str, kind: str, says: str
) -> None:
    served.write(files)
    error = await served.refused(path, kind)
    assert error.reason is Reason.BAD_REQUEST
    assert re.search(says, error.text), error.text


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ("[]", "must be a JSON object"),
        (
            {"inputs": [{"name": "x", "datatype": "FP32", "shape": [3, 4]}]},
            "the first dimension.* must be -1: that of x",
        ),
        ({"inputs": [{"name": "x", "datatype": "TEXT", "shape": [-1]}]}, "datatype TEXT: use BOOL"),
        ({"outputs": [{"name": "x", "datatype": "FP32", "shape": "4"}]}, "tensor x needs a shape"),
        ({"outputs": [{"name": "x", "shape": [4]}]}, "tensor x has no datatype: use BOOL"),
        ({"outputs": ["x"]}, "a tensor without a name"),
    ],
)
async def test_a_wrong_schema_is_refused(served: Served, schema: Any, says: str) -> None:
    text = schema if isinstance(schema, str) else json.dumps(schema)
    served.write({"r/config.pbtxt": FIL, "r/1/f": b"", "s.json": text})
    error = await served.refused("r", "triton", schema_path=str(served.folder / "pulled/s.json"))
    assert error.reason is Reason.BAD_REQUEST
    assert re.search(says, error.text), error.text


@pytest.mark.parametrize(
    ("files", "path", "kind"),
    [
        ({"p.py": ""}, "p.py", "triton-python"),
        ({"m.pt": b"x"}, "m.pt", "pytorch"),
        ({"r/config.pbtxt": PYTHON, "r/1/model.py": ""}, "r", "triton"),
        ({"r/config.pbtxt": PYTHON, "r/1/model.py": ""}, "r", "openvino_ir"),
        ({"r/config.pbtxt": 'backend: "mine"', "r/1/x": ""}, "r", "triton"),
        ({"r/config.pbtxt": 'backend: "fil" platform: "tensorrt_plan"', "r/1/x": ""}, "r", "triton"),
        ({"r/config.pbtxt": 'backend: "fil"', "r/libtriton_fil.so": "", "r/1/x": ""}, "r", "triton"),
        ({"r/config.pbtxt": 'backend: "fil"', "r/1/libtriton_fil.so.1": ""}, "r", "triton"),
        ({"r/config.pbtxt": 'backend: "onnxruntime" runtime: "r.py"', "r/1/model.onnx": ""}, "r", "triton"),
        (
            {
                "r/config.pbtxt": 'backend: "onnxruntime" model_operations {op_library_filename: "x"}',
                "r/1/model.onnx": "",
            },
            "r",
            "triton",
        ),
        ({"r/config.pbtxt": 'parameters {key: "CPU_EXTENSION_PATH" value {}}', "r/1/model.xml": ""}, "r", "triton"),
        (
            {
                "r/config.pbtxt": 'backend: "fil" parameters {key: "TRITON_BATCH_STRATEGY_PATH" value {}}',
                "r/1/x": "",
            },
            "r",
            "triton",
        ),
        ({"r/config.pbtxt": "max_batch_size: 4", "r/1/model.pt": ""}, "r", "triton"),
        ({"t/1/model.py": ""}, "t", "triton"),
    ],
)
async def test_code_is_refused_unless_the_pod_allows_it(
    served: Served, files: dict[str, Any], path: str, kind: str
) -> None:
    """The description and the files, not the model's type, decide whether a model may run code."""
    served.write(files)
    served.control = served.managed(allow_code=False)
    error = await served.refused(path, kind)
    assert error.reason is Reason.PRECONDITION, error.text
    assert "--allow-code" in error.text
    served.control = served.managed(allow_code=True)
    if path != "r" or "python" not in str(files):
        await served.load(path, kind)


async def test_data_is_served_without_the_permission(served: Served) -> None:
    """Models of backends that only compute need no permission."""
    served.write({"r/config.pbtxt": FIL, "r/1/f": b"", "d/n.xml": XML, "d/n.bin": b"", "a.onnx": ONNX})
    served.control = served.managed(allow_code=False)
    for number, (path, kind) in enumerate((("r", "triton"), ("d", "openvino_ir"), ("a.onnx", "onnx"))):
        await served.load(path, kind, f"m{number}")


async def test_ids_that_a_folder_or_a_shell_would_misread_get_another_name(served: Served) -> None:
    """An id without special characters is the model's name in Triton. Any other id, and one that looks like a digest,
    is replaced by a digest."""
    served.write({"p.py": ""})
    plain = ("a", "Churn-2.v_1")
    odd = ("team/churn", "..", ".x", "a b", "$(id)", "ä", "x" * 129, "0123456789abcdef0123456789abcdef", "\udcff")
    names = {served.control.name(model_id) for model_id in (*plain, *odd)}
    assert len(names) == len(plain) + len(odd)
    assert all(served.control.name(model_id) == model_id for model_id in plain)
    assert all(re.fullmatch("[0-9a-f]{32}", served.control.name(model_id)) for model_id in odd)
    for model_id in odd[:-1]:
        await served.load("p.py", "triton-python", model_id)
        assert served.control.name(model_id) in served.server.loaded
        await served.control.unload(pb.UnloadModelRequest(modelId=model_id), timeout=5)
    assert not served.server.loaded
    assert not list(served.server.root.iterdir())


async def test_an_archive_is_unpacked_and_removed_with_the_model(served: Served) -> None:
    """The content of an archive is treated as a folder that was pulled."""
    with zipfile.ZipFile(served.folder / "m.zip", "w") as archive:
        archive.writestr("repository/config.pbtxt", PYTHON)
        archive.writestr("repository/1/model.py", "x = 1")
    request = pb.LoadModelRequest(modelId="m", modelType="triton-python", modelPath=str(served.folder / "m.zip"))
    await served.control.load(request, timeout=5.0)
    file = (served.server.root / "m/1/model.py").resolve()
    assert file.read_text() == "x = 1"
    await served.control.unload(pb.UnloadModelRequest(modelId="m"), timeout=5)
    assert not file.exists()


async def test_a_server_is_ready_once_it_is_live_and_empty(served: Served) -> None:
    """Models that the server still holds are unloaded first, together with the models that depend on them. Until all
    are gone, the status is not READY."""
    served.write({"p.py": ""})
    await served.load("p.py", "triton-python", "left/one")
    served.server.loaded["theirs"] = None
    served.server.live = False
    status, _ = await served.managed().status(timeout=5)
    assert status.status == pb.RuntimeStatusResponse.STARTING
    assert len(served.server.loaded) == 2
    served.server.live, served.server.slow = True, 2
    status, _ = await served.managed().status(timeout=5)
    assert status.status == pb.RuntimeStatusResponse.READY
    assert not served.server.loaded
    assert not served.server.going
    assert ("theirs", True) in served.server.unloads
    assert not list(served.server.root.iterdir())
    status, _ = await served.managed().status(timeout=5)
    assert status.runtimeVersion == "triton 2.51.0"
    paths = {name: list(info.idInjectionPath) for name, info in status.methodInfos.items()}
    methods = ("ModelInfer", "ModelMetadata", "ModelReady")
    assert paths == {f"inference.GRPCInferenceService/{name}": [1] for name in methods}


async def test_an_unload_ends_once_the_model_is_gone(served: Served) -> None:
    """Triton answers before the model has left its memory, so the unload lasts until Triton's index no longer shows the
    model."""
    served.write({"p.py": ""})
    await served.load("p.py", "triton-python")
    served.server.slow = 3
    await served.control.unload(pb.UnloadModelRequest(modelId="m"), timeout=5)
    assert not served.server.going
    assert served.server.looks >= 3
    await served.control.unload(pb.UnloadModelRequest(modelId="unknown"), timeout=5)


async def test_a_model_that_never_goes_is_given_up(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unload does not wait forever for a model whose process has died. Triton reports such a model as UNLOADING
    without end, but can load it again."""
    monkeypatch.setattr(triton, "_GONE", 0.1)
    served.write({"p.py": ""})
    await served.load("p.py", "triton-python")
    served.server.slow = 1_000_000
    await served.control.unload(pb.UnloadModelRequest(modelId="m"), timeout=5)
    assert served.server.going
    await served.load("p.py", "triton-python")
    status, _ = await served.managed().status(timeout=5)
    assert status.status == pb.RuntimeStatusResponse.READY


async def test_an_unload_that_is_not_answered_fails_as_a_call_does(served: Served) -> None:
    """The relay replaces a server whose unload ends with DEADLINE_EXCEEDED after a load that was ended."""
    served.server.stuck = True
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await served.control.unload(pb.UnloadModelRequest(modelId="m"), timeout=0.2)
    assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_failed_load_says_why_without_paths(served: Served) -> None:
    """The error contains the model's id instead of its name in Triton."""
    served.write({"p.py": ""})
    served.server.fails = "load failed for model '{name}': {folder}/1/model.py: no"
    with pytest.raises(MeshError) as error:
        await served.load("p.py", "triton-python", "team/m")
    assert error.value.reason is Reason.LOAD_FAILED
    assert error.value.text == "Triton cannot load the model: load failed for model 'team/m': 1/model.py: no"
    assert not list(served.server.root.iterdir())


async def test_a_load_that_does_not_end_is_ended(served: Served) -> None:
    served.write({"p.py": ""})
    served.server.hangs = True
    request = pb.LoadModelRequest(modelId="m", modelType="triton-python", modelPath=str(served.folder / "pulled/p.py"))
    with pytest.raises((grpc.aio.AioRpcError, MeshError)) as error:
        await served.control.load(request, timeout=0.2)
    if isinstance(error.value, grpc.aio.AioRpcError):
        assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    else:
        assert error.value.reason is Reason.DEADLINE
    await until(lambda: len(served.server.ended) == 1, why="the server's own load is cancelled")
    await served.control.unload(pb.UnloadModelRequest(modelId="m"), timeout=5.0)  # as the agent asks then
    assert not list(served.server.root.iterdir()), "nothing of the model is left"
    served.server.hangs = False
    await served.control.load(request, timeout=5.0)
    assert len(served.server.loaded) == 1


async def test_a_model_that_the_server_lacks_is_not_found(served: Served) -> None:
    """The size of a model is unknown, but the answer shows whether the server has the model."""
    served.write({"p.py": ""})
    await served.load("p.py", "triton-python", "a/b")
    size, _ = await served.control.size(pb.ModelSizeRequest(modelId="a/b"), timeout=5)
    assert size.sizeInBytes == 0
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await served.control.size(pb.ModelSizeRequest(modelId="b"), timeout=5)
    assert error.value.code() is grpc.StatusCode.NOT_FOUND
