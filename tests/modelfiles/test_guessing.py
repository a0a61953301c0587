"""The types of models, guessed from their files."""

import io
import pickle
import zipfile
from pathlib import Path

import pytest

from mesh.modelfiles import guessing

PREDICTS = b"""# coding: utf-8\nclass Base: ...\nclass Mine(\n    Base,\n):\n    def predict(self, inputs): ...\n"""
TRITON = b"class TritonPythonModel:\n    def execute(self, requests): ...\n    def predict(self): ..."
BOOSTER = b'{"learner":{}}'


def zipped(*names: str) -> bytes:
    """Returns a zip archive of files with these names."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name in names:
            archive.writestr(name, b"1")
    return made.getvalue()


TORCHSCRIPT, CHECKPOINT = zipped("m/constants.pkl", "m/data.pkl"), zipped("m/data.pkl", "m/version")


@pytest.mark.parametrize(
    ("files", "path", "kind", "because"),
    [
        ({"churn.joblib": pickle.dumps("sklearn.pipeline")}, "churn.joblib", "sklearn", "scikit-learn"),
        ({"other.pkl": pickle.dumps("mine")}, "other.pkl", "sklearn", "its name ends in .pkl"),
        ({"m": BOOSTER}, "m", "xgboost", "XGBoost model in JSON"),
        ({"m.txt": b"tree\nversion=v4\n"}, "m.txt", "lightgbm", "LightGBM"),
        ({"m.cbm": b"CBM1"}, "m.cbm", "catboost", "CatBoost"),
        ({"d/m.json": BOOSTER}, "d", "xgboost", "XGBoost model in JSON"),
        ({"d/MLmodel": b"flavors: {python_function: {}, sklearn: {}}"}, "d", "mlflow", "python_function, sklearn"),
        ({"d/MLmodel": b"flavors: {onnx: {}}"}, "d", "onnx", "flavors onnx"),
        ({"d/model-settings.json": b'{"implementation": "mlserver_xgboost.X"}'}, "d", "xgboost", "mlserver_xgboost.X"),
        ({"net.pt": TORCHSCRIPT}, "net.pt", "pytorch", "TorchScript"),
        ({"net.pth": CHECKPOINT}, "net.pth", "", ""),
        ({"net.mar": b""}, "net.mar", "", ""),
        ({"d/MAR-INF": b"", "d/handler.py": b""}, "d", "pytorch-mar", "TorchServe archive"),
        (
            {"ir/m.xml": b"<?xml version='1.0'?><net name='m'><layers>", "ir/m.bin": b""},
            "ir",
            "openvino_ir",
            "OpenVINO",
        ),
        ({"r/config.pbtxt": b'backend: "python"'}, "r", "triton-python", "config.pbtxt with the backend python"),
        ({"r/config.pbtxt": b'backend: "fil" # x'}, "r", "triton", "it has a config.pbtxt"),
        ({"r/config.pbtxt": b"backend: ["}, "r", "", ""),
        ({"net.plan": b"ftrt"}, "net.plan", "tensorrt", "its name ends in .plan"),
        ({"a.txt": b"hello"}, "a.txt", "", ""),
        ({"data.bst": b"\x89PNG\r\n"}, "data.bst", "", ""),
        ({"d/model-settings.json": b"{"}, "d", "", ""),
        ({"d/model.py": PREDICTS, "d/w.bin": b"CBM1"}, "d", "python", "class Mine with the method predict"),
        ({"mine.py": PREDICTS}, "mine.py", "python", "mine.py defines the class Mine"),
        ({"d/model.py": TRITON, "d/x": b""}, "d", "triton-python", "defines the class TritonPythonModel"),
        ({"d/model.py": PREDICTS, "d/config.pbtxt": b'backend: "fil"'}, "d", "triton", "it has a config.pbtxt"),
        ({"m.py": b"def predict(x): ..."}, "m.py", "", ""),
        ({"m.py": b"class Mine:\n  def predict("}, "m.py", "", ""),
        ({"m.py": b"\xff\0"}, "m.py", "", ""),
        ({"m.py": b"(" * 100_000}, "m.py", "", ""),
        ({"d/MLmodel": b"["}, "d", "", ""),
    ],
)
def test_a_type_is_guessed_from_content_and_name(
    tmp_path: Path, files: dict[str, bytes], path: str, kind: str, because: str
) -> None:
    """The content counts more than the name. If the type is in doubt, no type is guessed."""
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    guess = guessing.of_file(tmp_path / path)
    assert (guess.type if guess else "") == kind
    if guess:
        assert because in guess.because


def test_an_archive_is_judged_by_the_names_in_it(tmp_path: Path) -> None:
    """The names of files in an archive decide its type. For an archive with files of two libraries, no type is
    guessed."""
    for names, kind in (
        (["a/MLmodel", "a/x.pkl"], "mlflow"),
        (["a/m.bst"], "xgboost"),
        (["m.bst", "m.cbm"], ""),
        (["a/net.mar"], "pytorch-mar"),
    ):
        with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
            for name in names:
                archive.writestr(name, b"1")
        guess = guessing.of_file(tmp_path / "m.zip")
        assert (guess.type if guess else "") == kind
