"""One model in ONNX Runtime: its session, its runs, and the interpretation of its errors.

Settings of a session, each measured on a logistic regression of 64 features:
- One thread: `run` computes on the thread that calls it. By default every session makes its own thread pool. Here calls
  run in parallel on the server's threads instead, which suits many small models.
- No arena: with an arena, a session has 1.16 MB allocated after its first call (103 KB of it touched), without one 75
  KB. For a convolutional network with 40 MB of activations, a call without an arena takes 0 to 3 % longer.
- No spinning: an idle server costs nothing.

Only this module, `device` and `v2.values` import onnxruntime.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from mesh.runtime.server.onnx.device import Device
from mesh.runtime.server.v2 import tensors, values
from mesh.runtime.server.v2.intake import Intake
from mesh.statuses import MeshError, Reason

MAX_WARM_UP = 64 << 20
"""Largest generated input, in bytes. Models whose declared shapes need more get no warm-up call."""

_MAX_TEXT = 1000
_OPTIONAL = "optional("

VERSION: str = onnxruntime.__version__

# Otherwise C++ code writes coloured lines to standard error when a call fails.
onnxruntime.set_default_logger_severity(4)
if hasattr(onnxruntime, "disable_telemetry_events"):
    onnxruntime.disable_telemetry_events()


def run_options() -> Any:
    """Returns a new onnxruntime.RunOptions. If any thread sets its `terminate`, the run ends with an error before its
    next operator (or round of a Loop)."""
    options = onnxruntime.RunOptions()
    options.log_severity_level = 4
    return options


class Stop:
    """The way to end a load from another thread, while the session is made or warmed up."""

    __slots__ = ("asked", "options", "warm_up")

    def __init__(self) -> None:
        self.asked = False
        self.warm_up = run_options()
        self.options: Any = onnxruntime.SessionOptions()

    def again(self) -> None:
        """Prepares another attempt at the session, which needs new options."""
        self.options = onnxruntime.SessionOptions()
        if self.asked:
            self.stop()

    def stop(self) -> None:
        """Asks ONNX Runtime to end the load, which happens at its next check."""
        self.asked = True
        self.warm_up.terminate = True
        if hasattr(self.options, "set_load_cancellation_flag"):  # onnxruntime 1.22 and later
            self.options.set_load_cancellation_flag(True)


class Session:
    """A model that can be run. Its memory is freed with the last reference."""

    __slots__ = ("_run", "_session", "inputs", "intake", "outputs", "unsupported")

    def __init__(
        self, path: Path, device: Device, stop: Stop, *, optimised: bool = False, write_to: Path | None = None
    ) -> None:
        """Makes the session. Slow: call it in a thread. Raises `MeshError`.

        `optimised` says that the file is the result of an earlier optimisation. `write_to` is the path to which to
        write the optimised graph. Optimising is most of the work of making a session of a network.
        """
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
        options.add_session_config_entry("session.load_model_format", "ONNX")  # independent of the file's name
        try:
            session = onnxruntime.InferenceSession(
                str(path), options, providers=list(device.providers), enable_fallback=0, read_config_from_model=0
            )
        except Exception as error:
            raise load_error(error) from error
        self._session: Any = session
        self.inputs: dict[str, tensors.Tensor] = {}
        """The model's inputs. Those with an initializer, and those of an optional type, are optional."""
        self.outputs: dict[str, tensors.Tensor] = {}
        """The outputs that V2 can carry, in the model's order."""
        self.unsupported: dict[str, str] = {}
        """Outputs that V2 cannot carry, such as sequences and maps, and their ONNX types."""
        for value in session.get_inputs():
            optional = value.type.startswith(_OPTIONAL)
            datatype = tensors.OF_ONNX.get(value.type[len(_OPTIONAL) : -1] if optional else value.type)
            if datatype is not None:
                self.inputs[value.name] = tensors.Tensor(value.name, datatype, value.shape, optional=optional)
            elif not optional:  # optional ones can be left out
                raise _unusable(f"input {value.name!r} is {value.type}, which V2 cannot carry")
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
        # The public `run` spends 3 us on checks that have been done here already.
        self._run = getattr(session, "_sess", session).run
        if any(tensor.datatype == "BF16" for tensor in (*self.inputs.values(), *self.outputs.values())):
            self._run = functools.partial(values.run, session, self.inputs)

    def run(self, names: Sequence[str], feed: Mapping[str, tensors.Array], options: Any) -> list[tensors.Array]:
        """Runs the model with the input that `intake.decode` returned. Raises ONNX Runtime's own exceptions, which
        `run_error` converts."""
        return self._run(names, feed, options)

    def close(self) -> None:
        """Frees the model's memory now, even if this object is still referenced. No run may be under way."""
        self._session = None
        self._run = _closed

    def made_up(self) -> dict[str, tensors.Array] | None:
        """Returns an input of zeros or empty strings in the declared shapes, with 1 for variable dimensions. Returns
        None if the input would be too large."""
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


