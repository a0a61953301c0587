"""One model in onnxruntime: how it is made, fed and run, and what its errors mean.

Settings of a session, each measured on a logistic regression of 64 features:
- One thread: `run` computes on the thread that calls it. At its defaults every session makes a thread pool of its own.
  Calls run beside each other on the server's threads instead, which is what many small models need.
- No arena: with it, a session has 1.16 MB allocated after its first call (103 KB of it touched), without it 75 KB. For
  a convolutional network with 40 MB of activations that costs 0 to 3 % of a call's time.
- No spinning: an idle server costs nothing.

onnxruntime is named nowhere else but here and in `device`.
"""

import contextlib
import ctypes
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from mesh.runtime.server import tensors
from mesh.runtime.server.device import Device
from mesh.runtime.server.intake import Intake
from mesh.statuses import MeshError, Reason

MAX_WARM_UP = 64 << 20
"""Bytes of made-up input. Declared shapes beyond that are not tried at load."""

_MAX_TEXT = 1000
_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16

VERSION: str = onnxruntime.__version__

# Otherwise a failing call writes lines to standard error, coloured, from C++.
onnxruntime.set_default_logger_severity(4)
if hasattr(onnxruntime, "disable_telemetry_events"):
    onnxruntime.disable_telemetry_events()


def run_options() -> Any:
    """A fresh onnxruntime.RunOptions. Set its `terminate` from anywhere and the run ends with an error, between two
    operators (or two rounds of a Loop)."""
    options = onnxruntime.RunOptions()
    options.log_severity_level = 4
    return options


class Stop:
    """Ends a load from another thread: the making of the session, and the warm-up after it."""

    __slots__ = ("asked", "options", "warm_up")

    def __init__(self) -> None:
        self.asked = False
        self.warm_up = run_options()
        self.options: Any = onnxruntime.SessionOptions()

    def again(self) -> None:
        """For another attempt at the session: what options were set for the first does not hold for it."""
        self.options = onnxruntime.SessionOptions()
        if self.asked:
            self.stop()

    def stop(self) -> None:
        """Asks for the end. It comes at the next place where onnxruntime looks."""
        self.asked = True
        self.warm_up.terminate = True
        if hasattr(self.options, "set_load_cancellation_flag"):  # onnxruntime 1.22 and later
            self.options.set_load_cancellation_flag(True)


class Session:
    """A model that can be run. Drop it to free its memory."""

    __slots__ = ("_run", "_session", "inputs", "intake", "outputs", "unsupported")

    def __init__(
        self, path: Path, device: Device, stop: Stop, *, optimised: bool = False, write_to: Path | None = None
    ) -> None:
        """Makes the session: slow, to be called in a thread. Raises `MeshError`.

        `optimised`: the file is what an earlier session has left at `write_to`, after onnxruntime's graph optimisers
        had been over it, which is most of what making a session of a network takes."""
        options = stop.options
        if optimised:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        if write_to is not None:
            options.optimized_model_filepath = str(write_to)
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.enable_cpu_mem_arena = False
        options.log_severity_level = 4
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        options.add_session_config_entry("session.load_model_format", "ONNX")  # whatever the file's name says
        try:
            session = onnxruntime.InferenceSession(
                str(path), options, providers=list(device.providers), enable_fallback=0, read_config_from_model=0
            )
        except Exception as error:
            raise load_error(error) from error
        self._session: Any = session
        self.inputs: dict[str, tensors.Tensor] = {}
        """What the model takes, in its order; the optional ones last."""
        self.outputs: dict[str, tensors.Tensor] = {}
        """What it can answer over V2, in its order."""
        self.unsupported: dict[str, str] = {}
        """Outputs that V2 cannot carry, such as sequences and maps, and their ONNX types."""
        for value in session.get_inputs():
            datatype = tensors.OF_ONNX.get(value.type)
            if datatype is None:
                raise _unusable(f"input {value.name!r} is {value.type}, which V2 cannot carry")
            self.inputs[value.name] = tensors.Tensor(value.name, datatype, value.shape)
        for value in session.get_overridable_initializers():
            datatype = tensors.OF_ONNX.get(value.type)
            if datatype is not None:
                self.inputs[value.name] = tensors.Tensor(value.name, datatype, value.shape, optional=True)
        for value in session.get_outputs():
            datatype = tensors.OF_ONNX.get(value.type)
            if datatype is None:
                self.unsupported[value.name] = value.type
            else:
                self.outputs[value.name] = tensors.Tensor(value.name, datatype, value.shape)
        if not self.outputs:
            what = ", ".join(f"{name!r} is {kind}" for name, kind in self.unsupported.items())
            raise _unusable(f"the model has no output that V2 can carry: {what}")
        self._run: Callable[..., list[tensors.Array]]
        self.intake = Intake(self.inputs)
        # The public `run` checks its arguments for 3 us more; here they have been checked.
        self._run = getattr(session, "_sess", session).run
        if any(tensor.datatype == "BF16" for tensor in (*self.inputs.values(), *self.outputs.values())):
            self._run = self._run_with_bfloat16

    def run(self, names: Sequence[str], feed: Mapping[str, tensors.Array], options: Any) -> list[tensors.Array]:
        """Runs the model on what `intake.decode` gave. Raises whatever onnxruntime raises: see `run_error`."""
        return self._run(names, feed, options)

    def close(self) -> None:
        """Frees the model's memory now, whoever still holds this object. No run may be under way."""
        self._session = None
        self._run = _closed

    def made_up(self) -> dict[str, tensors.Array] | None:
        """Zeros, or empty texts, in the declared shapes with 1 for what varies. None where that would be too much."""
        feed = {}
        size = 0
        for name, tensor in self.inputs.items():
            if tensor.optional:
                continue
            shape = tuple(1 if n < 0 else n for n in tensor.shape)
            size += int(np.prod(shape, dtype=object)) * max(tensor.kind.dtype.itemsize, 8)
            if size > MAX_WARM_UP:
                return None
            feed[name] = np.full(shape, "" if tensor.kind.dtype.hasobject else 0, tensor.kind.dtype)
        return feed

    def _run_with_bfloat16(
        self, names: Sequence[str], feed: Mapping[str, tensors.Array], options: Any
    ) -> list[tensors.Array]:
        """numpy has no bfloat16, so such arrays pass by their 16 bits, in onnxruntime's own values."""
        values = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(np.ascontiguousarray(array), _BFLOAT16)
            if self.inputs[name].datatype == "BF16"
            else onnxruntime.OrtValue.ortvalue_from_numpy(array)
            for name, array in feed.items()
        }
        return [_array(value) for value in self._session.run_with_ort_values(names, values, options)]


