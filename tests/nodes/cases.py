"""The node tests in the wheel `onnx`: models of one operator each, with inputs.

Outputs are compared with those of onnxruntime alone, not with those in the wheel. These tests check that nothing is
lost between client and onnxruntime, not that onnxruntime follows the ONNX standard.
"""

import ctypes
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime

from tests.support.models import ONNX_TYPES

DATATYPES: Mapping[int, str] = {number: name for name, number in ONNX_TYPES.items()}
_RUNS = 5  # runs of one case: the first two runs of a Dropout with a seed are equal, the third is not
_BFLOAT16 = ONNX_TYPES["BF16"]

onnxruntime.set_default_logger_severity(4)


@dataclass(frozen=True)
class Tensor:
    """An input or an output. BF16 values are stored as 16-bit integers."""

    name: str
    datatype: str
    array: np.ndarray

    def same(self, other: "Tensor") -> bool:
        """Returns whether name, datatype, shape and every bit are equal. All NaN are equal to each other."""
        if (self.name, self.datatype, self.array.shape) != (other.name, other.datatype, other.array.shape):
            return False
        if self.array.dtype.hasobject:
            return bool(self.array.tolist() == other.array.tolist())
        if self.array.dtype.kind == "f":
            bits = f"u{self.array.dtype.itemsize}"
            one, two = self.array, other.array
            return bool(np.all((one.view(bits) == two.view(bits)) | (np.isnan(one) & np.isnan(two))))
        return self.array.tobytes() == other.array.tobytes()


@dataclass(frozen=True)
class Case:
    """One test case. `inputs` is None if V2 has no datatype for one of them."""

    name: str
    model: bytes
    inputs: tuple[Tensor, ...] | None


@dataclass(frozen=True)
class Expected:
    """The result of a case that onnxruntime runs alone."""

    problem: str  # why onnxruntime does not load or run the model
    outputs: tuple[Tensor, ...] = ()
    random: bool = False  # True if not all runs are equal
    carried: bool = True  # True if V2 can carry at least one of the outputs


def collect() -> Iterator[Case]:
    """Yields all cases. Raises ImportError if the wheel does not contain them."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some cases produce infinities on purpose
        found = collect_testcases(None)
    for case in found:
        if case.model is None:
            continue
        for number, (inputs, _) in enumerate(case.data_sets or ()):
            yield Case(f"{case.name}.{number}", case.model.SerializeToString(), _inputs(case.model, inputs))


def _inputs(model: onnx.ModelProto, given: Sequence[Any]) -> tuple[Tensor, ...] | None:
    found = []
    for declared, value in zip(model.graph.input, given, strict=False):
        if value is None:  # an optional input that is omitted
            continue
        datatype = _datatype(declared.type)
        if datatype is None or not isinstance(value, np.ndarray | np.generic):
            return None
        array = np.asarray(value)
        if datatype == "BF16":
            array = array.view(np.uint16)
        elif datatype == "BYTES":
            array = _texts(array)
        found.append(Tensor(declared.name, datatype, array))
    return tuple(found)


def _datatype(kind: onnx.TypeProto) -> str | None:
    if kind.HasField("optional_type"):
        kind = kind.optional_type.elem_type
    return DATATYPES.get(kind.tensor_type.elem_type) if kind.HasField("tensor_type") else None


def _texts(array: np.ndarray) -> np.ndarray:
    made = np.empty(array.shape, object)
    for index in np.ndindex(array.shape):
        value = array[index]
        made[index] = value.decode() if isinstance(value, bytes) else str(value)
    return made


def alone(case: Case) -> Expected:
    """Runs a case in this process, with arrays aligned to 64 bytes as in the server."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(case.model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        return Expected(str(error))
    kinds = {value.name: value.type for value in session.get_outputs()}
    names = [name for name, kind in kinds.items() if _name(kind) is not None]
    if not names or case.inputs is None:
        return Expected("", carried=False)
    try:
        runs = [_run(session, names, case.inputs) for _ in range(_RUNS)]
    except Exception as error:
        return Expected(str(error))
    outputs = [
        tuple(Tensor(name, _name(kinds[name]) or "", array) for name, array in zip(names, arrays, strict=True))
        for arrays in runs
    ]
    equal = all(one.same(other) for run in outputs for one, other in zip(outputs[0], run, strict=True))
    return Expected("", outputs[0], random=not equal)


def _name(kind: str) -> str | None:
    written = {"float": "FP32", "double": "FP64", "float16": "FP16", "bfloat16": "BF16", "string": "BYTES"}
    inside = kind.removeprefix("tensor(").removesuffix(")")
    name = written.get(inside, inside.upper())
    return name if kind.startswith("tensor(") and name in ONNX_TYPES else None


def _run(session: Any, names: Sequence[str], inputs: Sequence[Tensor]) -> list[np.ndarray]:
    feed = {tensor.name: tensor.array if tensor.datatype == "BYTES" else _aligned(tensor.array) for tensor in inputs}
    datatypes = {tensor.name: tensor.datatype for tensor in inputs}
    outputs = {value.name: value.type for value in session.get_outputs()}
    if "BF16" not in datatypes.values() and all(outputs[name] != "tensor(bfloat16)" for name in names):
        return session.run(list(names), feed)  # type: ignore[no-any-return]
    make = onnxruntime.OrtValue
    values = {
        name: make.ortvalue_from_numpy_with_onnx_type(array, _BFLOAT16)
        if datatypes[name] == "BF16"
        else make.ortvalue_from_numpy(array)
        for name, array in feed.items()
    }
    return [_array(value) for value in session.run_with_ort_values(list(names), values)]


def _array(value: Any) -> np.ndarray:
    if value.data_type() != "tensor(bfloat16)":
        return value.numpy()  # type: ignore[no-any-return]
    shape = tuple(value.shape())
    size = 2 * int(np.prod(shape, dtype=np.int64))
    return np.frombuffer(ctypes.string_at(value.data_ptr(), size), np.uint16).reshape(shape)


def _aligned(array: np.ndarray) -> np.ndarray:
    memory = np.empty(array.nbytes + 64, np.uint8)
    begin = -memory.ctypes.data % 64
    made = np.ndarray(array.shape, array.dtype, memory[begin : begin + array.nbytes])
    made[...] = array
    return made
