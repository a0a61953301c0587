"""Names on disk for a store's files.

A store's keys are arbitrary text: `../../etc/passwd`, `a//b`, `a` next to `a/b`. Each of them becomes one path below
the model's folder, spelled as in the store, or is skipped with a reason. Volumes and buckets also hold files that were
never part of a model, so a skipped file does not fail the pull. The model only fails if a file is missing when it is
loaded; its error then names the reasons too.
"""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from puller.errors import PullError, PullErrorKind

MAX_FILES = 100_000
MAX_DEPTH = 64
_MAX_ELEMENT = 255  # bytes, of every common file system
_MAX_PATH = 2048  # bytes, of the kernel's limit of 4096; the rest is for the path before it
_ODD = re.compile(r"[\x00-\x1f\x7f\\]")
_TOLD = 10  # skipped entries named in one text


@dataclass(frozen=True, slots=True)
class Layout:
    """The files of a listing with their paths in the model's folder."""

    files: tuple[tuple[int, PurePosixPath], ...]  # numbers in the listing, and paths below the model's folder
    folders: tuple[PurePosixPath, ...]  # all folders needed, parents first
    skipped: tuple[str, ...]  # entries left out, each with the reason


def stray(name: str) -> str:
    """Returns why a path that contains this element cannot belong to a model, or "" if it can."""
    if name.startswith("._"):
        return "holds what macOS keeps beside a file"
    if name.startswith(".nfs"):
        return "is a deleted file that an NFS client has open"
    if name == "lost+found":
        return "belongs to the file system"
    return ""


def fault(path: str) -> str:
    """Returns why a store's name for a file cannot be a path relative to the model's folder, or "" if it can."""
    elements = path.split("/")
    if not elements[0]:
        return "is absolute or empty"
    if "" in elements:
        return "has an empty element"
    if ".." in elements or "." in elements:
        return 'has "." or ".." in it'
    if _ODD.search(path):
        return "holds a backslash or control characters"
    if len(elements) > MAX_DEPTH:
        return f"is nested more than {MAX_DEPTH} deep"
    try:
        lengths = [len(os.fsencode(element)) for element in elements]
    except UnicodeEncodeError:
        return "is not text that can name a file"
    if max(lengths) > _MAX_ELEMENT or sum(lengths) + len(lengths) > _MAX_PATH:
        return "is too long for a file system"
    return next(filter(None, map(stray, elements)), "")


def lay_out(files: Sequence[str], folders: Iterable[str], shown: str) -> Layout:
    """Gives each file its own path. Raises PullError if two files have one name, if there are more than a model can
    have, or if none is left.

    A file whose path is needed for a folder is skipped.
    """
    skipped: list[str] = []

    def usable(name: str) -> bool:
        why = fault(name)
        if why:
            skipped.append(f"{name[:200]!r} {why}")
        return not why

    paths: dict[PurePosixPath, int] = {}
    for number, file in enumerate(files):
        if not usable(file):
            continue
        path = PurePosixPath(file)
        if path in paths:
            raise PullError(PullErrorKind.BAD_REQUEST, f"{shown} contains two files with the name {file!r}; remove one")
        paths[path] = number
        if len(paths) > MAX_FILES:
            raise PullError(
                PullErrorKind.TOO_LARGE, f"{shown} contains more than {MAX_FILES} files; name a folder below it"
            )
    needed: set[PurePosixPath] = set()
    for path in [*paths, *(PurePosixPath(folder) / "_" for folder in folders if usable(folder))]:
        for parent in path.parents:
            if parent in needed or not parent.parts:
                break
            needed.add(parent)
    for path in sorted(paths.keys() & needed):
        skipped.append(f"{str(path)!r} is a file, but a folder with that name holds others")
        del paths[path]
    if not paths:
        raise PullError(PullErrorKind.EMPTY, f"{shown} contains no file that can be part of a model: {told(skipped)}")
    return Layout(
        tuple((number, path) for path, number in paths.items()),
        tuple(sorted(needed, key=lambda folder: (len(folder.parts), folder))),
        tuple(skipped),
    )


def told(skipped: Sequence[str]) -> str:
    """Returns the skipped entries with their reasons as one text of bounded length."""
    more = [f"and {len(skipped) - _TOLD} more"] if len(skipped) > _TOLD else []
    return "; ".join([*skipped[:_TOLD], *more])
