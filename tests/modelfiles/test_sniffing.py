"""Kinds of files, recognised by their bytes. Some files are written by their library, the others are the bytes with
which such files begin."""

import gzip
import io
import pickle
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.modelfiles import sniffing
from mesh.modelfiles.sniffing import Kind
from tests.support import models


class Estimator:
    """A class that is pickled as if it belonged to a library."""


def pickled(module: str, protocol: int = 4) -> bytes:
    """Returns the pickle of an object whose class is in the given module. The class need not exist."""
    found = pickle.dumps(Estimator(), protocol)
    own = Estimator.__module__.encode()
    if protocol < 4:
        return found.replace(b"c" + own, b"c" + module.encode())
    name = module.encode()
    return b"\x80\x04\x8c" + bytes([len(name)]) + name + found[found.index(own) + len(own) :]


def zipped(*names: str) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name in names:
            archive.writestr(name, b"x" * 50)
    return made.getvalue()


def nested(name: str, content: bytes, *names: str) -> bytes:
    """Returns a zip archive that contains another archive, uncompressed, and then empty files with these names."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr(name, content)
        for one in names:
            archive.writestr(one, b"")
    return made.getvalue()


def tarred() -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.onnx"))
    return made.getvalue()


def array() -> bytes:
    made = io.BytesIO()
    np.save(made, np.zeros(3))
    return made.getvalue()


def arrays() -> bytes:
    made = io.BytesIO()
    np.savez(made, a=np.zeros(3), b=np.zeros(1))
    return made.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
S3_ERROR = b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>NoSuchKey</Code></Error>'

FILES: dict[str, tuple[bytes, Kind | None]] = {
    "an ONNX model": (models.constant(1.0), sniffing.ONNX),
    "nothing": (b"", sniffing.EMPTY),
    "a Git LFS pointer": (LFS, sniffing.LFS),
    "an HTML page": (b"\n<!DOCTYPE html>\n<html><body>Sign in", sniffing.HTML),
    "an old HTML page": (b"<HTML><HEAD>", sniffing.HTML),
    "a store's error": (S3_ERROR, sniffing.STORE_ERROR),
    **{f"a pickle, protocol {n}": (pickle.dumps(Estimator(), n), sniffing.PICKLE) for n in range(6)},
    "a scikit-learn pickle": (pickled("sklearn.linear_model._logistic"), sniffing.SKLEARN),
    "an old scikit-learn pickle": (pickled("sklearn.svm", 2), sniffing.SKLEARN),
    "an XGBoost pickle": (pickled("xgboost.sklearn"), sniffing.XGBOOST_PICKLE),
    "a LightGBM pickle": (pickled("lightgbm.sklearn"), sniffing.LIGHTGBM_PICKLE),
    "a compressed joblib file": (zlib.compress(pickled("sklearn.svm"), 3), sniffing.SKLEARN),
    "compressed numbers": (zlib.compress(bytes(100)), None),
    "an old PyTorch file": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.", sniffing.TORCH),
    "a PyTorch file": (zipped("model/data.pkl", "model/version"), sniffing.TORCH),
    "TorchScript": (zipped("m/data.pkl", "m/code/__torch__.py", "m/constants.pkl"), sniffing.TORCHSCRIPT),
    "a TorchServe archive": (zipped("model.pt", "MAR-INF/MANIFEST.json"), sniffing.MAR),
    "a Keras file": (zipped("metadata.json", "config.json", "model.weights.h5"), sniffing.KERAS),
    "a zip archive": (zipped("model.onnx"), sniffing.ZIP),
    "a zip archive of a TorchServe archive": (nested("x/m.mar", zipped("m.pt", "MAR-INF/MANIFEST.json")), sniffing.ZIP),
    "a long zip archive of TorchScript": (
        nested("m.pt", zipped("m/constants.pkl"), *map(str, range(99))),
        sniffing.ZIP,
    ),
    "long TorchScript": (zipped("m/constants.pkl", *(f"m/data/{n}" for n in range(999))), sniffing.TORCHSCRIPT),
    "an empty zip archive": (zipped(), sniffing.ZIP),
    "a gzip file": (gzip.compress(b"x"), sniffing.GZIP),
    "a tar archive": (tarred(), sniffing.TAR),
    "an array": (array(), sniffing.NUMPY),
    "several arrays": (arrays(), sniffing.NUMPY),
    "XGBoost's JSON": (b'{"learner":{"attributes":{},"feature_names":[]', sniffing.XGBOOST_JSON),
    "XGBoost's UBJSON": (b"{L\0\0\0\0\0\0\0\x07learner{L\0\0\0\0\0\0\0\nattributes", sniffing.XGBOOST_UBJ),
    "XGBoost's old format": (b"binf\0\0\0?", sniffing.XGBOOST_BINARY),
    "LightGBM's text": (b"tree\nversion=v4\nnum_class=1\n", sniffing.LIGHTGBM),
    "CatBoost's file": (b"CBM1\x10\0\0\0", sniffing.CATBOOST),
    "Keras' HDF5": (b"\x89HDF\r\n\x1a\n\0", sniffing.KERAS_H5),
    "TensorFlow Lite": (b"\x1c\0\0\0TFL3\x14\0", sniffing.TFLITE),
    "ONNX Runtime's format": (b"\x20\0\0\0ORTM\0", sniffing.ORT),
    "OpenVINO": (b'<?xml version="1.0"?>\n<net name="m" version="11">\n\t<layers>', sniffing.OPENVINO),
    "PMML": (b'<?xml version="1.0"?><PMML version="4.4">', sniffing.PMML),
    "safetensors": (b"\x48\0\0\0\0\0\0\0" + b'{"weight":{"dtype":"F32"', sniffing.SAFETENSORS),
    "GGUF": (b"GGUF\x03\0\0\0", sniffing.GGUF),
    "other JSON": (b'\n{ "a": 1}', sniffing.JSON),
    "other XML": (b'<?xml version="1.0"?><a/>', sniffing.XML),
    "other text": (b"hello, world", None),
    "other bytes": (bytes(range(200, 256)), None),
}


@pytest.mark.parametrize(("content", "kind"), FILES.values(), ids=FILES)
def test_a_file_is_named_as_what_it_is(tmp_path: Path, content: bytes, kind: Kind | None) -> None:
    """A file is recognised by its content, whatever its name."""
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert sniffing.look(path) == kind


@pytest.mark.parametrize("make", [models.all_types, models.shout, models.with_optional, models.sequence_output])
def test_an_onnx_model_is_recognised_by_its_beginning(make: Callable[[], bytes]) -> None:
    assert sniffing.sniff(make()[: sniffing.HEAD]) == sniffing.ONNX


MLMODEL = b"artifact_path: model\nflavors:\n  python_function:\n    loader_module: mlflow.sklearn\n"


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        pytest.param(["MLmodel", "model.pkl", "conda.yaml"], sniffing.MLFLOW, id="MLflow"),
        pytest.param(["saved_model.pb", "variables"], sniffing.SAVED_MODEL, id="SavedModel"),
        pytest.param(["net.xml", "net.bin"], sniffing.OPENVINO, id="OpenVINO"),
        pytest.param(["config.json", "model.safetensors"], sniffing.HUGGING_FACE, id="Hugging Face"),
        pytest.param(["config.pbtxt", "1"], sniffing.TRITON, id="Triton"),
        pytest.param(["a", "b"], None, id="other names"),
        pytest.param([], None, id="nothing"),
    ],
)
def test_a_folder_is_named_by_its_files(tmp_path: Path, names: list[str], kind: Kind | None) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"?")
    assert sniffing.look(tmp_path) == kind


def test_the_only_file_of_a_folder_is_looked_into(tmp_path: Path) -> None:
    """A folder with one file has the kind of that file. Hidden files do not count."""
    (tmp_path / ".hidden").write_bytes(b"?")
    (tmp_path / "model.joblib").write_bytes(pickled("sklearn.svm"))
    assert sniffing.look(tmp_path) == sniffing.SKLEARN


def test_an_mlflow_description_alone_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(MLMODEL)
    found = sniffing.look(path)
    assert found is not None
    assert found.what == "an MLflow model's description"


def test_every_kind_has_a_way_out() -> None:
    """The text for each kind says what the file is and what to do about it."""
    for _, kind in FILES.values():
        if kind is not None:
            assert kind.what.startswith(("a ", "an "))
            assert kind.way_out


BEGINNINGS = st.sampled_from([content[:60] for content, _ in FILES.values()])


@given(BEGINNINGS, st.binary(max_size=300), st.binary(max_size=300))
def test_any_bytes_are_named_or_not_and_never_fail(beginning: bytes, head: bytes, tail: bytes) -> None:
    """Any bytes, even those that begin like a known file, give a kind or None, without an exception."""
    for content in (head, beginning + head, beginning[: len(beginning) // 2] + head):
        assert isinstance(sniffing.sniff(content, tail), Kind | None)


class CountedFile(io.FileIO):
    """A file that counts the bytes that are read from it."""

    read_bytes = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(-1 if size is None else size) or b""
        CountedFile.read_bytes += len(data)
        return data


@pytest.mark.parametrize("beginning", [b"", b"PK\x03\x04", b"\x80\x04", b"{", b"<?xml ", b"\x78\x9c"])
def test_no_more_than_a_few_kilobytes_are_read(tmp_path: Path, monkeypatch, beginning: bytes) -> None:
    """However large a file is, only its beginning and its end are read."""
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.write(beginning)
        file.truncate(1 << 30)
    monkeypatch.setattr(CountedFile, "read_bytes", 0)
    monkeypatch.setattr(Path, "open", lambda self, mode="r", buffering=-1: CountedFile(self, mode))
    sniffing.look(path)
    assert 0 < CountedFile.read_bytes <= sniffing.HEAD + sniffing.TAIL < 8192
