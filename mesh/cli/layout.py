"""The models of a folder, for `mesh import`: the files and folders in it that pods can load.

A registration names a file, or a folder in which the pods find the file (`mesh.runtime.server.onnx.onnxfile`). A folder
is registered if the model keeps tensors in other files, which ONNX calls external data. A folder is also registered if
the model has versions, each in a folder whose name is a number, as in Triton's repositories. There a version may keep
its model in a folder `model.onnx`.

This module only reads the file system. Hidden files, such as those that macOS and NFS leave behind (`._a.onnx`,
`.nfs0001.onnx`), are ignored; a folder without read permission is skipped.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_LOCATION = b"\n\x08location\x12"
"""The bytes before the name of a file of external data in a model: the entry's key, and the tag of its value."""

_CONFIG = "config.pbtxt"  # a model's settings, in Triton's repositories

_BLOCK = 1 << 20  # bytes of a file that are searched at once
_LONGEST = 4096  # bytes of such a name


@dataclass(frozen=True, slots=True)
class Found:
    """A model: its id, made from its path in the folder, and the file or folder to register. `problem` is the reason
    why pods cannot load the model, or ""."""

    id: str
    path: Path
    problem: str = ""


def models(root: Path, skipped: Callable[[Path, str], None] = lambda path, why: None) -> Iterator[Found]:
    """Yields the models below `root`, in the order of their ids. Calls `skipped` with each folder that could not be
    read, and the reason."""
    yield from sorted(_below(root, root, skipped), key=lambda found: found.id)


def placed(file: Path) -> tuple[Path, str]:
    """Returns the path to register for a model's file: the file, or its folder if the model has external data. Also
    returns the reason why pods cannot load that path, or "" if they can."""
    if not _has_external_data(file):
        return file, ""
    others = [other.name for other in _onnx(file.parent) if other.name != file.name]
    if file.name == "model.onnx" or not others:
        return file.parent, ""
    return file.parent, (
        "it has external data, so its folder would be registered, but the folder also contains "
        f"{', '.join(others[:3])}: put the model and its data into a folder of their own"
    )


def _below(folder: Path, root: Path, skipped: Callable[[Path, str], None]) -> Iterator[Found]:
    try:
        folders = sorted(
            entry.name
            for entry in os.scandir(folder)
            if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False)
        )
        files = _onnx(folder)
    except OSError as error:
        if folder == root:
            raise
        skipped(folder, error.strerror or str(error))
        return
    # The imported folder is a collection, even if its folders have numbers for names, unless it has a config.pbtxt.
    one = folder != root or (root / _CONFIG).is_file()
    if one and not files and _has_versions(folder, folders):
        yield Found(folder.relative_to(root).as_posix() if folder != root else root.resolve().name, folder)
        return
    for file in files:
        model_id = file.relative_to(root).with_suffix("").as_posix()
        try:
            path, problem = placed(file)
        except OSError as error:
            path, problem = file, f"{file} cannot be read: {error.strerror or error}"
        yield Found(model_id, path, problem)
    for name in folders:
        yield from _below(folder / name, root, skipped)


def _onnx(folder: Path) -> list[Path]:
    """Returns the model files directly in a folder."""
    return sorted(
        Path(entry.path)
        for entry in os.scandir(folder)
        if not entry.name.startswith(".") and entry.name.lower().endswith(".onnx") and entry.is_file()
    )


def _has_versions(folder: Path, names: list[str]) -> bool:
    """Returns whether one of the folders is a version of a model: its name is a number, and it has only one possible
    model file."""
    for name in names:
        if not (name.isascii() and name.isdigit()):
            continue
        try:
            files = _onnx(folder / name)
        except OSError:
            continue
        inside = folder / name / "model.onnx"  # a folder, if the model has external data
        if not files and inside.is_dir():
            files = _onnx(inside)
        if len(files) == 1 or any(file.name == "model.onnx" for file in files):
            return True
    return False


def _has_external_data(file: Path) -> bool:
    """Returns whether the model keeps tensors in a file next to it. Searches the bytes for the file's name instead of
    parsing them, because a model may have gigabytes. Bytes that only look like a name do not name an existing file."""
    with file.open("rb", buffering=0) as stream:
        kept = b""
        while block := stream.read(_BLOCK):
            searched = kept + block
            at = searched.find(_LOCATION)
            while at >= 0:
                if len(searched) - at < len(_LOCATION) + _LONGEST + 2:
                    searched += stream.read(_LONGEST + 2) or b""
                if _is_file_beside(file, searched[at + len(_LOCATION) :]):
                    return True
                at = searched.find(_LOCATION, at + 1)
            kept = searched[-len(_LOCATION) + 1 :]
    return False


def _is_file_beside(file: Path, text: bytes) -> bool:
    """Returns whether the text, a string in protobuf's encoding, names a file in or below the model's folder."""
    if not text:
        return False
    length, start = text[0], 1
    if length >= 0x80:
        if len(text) < 2 or text[1] >= 0x80:
            return False
        length, start = (length & 0x7F) | text[1] << 7, 2
    name = text[start : start + length]
    if len(name) < length or not name or b"\0" in name or name.startswith(b"/"):
        return False
    try:
        target = (file.parent / os.fsdecode(name)).resolve()
        return target.is_relative_to(file.parent.resolve()) and target.is_file()
    except OSError:
        return False
