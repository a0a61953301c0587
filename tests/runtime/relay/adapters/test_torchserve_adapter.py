"""The adapter for TorchServe, against a stand-in that answers as TorchServe does."""

import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from mesh.pb import inference_pb2 as v2
from mesh.pb import modelruntime_pb2 as pb
from mesh.runtime.relay.adapters.torchserve import TorchServe, V2OverPredictions
from mesh.statuses import MeshError, Reason
from tests.support.faketorchserve import FakeTorchServe


def zipped(**files: bytes | str) -> bytes:
    """Returns a zip archive of files. In their names, `__` stands for a slash."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "/"), content)
    return made.getvalue()


def manifest(**model: Any) -> str:
    """Returns the manifest of an archive whose own handler is `own.py:run`, with more fields for its model."""
    return json.dumps({"runtime": "python", "model": {"modelName": "mine", "handler": "own.py:run", **model}})


TORCHSCRIPT = zipped(**{"m__constants.pkl": b"1", "m__code__net.py": "x", "m__data.pkl": b"2"})
MAR = zipped(
    **{"own.py": "1", "pkg__deep.py": "2", "MAR-INF__MANIFEST.json": manifest(serializedFile="w.pt"), "w.pt": "3"}
)
CHECKPOINT = zipped(**{"m__data.pkl": pickle.dumps({}), "m__version": "3"})


class Served:
    """A stand-in for TorchServe, its control, and the files that an agent has pulled."""

    def __init__(self, folder: Path, server: FakeTorchServe, channel: grpc.aio.Channel) -> None:
        self.folder = folder
        self.server = server
        self.channel = channel
        self.control = self.managed()

    def managed(self, *, allow_code: bool = True) -> TorchServe:
        """Returns another control of the same server, as the next relay would have."""
        return TorchServe(self.channel, self.server.root.parent, load_timeout=5.0, allow_code=allow_code)

    def write(self, files: dict[str, bytes | str]) -> None:
        """Writes files as if an agent had pulled them."""
        for name, content in files.items():
            path = self.folder / "pulled" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    async def load(self, path: str, kind: str, model_id: str = "m", *, timeout: float = 5.0) -> Path:
        """Loads a model, and returns the folder that the server got."""
        path = str(self.folder / "pulled" / path)
        await self.control.load(pb.LoadModelRequest(modelId=model_id, modelType=kind, modelPath=path), timeout=timeout)
        return self.server.root / self.server.requests[-1].url

    async def refused(self, path: str, kind: str) -> MeshError:
        """Returns the error of a load that must fail, and checks that nothing of the model is left."""
        with pytest.raises(MeshError) as error:
            await self.load(path, kind)
        root = self.server.root.parent
        assert not [*root.glob("models/*"), *root.glob("files/*"), *root.glob("ids/*")]
        assert not self.server.loaded
        assert str(self.folder) not in error.value.text, "callers learn nothing of the pod's disk"
        return error.value


@pytest_asyncio.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    """Runs a stand-in for TorchServe, with an empty model store."""
    root = tmp_path / "server" / "models"
    root.mkdir(parents=True)
    async with FakeTorchServe(root) as server, grpc.aio.insecure_channel(server.address) as channel:
        yield Served(tmp_path, server, channel)


@pytest.mark.parametrize(
    ("files", "path", "link"),
    [
        ({"net.pt": TORCHSCRIPT}, "net.pt", "net.pt"),
        ({"d/model.pt": TORCHSCRIPT, "d/other.pt": b""}, "d", "d/model.pt"),
        ({"d/net.pth": TORCHSCRIPT, "d/README": ""}, "d", "d/net.pth"),
        ({"v/1/a.pt": TORCHSCRIPT, "v/12/b.pt": TORCHSCRIPT}, "v", "v/12/b.pt"),
        ({"z.zip": zipped(**{"x__model.pt": TORCHSCRIPT})}, "z.zip", ""),
    ],
)
async def test_a_torchscript_file_gets_meshs_handler(
    served: Served, files: dict[str, Any], path: str, link: str
) -> None:
    """For a TorchScript file, the server gets a folder with a link to the file, a manifest, and Mesh's handler with its
    helper."""
    served.write(files)
    folder = await served.load(path, "mt:pytorch:1", "team/net ä")
    described = json.loads((folder / "MAR-INF" / "MANIFEST.json").read_text())["model"]
    assert described["handler"] == "mesh_handler.py"
    assert "meshHandler" not in described
    assert (folder / described["serializedFile"]).read_bytes() == TORCHSCRIPT
    if link:
        assert (folder / described["serializedFile"]).resolve() == served.folder / "pulled" / link
    assert {"mesh_handler.py", "mesh_v2.py"} <= {entry.name for entry in folder.iterdir()}
    (request,) = served.server.requests
    assert (request.model_name, request.initial_workers, request.synchronous) == (folder.name, 1, True)
    assert request.startup_timeout == 5


def tgz() -> bytes:
    """Returns an archive in the `tgz` form that torch-model-archiver can also write."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as archive:
        for name, content in (("MAR-INF/MANIFEST.json", manifest()), ("own.py", "1"), ("pkg/deep.py", "2")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content.encode()))
    return made.getvalue()


