"""Runs of models with BF16 inputs or outputs, for which numpy has no type.

Their 16 bits are passed in ONNX Runtime's own values. All inputs of the run must then be such values. Python cannot
make one from strings, but a session can return one. Strings are therefore written into a tiny model that returns them,
which takes 0.5 ms for each call.
"""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime

from mesh.runtime.server.v2.tensors import Array, Tensor
from mesh.wire.encoding import text_field, varint

_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16


def run(
    session: Any, tensors: Mapping[str, Tensor], names: Sequence[str], feed: Mapping[str, Array], options: Any
) -> list[Array]:
    """Runs a session with arrays by name, as the session's own `run` does. `tensors` are the model's inputs."""
    values = {name: _value(array, tensors[name]) for name, array in feed.items()}
    return [_array(value) for value in session.run_with_ort_values(names, values, options)]


def _value(array: Array, tensor: Tensor) -> Any:
    if tensor.kind.dtype.hasobject:
        return _texts(array)
    if not array.flags.c_contiguous:
        array = array.copy()
    if tensor.datatype == "BF16":
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _array(value: Any) -> Array:
    if value.data_type() != "tensor(bfloat16)":
        return value.numpy()  # type: ignore[no-any-return]
    shape = tuple(value.shape())
    size = 2 * int(np.prod(shape, dtype=np.int64))
    # Copied: the memory is freed with the value.
    return np.frombuffer(ctypes.string_at(value.data_ptr(), size), np.uint16).reshape(shape)


def _texts(array: Array) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(_answering(array), options, providers=["CPUExecutionProvider"])
    (value,) = session.run_with_ort_values(["y"], {})
    return value


def _field(number: int, contents: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(contents)) + contents


def _answering(array: Array) -> bytes:
    """Encodes an onnx.ModelProto (opset 17) whose only output, `y`, is that array of strings."""
    string = b"\x08"  # TensorProto.STRING
    dims = b"".join(b"\x08" + varint(n) for n in array.shape)
    contents = b"".join(_field(6, text.encode()) for text in array.ravel().tolist())
    tensor = dims + b"\x10" + string + contents + text_field(0x42, b"x")
    shape = b"".join(_field(1, b"\x08" + varint(n)) for n in array.shape)
    output = _field(1, b"y") + _field(2, _field(1, b"\x08" + string + _field(2, shape)))
    node = _field(1, b"x") + _field(2, b"y") + _field(4, b"Identity")
    graph = _field(1, node) + _field(2, b"g") + _field(5, tensor) + _field(12, output)
    return b"\x08\x08" + _field(7, graph) + _field(8, b"\x10\x11")


Run = Callable[[Sequence[str], Mapping[str, Array], Any], list[Array]]
