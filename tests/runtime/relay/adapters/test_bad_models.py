"""Bad models, given to every adapter: none reaches the server, each error has the right status, and nothing is left.

No server listens at the adapters' address, so an adapter that asked its server would get another error.
"""

import io
import json
import os
import re
import stat
import tarfile
import threading
import zipfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from mesh.modelfiles import archives
from mesh.modelservers import kinds
from mesh.pb import modelruntime_pb2 as pb
from mesh.runtime.relay.adapters import choice, contents
from mesh.runtime.relay.adapters.folders import Folders, ModelFolders
from mesh.statuses import MeshError, Reason

TYPES = {"mlserver": "xgboost", "triton": "onnx", "torchserve": "pytorch", "ovms": "openvino_ir"}
"""A type of each kind of server."""


class Pod:
    """One adapter in a folder of its own, and the files that an agent has pulled."""

    def __init__(self, folder: Path, kind: str, channel: grpc.aio.Channel) -> None:
        self.kind = kind
        self.pulled = folder / "pulled"
        self.pulled.mkdir()
        self.root = folder / "server"
        self.control: Any = choice.managed(kind, self.root, load_timeout=5.0, allow_code=True, rest="127.0.0.1:1")(
            channel
        )

    def write(self, name: str, content: bytes | str) -> None:
        """Writes a file as if an agent had pulled it."""
        path = self.pulled / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    async def load(self, path: str, model_type: str = "", model_id: str = "m", **key: Any) -> None:
        request = pb.LoadModelRequest(
            modelId=model_id,
            modelType=model_type or TYPES[self.kind],
            modelPath=str(self.pulled / path),
            modelKey=json.dumps(key),
        )
        await self.control.load(request, timeout=30.0)

    async def refused(self, path: str, model_type: str = "", **key: Any) -> MeshError:
        """Returns the error of a load that must fail, and checks that nothing of the model is left."""
        before = sorted(self.pulled.rglob("*"))
        with pytest.raises(MeshError) as error:
            await self.load(path, model_type, **key)
        assert not self.left()
        assert sorted(self.pulled.rglob("*")) == before
        assert str(self.root.parent) not in error.value.text, "callers learn nothing of the pod's disk"
        return error.value

    def left(self) -> list[Path]:
        """Returns what is left in the folders of models."""
        return [
            one for name in ("models", "files", "ids") for one in self.root.glob(f"{name}/*") if one.suffix != ".json"
        ]