@pytest.mark.parametrize(
    ("files", "path", "kind"),
    [
        ({"net.mar": MAR}, "net.mar", "pytorch-mar"),
        ({"renamed": MAR}, "renamed", "pytorch"),
        ({"d/any.mar": MAR}, "d", "pytorch-mar"),
        ({"z.zip": zipped(**{"x__net.mar": MAR})}, "z.zip", "pytorch-mar"),
        ({"net.tar.gz": tgz()}, "net.tar.gz", "pytorch-mar"),
        ({"d/MAR-INF/MANIFEST.json": manifest(), "d/own.py": "1", "d/pkg/deep.py": "2"}, "d", "pytorch"),
        ({"v/1/MAR-INF/MANIFEST.json": manifest(), "v/1/own.py": "1", "v/1/pkg/deep.py": "2"}, "v", "pytorch-mar"),
    ],
)
async def test_an_archive_keeps_its_handler_behind_meshs(
    served: Served, files: dict[str, Any], path: str, kind: str
) -> None:
    """A `.mar` is unpacked, and Mesh's handler gets the name of the archive's own handler. The pulled files are not
    changed."""
    served.write(files)
    folder = await served.load(path, kind)
    described = json.loads((folder / "MAR-INF" / "MANIFEST.json").read_text())["model"]
    assert (described["handler"], described["meshHandler"]) == ("mesh_handler.py", "own.py:run")
    assert (folder / "own.py").read_text() == "1"
    assert (folder / "pkg" / "deep.py").read_text() == "2"
    (folder / "pkg" / "written.pyc").touch()
    await served.control.unload(pb.UnloadModelRequest(modelId="m"), timeout=5.0)
    assert not folder.exists()
    for name, content in files.items():
        kept = (served.folder / "pulled" / name).read_bytes()
        assert kept == (content.encode() if isinstance(content, str) else content)
    assert not [*(served.folder / "pulled").rglob("*.pyc")]