def _closed(*_: object) -> list[tensors.Array]:
    raise MeshError(Reason.UNAVAILABLE, "the model is unloaded")


def _array(value: Any) -> tensors.Array:
    if value.data_type() != "tensor(bfloat16)":
        return value.numpy()  # type: ignore[no-any-return]
    shape = tuple(value.shape())
    size = 2 * int(np.prod(shape))
    return np.frombuffer(ctypes.string_at(value.data_ptr(), size), np.uint16).reshape(shape)


# -- errors, by the names of onnxruntime's exceptions: their classes share no base of their own

_OF_LOAD = {
    "NoSuchFile": Reason.UNKNOWN_MODEL,
    "InvalidProtobuf": Reason.BAD_REQUEST,
    "InvalidGraph": Reason.BAD_REQUEST,
    "InvalidArgument": Reason.BAD_REQUEST,
    "NotImplemented": Reason.BAD_REQUEST,  # an operator that this onnxruntime does not have
    "NoModel": Reason.BAD_REQUEST,
    "Fail": Reason.BAD_REQUEST,
}
_OF_RUN = {"InvalidArgument": Reason.BAD_REQUEST}
_NO_MEMORY = ("bad_alloc", "failed to allocate", "bad allocation", "out of memory", "outofmemory", "cannot allocate")


def load_error(error: Exception) -> MeshError:
    """What it means that a session could not be made."""
    if isinstance(error, MeshError):
        return error
    if out_of_memory(error):
        return _no_memory(error)
    return MeshError(_OF_LOAD.get(type(error).__name__, Reason.LOAD_FAILED), _text(error))


def run_error(error: Exception) -> MeshError:
    """What it means that a run failed that nobody terminated."""
    if isinstance(error, MeshError):
        return error
    if out_of_memory(error):
        return _no_memory(error)
    return MeshError(_OF_RUN.get(type(error).__name__, Reason.INTERNAL), f"the model failed: {_text(error)}")


def out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on the host or on the device."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(sign in text for sign in _NO_MEMORY)


def _no_memory(error: Exception) -> MeshError:
    return MeshError(Reason.NO_ROOM, f"the model asks for more memory than this server has for it: {_text(error)}")


def _unusable(text: str) -> MeshError:
    return MeshError(Reason.BAD_REQUEST, text)


def _text(error: Exception) -> str:
    text = str(error) or type(error).__name__
    with contextlib.suppress(ValueError):
        if text.startswith("[ONNXRuntimeError]"):
            text = text.split(" : ", 3)[3]
    text = " ".join(text.split())
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}..."