@pytest.fixture(autouse=True)
def few_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a model have few files, because it takes long to write thousands."""
    monkeypatch.setattr(archives, "LIMITS", archives.ArchiveLimits(files=200))


@pytest_asyncio.fixture(params=kinds.KINDS)
async def pod(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Pod]:
    """Yields the adapter of each kind of server."""
    async with grpc.aio.insecure_channel("unix:/nowhere") as channel:
        yield Pod(tmp_path, request.param, channel)


# --- archives


def of_zip(*entries: tuple[str, bytes], mode: int = 0, form: int = zipfile.ZIP_DEFLATED) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", form) as archive:
        for name, content in entries:
            info = zipfile.ZipInfo("x")
            info.filename, info.compress_type, info.external_attr = name, form, mode << 16
            archive.writestr(info, content)
    return made.getvalue()


def of_tar(*entries: tuple[str, bytes], kind: bytes = tarfile.REGTYPE, link: str = "", mode: str = "w:gz") -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in entries:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, link, len(content)
            archive.addfile(info, io.BytesIO(content))
    return made.getvalue()


def encrypted() -> bytes:
    """Returns a zip archive whose only entry is marked as encrypted."""
    content = bytearray(of_zip(("a", b"1")))
    content[6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    return bytes(content)


OUT, LINK, DEVICE = "a path that leads out of it", "holds a link", "holds a device or a pipe"

ARCHIVES: dict[str, tuple[Callable[[], bytes], str]] = {
    "zip: up": (lambda: of_zip(("../up", b"1")), OUT),
    "zip: up from within": (lambda: of_zip(("a/../../up", b"1")), OUT),
    "zip: absolute": (lambda: of_zip(("/tmp/up", b"1")), OUT),
    "zip: backslash": (lambda: of_zip(("..\\up", b"1")), "a backslash or a NUL"),
    "zip: link": (lambda: of_zip(("a", b"/etc"), mode=stat.S_IFLNK | 0o777), LINK),
    "zip: device": (lambda: of_zip(("a", b""), mode=stat.S_IFCHR | 0o666), DEVICE),
    "zip: socket": (lambda: of_zip(("a", b""), mode=stat.S_IFSOCK | 0o666), DEVICE),
    "zip: twice": (lambda: of_zip(("a/b", b"1"), ("a", b"2")), "two entries with the same path"),
    "zip: encrypted": (encrypted, "cannot be unpacked .*encrypted"),
    "zip: cut": (
        lambda: of_zip(("a", os.urandom(3000)))[:-1000],
        "cannot be read as an archive|nor a .mar|not a model of",
    ),
    "tar: up": (lambda: of_tar(("../up", b"1")), OUT),
    "tar: absolute": (lambda: of_tar(("/tmp/up", b"1")), OUT),
    "tar: symbolic link": (lambda: of_tar(("a", b""), kind=tarfile.SYMTYPE, link="/etc"), LINK),
    "tar: link to what is in it": (lambda: of_tar(("a", b""), kind=tarfile.SYMTYPE, link="b"), LINK),
    "tar: hard link": (lambda: of_tar(("a", b""), kind=tarfile.LNKTYPE, link="/etc/passwd"), LINK),
    "tar: character device": (lambda: of_tar(("a", b""), kind=tarfile.CHRTYPE), DEVICE),
    "tar: block device": (lambda: of_tar(("a", b""), kind=tarfile.BLKTYPE), DEVICE),
    "tar: pipe": (lambda: of_tar(("a", b""), kind=tarfile.FIFOTYPE), DEVICE),
    "tar: cut": (lambda: of_tar(("a", os.urandom(3000)))[:-1000], "is damaged"),
    "tar: xz": (lambda: of_tar(("../up", b"1"), mode="w:xz"), OUT),
    "tar: bz2": (lambda: of_tar(("../up", b"1"), mode="w:bz2"), OUT),
    "many": (lambda: of_zip(*((str(number), b"") for number in range(201))), "more than 200 files"),
    "deep": (lambda: of_zip(("/".join("abc" * 11), b"1")), "more than 32 deep"),
    "long name": (lambda: of_tar(("n" * 256, b"1")), "a name of more than 255 bytes"),
    "long path": (lambda: of_tar(("/".join(["n" * 250] * 20), b"1")), "a path that is too long"),
    "archive in an archive": (lambda: of_zip(("a.zip", of_zip(("b", b"1")))), ""),
    "nothing in it": (lambda: of_tar(), ""),
}


@pytest.mark.parametrize("name", ARCHIVES)
async def test_a_bad_archive_is_refused(pod: Pod, name: str) -> None:
    make, says = ARCHIVES[name]
    pod.write("model", make())
    error = await pod.refused("model")
    assert error.reason is Reason.BAD_REQUEST, error.text
    assert re.search(says, error.text), error.text


async def test_an_archive_that_is_too_large_for_the_disk_is_refused(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bomb of some kilobytes is unpacked only up to the share of the disk that one archive may fill."""
    monkeypatch.setattr(archives, "_DISK_SHARE", 1e-9)
    pod.write("model", of_zip(("a", bytes(8 << 20))))
    error = await pod.refused("model")
    assert error.reason is Reason.BAD_REQUEST
    assert "more than half of the disk's free space" in error.text


# --- folders


