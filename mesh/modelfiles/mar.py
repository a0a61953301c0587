"""TorchServe's model archives: what the manifest in a `.mar` says about the handler and the model's file.

A `.mar` is a zip archive, or a tar.gz, with a folder MAR-INF. The functions here read one that is unpacked.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = "MAR-INF"
MANIFEST = "MANIFEST.json"
"""The file in `FOLDER` that makes a folder an unpacked archive."""

_MAX_BYTES = 1 << 20


class BadManifest(ValueError):
    """A manifest that TorchServe could not use. The text says why."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest, as far as it matters here."""

    handler: str  # a file of the archive, a file and a function in it, or the name of a handler of TorchServe's own
    content: dict[str, Any]  # all of it


def is_unpacked(folder: Path) -> bool:
    """Returns whether a folder is an unpacked archive. Raises OSError."""
    return (folder / FOLDER / MANIFEST).is_file()


def read(folder: Path) -> Manifest:
    """Reads the manifest of an unpacked archive. Raises BadManifest."""
    file = folder / FOLDER / MANIFEST
    where = f"{FOLDER}/{MANIFEST}"
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise BadManifest(f"{where} has more than {_MAX_BYTES} bytes: make the archive with torch-model-archiver")
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        if isinstance(error, BadManifest):
            raise
        raise BadManifest(f"{where} is not valid JSON: make the archive with torch-model-archiver") from error
    except FileNotFoundError as error:
        raise BadManifest(f"the archive lacks {where}: make it with torch-model-archiver") from error
    except OSError as error:
        raise BadManifest(f"{where} cannot be read: {error.strerror}") from error
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict):
        raise BadManifest(f"{where} has no object `model`: make the archive with torch-model-archiver")
    handler = model.get("handler")
    if not isinstance(handler, str) or not handler.strip():
        raise BadManifest(f"{where} names no handler: make the archive with torch-model-archiver --handler")
    for name in ("serializedFile", "modelFile"):
        _check_file(folder, model.get(name), f"model.{name} in {where}")
    return Manifest(handler, content)


def _check_file(folder: Path, name: Any, where: str) -> None:
    if name is None:
        return
    if not isinstance(name, str) or "\0" in name:
        raise BadManifest(f"{where} must be a string without NUL characters")
    try:
        file = (folder / name).resolve()
        if not file.is_relative_to(folder.resolve()):
            raise BadManifest(f"{where} leads out of the archive: {name!r}; name a file in it")
        there = file.exists()
    except (OSError, RuntimeError) as error:  # names that are too long, and links that lead to themselves
        raise BadManifest(f"{where} cannot be used as a file's name: {name[:100]!r}") from error
    if not there:
        raise BadManifest(f"{name!r}, which {where} names, is missing: add it to the archive")
