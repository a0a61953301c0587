"""The folder of a model in Triton's repository, made from what was pulled.

Triton wants a folder for each model, with a subfolder for each version, in which the model's file or folder has the
name that its backend expects. The folder may have a description, `config.pbtxt`; without one, Triton finds out what the
model is. What users register is such a folder, or only a part of it: the version folders, one version, or one file.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mesh.modelfiles import pbtxt, sniffing
from mesh.runtime.relay.adapters import contents, tritonconfig
from mesh.runtime.relay.adapters.tritonconfig import CONFIG
from mesh.statuses import MeshError, Reason

TRITON, PYTHON = "triton", "triton-python"
"""The type of models whose files say what they are, and the type of models for the Python backend."""

_SCHEMA = "_schema.json"  # the name under which a schema may have been pulled beside the model


@dataclass(frozen=True, slots=True)
class Format:
    """A format of models: how Triton's backend wants them to be named in the folder of a version."""

    backend: str
    file: str  # name of a model that is a file
    folder: str = ""  # name of a model that is a folder; "": it is the folder of the version
    suffixes: tuple[str, ...] = ()  # of files that users give other names
    holds: str = ""  # a file that such a folder must have; "": `file`
    code: bool = True  # a model may do more than compute


FORMATS = {
    "tensorflow": Format("tensorflow", "model.graphdef", "model.savedmodel", (".graphdef", ".pb"), "saved_model.pb"),
    "keras": Format("tensorflow", "", "model.savedmodel", (), "saved_model.pb"),
    "onnx": Format("onnxruntime", "model.onnx", "model.onnx", (".onnx",), code=False),
    "pytorch": Format("pytorch", "model.pt", "", (".pt", ".pth", ".ts")),
    "tensorrt": Format("tensorrt", "model.plan", "", (".plan", ".engine", ".trt")),
    "openvino_ir": Format("openvino", "model.xml", "", (".xml",), code=False),
    PYTHON: Format("python", "model.py", "", (".py",)),
}
"""The formats by model type. A folder with a description may be in any other."""


def lay_out(model_type: str, schema: dict[str, list[Any]], pulled: Path, read: Path, *, allow_code: bool) -> None:
    """Fills the model's folder in the repository, `read`, which is empty, from what was `pulled`. Puts the inputs and
    outputs of the schema into the description. Blocks. Raises OSError, and MeshError for a model that Triton cannot
    load, or that may run code without `allow_code`."""
    if pulled.is_dir() and (pulled / CONFIG).is_file():
        _native(schema, pulled, read, allow_code=allow_code)
        return
    version, source = _version(pulled)
    model_type = model_type if model_type in FORMATS else _inferred(model_type, source)
    form = FORMATS[model_type]
    if form.code and not allow_code:
        raise refused(f"is for Triton's backend {form.backend}")
    _link(form, model_type, source, read / str(version))
    if schema or form is FORMATS[PYTHON]:
        config = tritonconfig.with_schema(tritonconfig.generated(form.backend), schema)
        (read / CONFIG).write_text(pbtxt.to_text(config))


def refused(why: str) -> MeshError:
    """Returns the error for a model that may run code in a pod that does not allow that."""
    text = f"the model {why}, and so may run code, which this pod does not allow"
    return MeshError(
        Reason.PRECONDITION, f"{text}: start pods with --allow-code if all who may register models are trusted"
    )


def _native(schema: dict[str, list[Any]], pulled: Path, read: Path, *, allow_code: bool) -> None:
    """Fills the folder from one in Triton's own layout. Its description is kept, but gets the inputs and outputs of the
    schema. Raises MeshError and OSError."""
    file = pulled / CONFIG
    if file.stat().st_size > pbtxt.MAX_BYTES:
        raise contents.bad(f"{CONFIG} has more than {pbtxt.MAX_BYTES:,} bytes")
    config = tritonconfig.read(file.read_bytes())
    contents.tree_of_links(pulled, read)
    (read / CONFIG).unlink()
    why = tritonconfig.code_in(config, _names(read))
    if why and not allow_code:
        raise refused(why)
    versions = [entry for entry in pulled.iterdir() if _is_version(entry)]
    if not versions:
        raise contents.missing("a folder for the model's version, such as 1", pulled)
    wanted = tritonconfig.model_file(config)
    latest = max(versions, key=lambda entry: int(entry.name))
    if wanted and not os.path.exists(latest / wanted):
        raise contents.bad(f"the version {latest.name} lacks the file {wanted[:255]}, which Triton's backend loads")
    (read / CONFIG).write_text(pbtxt.to_text(tritonconfig.with_schema(config, schema)))