@pytest.mark.parametrize("model_type", ["", "mlflow", "triton", "pytorch-mar", "python", "onnx"])
@pytest.mark.parametrize("content", ["", "nothing", "circle", "out", "other bytes"])
async def test_a_folder_that_is_no_model_is_refused(pod: Pod, model_type: str, content: str) -> None:
    """The folder holds nothing, or links that lead nowhere, in a circle or out of the folder, or names that are not
    UTF-8."""
    folder = pod.pulled / "folder"
    folder.mkdir()
    for name in ("a", "b"):
        if content == "nothing":
            (folder / name).symlink_to("nowhere")
        elif content == "circle":
            (folder / name).symlink_to(folder)
        elif content == "out":
            (folder / name).symlink_to("/proc/self")
        elif content == "other bytes":
            Path(os.fsdecode(os.fsencode(folder / name) + b"\xe8")).touch()
    error = await pod.refused("folder", model_type)
    assert error.reason in (Reason.BAD_REQUEST, Reason.PRECONDITION), error.text


async def test_links_in_a_circle_end(tmp_path: Path) -> None:
    """Copying a folder fails if it would go too deep, for instance because a link leads back to the folder, or if there
    are too many files."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "again").symlink_to(folder)
    for number, copy in enumerate((contents.mirror, contents.tree_of_links)):
        with pytest.raises(MeshError, match="folders more than 32 deep"):
            copy(folder, tmp_path / f"copy-{number}")
    (folder / "again").unlink()
    for number in range(archives.LIMITS.files + 1):
        (folder / str(number)).touch()
    for number, copy in enumerate((contents.mirror, contents.tree_of_links)):
        with pytest.raises(MeshError, match="more than 200 files"):
            copy(folder, tmp_path / f"large-{number}")


async def test_a_folder_that_vanishes_while_it_is_read_fails_the_load(
    pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is removed before its model's first link is made, as if another process had emptied the disk."""
    files = {
        "mlserver": {"model.json": '{"learner":{}}', "model-settings.json": '{"implementation": "mine.Model"}'},
        "triton": {"config.pbtxt": 'backend: "fil"', "1/x": ""},
        "torchserve": {"MAR-INF/MANIFEST.json": '{"model": {"handler": "h.py"}}', "h.py": "", "own/x.py": ""},
        "ovms": {"m.xml": "<net>", "m.bin": "", "more/x": ""},
    }
    for name, content in files[pod.kind].items():
        pod.write(f"folder/{name}", content)

    def vanish(source: Path, target: Path) -> None:
        for path in sorted((pod.pulled / "folder").rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        (pod.pulled / "folder").rmdir()
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(contents, "link", vanish)
    with pytest.raises(MeshError) as error:
        await pod.load("folder", "pytorch-mar" if pod.kind == "torchserve" else "")
    assert error.value.reason is Reason.LOAD_FAILED
    assert "No such file or directory" in error.value.text
    assert not pod.left()


# --- descriptions


DEEP, LARGE = "[" * 200_000, " " * ((1 << 20) + 1)

SETTINGS = [
    (DEEP, "nested too deeply"),
    (LARGE, "more than 1,048,576 bytes"),
    ("null", "must be a JSON object"),
    ('{"parameters": []}', "must be a JSON object"),
    ('{"implementation": ["mlserver_xgboost.XGBoostModel"]}', "must be the name of a class"),
    ('{"implementation": {}}', "must be the name of a class"),
    *(
        (json.dumps({"parameters": {"uri": uri}}), "must be a path in the model's folder")
        for uri in (5, [], {}, "http://[")
    ),
    (json.dumps({"parameters": {"uri": "a\0b"}}), "must be a path in the model's folder"),
    (json.dumps({"parameters": {"uri": "n" * 5000}}), "must be a path in the model's folder"),
    (json.dumps({"parameters": {"uri": "file:///..%2f..%2fetc"}}), "out of the model's folder"),
    (json.dumps({"parameters": {"uri": "\udcff"}}), "is missing"),
    (b"\xff\xfe{}", "is not valid JSON"),
]


@pytest.mark.parametrize("pod", ["mlserver"], indirect=True)
@pytest.mark.parametrize(("content", "says"), SETTINGS, ids=lambda value: repr(value)[:40])
async def test_bad_settings_are_refused(pod: Pod, content: bytes | str, says: str) -> None:
    pod.write("folder/model-settings.json", content)
    error = await pod.refused("folder")
    assert error.reason is Reason.BAD_REQUEST
    assert says in error.text


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["..", "/", "x", "\0"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["parameters", "uri", "implementation", "name", "environment_path"]), inner)
    ),
    max_leaves=8,
)


