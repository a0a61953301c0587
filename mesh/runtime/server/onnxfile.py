"""Which file of a folder is the model, and whether its tensors stay inside that folder.

(Whether its functions unfold to more than can be loaded is said by `functions`, and asked here.)

A model may keep tensors in other files (ONNX calls it external data) and names them by path. A name that leads out of
the model's own folder would let whoever registers a model read the pod's files into its answers, so such a model is
refused before ONNX Runtime sees it, whatever the version of ONNX Runtime checks itself.

The file is not parsed for that, as a rule: every external tensor carries the word `location`, and protobuf keeps words
whole, so a file without it has none (10 MB: 6 ms instead of 110). Otherwise the few messages that can hold tensors are
parsed, with the rest skipped.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError

from mesh.runtime.server import functions, outline
from mesh.statuses import MeshError, Reason

MAX_BYTES = (1 << 31) - 1
"""Protobuf's own limit of one message. Larger models keep their tensors in external data."""


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A model on disk that may be loaded."""

    path: Path
    bytes: int  # of the file and its external data
    external: tuple[Path, ...]


def find(path: str) -> ModelFile:
    """The model at `path`, a file or a folder. Touches the disk: call it in a thread.

    In a folder it is `model.onnx`, else the only `*.onnx`, else the same within the subfolder with the highest number
    (a version, as Triton lays them out). Raises `MeshError`: not there, not a model, or reaching out of its folder.
    """
    model = _pick(Path(path))
    try:
        size = model.stat().st_size
        if not size:
            raise _unusable(f"{model} is empty")
        if size > MAX_BYTES:
            raise _unusable(f"{model} has {size} bytes: an ONNX file has less than 2 GiB, the rest is external data")
        if (why := functions.too_many(model)) is not None:
            raise _unusable(f"the model is too much: {why}")
        external = tuple(_external(model))
        return ModelFile(model, size + sum(file.stat().st_size for file in external), external)
    except OSError as error:
        raise _unreadable(model, error) from error


def _pick(path: Path) -> Path:
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            return path
        if not stat.S_ISDIR(mode):
            raise _unusable(f"{path} is neither a file nor a folder")
        names = sorted(os.listdir(path))
        models = [name for name in names if name.endswith(".onnx") and (path / name).is_file()]
        if "model.onnx" in models:
            return path / "model.onnx"
        if len(models) == 1:
            return path / models[0]
        if models:
            raise _unusable(f"{path} holds several models and none is model.onnx: {', '.join(models[:10])}")
        versions = [name for name in names if name.isascii() and name.isdigit() and (path / name).is_dir()]
    except OSError as error:
        raise _unreadable(path, error) from error
    if versions:
        return _pick(path / max(versions, key=int))
    raise _unusable(f"{path} holds no *.onnx file; it has {', '.join(names[:10]) or 'nothing'}")


def _external(model: Path) -> Iterator[Path]:
    """The files that the model's external tensors stand in. Raises `MeshError` for one that may not be read."""
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
            raise _unusable("external data is described twice over")
        location = entries.get("location", "")
        # The name in the middle is how ONNX Runtime marks tensors that lie at an address of its own memory.
        if not location or "\0" in location or "_ORT_MEM_ADDR_" in location or Path(location).is_absolute():
            raise _unusable(f"external data must be named by a relative path, and {location!r} is none")
        try:
            file_path = (folder / location).resolve(strict=True)
        except OSError as error:
            raise _unusable(f"external data {location!r} is not in the model's folder: {error.strerror}") from error
        if not file_path.is_relative_to(inside):
            raise _unusable(f"external data {location!r} is outside the model's own folder")
        if not file_path.is_file():
            raise _unusable(f"external data {location!r} is not a file")
        _check_span(entries, location, file_path.stat().st_size)
        if file_path not in seen:
            seen.add(file_path)
            yield file_path


def _mentions(path: Path, word: bytes) -> bool:
    """Whether the file has that word in it. By chunks, for what it takes in memory; `mmap.find` is 7 times slower."""
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
        raise _unusable(f"external data {location!r} has {size} bytes, a tensor wants {length} from {offset} on")


def _unusable(text: str) -> MeshError:
    return MeshError(Reason.BAD_REQUEST, text)


def _unreadable(path: Path, error: OSError) -> MeshError:
    gone = isinstance(error, FileNotFoundError | NotADirectoryError)
    return MeshError(
        Reason.UNKNOWN_MODEL if gone else Reason.LOAD_FAILED, f"{path} cannot be read: {error.strerror or error}"
    )
