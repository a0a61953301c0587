"""The search for a model's file, and the confinement of all reads to its folder."""

import gzip
import os
import pickle
import re

import onnx
import pytest

from mesh.runtime.server.onnx import onnxfile
from mesh.statuses import MeshError, Reason
from tests.support import models

MODEL = models.constant(1.0)


def put(folder, **files: bytes):
    """Writes files. In their names, `__` stands for a slash and a final `_onnx` for the suffix."""
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_onnx", ".onnx")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def refused(path) -> MeshError:
    with pytest.raises(MeshError) as error:
        onnxfile.find(str(path))
    return error.value


def test_a_file_is_the_model(tmp_path):
    """If the path is a file, its name does not matter."""
    put(tmp_path, anything=MODEL)
    found = onnxfile.find(str(tmp_path / "anything"))
    assert (found.path, found.bytes, found.external) == (tmp_path / "anything", len(MODEL), ())


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param(["only_onnx", "readme"], "only.onnx", id="the-only-one"),
        pytest.param(["model_onnx", "other_onnx"], "model.onnx", id="by-name"),
        pytest.param(["9__model_onnx", "10__model_onnx"], "10/model.onnx", id="highest-version"),
        pytest.param(["1__2__x_onnx"], "1/2/x.onnx", id="nested"),
        pytest.param(
            ["1__model_onnx__model_onnx", "1__model_onnx__data"], "1/model.onnx/model.onnx", id="folder-as-file"
        ),
        pytest.param(["model_onnx__fraud_onnx"], "model.onnx/fraud.onnx", id="folder-as-file-without-version"),
        pytest.param(["top_onnx", "1__model_onnx"], "top.onnx", id="here-before-versions"),
        pytest.param(["M.ONNX", "readme"], "M.ONNX", id="upper-case"),
        pytest.param(["Model.Onnx", "other_onnx"], "Model.Onnx", id="by-name-in-any-case"),
        pytest.param(["fraud_onnx", "._fraud_onnx", ".nfs000_onnx"], "fraud.onnx", id="beside-what-others-leave"),
    ],
)
def test_in_a_folder_it_is_found(tmp_path, files, expected):
    """A model is found in its folder by the rules that users of Triton know."""
    put(tmp_path, **dict.fromkeys(files, MODEL))
    assert onnxfile.find(str(tmp_path)).path == tmp_path / expected


@pytest.mark.parametrize(
    ("files", "says"),
    [
        pytest.param(["a_onnx", "b_onnx"], "several models", id="two"),
        pytest.param(["readme", "weights"], "it has readme, weights", id="none"),
        pytest.param(["v1__model_onnx"], "no *.onnx", id="not-a-version"),
        pytest.param(["1__model_onnx__model_onnx__a_onnx"], "no *.onnx", id="a-folder-as-file-in-another"),
    ],
)
def test_a_folder_without_the_model_is_refused(tmp_path, files, says):
    put(tmp_path, **dict.fromkeys(files, MODEL))
    error = refused(tmp_path)
    assert error.reason is Reason.BAD_REQUEST
    assert says in error.text


def test_what_is_not_there_is_not_found(tmp_path):
    """A path that goes through a file counts as missing too."""
    put(tmp_path, file=MODEL)
    for path in (tmp_path / "none", tmp_path / "file" / "below"):
        error = refused(path)
        assert error.reason is Reason.UNKNOWN_MODEL
        assert str(path) in error.text


def test_what_is_no_file_is_refused(tmp_path):
    """An empty file, an empty folder and a device are refused."""
    put(tmp_path, empty=b"")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "empty", tmp_path / "folder", "/dev/null"):
        assert refused(path).reason is Reason.BAD_REQUEST
    assert "empty" in refused(tmp_path / "empty").text


# -- external data


def with_external(folder, location: str, build=models.external_data, **more):
    folder.mkdir(exist_ok=True)
    put(folder, model_onnx=build(location, **more))
    return folder / "model.onnx"


def test_external_data_in_the_folder_is_counted(tmp_path):
    """External data in the folder or below it counts towards the size, even if its path takes a detour within the
    folder."""
    folder = tmp_path / "m"
    put(folder, weights=b"1234", sub__weights=b"12345678")
    for location, size in (("weights", 4), ("sub/weights", 8), ("sub/../weights", 4)):
        model = with_external(folder, location)
        found = onnxfile.find(str(model))
        assert found.bytes == model.stat().st_size + size
        assert len(found.external) == 1


@pytest.mark.parametrize("build", [models.external_data, models.external_data_in_a_branch])
@pytest.mark.parametrize(
    "location",
    ["../secret", "/etc/passwd", "", "sub/../../secret", "none", "sub", "link", "linked/secret", "*/_ORT_MEM_ADDR_/*"],
)
def test_external_data_elsewhere_is_refused(tmp_path, location, build):
    """External data is refused if its path is empty, absolute, missing or a folder, or leads out of the model's folder,
    even through a link. This holds in the graph and in its branches."""
    put(tmp_path, secret=b"secret!!")
    folder = tmp_path / "m"
    put(folder, sub__file=b"1234")
    (folder / "*" / "_ORT_MEM_ADDR_").mkdir(parents=True)
    (folder / "*" / "_ORT_MEM_ADDR_" / "*").write_bytes(b"1234")
    os.symlink(tmp_path / "secret", folder / "link")
    os.symlink(tmp_path, folder / "linked")
    error = refused(with_external(folder, location, build))
    assert error.reason is Reason.BAD_REQUEST
    assert "external data" in error.text


def test_a_link_that_stays_inside_is_allowed(tmp_path):
    folder = tmp_path / "m"
    put(folder, weights=b"1234")
    os.symlink("weights", folder / "link")
    assert onnxfile.find(str(with_external(folder, "link"))).external == (folder / "weights",)