@given(settings=JSON)
def test_no_settings_do_more_than_be_refused(settings: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever a model's own settings are, the adapter writes settings for the server, or refuses the model."""
    folder = tmp_path_factory.mktemp("any")
    (folder / "pulled").mkdir()
    (folder / "pulled" / "model-settings.json").write_text(json.dumps(settings))
    nowhere: Any = SimpleNamespace(unary_unary=lambda *_, **__: None)
    control: Any = choice.managed("mlserver", folder / "server", load_timeout=1.0, allow_code=True)(nowhere)
    request = pb.LoadModelRequest(modelId="m", modelType="xgboost", modelPath=str(folder / "pulled"))
    place = control._folders.begin("m")
    try:
        control._lay_out(request, place, threading.Event())
    except MeshError as error:
        assert error.reason in (Reason.BAD_REQUEST, Reason.PRECONDITION)
        return
    written = json.loads((place.read / "model-settings.json").read_bytes())
    assert written["name"] == "m"
    uri = written["parameters"].get("uri")
    assert uri is None or Path(uri).resolve().is_relative_to((folder / "pulled").resolve())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (DEEP, "the schema is nested too deeply"),
        (LARGE, "the schema has more than 1,048,576 bytes"),
        (b"\xff\xfe", "the schema is not valid JSON"),
        ('"text"', "must be a JSON object"),
    ],
    ids=["deep", "large", "other bytes", "text"],
)
@pytest.mark.parametrize("pod", ["mlserver", "triton"], indirect=True)
async def test_a_bad_schema_is_refused(pod: Pod, content: bytes | str, says: str) -> None:
    pod.write("schema.json", content)
    pod.write("model", '{"learner":{}}' if pod.kind == "mlserver" else b"\x08\x08\x12\x05torch")
    error = await pod.refused("model", schema_path=str(pod.pulled / "schema.json"))
    assert error.reason is Reason.BAD_REQUEST
    assert says in error.text


@pytest.mark.parametrize("pod", ["mlserver", "triton"], indirect=True)
async def test_a_schema_that_is_a_folder_fails_the_load(pod: Pod) -> None:
    (pod.pulled / "schema").mkdir()
    pod.write("model", '{"learner":{}}' if pod.kind == "mlserver" else b"\x08\x08\x12\x05torch")
    error = await pod.refused("model", schema_path=str(pod.pulled / "schema"))
    assert error.reason is Reason.LOAD_FAILED
    assert "the schema cannot be read: Is a directory" in error.text


CONFIGS = [
    ("{" * 100_000, "cannot be read"),
    ("a {" * 10_000, "cannot be read"),
    ("a: [" * 10_000, "cannot be read"),
    ('backend: "python', "cannot be read"),
    ("\0", "cannot be read"),
    ("\ufeffbackend: 1", "cannot be read"),
    (b'backend: "\xe8"', "it is not UTF-8"),
    (r'default_model_filename: "a\000b" backend: "fil"', "has a text with a NUL"),
    (r'default_model_filename: "\057etc" backend: "fil"', "leads out of the model's folder"),
    ("default_model_filename: '.' './x' backend: 'fil'", "leads out of the model's folder"),
    ('backend: "python" default_model_filename: "' + "n" * 5000 + '"', "lacks the file nnn"),
    ('platform: "ensemble" backend: ""', "describes an ensemble"),
    ('model_warmup {inputs {key: "x" value {input_data_file: "../../x"}}}', "leads out of the model's folder"),
    ("max_batch_size: 1 max_batch_size: 2", "gives max_batch_size more than once"),
]


