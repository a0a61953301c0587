"""The choice of a folder's model file, and the check that the model's tensors are inside that folder.

(This module also calls `functions`, which checks that the model's functions do not expand to more than can be loaded.)

A model may keep tensors in other files (ONNX calls this external data), which it names by path. With a path that leads
out of the model's own folder, anyone who may register models could read the pod's files by a model's answers. Such a
model is therefore refused before ONNX Runtime opens it, regardless of the checks in the installed version of ONNX
Runtime.

Most files do not have to be parsed for this check: every external tensor has the key `location`, and protobuf stores
strings in one piece, so a file without that word has no external tensor (10 MB: 6 ms instead of 110). Of other files,
only the messages that can contain tensors are parsed.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from google.protobuf.message import DecodeError

from mesh.modelfiles import sniffing
from mesh.runtime.server.onnx import functions, outline
from mesh.statuses import MeshError, Reason
from mesh.telemetry import logs

log = logs.get(__name__)

MAX_BYTES = (1 << 31) - 1
"""Protobuf's own limit for one message. Larger models keep their tensors in external data."""

INSIDE = "model.onnx"
"""The name of a model's file in a folder, or of the subfolder that holds the file and its external data."""


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A model on disk that may be loaded."""

    path: Path
    bytes: int  # of the file and its external data
    external: tuple[Path, ...]


class _Incomplete(MeshError):
    """The error that a part of the model is missing, for example because the model is being uploaded."""

    def __init__(self, text: str) -> None:
        super().__init__(Reason.BAD_REQUEST, text)


def find(path: str) -> ModelFile:
    """Finds the model at `path`, a file or a folder. Touches the disk: call it in a thread.

    In a folder, the model is `model.onnx`, or else the only `*.onnx` file, or else one of these in the subfolder with
    the highest number (a version in Triton's layout) that contains a complete model. The model may also be in a
    subfolder `model.onnx` (Triton's layout for external data). Raises `MeshError` if the model is missing, not a model,
    or incomplete, or if it has data outside its folder.
    """
    return _find(Path(path))


def _find(path: Path) -> ModelFile:
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            return _described(path)
        if not stat.S_ISDIR(mode):
            raise _unusable(f"{path} is neither a file nor a folder: register one")
        names = sorted(os.listdir(path))
        # Other programs leave files whose names begin with a dot, such as `._model.onnx`.
        models = [name for name in names if _suffix(name) and not name.startswith(".") and (path / name).is_file()]
        versions = [name for name in names if name.isascii() and name.isdigit() and (path / name).is_dir()]
        inside = next((name for name in names if name.lower() == INSIDE and (path / name).is_dir()), "")
    except OSError as error:
        raise _unreadable(path, error) from error
    for name in models:
        if name.lower() == INSIDE or len(models) == 1:
            return _described(path / name)
    if models:
        raise _unusable(f"{path} holds several models and none is named model.onnx: {', '.join(models[:10])}")
    if inside and path.name.lower() != INSIDE:
        return _find(path / inside)
    if not versions:
        raise _Incomplete(_without_models(path, names))
    return _newest(path, sorted(versions, key=int, reverse=True))


def _newest(path: Path, versions: list[str]) -> ModelFile:
    """Returns the model of the highest version that is complete. If none is, raises the error of the highest
    version."""
    missing: dict[str, _Incomplete] = {}
    for version in versions:
        try:
            found = _find(path / version)
        except _Incomplete as error:
            missing[version] = error
            continue
        for newer, why in missing.items():
            log.warning("incomplete version skipped", model=path.name, version=newer, used=version, why=why.text)
        return found
    raise missing[versions[0]]


def _without_models(path: Path, names: list[str]) -> str:
    """Returns the error text for a folder without an ONNX model, which says what the folder contains instead, if this
    is obvious."""
    text = f"{path} holds no *.onnx file; it has {', '.join(names[:10]) or 'nothing'}"
    try:
        kind = sniffing.look(path)
    except OSError:
        return text
    if kind is None or kind is sniffing.ONNX:
        return text
    return f"{text}. It is {kind.what}: {kind.way_out}"


def _suffix(name: str) -> bool:
    return name.lower().endswith(".onnx")


def _described(model: Path) -> ModelFile:
    try:
        size = model.stat().st_size
        if not size:
            raise _Incomplete(f"{model} is empty")
        if size > MAX_BYTES:
            raise _unusable(
                f"{model} has {size} bytes, and an ONNX file less than 2 GiB: export the weights as external data"
            )
        kind = sniffing.look(model)
        if kind is not None and kind is not sniffing.ONNX:
            raise _unusable(f"{model} is {kind.what}, not an ONNX model: {kind.way_out}")
        if not _whole(model, size):
            raise _Incomplete(
                f"{model} is truncated, or not an ONNX model: its {size} bytes end in the middle of a field"
            )
        if (why := functions.too_many(model)) is not None:
            raise _unusable(f"the model cannot be loaded: {why}")
        external = tuple(_external(model))
        return ModelFile(model, size + sum(file.stat().st_size for file in external), external)
    except OSError as error:
        raise _unreadable(model, error) from error


def _whole(model: Path, size: int) -> bool:
    """Returns whether the file ends where its last field ends, as far as the file can be read as a message.

    Reads only the tags and lengths of the outermost fields, about ten of them.
    """
    with model.open("rb") as file:
        while file.tell() < size:
            try:
                kind = _varint(file) & 7
                length = {0: 0, 1: 8, 2: 0, 5: 4}.get(kind)
                if length is None:
                    return True  # an unknown field: the parser will report it
                if kind in (0, 2):
                    value = _varint(file)
                    length = value if kind == 2 else 0
            except EOFError:
                return False
            if file.tell() + length > size:
                return False
            file.seek(length, os.SEEK_CUR)
    return True


def _varint(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise EOFError
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            break
    return value


def _external(model: Path) -> Iterator[Path]:
    """Yields the files of the model's external tensors. Raises `MeshError` for a file that may not be read."""
    if not _mentions(model, b"location"):
        return
    try:
        parsed = outline.Model.FromString(model.read_bytes())
    except DecodeError as error:
        raise _unusable(f"{model} is not an ONNX model: {error}") from error
    folder = model.parent
    inside = folder.resolve(strict=True)
    seen = set()
    for tensor in outline.tensors(parsed):
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if not entries and not tensor.data_location:
            continue
        if len(entries) != len(tensor.external_data):
            raise _unusable("a tensor describes its external data twice: export the model again")
        location = entries.get("location", "")
        # ONNX Runtime uses this name for tensors at an address in its own memory.
        if not location or "\0" in location or "_ORT_MEM_ADDR_" in location or Path(location).is_absolute():
            raise _unusable(f"external data must be named by a relative path, not {location!r}")
        try:
            file_path = (folder / location).resolve(strict=True)
        except OSError as error:
            raise _Incomplete(f"external data {location!r} is not in the model's folder: {error.strerror}") from error
        if not file_path.is_relative_to(inside):
            raise _unusable(f"external data {location!r} is outside the model's own folder: put it beside the model")
        if not file_path.is_file():
            raise _unusable(f"external data {location!r} is not a file: export the model again")
        _check_span(entries, location, file_path.stat().st_size)
        if file_path not in seen:
            seen.add(file_path)
            yield file_path


def _mentions(path: Path, word: bytes) -> bool:
    """Returns whether the file contains that word. Reads chunks, to save memory; `mmap.find` is 7 times slower."""
    tail = b""
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(1 << 20):
            if word in tail + chunk:
                return True
            tail = chunk[-len(word) + 1 :]
    return False


def _check_span(entries: dict[str, str], location: str, size: int) -> None:
    try:
        offset, length = int(entries.get("offset") or 0), int(entries.get("length") or 0)
    except ValueError:
        raise _unusable(f"external data {location!r}: offset and length must be numbers") from None
    if offset < 0 or length < 0 or offset + length > size:
        raise _Incomplete(
            f"external data {location!r} has {size} bytes, but a tensor needs {length} from offset {offset}"
        )


def _unusable(text: str) -> MeshError:
    return MeshError(Reason.BAD_REQUEST, text)


def _unreadable(path: Path, error: OSError) -> MeshError:
    gone = isinstance(error, FileNotFoundError | NotADirectoryError)
    return MeshError(
        Reason.UNKNOWN_MODEL if gone else Reason.LOAD_FAILED, f"{path} cannot be read: {error.strerror or error}"
    )
