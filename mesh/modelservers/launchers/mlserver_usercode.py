"""Python code of users as a model: a class in `model.py`, and the tensors that it takes and returns as numpy arrays.

Each load imports `model.py` as a package with a name of its own. So models never share modules, and a model reaches
the files beside its `model.py` with `from . import helper`. MLServer's side of this is `mlserver_python`.
"""

import gc
import importlib.util
import inspect
import math
import operator
import re
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

CODE = "model.py"
OUTPUT = "predict"
"""The name of the output of a model that returns one array."""

_TRITON = "TritonPythonModel"
_TEXT = 1000  # characters of an error
_PATH = re.compile(r"(?<![\w./:])/(?:[^\s/'\":]+/)+")
_NUMBERS = {
    **{f"{kind}{bits}": f"{kind.lower()}{bits}" for kind in ("INT", "UINT") for bits in (8, 16, 32, 64)},
    "BOOL": "bool",
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
}
_DATATYPES = {dtype: datatype for datatype, dtype in _NUMBERS.items()}


class CodeFailure(Exception):
    """A failure of a user's code. The text is for callers, and has no paths of this machine."""


class BadTensors(Exception):
    """Tensors of a request that cannot be passed to a model. The text is for callers."""


class UserModel:
    """A model from a folder with `model.py`."""

    def __init__(self, folder: Path) -> None:
        """Imports the code and loads the model. Raises CodeFailure."""
        self._name = f"mesh_model_{uuid.uuid4().hex}"
        self._folder = folder
        self._model: Any = None
        self.size = 0  # in bytes; 0: the code does not say
        try:
            module = self._run(f"{CODE} cannot be imported", self._import)
            made = class_in(module)
            self._model = self._run(f"{made.__name__}() failed", made)
            if hasattr(self._model, "load"):
                self._run("load failed", lambda: self._model.load(folder))
            if hasattr(self._model, "size"):
                self.size = _bytes(self._run("size failed", self._model.size))
        except BaseException:
            self.close()
            raise

    def predict(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Returns the outputs by name, as the code returns them. Raises CodeFailure."""
        outputs = self._run("predict failed", lambda: self._model.predict(inputs))
        if not isinstance(outputs, dict):
            outputs = {OUTPUT: outputs}
        if not outputs or not all(isinstance(name, str) for name in outputs):
            raise CodeFailure("predict must return an array, or a dict of arrays by the names of the outputs")
        return outputs

    def close(self) -> None:
        """Drops the model and its modules."""
        self._model = None
        for name in [name for name in sys.modules if name.partition(".")[0] == self._name]:
            del sys.modules[name]
        gc.collect()  # a module and its functions refer to each other

    def _import(self) -> ModuleType:
        spec = importlib.util.spec_from_file_location(
            self._name, self._folder / CODE, submodule_search_locations=[str(self._folder)]
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[self._name] = module
        spec.loader.exec_module(module)
        return module

    def _run(self, what: str, code: Callable[[], Any]) -> Any:
        """Returns what a user's code returns. Code that wants to end the program fails like any other."""
        try:
            return code()
        except (Exception, SystemExit) as error:
            text = f"{type(error).__name__}: {error}".rstrip(": ").replace(self._name, "model")
            for folder in (self._folder, self._folder.resolve()):
                text = text.replace(f"{folder}/", "")
            where = _line(error, self._folder)
            text = f"{what}: {_PATH.sub('', text)[:_TEXT]}{where}{self._remedy(error)}"
            raise CodeFailure(text) from error

    def _remedy(self, error: BaseException) -> str:
        name = error.name if isinstance(error, ModuleNotFoundError) and error.name else ""
        if name.isidentifier() and ((self._folder / f"{name}.py").is_file() or (self._folder / name).is_dir()):
            return f": {name} is beside {CODE}, so write `from . import {name}`"
        return ""


def class_in(module: ModuleType) -> type:
    """Returns the only public class with a method `predict` that a module defines. Raises CodeFailure."""
    classes = {
        name: one
        for name, one in vars(module).items()
        if isinstance(one, type) and one.__module__ == module.__name__ and not name.startswith("_")
    }
    found = [one for one in dict.fromkeys(classes.values()) if callable(getattr(one, "predict", None))]
    if len(found) > 1:
        names = ", ".join(one.__name__ for one in found)
        text = f"{CODE} defines several classes with a method predict: {names}"
        raise CodeFailure(f"{text}. Begin the names of all but one with an underscore")
    if not found:
        there = f"; its classes are {', '.join(classes)}" if classes else ""
        remedy = ": register it with --type triton-python" if _TRITON in classes else ""
        raise CodeFailure(f"{CODE} defines no class with a method predict{there}{remedy}")
    for name in ("load", "predict", "size"):
        if inspect.iscoroutinefunction(getattr(found[0], name, None)):
            raise CodeFailure(f"{found[0].__name__}.{name} is async: make it an ordinary method")
    return found[0]


def decode(name: str, datatype: str, shape: list[int], data: Any) -> Any:
    """Returns the array of a tensor. BYTES become an array of str if all elements are UTF-8, otherwise of bytes. Raises
    BadTensors."""
    try:
        if datatype == "BYTES":
            array = np.empty(len(data), object)
            array[:] = _strings(list(data))
        else:
            array = np.array(data, _NUMBERS[datatype])
    except KeyError:
        raise BadTensors(f"the input {name} has the datatype {datatype}, which Python code cannot take") from None
    except (ValueError, TypeError, OverflowError):
        raise BadTensors(f"the input {name} has values that are not of its datatype {datatype}") from None
    if any(length < 0 for length in shape) or math.prod(shape) != array.size:
        raise BadTensors(f"the input {name} has {array.size} values, which do not fill its shape {list(shape)}")
    return array.reshape(shape)


def encode(name: str, value: Any) -> tuple[str, list[int], list[Any]]:
    """Returns the datatype, the shape and the values of an output. A single value has the shape [1]. FP16 becomes FP32,
    because a V2 message without raw contents cannot hold FP16. Raises CodeFailure."""
    try:
        array = np.atleast_1d(np.asarray(value))
    except ValueError as error:
        raise CodeFailure(f"the output {name} is not an array: its rows have different lengths") from error
    if array.dtype == np.float16:
        array = array.astype(np.float32)
    if (datatype := _DATATYPES.get(array.dtype.name)) is not None:
        return datatype, list(array.shape), array.ravel().tolist()
    values = array.ravel().tolist()
    if array.dtype.kind in "SUO" and all(isinstance(one, str | bytes) for one in values):
        return "BYTES", list(array.shape), [one.encode() if isinstance(one, str) else one for one in values]
    mixed = array.dtype == object and not isinstance(value, np.ndarray)
    what = f"of the type {type(value).__name__}" if mixed else f"an array of {array.dtype}"
    raise CodeFailure(f"the output {name} is {what}: return numbers, truth values, str or bytes in a numpy array")


def _strings(values: list[Any]) -> list[Any]:
    """Returns all values as str if all are UTF-8, otherwise all as bytes. Raises TypeError if one is neither."""
    if not all(isinstance(one, str | bytes) for one in values):
        raise TypeError("neither text nor bytes")
    try:
        return [one.decode() if isinstance(one, bytes) else one for one in values]
    except UnicodeDecodeError:
        return [one.encode() if isinstance(one, str) else one for one in values]


def _bytes(size: Any) -> int:
    try:
        stated = operator.index(size)
    except TypeError:
        stated = -1
    if stated < 0 or isinstance(size, bool):
        raise CodeFailure(f"size must return a number of bytes, as an integer, not {str(size)[:40]!r}")
    return stated


def _line(error: BaseException, folder: Path) -> str:
    """Returns ` (FILE, line N)` for the last line of the user's own files that an error passed, or "" if it passed
    none."""
    found, trace = "", error.__traceback__
    while trace is not None:
        file = Path(trace.tb_frame.f_code.co_filename)
        if file.is_relative_to(folder):
            found = f" ({file.relative_to(folder)}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return found
