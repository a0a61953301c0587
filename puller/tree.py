"""Names on disk for what a store calls its files.

A store's keys are text of anybody's choosing: `../../etc/passwd`, `a//b`, `a` beside `a/b`. Here each of them becomes
one path below the model's folder, spelled as in the store, or is refused, the whole tree with it: a model of which one
file is missing or renamed would fail later and say less.
"""

import os
import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from puller.errors import PullError, PullErrorKind

MAX_FILES = 100_000
MAX_DEPTH = 64
_MAX_ELEMENT = 255  # bytes, of every common file system
_MAX_PATH = 2048  # bytes, of the 4096 that the kernel takes; the rest is for what stands before
_ODD = re.compile(r"[\x00-\x1f\x7f\\]")


def safe(path: str, shown: str) -> PurePosixPath:
    """The path of a store's file relative to the model's folder. Raises PullError(BAD_REQUEST)."""
    elements = path.split("/")
    why = ""
    if not elements[0]:
        why = "is absolute or empty"
    elif "" in elements:
        why = "has an empty element"
    elif ".." in elements or "." in elements:
        why = 'has "." or ".." in it'
    elif _ODD.search(path):
        why = "holds a backslash or control characters"
    elif len(elements) > MAX_DEPTH:
        why = f"is nested more than {MAX_DEPTH} deep"
    else:
        try:
            lengths = [len(os.fsencode(element)) for element in elements]
        except UnicodeEncodeError:
            why = "is not text that can name a file"
        else:
            if max(lengths) > _MAX_ELEMENT or sum(lengths) + len(lengths) > _MAX_PATH:
                why = "is too long for a file system"
    if why:
        text = f"{shown} holds a file that cannot be part of a model: the name {path[:200]!r} {why}; rename it there"
        raise PullError(PullErrorKind.BAD_REQUEST, text)
    return PurePosixPath(path)


def lay_out(
    files: Iterable[str], folders: Iterable[str], shown: str
) -> tuple[list[PurePosixPath], list[PurePosixPath]]:
    """The files' paths, in order, and all folders that they and `folders` need, parents first.

    Raises PullError: two files of one name, a file where a folder has to be, more than can be a model."""
    paths: list[PurePosixPath] = []
    taken: set[PurePosixPath] = set()
    for file in files:
        path = safe(file, shown)
        if path in taken:
            raise PullError(PullErrorKind.BAD_REQUEST, f"{shown} holds two files of the name {file!r}; remove one")
        taken.add(path)
        paths.append(path)
        if len(paths) > MAX_FILES:
            raise PullError(
                PullErrorKind.TOO_LARGE, f"{shown} holds more than {MAX_FILES} files; name a folder below it"
            )
    needed: set[PurePosixPath] = set()
    for path in [*paths, *(safe(folder, shown) / "_" for folder in folders)]:
        for parent in path.parents:
            if parent in needed or not parent.parts:
                break
            needed.add(parent)
    both = taken & needed
    if both:
        text = f"{shown} holds {str(min(both))!r} both as a file and as a folder; remove one"
        raise PullError(PullErrorKind.BAD_REQUEST, text)
    return paths, sorted(needed, key=lambda folder: (len(folder.parts), folder))
