"""The adapter for MLServer, against a stand-in that searches its repository as MLServer does."""

import json
import pickle
import re
import zipfile
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from mesh.pb import modelruntime_pb2 as pb
from mesh.runtime.relay.adapters.mlserver import MLServer
from mesh.statuses import MeshError, Reason
from tests.support.fakemlserver import FakeMLServer
from tests.support.waiting import until

SKLEARN = pickle.dumps({"of": "sklearn.pipeline"})
XGBOOST = b'{"learner":{"attributes":{}}}'
XGBOOST_UBJ = b"{L\0\0\0\0\0\0\0\x07learner{}}"
LIGHTGBM = b"tree\nversion=v4\n"
CATBOOST = b"CBM1" + bytes(20)
ELSEWHERE = {"implementation": "mlserver_xgboost.XGBoostModel", "parameters": {"environment_path": "/opt/other"}}
CODE = "class Model:\n    def predict(self, inputs): ..."
MLMODEL = "flavors:\n  python_function:\n    loader_module: mlflow.sklearn\n  sklearn:\n    pickled_model: model.pkl\n"


class Served:
    """A stand-in for MLServer, its control, and the files that an agent has pulled."""

    def __init__(self, folder: Path, server: FakeMLServer, channel: grpc.aio.Channel) -> None:
        self.folder = folder
        self.server = server
        self.channel = channel
        self.control = self.managed()

    def managed(self, *, allow_code: bool = True) -> MLServer:
        """Returns another control of the same server, as the next relay would have."""
        return MLServer(self.channel, self.server.root.parent, load_timeout=5.0, allow_code=allow_code)

    def write(self, files: dict[str, bytes | str]) -> None:
        """Writes files as if an agent had pulled them."""
        for name, content in files.items():
            path = self.folder / "pulled" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    async def load(self, path: str, kind: str, model_id: str = "m", **key: Any) -> dict[str, Any]:
        """Loads a model, and returns the settings that the server got."""
        request = pb.LoadModelRequest(
            modelId=model_id, modelType=kind, modelPath=str(self.folder / "pulled" / path), modelKey=json.dumps(key)
        )
        await self.control.load(request, timeout=5.0)
        return self.server.loaded[model_id]

    async def refused(self, path: str, kind: str) -> MeshError:
        """Returns the error of a load that must fail, and checks that nothing of the model is left."""
        with pytest.raises(MeshError) as error:
            await self.load(path, kind)
        root = self.server.root.parent
        assert not [*root.glob("models/*"), *root.glob("files/*"), *root.glob("ids/*")]
        assert str(self.folder) not in error.value.text, "callers learn nothing of the pod's disk"
        return error.value


@pytest_asyncio.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    """Runs a stand-in for MLServer, with an empty repository."""
    root = tmp_path / "server" / "models"
    root.mkdir(parents=True)
    async with FakeMLServer(root) as server, grpc.aio.insecure_channel(server.address) as channel:
        yield Served(tmp_path, server, channel)


@pytest.mark.parametrize(
    ("files", "path", "kind", "implementation", "link"),
    [
        ({"churn.joblib": SKLEARN}, "churn.joblib", "sklearn", "sklearn.SKLearn", "churn.joblib"),
        ({"a%20b?#.pkl": zlib.compress(SKLEARN)}, "a%20b?#.pkl", "sklearn", "sklearn.SKLearn", "a%20b?#.pkl"),
        ({"d/x.joblib": SKLEARN, "d/README.md": ""}, "d", "mt:sklearn:1", "sklearn.SKLearn", "d/x.joblib"),
        ({"d/model.pkl": SKLEARN, "d/other.pkl": b""}, "d", "sklearn", "sklearn.SKLearn", "d/model.pkl"),
        ({"m": XGBOOST}, "m", "xgboost", "xgboost.XGBoost", "m"),
        ({"m.bst": XGBOOST_UBJ}, "m.bst", "xgboost", "xgboost.XGBoost", "m.bst"),
        ({"v/1/old.json": XGBOOST, "v/10/new.json": XGBOOST}, "v", "xgboost", "xgboost.XGBoost", "v/10/new.json"),
        ({"model.txt": LIGHTGBM}, "model.txt", "lightgbm", "lightgbm.LightGBM", "model.txt"),
        ({"l.pkl": pickle.dumps("lightgbm.sklearn")}, "l.pkl", "lightgbm", "sklearn.SKLearn", "l.pkl"),
        ({"c.cbm": CATBOOST}, "c.cbm", "catboost", "catboost.Catboost", "c.cbm"),
        ({"f/MLmodel": MLMODEL}, "f", "mlflow", "mlflow.MLflow", "f"),
        ({"f/MLmodel": MLMODEL, "f/model.pkl": SKLEARN}, "f", "sklearn", "sklearn.SKLearn", "f/model.pkl"),
    ],
)
async def test_each_layout_is_described_to_the_server(
    served: Served, files: dict[str, Any], path: str, kind: str, implementation: str, link: str
) -> None:
    """The server gets a link to the model's file, under a name without characters that it would decode. For MLflow, it
    gets a folder instead."""
    served.write(files)
    settings = await served.load(path, kind, "team/churn ä")
    assert implementation in settings["implementation"]
    assert settings["name"] == "team/churn ä"
    uri = Path(settings["parameters"]["uri"])
    pulled = served.folder / "pulled" / link
    if pulled.is_dir():
        assert not uri.is_symlink(), "MLflow follows no links"
        assert {path.name: path.read_bytes() for path in uri.iterdir()} == {"MLmodel": MLMODEL.encode()}
    else:
        assert uri.resolve() == pulled
    assert not set("%?#") & set(str(uri.relative_to(served.folder)))
    if uri.suffix:
        assert uri.suffix == {"m": ".json", "m.bst": ".ubj"}.get(link, Path(link).suffix)


