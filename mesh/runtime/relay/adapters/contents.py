"""The model in what the agent has pulled: a file, a folder, or an archive of either.

A server wants one file, or one folder. This module finds it by the names that the server's users give their files, and
otherwise says which file is missing. It reads only names, and the first and last bytes of files.
"""

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mesh.modelfiles import archives, sniffing, usercode
from mesh.modelfiles.sniffing import Kind
from mesh.statuses import MeshError, Reason

_SHOWN = 10  # names of a folder in an error
_JSON_BYTES = 1 << 20  # of a file that describes a model


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A model on the disk."""

    path: Path  # the file or folder that the server loads
    kind: Kind | None  # what it is, if its content leaves no doubt


def opened(path: Path, folder: Path, stop: threading.Event) -> Path:
    """Returns the folder of an archive's content, unpacked below `folder`, or `path` itself if it is no archive.

    Blocks. Ends early once `stop` is set. Raises MeshError.
    """
    try:
        kind = sniffing.look(path) if path.is_file() else None
        if kind is None or not kind.archive or not archives.is_archive(path):
            return path
        return archives.unpack(path, folder / "unpacked", stop=stop)
    except archives.BadArchive as error:
        raise bad(str(error)) from error
    except archives.CannotWrite as error:
        text = f"{path.name} cannot be unpacked onto the pod's disk: {error.strerror or error}"
        raise MeshError(Reason.LOAD_FAILED, text) from error
    except OSError as error:
        raise unreadable(path, error) from error


def find(path: Path, names: Sequence[str], suffixes: Sequence[str]) -> FoundModel:
    """Finds the model's file. In a folder, or in that of its highest version (`newest`), it is the first of `names`
    that is there, or else the only file with one of the suffixes. Raises MeshError."""
    try:
        if not path.is_dir():
            return FoundModel(path, sniffing.look(path))
        path = newest(path)
        there = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
        for name in names:
            if name in there and (path / name).is_file():
                return FoundModel(path / name, sniffing.look(path / name))
        fitting = [name for name in there if name.lower().endswith(tuple(suffixes)) and (path / name).is_file()]
        if len(fitting) == 1:
            return FoundModel(path / fitting[0], sniffing.look(path / fitting[0]))
    except OSError as error:
        raise unreadable(path, error) from error
    wanted = ", ".join(names)
    if fitting:
        text = f"the folder holds several files that could be the model, and none is named {_or(names)}"
        raise bad(f"{text}: {_listed(fitting)}")
    raise bad(f"the folder lacks the model's file ({wanted}, or one with the ending {_or(suffixes)}); {_has(there)}")


def newest(folder: Path) -> Path:
    """Returns the folder of the highest version, if `folder` contains only subfolders with numbers as names, apart from
    hidden entries. Otherwise returns `folder` itself. Raises OSError."""
    there = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    numbered = [entry for entry in there if entry.name.isascii() and entry.name.isdigit() and entry.is_dir()]
    if not numbered or len(numbered) < len(there):
        return folder
    return max(numbered, key=lambda entry: int(entry.name))


def with_file(path: Path, name: str) -> Path:
    """Returns the folder that holds a file of that name: `path`, or its newest version. Raises MeshError."""
    try:
        if path.is_dir():
            for folder in (path, newest(path)):
                if (folder / name).is_file():
                    return folder
            there = sorted(entry.name for entry in path.iterdir())
            raise bad(f"the folder lacks the file {name}; {_has(there)}")
    except OSError as error:
        raise unreadable(path, error) from error
    kind = sniffing.look(path)
    what = f": it is {kind.what}" if kind is not None else ""
    raise bad(f"the model is a file, instead of a folder with the file {name}{what}")


def link(target: Path, name: Path) -> None:
    """Makes a symbolic link to a file or folder that was pulled. Raises OSError."""
    name.symlink_to(target.absolute())


def mirror(folder: Path, name: Path) -> None:
    """Makes a folder with the same files as one that was pulled, for servers that refuse symbolic links. The files are
    hard links, or copies if they are on another file system. Raises OSError and MeshError."""

    def put(source: Path, target: Path) -> None:
        source = source.resolve()
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)

    _same(folder, name, put)


def tree_of_links(folder: Path, name: Path) -> None:
    """Makes a folder with the subfolders of one that was pulled, and with links to its files, so that what a server
    writes beside them does not reach what was pulled. Raises OSError and MeshError."""
    _same(folder, name, link)


def _same(folder: Path, name: Path, put: Callable[[Path, Path], None]) -> None:
    """Makes a folder with the subfolders of another one, and has `put` make each file of it. Raises OSError and
    MeshError."""
    left = archives.LIMITS.files

    def fill(source: Path, target: Path, depth: int) -> None:
        nonlocal left
        target.mkdir(exist_ok=True)
        for entry in source.iterdir():
            left -= 1
            if left < 0:
                raise bad(f"the folder holds more than {archives.LIMITS.files:,} files: register a smaller one")
            if depth > archives.LIMITS.depth:
                deep = f"the folder holds folders more than {archives.LIMITS.depth} deep"
                raise bad(f"{deep}: remove links that lead to a folder around them, or make the folder flatter")
            if entry.is_dir():
                fill(entry, target / entry.name, depth + 1)
            else:
                put(entry, target / entry.name)

    fill(folder, name, 1)


def python_code(pulled: Path, name: Path) -> None:
    """Makes the folder of a model that is Python code: a file, or a folder with `model.py`. The server's bytecode is
    written there, and not beside what was pulled. Raises OSError and MeshError."""
    if pulled.is_dir():
        tree_of_links(with_file(pulled, usercode.CODE), name)
        return
    if (kind := sniffing.look(pulled)) is not None:
        raise bad(f"the model is {kind.what}, instead of Python code or a folder with {usercode.CODE}")
    name.mkdir()
    link(pulled, name / usercode.CODE)


def read_json(file: Path, name: str) -> Any:
    """Returns the content of a JSON file. `name` is its name in errors. Raises MeshError, also if it has more than a
    mebibyte."""
    try:
        if file.stat().st_size > _JSON_BYTES:
            raise bad(f"{name} has more than {_JSON_BYTES:,} bytes")
        return json.loads(file.read_bytes())
    except OSError as error:
        raise MeshError(Reason.LOAD_FAILED, f"{name} cannot be read: {error.strerror or error}") from error
    except RecursionError as error:
        raise bad(f"{name} is nested too deeply") from error
    except ValueError as error:
        raise bad(f"{name} is not valid JSON: {error}") from error


def bad(text: str) -> MeshError:
    """Returns the error for a model that cannot be loaded as it is."""
    return MeshError(Reason.BAD_REQUEST, text)


def unknown_type(server: str, types: Iterable[str], model_type: str) -> MeshError:
    """Returns the error for a model of a type that the server does not take."""
    text = f"{server} takes models of the types {', '.join(types)}, not {model_type}"
    return bad(f"{text}: register the model with the type of its file")


def one_openvino_file() -> MeshError:
    """Returns the error for an OpenVINO model that is registered by one of its two files."""
    text = "an OpenVINO model is a folder with an .xml and a .bin file, and this is one file"
    return bad(f"{text}: register the folder")


def unreadable(path: Path, error: OSError) -> MeshError:
    """Returns the error for files that cannot be read."""
    return MeshError(Reason.LOAD_FAILED, f"{path.name} cannot be read: {error.strerror or error}")


def missing(what: str, folder: Path) -> MeshError:
    """Returns the error for a folder that lacks something. Raises OSError."""
    return bad(f"the folder lacks {what}; {_has(sorted(entry.name for entry in folder.iterdir()))}")


def _or(words: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _has(there: Sequence[str]) -> str:
    return f"it has {_listed(there)}" if there else "it is empty"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
