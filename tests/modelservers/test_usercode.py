"""Python code of users, as MLServer's runtime for it loads and calls the code."""

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mesh.modelservers import environments

(_file,) = (path for path in environments.companions_of("mlserver") if path.stem == "mlserver_usercode")
_found = importlib.util.spec_from_file_location("mlserver_usercode", _file)
assert _found is not None
assert _found.loader is not None
usercode: Any = importlib.util.module_from_spec(_found)
_found.loader.exec_module(usercode)

DOUBLE = "class Model:\n    def predict(self, inputs):\n        return 2 * inputs['x']\n"
OPENS = "    def load(self, folder):\n        open({})"
HELPED = """
from . import helper
class Model:
    def load(self, folder):
        self.added = int((folder / "data.txt").read_text())
    def predict(self, inputs):
        from .helper import FACTOR
        return {"y": helper.FACTOR * inputs["x"] + self.added, "factor": FACTOR}
    def size(self):
        return 12345
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns the folder of a model, whose path has a space."""
    (tmp_path / "a model").mkdir()
    return tmp_path / "a model"


def loaded(folder: Path, code: str, **files: str) -> Any:
    """Loads a model from its code and further files."""
    folder.mkdir(exist_ok=True)
    for name, content in ({"model.py": code} | files).items():
        (folder / name).write_text(content)
    return usercode.UserModel(folder)


def failure(folder: Path, code: str, **files: str) -> str:
    """Returns the error of a load. Checks that the error shows no path of the pod, and that no module of the model is
    left."""
    with pytest.raises(usercode.CodeFailure) as error:
        loaded(folder, code, **files)
    assert str(folder.parent) not in str(error.value), "callers learn nothing of the pod's disk"
    assert not modules()
    return str(error.value)


def modules() -> list[str]:
    """Returns the names of all modules of models."""
    return [name for name in sys.modules if name.startswith("mesh_model_")]


def test_the_smallest_class_is_a_model(folder: Path) -> None:
    """Only `predict` is needed, and a model that returns one array has one output."""
    model = loaded(folder, DOUBLE)
    outputs = model.predict({"x": np.array([1.5, 2])})
    assert {name: array.tolist() for name, array in outputs.items()} == {"predict": [3, 4]}
    assert model.size == 0
    model.close()


def test_models_with_files_of_the_same_names_do_not_clash(tmp_path: Path) -> None:
    """Each model has its own modules and files, also for imports during calls, and leaves no module behind."""
    files = [{"helper.py": f"FACTOR = {number}", "data.txt": str(number)} for number in (3, 5)]
    three, five = (loaded(tmp_path / f"m{number}", HELPED, **one) for number, one in enumerate(files))
    for model, number in ((three, 3), (five, 5), (three, 3)):
        outputs = model.predict({"x": np.array([10])})
        assert (outputs["y"].tolist(), outputs["factor"]) == ([10 * number + number], number)
        assert model.size == 12345
    three.close()
    assert five.predict({"x": np.array([1])})["y"].tolist() == [10]
    five.close()
    assert not modules()


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("", "defines no class with a method predict$"),
        ("class A: ...\nclass B: ...", "no class with a method predict; its classes are A, B$"),
        (DOUBLE + DOUBLE.replace("Model", "Other"), "several classes with a method predict: Model, Other. Begin the"),
        ("class TritonPythonModel:\n    def execute(self, requests): ...", "register it with --type triton-python"),
        (DOUBLE.replace("def p", "async def p"), "Model.predict is async: make it an ordinary method"),
        ("def f(:", r"model.py cannot be imported: SyntaxError: .*\(model.py, line 1\)"),
        ("\n1 / 0", r"cannot be imported: ZeroDivisionError: division by zero \(model.py, line 2\)"),
        ("import sys\nsys.exit('bye')", r"cannot be imported: SystemExit: bye \(model.py, line 2\)"),
        ("import helper", r"No module named 'helper' \(model.py, line 1\): .* so write `from . import helper`"),
        ("from . import absent", r"cannot import name 'absent' from 'model'"),
        ("import nowhere_to_be_found", r"No module named 'nowhere_to_be_found' \(model.py, line 1\)$"),
        (DOUBLE + "    def __init__(self, x): ...", r"Model\(\) failed: TypeError: .*missing 1 required"),
        (
            DOUBLE + "    def load(self, folder):\n        open(folder / 'w.npy')",
            r"load failed: .*: 'w.npy' \(model.py, l",
        ),
        (
            DOUBLE + "    def load(self, folder):\n        open('/opt/x/w.npy')",
            r"load failed: .*: 'w.npy' \(model.py, l",
        ),
        (DOUBLE + "    def load(self): ...", "load failed: TypeError: .*takes 1 positional argument but 2 were given"),
        (DOUBLE + "    def size(self): return 1.5", "size must return a number of bytes, as an integer, not '1.5'"),
        (DOUBLE + "    def size(self): return -1", "size must return a number of bytes, as an integer, not '-1'"),
        (DOUBLE + "    def size(self): return 1 / 0", "size failed: ZeroDivisionError"),
    ],
)
def test_code_that_cannot_be_loaded_is_refused_with_the_reason(folder: Path, code: str, says: str) -> None:
    """The error says what is wrong, and in which line if code has failed, but shows no paths."""
    text = failure(folder, code, **{"helper.py": ""})
    assert re.search(says, text, re.DOTALL), text