async def test_a_load_reads_the_settings_of_no_other_model(served: Served) -> None:
    """The server searches its whole repository at each load, so the repository holds no model that is already
    loaded."""
    served.write({"a.txt": LIGHTGBM, "b.txt": LIGHTGBM})
    await served.load("a.txt", "lightgbm", "a")
    await served.load("b.txt", "lightgbm", "b")
    assert served.server.found == [["a"], ["b"]]
    assert sorted(served.server.loaded) == ["a", "b"]


async def test_a_folder_within_a_model_passes_for_no_other_model(served: Served) -> None:
    """Settings deep in an MLflow folder do not reach the server, which would take them for a separate model."""
    deep = json.dumps({"name": "victim", "implementation": "evil.Model"})
    served.write({"f/MLmodel": MLMODEL, "f/code/model-settings.json": deep})
    await served.load("f", "mlflow")
    assert served.server.found == [["m"]]


async def test_settings_that_came_with_a_model_are_completed(served: Served) -> None:
    """Settings that came with a model keep their content, and get the model's id, an absolute path, and the inputs of
    its schema. The pulled files are not changed."""
    own = {"name": "mine", "implementation": "mlserver_xgboost.XGBoostModel", "max_batch_size": 8}
    text = json.dumps(own | {"parameters": {"uri": "./booster.json", "version": "3"}})
    served.write({"d/model-settings.json": text, "d/booster.json": XGBOOST, "s.json": '{"inputs": [{"name": "x"}]}'})
    served.control = served.managed(allow_code=False)
    settings = await served.load("d", "xgboost", schema_path=str(served.folder / "pulled" / "s.json"))
    uri = Path(settings["parameters"].pop("uri"))
    assert uri.resolve() == served.folder / "pulled" / "d" / "booster.json"
    assert settings == own | {"name": "m", "parameters": {"version": "3"}, "inputs": [{"name": "x"}]}
    assert (served.folder / "pulled/d/model-settings.json").read_text() == text


async def test_settings_without_a_path_mean_their_own_folder(served: Served) -> None:
    """Without a path, MLServer looks in the folder of the settings for a file with one of its default names."""
    own = {"implementation": "mlserver_xgboost.XGBoostModel"}
    served.write({"d/model-settings.json": json.dumps(own), "d/model.json": XGBOOST})
    served.control = served.managed(allow_code=False)
    settings = await served.load("d", "xgboost")
    assert (Path(settings["parameters"]["uri"]) / "model.json").read_bytes() == XGBOOST


async def test_modules_of_a_model_are_found_beside_its_settings(served: Served) -> None:
    """Python modules that a model's own settings name are linked into the model's folder, from which the server imports
    them. A second module of the same name is refused, because Python would give both models the same module."""
    files = {"model-settings.json": '{"implementation": "mine.Model"}', "mine.py": "class Model: ...", "data/x.bin": ""}
    served.write({f"{folder}/{name}": content for folder in ("a", "b") for name, content in files.items()})
    await served.load("a", "python", "a")
    (module,) = (served.server.root).glob("*/mine.py")
    assert module.resolve() == served.folder / "pulled/a/mine.py"
    with pytest.raises(MeshError, match="another model in this server has a Python module with the same name, data,"):
        await served.load("b", "python", "b")
    await served.control.unload(pb.UnloadModelRequest(modelId="a"), timeout=5)
    await served.load("b", "python", "b")


