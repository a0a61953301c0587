"""The description of a Triton model, `config.pbtxt`: which backend it names, whether that backend may run code of the
model's author, and how a schema gets into the description. Pure, except for the names of a folder's files.

A backend may be a library in the model's own folder, several backends take libraries of operators or scripts, and the
formats of PyTorch, TensorFlow and TensorRT hold programs that can do more than compute. So everything counts as code
that is not known to be data only.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any

from mesh.modelfiles.pbtxt import BadText, Field, Message, Word, parse
from mesh.runtime.relay.adapters import contents

CONFIG = "config.pbtxt"

_DATA = frozenset(("onnxruntime", "openvino", "fil"))
"""Backends whose models only compute, unless they name libraries."""

_DATA_PLATFORMS = frozenset(("onnxruntime_onnx",))
_DATA_FILES = frozenset(("model.onnx", "model.xml", "model.bin"))  # from which Triton infers such a backend
_CODE_FIELDS = {
    "model_operations": "names libraries of operators",
    "runtime": "names a runtime of its own",
    "model_repository_agents": "names repository agents",
}
_CODE_PARAMETER = re.compile("path|librar|extension|plugin", re.IGNORECASE)
"""Parameters that may name a library or an environment: OpenVINO's CPU_EXTENSION_PATH, Python's EXECUTION_ENV_PATH, and
TRITON_BATCH_STRATEGY_PATH, by which Triton loads a library for models of every backend."""
_FILES = {"python": "model.py", "onnxruntime": "model.onnx", "pytorch": "model.pt", "tensorrt": "model.plan"}
"""The file that each backend loads from a version's folder, unless the description names another one."""

_ONCE = ("backend", "platform", "runtime", "default_model_filename", "max_batch_size")
_TYPES = {
    **{name: name for name in ("BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64")},
    **{name: name for name in ("FP16", "FP32", "FP64", "BF16", "STRING")},
    "BYTES": "STRING",
}
"""Triton's names of V2's data types."""


def read(content: bytes) -> Message:
    """Parses a description, and returns it without the model's name, which Triton then takes from the folder. Raises
    MeshError if the description is not valid, describes an ensemble, or names a path outside the model's folder."""
    try:
        config = parse(content)
    except BadText as error:
        raise contents.bad(f"{CONFIG} cannot be read: {error}") from error
    for name in _ONCE:
        if len(config.all(name)) > 1:
            raise contents.bad(f"{CONFIG} gives {name} more than once")
    if config.all("ensemble_scheduling") or _text(config, "platform") == "ensemble":
        text = f"{CONFIG} describes an ensemble, which cannot be served, because Mesh loads each model alone"
        raise contents.bad(f"{text}: register the ensemble's models, and call them in turn")
    for value in _strings(config):
        if value.startswith("/") or ".." in PurePosixPath(value).parts:
            text = f"{CONFIG} names a path that leads out of the model's folder: {value[:200]!r}"
            raise contents.bad(f"{text}; name paths in it")
        if "\0" in value:
            raise contents.bad(f"{CONFIG} has a text with a NUL: {value[:200]!r}; remove the NUL")
    return config.without("name")


def code_in(config: Message, files: Iterable[str]) -> str:
    """Returns why a model of this description may run code, as a clause about it, or "" if it is only data. `files` are
    the names of all files in its folder."""
    names = list(files)
    for name in names:
        if name.endswith(".py") or ".so" in PurePosixPath(name).suffixes:
            return f"holds the program {name}"
    backend, platform = _text(config, "backend"), _text(config, "platform")
    if (backend and backend not in _DATA) or (platform and platform not in _DATA_PLATFORMS):
        return f"is for Triton's backend {backend or platform}"
    if not backend and not platform and not _DATA_FILES.issuperset(name for name in names if name.startswith("model.")):
        return f"names no backend in {CONFIG}"
    for name, does in _CODE_FIELDS.items():
        if config.all(name):
            return f"{does} in {CONFIG}"
    for parameter in config.all("parameters"):
        keys = parameter.all("key") if isinstance(parameter, Message) else []
        for name in (key.decode(errors="replace") for key in keys if isinstance(key, bytes)):
            if _CODE_PARAMETER.search(name):
                return f"may name a library in {CONFIG} (the parameter {name[:100]!r})"
    return ""


def model_file(config: Message) -> str:
    """Returns the name of the file that a version's folder must have, or "" if that is not known."""
    if config.all("cc_model_filenames"):
        return ""
    return _text(config, "default_model_filename") or _FILES.get(_text(config, "backend"), "")


def with_schema(config: Message, schema: dict[str, list[Any]]) -> Message:
    """Returns a description with a schema's inputs and outputs, as far as the schema has them, in place of its own.
    Raises MeshError."""
    batch = _max_batch_size(config) > 0
    made: list[Field] = []
    for ours, theirs in (("inputs", "input"), ("outputs", "output")):
        if ours in schema:
            config = config.without(theirs)
            made += [Field(theirs, _tensor(one, batch=batch)) for one in schema[ours]]
    return config.plus(made)


def generated(backend: str) -> Message:
    """Returns a description that only names the backend, for a model that comes without a description."""
    return Message((Field("backend", backend.encode()),))


def _tensor(one: Any, *, batch: bool) -> Message:
    """Returns a tensor of a schema in Triton's form. With `batch`, leaves out the first dimension, which Triton adds.
    Raises MeshError."""
    name, datatype, shape = (
        (one.get(key) for key in ("name", "datatype", "shape")) if isinstance(one, dict) else (0, 0, 0)
    )
    if not isinstance(name, str):
        raise contents.bad("the schema has a tensor without a name")
    if not isinstance(shape, list) or not all(type(size) is int for size in shape):
        raise contents.bad(f"the schema's tensor {name} needs a shape that is a list of whole numbers")
    if datatype is None:
        raise contents.bad(f"the schema's tensor {name} has no datatype: use {', '.join(_TYPES)}")
    if not isinstance(datatype, str) or datatype not in _TYPES:
        raise contents.bad(f"the schema's tensor {name} has the datatype {datatype}: use {', '.join(_TYPES)}")
    if batch:
        if not shape or shape[0] != -1:
            text = f"{CONFIG} has a max_batch_size, so the first dimension of each tensor in the schema must be -1"
            raise contents.bad(f"{text}: that of {name} is not")
        shape = shape[1:]
    fields = [Field("name", name.encode()), Field("data_type", Word(f"TYPE_{_TYPES[datatype]}"))]
    return Message((*fields, *(Field("dims", Word(str(size))) for size in shape)))


def _max_batch_size(config: Message) -> int:
    (value,) = config.all("max_batch_size") or [Word("0")]
    try:
        return int(value.text, 0) if isinstance(value, Word) else 0
    except ValueError:
        return 0  # Triton refuses it


def _text(config: Message, name: str) -> str:
    (value,) = config.all(name) or [b""]
    return value.decode(errors="replace") if isinstance(value, bytes) else ""


def _strings(message: Message) -> Iterator[str]:
    for field in message.fields:
        if isinstance(field.value, Message):
            yield from _strings(field.value)
        elif isinstance(field.value, bytes):
            yield field.value.decode(errors="replace")