def test_classes_that_are_not_meant_do_not_count(folder: Path) -> None:
    """Private classes, imported classes and second names of a class do not count as models."""
    code = "from .base import Base\nclass _Common(Base): ...\nclass Model(_Common): ...\nAlias = Model\n"
    base = "class Base:\n    def predict(self, inputs): return [7]\n"
    model = loaded(folder, code, **{"base.py": base})
    assert model.predict({}) == {"predict": [7]}
    model.close()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return inputs['y']", r"^predict failed: KeyError: 'y' \(model.py, line 3\)$"),
        ("raise SystemExit", r"^predict failed: SystemExit \(model.py, line 3\)$"),
        (
            "raise ValueError('see /var/lib/mesh/models/w.npy or http://a.b/c/d, a/b')",
            "see w.npy or http://a.b/c/d, a/b",
        ),
        ("raise ValueError('x' * 5000)", "^.{900,1200}$"),
        ("return {}", "must return an array, or a dict of arrays"),
        ("return {1: 2}", "must return an array, or a dict of arrays"),
    ],
)
def test_an_exception_becomes_an_error_for_the_caller(folder: Path, body: str, says: str) -> None:
    """The error shows the exception, but nothing of the pod's disk. The model can be called again."""
    model = loaded(folder, f"class Model:\n    def predict(self, inputs):\n        {body}\n")
    for _ in range(2):
        with pytest.raises(usercode.CodeFailure) as error:
            model.predict({})
        text = str(error.value)
        assert re.search(says, text), text
        assert "/var" not in text
    assert error.value.__cause__ is None or error.value.__cause__.__traceback__ is not None, "for the log"
    model.close()


@pytest.mark.parametrize(
    "kind", ["float32", "float64", "bool", *(f"{u}int{n}" for u in ("", "u") for n in (8, 16, 32, 64))]
)
def test_arrays_of_numbers_go_there_and_back(kind: str) -> None:
    array = np.array([[0, 1, 1], [1, 0, 1]], kind)
    datatype, shape, data = usercode.encode("y", array)
    assert shape == [2, 3]
    back = usercode.decode("x", datatype, shape, data)
    assert back.dtype == array.dtype
    assert np.array_equal(back, array)


def test_special_values_go_there_and_back() -> None:
    """NaN and infinities stay, single values and lists become arrays, and half precision becomes FP32."""
    _, _, data = usercode.encode("y", np.array([np.nan, np.inf, -np.inf]))
    assert np.array_equal(usercode.decode("x", "FP64", [3], data), [np.nan, np.inf, -np.inf], equal_nan=True)
    assert usercode.encode("y", 7) == ("INT64", [1], [7])
    assert usercode.encode("y", [[1.5], [2.5]]) == ("FP64", [2, 1], [1.5, 2.5])
    assert usercode.encode("y", np.array([1.5], np.float16)) == ("FP32", [1], [1.5])
    assert usercode.encode("y", np.empty((0, 3), np.float32)) == ("FP32", [0, 3], [])
    assert usercode.decode("x", "FP32", [0, 3], []).shape == (0, 3)
    assert usercode.decode("x", "FP16", [2], [0.5, 1]).dtype == np.float16


def test_texts_are_str_and_other_bytes_stay() -> None:
    """Elements of BYTES are str if all are UTF-8, also with zeros at their ends, and otherwise bytes."""
    texts = usercode.decode("x", "BYTES", [2, 1], ["ä".encode(), b"b\0"])
    assert texts.tolist() == [["ä"], ["b\0"]]
    assert usercode.encode("y", texts) == ("BYTES", [2, 1], ["ä".encode(), b"b\0"])
    assert usercode.decode("x", "BYTES", [2], ["a", "b"]).tolist() == ["a", "b"]
    mixed = usercode.decode("x", "BYTES", [2], [b"a", b"\xff\xd8"])
    assert mixed.tolist() == [b"a", b"\xff\xd8"]
    assert usercode.encode("y", mixed) == ("BYTES", [2], [b"a", b"\xff\xd8"])
    assert usercode.encode("y", np.array(["a", "bc"])) == ("BYTES", [2], [b"a", b"bc"])
    assert usercode.encode("y", "text") == ("BYTES", [1], [b"text"])


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "says"),
    [
        ("FP64", [2], [1.0], "the input x has 1 values, which do not fill its shape [2]"),
        ("FP64", [-1], [1.0], "do not fill its shape [-1]"),
        ("FP64", [-1, -1], [1.0], "do not fill its shape [-1, -1]"),
        ("INT8", [1], ["a"], "not of its datatype INT8"),
        ("INT32", [1], [2**40], "not of its datatype INT32"),
        ("BYTES", [1], [1], "not of its datatype BYTES"),
        ("BF16", [1], [1], "has the datatype BF16, which Python code cannot take"),
        ("FP32", [2], [[1], [1, 2]], "not of its datatype FP32"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(datatype: str, shape: list[int], data: list[Any], says: str) -> None:
    with pytest.raises(usercode.BadTensors) as error:
        usercode.decode("x", datatype, shape, data)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "the output y is of the type NoneType: return numbers"),
        (np.array([1j]), "the output y is an array of complex128"),
        ([[1], [1, 2]], "its rows have different lengths"),
        (np.array(["a", 1], object), "the output y is an array of object"),
        (np.array(["2020-01-01"], "datetime64[D]"), r"an array of datetime64[D]"),
    ],
)
def test_outputs_that_are_no_tensors_are_errors_of_the_model(value: Any, says: str) -> None:
    with pytest.raises(usercode.CodeFailure) as error:
        usercode.encode("y", value)
    assert says in str(error.value)