@pytest.mark.parametrize(
    ("files", "path", "kind", "says"),
    [
        (
            {"d/notes.md": ""},
            "d",
            "xgboost",
            r"lacks the model's file \(model.bst, model.json, model.ubj.*has notes.md",
        ),
        ({"d/a.pkl": b"", "d/b.pkl": b""}, "d", "sklearn", r"several files.*model.joblib.* or model.pkl: a.pkl, b.pkl"),
        ({"d/model.pkl": SKLEARN}, "d", "mlflow", "lacks the file MLmodel; it has model.pkl"),
        ({"m.pkl": SKLEARN}, "m.pkl", "mlflow", "is a file, instead of a folder with the file MLmodel: it is a pickle"),
        ({"m.json": XGBOOST}, "m.json", "sklearn", "is an XGBoost model in JSON: register it with --type xgboost"),
        ({"f/MLmodel": MLMODEL}, "f", "sklearn", "model.pkl, which MLmodel names, is missing"),
        ({"f/MLmodel": MLMODEL}, "f", "xgboost", "has no flavor xgboost, only python_function, sklearn"),
        ({"d/model-settings.json": "{"}, "d", "sklearn", "not valid JSON"),
        ({"d/model-settings.json": '{"parameters": {"uri": "../x"}}'}, "d", "sklearn", "out of the model's folder"),
        ({"d/model-settings.json": '{"parameters": {"uri": "/etc/passwd"}}'}, "d", "sklearn", "out of the model's"),
        ({"d/model-settings.json": '{"parameters": {"uri": "s3://b/x"}}'}, "d", "sklearn", "must be a path in"),
        ({"d/model-settings.json": '{"parameters": {"uri": "x"}}'}, "d", "sklearn", "x, which .* names, is missing"),
        (
            {"d/model-settings.json": "{}", "d/e/model-settings.json": "{}"},
            "d",
            "sklearn",
            "that in a subfolder: remove e/model-settings.json",
        ),
        ({"d/mine.py": CODE}, "d", "python", "lacks the file model.py; it has mine.py"),
        ({"m.pkl": SKLEARN}, "m.pkl", "python", "is a pickle .*, instead of Python code or a folder with model.py"),
        ({"m.onnx": b""}, "m.onnx", "tensorrt", "models of type tensorrt need a folder with model-settings.json"),
        ({"m.zip": b"PK\x03\x04 damaged"}, "m.zip", "xgboost", "the file is a zip archive"),
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
    ("files", "path", "kind"),
    [
        ({"m.joblib": SKLEARN}, "m.joblib", "sklearn"),
        ({"m.pkl": pickle.dumps("xgboost.sklearn")}, "m.pkl", "xgboost"),
        ({"f/MLmodel": MLMODEL}, "f", "mlflow"),
        ({"m.py": CODE}, "m.py", "python"),
        ({"d/model-settings.json": '{"implementation": "mine.Model"}'}, "d", "xgboost"),
        ({"d/model-settings.json": json.dumps(ELSEWHERE), "d/model.json": XGBOOST}, "d", "xgboost"),
    ],
)
async def test_code_is_refused_unless_the_pod_allows_it(
    served: Served, files: dict[str, Any], path: str, kind: str
) -> None:
    """The files, not the model's type, decide whether a load would run code."""
    served.write(files)
    served.control = served.managed(allow_code=False)
    error = await served.refused(path, kind)
    assert error.reason is Reason.PRECONDITION
    assert "--allow-code" in error.text
    served.control = served.managed(allow_code=True)
    await served.load(path, kind)


@pytest.mark.parametrize(
    ("files", "path"),
    [
        ({"d/model.py": CODE, "d/part/helper.py": "A = 1"}, "d"),
        ({"d/1/model.py": "", "d/2/model.py": CODE, "d/2/part/helper.py": "A = 1"}, "d"),
        ({"mine.py": CODE}, "mine.py"),
    ],
)
async def test_python_code_gets_a_folder_of_its_own(served: Served, files: dict[str, Any], path: str) -> None:
    """The server gets a folder with `model.py` and all that lies beside it. What the server writes there does not reach
    the pulled files. The folder is removed with the model."""
    served.write(files)
    settings = await served.load(path, "python")
    assert settings["implementation"] == "mlserver_python.PythonModel"
    folder = Path(settings["parameters"]["uri"])
    assert (folder / "model.py").read_text() == CODE
    if len(files) > 1:
        assert (folder / "part" / "helper.py").read_text() == "A = 1"
    (folder / "__pycache__").mkdir()
    assert not [*(served.folder / "pulled").rglob("__pycache__")]
    await served.control.unload(pb.UnloadModelRequest(modelId="m"), timeout=5)
    assert not folder.exists()
    assert all((served.folder / "pulled" / name).exists() for name in files)


async def test_the_size_that_code_states_is_reported(served: Served) -> None:
    """The size that a model's code states is among the parameters of its metadata. A negative size means nothing."""
    served.write({"m.py": CODE})
    await served.load("m.py", "python")
    for stated, bytes_ in ((0, 0), (123_456_789_012, 123_456_789_012), (-1, 0)):
        served.server.stated = stated
        size, _ = await served.control.size(pb.ModelSizeRequest(modelId="m"), timeout=5)
        assert size.sizeInBytes == bytes_


async def test_an_archive_is_unpacked_and_removed_with_the_model(served: Served) -> None:
    """The content of an archive is treated as a folder that was pulled."""
    served.write({"x/booster.json": XGBOOST})
    with zipfile.ZipFile(served.folder / "pulled" / "m.zip", "w") as archive:
        archive.write(served.folder / "pulled/x/booster.json", "model/booster.json")
    settings = await served.load("m.zip", "xgboost")
    uri = Path(settings["parameters"]["uri"])
    assert uri.read_bytes() == XGBOOST
    await served.control.unload(pb.UnloadModelRequest(modelId="m"), timeout=5)
    assert not uri.exists()
    assert (served.folder / "pulled/m.zip").exists()


async def test_a_server_is_ready_once_it_is_live_and_empty(served: Served) -> None:
    """Before the server counts as ready, models that it still holds for a former agent are unloaded, even those that it
    does not list."""
    served.write({"a.txt": LIGHTGBM})
    await served.load("a.txt", "lightgbm", "left")
    served.server.live = False
    status, _ = await served.managed().status(timeout=5)
    assert status.status == pb.RuntimeStatusResponse.STARTING
    assert served.server.loaded
    served.server.live = True
    status, _ = await served.managed().status(timeout=5)
    assert status.status == pb.RuntimeStatusResponse.READY
    assert not served.server.loaded
    assert status.runtimeVersion == "mlserver 1.7.1"
    paths = {name: list(info.idInjectionPath) for name, info in status.methodInfos.items()}
    methods = ("ModelInfer", "ModelMetadata", "ModelReady")
    assert paths == {f"inference.GRPCInferenceService/{name}": [1] for name in methods}


async def test_a_failed_load_says_why_without_paths(served: Served) -> None:
    served.write({"a.txt": LIGHTGBM})
    served.server.fails = "cannot parse {uri}: bad tree"
    error = await served.refused("a.txt", "lightgbm")
    assert error.reason is Reason.LOAD_FAILED
    assert error.text == "MLServer cannot load the model: cannot parse model.txt: bad tree"


async def test_a_model_that_is_not_ready_after_its_load_is_not_loaded(served: Served) -> None:
    """MLServer keeps a model whose own load() does not return True, but refuses all calls of the model."""
    served.write({"a.txt": LIGHTGBM})
    served.server.ready = False
    error = await served.refused("a.txt", "lightgbm")
    assert error.reason is Reason.LOAD_FAILED
    assert served.server.unloads == ["m"]


async def test_a_load_that_does_not_end_is_ended(served: Served) -> None:
    served.write({"a.txt": LIGHTGBM})
    served.server.hangs = True
    request = pb.LoadModelRequest(modelId="m", modelType="lightgbm", modelPath=str(served.folder / "pulled/a.txt"))
    with pytest.raises((grpc.aio.AioRpcError, MeshError)) as error:
        await served.control.load(request, timeout=0.2)
    if isinstance(error.value, grpc.aio.AioRpcError):
        assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    else:
        assert error.value.reason is Reason.DEADLINE
    await until(lambda: served.server.ended == ["m"], why="the server's own load is cancelled")
    await served.control.unload(pb.UnloadModelRequest(modelId="m"), timeout=5.0)  # as the agent asks then
    assert not served.server.settings(), "no later load finds the model"
    served.server.hangs = False
    await served.load("a.txt", "lightgbm")
    assert list(served.server.loaded) == ["m"]


async def test_a_model_that_the_server_lacks_is_not_found(served: Served) -> None:
    """The size of a model is unknown, but the answer shows whether the server has the model."""
    served.write({"a.txt": LIGHTGBM})
    await served.load("a.txt", "lightgbm", "a")
    size, _ = await served.control.size(pb.ModelSizeRequest(modelId="a"), timeout=5)
    assert size.sizeInBytes == 0
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await served.control.size(pb.ModelSizeRequest(modelId="b"), timeout=5)
    assert error.value.code() is grpc.StatusCode.NOT_FOUND