@pytest.mark.parametrize("span", [{"offset": 1}, {"length": 5}, {"offset": -4}, {"offset": 1 << 62}])
def test_external_data_beyond_the_end_of_its_file_is_refused(tmp_path, span):
    """Reading beyond the end of a mapped file would kill the server."""
    folder = tmp_path / "m"
    put(folder, weights=b"1234")
    assert "weights" in refused(with_external(folder, "weights", **span)).text


def test_the_word_alone_makes_no_external_data(tmp_path):
    """A model is not refused because the name of a tensor contains the word that marks external data."""
    put(tmp_path, model_onnx=MODEL + b"\x1a\x08location")  # field 3 of ModelProto: producer_version
    assert onnxfile.find(str(tmp_path)).external == ()


def test_a_file_that_mentions_the_word_and_is_no_model_is_refused(tmp_path):
    put(tmp_path, model_onnx=b"\xff\xffwhat is the location?")
    assert "not an ONNX model" in refused(tmp_path).text


def test_the_word_is_found_where_chunks_meet(tmp_path):
    """The file is read in chunks of 1 MiB, and the word for external data is found even across their boundary."""
    word = b"location"
    for shift in range(len(word) + 1):
        path = tmp_path / "file"
        path.write_bytes(b"." * ((1 << 20) - shift) + word)
        assert onnxfile._mentions(path, word)
    path.write_bytes(b"." * ((1 << 20) - 3) + b"locatio")
    assert not onnxfile._mentions(path, word)


@pytest.mark.parametrize(
    "newest",
    [
        pytest.param({}, id="empty"),
        pytest.param({"readme": b"soon"}, id="no-model"),
        pytest.param({"model.onnx": b""}, id="of-no-bytes"),
        pytest.param({"model.onnx": MODEL[:-1]}, id="cut-off"),
        pytest.param({"model.onnx": MODEL[: len(MODEL) // 2]}, id="half-there"),
        pytest.param({"model.onnx.part": MODEL}, id="another-name"),
        pytest.param({"model.onnx": models.external_data("w")}, id="without-its-weights"),
        pytest.param({"model.onnx": models.external_data("w", length=4), "w": b"1"}, id="half-of-its-weights"),
        pytest.param({"._model.onnx": MODEL}, id="left-by-others"),
        pytest.param({"1/model.onnx": b""}, id="nested"),
    ],
)
def test_an_incomplete_version_is_passed_over(tmp_path, newest, caplog):
    """An incomplete version is skipped and logged, and the version before it is served. Once complete, the newest
    version is taken."""
    put(tmp_path, **{"2__model_onnx": MODEL, "9__model_onnx": MODEL})
    (tmp_path / "10").mkdir()
    for name, content in newest.items():
        (tmp_path / "10" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "10" / name).write_bytes(content)
    assert onnxfile.find(str(tmp_path)).path == tmp_path / "9" / "model.onnx"
    assert "version skipped" in caplog.text
    put(tmp_path, **{"10__model_onnx": MODEL})
    assert onnxfile.find(str(tmp_path)).path == tmp_path / "10" / "model.onnx"


def test_no_version_is_whole(tmp_path):
    """If no version is complete, the error names the newest one."""
    put(tmp_path, **{"1__model_onnx": b"", "2__readme": b""})
    assert f"{tmp_path}/2" in refused(tmp_path).text


def test_a_version_that_is_whole_and_wrong_is_not_passed_over(tmp_path):
    """A complete but invalid version, such as one with two models, is not skipped: it is not an upload under way, and a
    person has to decide."""
    put(tmp_path, **{"1__model_onnx": MODEL, "2__a_onnx": MODEL, "2__b_onnx": MODEL})
    assert "several models" in refused(tmp_path).text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param(pickle.dumps({"a": 1}), "is a Python pickle, not an ONNX model: export", id="pickle"),
        pytest.param(b"PK\x03\x04" + bytes(60), "is a zip archive, not an ONNX model: unpack it", id="zip"),
        pytest.param(gzip.compress(MODEL), "is a gzip file, not an ONNX model: unpack it", id="gzip"),
        pytest.param(b'{"learner":{}}', "is an XGBoost model in JSON, .* --type xgboost", id="booster"),
        pytest.param(b"<!doctype html><html>", "is an HTML page, .*: check the URL", id="page"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer, .*git lfs pull", id="lfs"),
    ],
)
def test_a_file_that_plainly_is_something_else_is_named(tmp_path, content, says):
    """The error about a file of another kind says what the file is, and what to do."""
    put(tmp_path, model_onnx=content)
    assert re.search(says, refused(tmp_path / "model.onnx").text)
    assert re.search(says, refused(tmp_path).text)


def test_a_folder_that_plainly_is_something_else_is_named(tmp_path):
    put(tmp_path, MLmodel=b"flavors:", model__weights=b"?")
    text = refused(tmp_path).text
    assert "holds no *.onnx file; it has MLmodel, model. It is an MLflow model: register it with --type mlflow" in text


@pytest.mark.parametrize("at", range(0, len(MODEL), 7))
def test_a_model_that_is_cut_off_is_not_whole(tmp_path, at):
    """A truncated model is recognised as incomplete. A cut between two outermost fields is the exception, because the
    rest is then a valid message."""
    put(tmp_path, model_onnx=MODEL[:at])
    try:
        onnxfile.find(str(tmp_path))
    except MeshError as error:
        assert "truncated" in error.text or "is empty" in error.text
        return
    assert onnx.ModelProto.FromString(MODEL[:at]).SerializeToString() == MODEL[:at]