def _closed(*_: object) -> list[tensors.Array]:
    raise MeshError(Reason.UNAVAILABLE, "the model has been unloaded: call again")


# -- errors, by the names of onnxruntime's exceptions: their classes have no common base

_OF_LOAD = {
    "NoSuchFile": Reason.UNKNOWN_MODEL,
    "InvalidProtobuf": Reason.BAD_REQUEST,
    "InvalidGraph": Reason.BAD_REQUEST,
    "InvalidArgument": Reason.BAD_REQUEST,
    "NotImplemented": Reason.BAD_REQUEST,  # this onnxruntime lacks an operator of the model
    "NoModel": Reason.BAD_REQUEST,
    "Fail": Reason.BAD_REQUEST,
}
_OF_RUN = {"InvalidArgument": Reason.BAD_REQUEST}
_OF_PROVIDER = ("EPFail", "EngineError")  # the execution provider has failed, not the model
_LOCALE = re.compile(r"locale with name:([\w.@-]+)")
_NO_MEMORY = ("bad_alloc", "failed to allocate", "bad allocation", "out of memory", "outofmemory", "cannot allocate")


def load_error(error: Exception) -> MeshError:
    """Returns the error for a session that could not be made."""
    if isinstance(error, MeshError):
        return error
    if out_of_memory(error):
        return _no_memory(error)
    text = _text(error)
    if (locale := _LOCALE.search(text)) is not None:
        text = (
            f"the model needs the locale {locale[1]}, which this machine lacks: install it where the model "
            f"server runs (Debian: the package locales, {locale[1]} in /etc/locale.gen, locale-gen). {text}"
        )
    return MeshError(_OF_LOAD.get(type(error).__name__, Reason.LOAD_FAILED), text)


def run_error(error: Exception, *, proven: bool, device: str = "cpu") -> MeshError:
    """Returns the error for a run that failed by itself and was not terminated. `proven` is True if the model has run
    without an error before.

    If a proven model fails on the CPU, the caller's input is the cause, for example an unknown category. On a GPU,
    errors of the device raise the same exceptions, so the caller is not blamed.
    """
    if isinstance(error, MeshError):
        return error
    if out_of_memory(error):
        return _no_memory(error)
    kind = type(error).__name__
    if proven and device == "cpu" and kind not in _OF_PROVIDER and _is_of_onnxruntime(error):
        return MeshError(Reason.BAD_REQUEST, f"the model does not accept this input: {_text(error)}")
    return MeshError(_OF_RUN.get(kind, Reason.INTERNAL), f"the model failed: {_text(error)}")


def _is_of_onnxruntime(error: Exception) -> bool:
    return type(error).__module__.startswith("onnxruntime.")


def out_of_memory(error: Exception) -> bool:
    """Returns whether an allocation failed, on the host or on the device."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(sign in text for sign in _NO_MEMORY)


def _no_memory(error: Exception) -> MeshError:
    return MeshError(Reason.NO_ROOM, f"the model needs more memory than this server has for it: {_text(error)}")


def _unusable(text: str) -> MeshError:
    return MeshError(Reason.BAD_REQUEST, text)


def _text(error: Exception) -> str:
    text = str(error) or type(error).__name__
    with contextlib.suppress(ValueError):
        if text.startswith("[ONNXRuntimeError]"):
            text = text.split(" : ", 3)[3]
    text = " ".join(text.split())
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}..."