@pytest.mark.parametrize(
    ("files", "kind", "says"),
    [
        ({"m": CHECKPOINT}, "pytorch", "a PyTorch checkpoint, whose classes TorchServe does not know"),
        ({"m": b"hello"}, "pytorch", "neither TorchScript nor a .mar"),
        ({"m": b""}, "pytorch-mar", "the file is an empty file"),
        ({"m": TORCHSCRIPT}, "sklearn", "types pytorch, pytorch-mar, not sklearn"),
        ({"m/a.txt": b""}, "pytorch", "lacks the model's file (model.pt, model.pth"),
        ({"m/a.pt": TORCHSCRIPT, "m/b.pt": TORCHSCRIPT}, "pytorch", "several files"),
        ({"m": zipped(**{"MAR-INF__MANIFEST.json": "{"})}, "pytorch-mar", "MANIFEST.json"),
        ({"m": zipped(**{"MAR-INF__MANIFEST.json": "{", "x": ""})}, "pytorch-mar", "is not valid JSON"),
        (
            {"m": zipped(**{"MAR-INF__MANIFEST.json": manifest(serializedFile="../../x"), "x": ""})},
            "pytorch-mar",
            "leads out of the archive",
        ),
        (
            {"m": zipped(**{"MAR-INF__MANIFEST.json": manifest(), "mesh_v2.py": "evil"})},
            "pytorch-mar",
            "mesh_v2.py, which Mesh needs",
        ),
        ({"m": zipped(**{"MAR-INF__MANIFEST.json": manifest(), "..__up": "1"})}, "pytorch-mar", "up"),
        ({"m": MAR[: len(MAR) // 2]}, "pytorch-mar", ""),
    ],
)
async def test_a_bad_model_is_refused_with_the_reason(
    served: Served, files: dict[str, Any], kind: str, says: str
) -> None:
    """For a bad model, the server is not asked, and no file is left."""
    served.write(files)
    error = await served.refused("m", kind)
    assert error.reason is Reason.BAD_REQUEST
    assert says in error.text
    assert not served.server.requests


@pytest.mark.parametrize(("content", "kind"), [(TORCHSCRIPT, "pytorch"), (MAR, "pytorch-mar")])
async def test_nothing_is_loaded_where_code_is_not_allowed(served: Served, content: bytes, kind: str) -> None:
    """TorchScript counts as code too, because it can overwrite files."""
    served.write({"m": content})
    served.control = served.managed(allow_code=False)
    error = await served.refused("m", kind)
    assert error.reason is Reason.PRECONDITION
    assert "--allow-code" in error.text
    assert not served.server.requests


async def test_a_failed_load_says_what_the_handler_left(served: Served) -> None:
    """The error of a failed load contains what Mesh's handler recorded, because TorchServe does not say why a process
    did not start. TorchServe would keep the model registered, so the adapter removes it."""
    served.write({"m": TORCHSCRIPT})
    served.server.fails = "ValueError: bad weights in {folder}/model.pt"
    assert (
        "TorchServe cannot load the model: ValueError: bad weights in model.pt"
        in (await served.refused("m", "pytorch")).text
    )
    served.server.fails, served.server.breaks = "", True
    error = await served.refused("m", "pytorch")
    assert error.text == "TorchServe cannot load the model: Failed to start workers for model m version: 1.0"
    served.server.breaks = False
    assert (await served.load("m", "pytorch")).is_dir()


async def test_a_load_that_takes_too_long_is_ended(served: Served) -> None:
    """After an unload, a model whose load took too long can be loaded again."""
    served.write({"m": TORCHSCRIPT})
    served.server.hangs = True
    with pytest.raises((MeshError, grpc.aio.AioRpcError)):
        await served.load("m", "pytorch", timeout=0.3)
    served.server.hangs = False
    await served.control.unload(pb.UnloadModelRequest(modelId="m"), timeout=5.0)
    await served.load("m", "pytorch")
    assert list(served.server.loaded) == ["m"]


async def test_a_server_is_ready_once_it_has_dropped_all_models(served: Served) -> None:
    """The list of models may have several pages. Folders of a former relay are removed too."""
    served.write({"m": TORCHSCRIPT})
    folder = await served.load("m", "pytorch")
    served.server.loaded |= {f"other-{number}": {} for number in range(250)}
    status, _ = await served.managed().status(timeout=5.0)
    assert status.status == pb.RuntimeStatusResponse.READY
    assert not served.server.loaded
    assert not folder.exists()
    assert all(list(info.idInjectionPath) == [1] for info in status.methodInfos.values())
    assert len(status.methodInfos) == 4


async def test_a_model_needs_a_process_and_its_own_bytes(served: Served) -> None:
    """The size of a model includes its process, which takes most of the memory of a small model."""
    for key, size in (("", 250_000_000), ('{"disk_size_bytes": 400000000}', 750_000_000)):
        answer = await served.control.predict(pb.PredictModelSizeRequest(modelKey=key), timeout=1.0)
        assert answer.sizeInBytes == size


async def test_the_server_is_asked_whether_it_has_a_model(served: Served) -> None:
    """The size of a model that the server lacks is NOT_FOUND. Unloading such a model is no error."""
    served.write({"m": TORCHSCRIPT})
    await served.load("m", "pytorch")
    answer, _ = await served.control.size(pb.ModelSizeRequest(modelId="m"), timeout=5.0)
    assert answer.sizeInBytes == 0
    await served.control.unload(pb.UnloadModelRequest(modelId="never"), timeout=5.0)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await served.control.size(pb.ModelSizeRequest(modelId="never"), timeout=5.0)
    assert error.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("model_id", "kept"),
    [
        ("net-1.2@3", True),
        ("team/net", False),
        ("net\n", False),
        ("nét", False),
        ("x" * 201, False),
        ("0af3" * 8, False),
    ],
)
def test_only_plain_ids_are_names_at_the_server(served: Served, model_id: str, kept: bool) -> None:
    """TorchServe writes names into its log, so an id that is not plain becomes a digest. So does an id that looks like
    one."""
    name = served.control.name(model_id)
    assert (name == model_id) is kept
    assert kept or len(name) == 32


def test_only_v2s_calls_of_models_are_translated() -> None:
    """TorchServe's own calls pass unchanged. A V2 message without a readable model name is refused."""
    translation = V2OverPredictions()
    infer = b"/inference.GRPCInferenceService/ModelInfer"
    assert translation.method(infer) == b"/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions"
    assert translation.method(b"/org.pytorch.serve.grpc.inference.InferenceAPIsService/Predictions") is None
    for message in (b"\x0a\x02\xff\xff", b"\x0a\xff"):
        with pytest.raises(MeshError) as error:
            translation.request(infer, message)
        assert error.value.reason is Reason.BAD_REQUEST
    named = translation.request(infer, v2.ModelInferRequest(model_name="a/ä", id="7").SerializeToString())
    assert b"mesh-v2-infer" in named