@pytest.mark.parametrize("pod", ["triton"], indirect=True)
@pytest.mark.parametrize(("content", "says"), CONFIGS, ids=lambda value: repr(value)[:40])
async def test_a_bad_description_is_refused(pod: Pod, content: bytes | str, says: str) -> None:
    pod.write("folder/config.pbtxt", content)
    pod.write("folder/1/model.onnx", "")
    error = await pod.refused("folder", "triton")
    assert error.reason is Reason.BAD_REQUEST
    assert says in error.text


MLMODELS = [
    ('flavors: {sklearn: {pickled_model: "a\\0b"}}', "names a file by a name that cannot be used"),
    (f"flavors: {{sklearn: {{pickled_model: {'n' * 5000}}}}}", "names a file by a name that cannot be used"),
    ("flavors: {sklearn: {pickled_model: ../../../x}}", "outside of the model's folder"),
    ("flavors: {sklearn: {pickled_model: [a]}}", "lacks pickled_model, the name of the model's file"),
    ("flavors: 2020-13-45", "is not valid YAML"),
    ("flavors: !!timestamp never", "is not valid YAML"),
    ("flavors: !!python/object/apply:os.system ['true']", "is not valid YAML"),
    ("flavors: " + "[" * 20_000, "is not valid YAML"),
    ("flavors: []", "names no flavors"),
    (b"\xff\xfe\xff", "is not valid YAML"),
    ("#" * ((1 << 20) + 1), "more than 1048576 bytes"),
]


@pytest.mark.parametrize("pod", ["mlserver"], indirect=True)
@pytest.mark.parametrize(("content", "says"), MLMODELS, ids=lambda value: repr(value)[:40])
async def test_a_bad_mlflow_description_is_refused(pod: Pod, content: bytes | str, says: str) -> None:
    pod.write("folder/MLmodel", content)
    error = await pod.refused("folder", "sklearn")
    assert error.reason is Reason.BAD_REQUEST
    assert says in error.text


# --- names of models

IDS = (
    *("a", "A", "a/b", "a\\b", "..", ".", "../../x", "/etc/passwd", "", " ", "a b", " a", "a ", "a\nb", "a\tb", "\x7f"),
    *("é", "e\u0301", "模型", "\u202eabc", "\udcff", "x" * 300, "x" * 5000, "é" * 200, "%2e%2e", "a%20b", "~", "-rf"),
    *(".hidden", "models", "files", "ids", "con", "$(id)", "`id`", "'", '"', "0123456789abcdef0123456789abcdef"),
)


async def test_every_id_has_folders_of_its_own(pod: Pod) -> None:
    """No id leads out of the server's folder or into the folders of another model, and each id can be read back from
    its folders."""
    folders: Folders = pod.control._folders
    places: dict[str, ModelFolders] = {}
    for model_id in IDS:
        places[model_id] = folders.begin(model_id)
        (places[model_id].read / "mine").write_bytes(model_id.encode("utf-8", "surrogatepass"))
    for model_id, place in places.items():
        assert (place.read / "mine").read_bytes() == model_id.encode("utf-8", "surrogatepass")
        for folder in (place.read, place.files):
            assert folder.resolve().parent.parent == pod.root.resolve()
    assert sorted(folders.ids()) == sorted(IDS)
    for model_id in IDS:
        folders.remove(model_id)
        assert not places[model_id].read.exists()
    assert not pod.left()


async def test_a_refused_model_is_refused_under_every_id(pod: Pod) -> None:
    """Whatever its id, a bad model leaves nothing behind, not even beside the server's folder."""
    pod.write("model", of_zip(("../up", b"1")))
    await pod.refused("model")
    before = sorted(pod.root.parent.iterdir())
    for model_id in IDS:
        if "\udcff" in model_id:
            continue  # which no message can hold
        with pytest.raises(MeshError, match=OUT):
            await pod.load("model", model_id=model_id)
    assert not pod.left()
    assert sorted(pod.root.parent.iterdir()) == before