def _version(pulled: Path) -> tuple[int, Path]:
    """Returns the highest version in what was pulled, and its folder, or 1 and `pulled` without version folders."""
    if pulled.is_dir():
        newest = contents.newest(pulled)
        if newest != pulled and int(newest.name) > 0:
            return int(newest.name), newest
    return 1, pulled


def _is_version(entry: Path) -> bool:
    return entry.name.isascii() and entry.name.isdigit() and int(entry.name) > 0 and entry.is_dir()


def _inferred(model_type: str, source: Path) -> str:
    """Returns the type of a model of type `triton` that has no description, from the names of its files. Raises
    MeshError, also for types that Triton takes only with a description."""
    if model_type == TRITON:
        there = {entry.name for entry in source.iterdir()} if source.is_dir() else {source.name}
        for name, form in FORMATS.items():
            if there & {form.file, form.folder} - {""}:
                return name
        known = sorted({name for form in FORMATS.values() for name in (form.file, form.folder) if name})
        if not source.is_dir():
            files = ", ".join(sorted({form.file for form in FORMATS.values() if form.file}))
            text = f"the name of the file, {source.name}, does not tell Triton the format of the model"
            raise contents.bad(f"{text}: register it with the type of its format, or give it one of the names {files}")
        text = f"has no file by whose name Triton knows the model ({', '.join(known)})"
        raise contents.bad(f"the folder has no {CONFIG}, and {text}: add one of them")
    text = f"models of type {model_type} need a folder with {CONFIG} and version folders"
    raise contents.bad(f"{text}; without it, Triton takes the types {', '.join(FORMATS)}")


def _link(form: Format, model_type: str, source: Path, version: Path) -> None:
    """Makes the folder of a version, in which the model has the name that its backend expects."""
    if source.is_dir():
        entries = [entry for entry in source.iterdir() if not entry.name.startswith(".") and entry.name != _SCHEMA]
        if len(entries) == 1 and _may_be(entries[0], form):
            source = entries[0]
    if form is FORMATS[PYTHON] and source.is_dir():
        if not (source / form.file).is_file():
            raise contents.missing(f"the file {form.file}", source)
        contents.tree_of_links(source, version)
    elif not source.is_dir():
        _check(form, model_type, source)
        version.mkdir()
        contents.link(source, version / form.file)
    elif form.folder:
        wanted = form.holds or form.file
        inner = source / form.folder
        source = inner if inner.is_dir() else source
        if not (source / wanted).is_file() and form.holds:
            raise contents.missing(f"the file {wanted}", source)
        version.mkdir()
        if (source / wanted).is_file():
            contents.link(source, version / form.folder)
        else:
            contents.tree_of_links(source, version / form.folder)
            _rename(form, source, version / form.folder)
    else:
        contents.tree_of_links(source, version)
        _rename(form, source, version)


def _may_be(entry: Path, form: Format) -> bool:
    """Returns whether the only entry of a folder may be the model, whatever its name. Only a model for the Python
    backend is recognised by its ending."""
    if entry.is_dir():
        return bool(form.folder)
    return form is not FORMATS[PYTHON] or entry.name.endswith(form.suffixes)


def _rename(form: Format, source: Path, version: Path) -> None:
    """Gives the model's file in a version's folder the name that the backend expects, if it has another one."""
    if (version / form.file).exists():
        return
    found = contents.find(source, (form.file,), form.suffixes)
    there = version / found.path.relative_to(source)
    there.rename(version / form.file)
    if form.file.endswith(".xml"):  # OpenVINO's weights have the same name
        weights = there.with_suffix(".bin")
        if not weights.exists():
            raise contents.missing(f"the file {weights.name}, which belongs to {found.path.name}", source)
        weights.rename(version / "model.bin")


def _check(form: Format, model_type: str, file: Path) -> None:
    """Raises MeshError if a file cannot be a model of that format."""
    kind = sniffing.look(file)
    if not form.file:
        text = f"models of type {model_type} are folders with the file {form.holds}"
        raise contents.bad(f"{text}: export the model as a SavedModel (tf.saved_model.save)")
    if kind is sniffing.TORCH and form.backend == "pytorch":
        raise contents.bad(f"the file is {kind.what}: save the model as TorchScript (torch.jit.save)")
    if kind is not None and kind.archive:
        raise contents.bad(f"the file is {kind.what}, but cannot be read as an archive: pack the model again")
    if kind is not None and kind.type not in ("", model_type):
        raise contents.bad(f"the file is {kind.what}: register it with --type {kind.type}")
    if form.file == "model.xml":
        raise contents.one_openvino_file()


def _names(folder: Path) -> Iterator[str]:
    """Yields the names of all files below a folder."""
    for _, _, files in os.walk(folder):
        yield from files
