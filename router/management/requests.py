"""Requests to management, and their validation."""

import re
from dataclasses import dataclass
from typing import NamedTuple

from mesh.schema import confidential, records
from mesh.schema.records import ModelRecord
from mesh.statuses import MeshError, Reason
from placement.copies import UNLIMITED, CopyLimits

HOUR_MS = 3_600_000
RECENCY_LOAD_NOW_MS = HOUR_MS
"""A model registered and loaded at once counts as used an hour ago: it does not displace models in real use."""
RECENCY_MS = 6 * HOUR_MS

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


class Item(NamedTuple):
    """A registration with the predecessor's attributes, and optional further ones."""

    model_id: str
    type: str
    path: str = ""
    key: str = ""
    sha256: str = ""  # hex, of the model's file; "": not named
    limits: CopyLimits = UNLIMITED  # of its copies


@dataclass(frozen=True, slots=True)
class Register:
    """A request to register a model, and with `load_now` to load it; with `sync`, the answer waits for that."""

    item: Item
    load_now: bool = False
    sync: bool = False
    last_used_ms: int = 0  # epoch; 0: some hours ago


@dataclass(frozen=True, slots=True)
class Load:
    """A request to load a model that has no copy; with `sync`, the answer waits for that."""

    model_id: str
    sync: bool = False
    last_used_ms: int = 0  # epoch; 0: now


def check_id(model_id: str) -> None:
    """Checks that a model can have that id. Raises BAD_REQUEST."""
    try:
        records.check_id(model_id)
    except ValueError as error:
        raise MeshError(Reason.BAD_REQUEST, str(error)) from error


def record_of(item: Item, *, now_ms: int, load_now: bool = False, last_used_ms: int = 0) -> ModelRecord:
    """Returns the record that the item is registered as. Raises BAD_REQUEST."""
    model_id, type, path, key, sha256, limits = item
    check_id(model_id)
    if not type:
        raise MeshError(Reason.BAD_REQUEST, "Must provide non-empty model type string")
    if last_used_ms <= 0:
        last_used_ms = now_ms - (RECENCY_LOAD_NOW_MS if load_now else RECENCY_MS)
    try:
        for text in (type, path, key):
            text.encode()
    except UnicodeEncodeError as error:
        raise MeshError(Reason.BAD_REQUEST, "type, path and key must be valid text") from error
    if sha256 and _SHA256.fullmatch(sha256) is None:
        text = f"sha256 must be 64 hexadecimal digits, as `sha256sum` prints them, not {sha256[:80]!r}"
        raise MeshError(Reason.BAD_REQUEST, text)
    if path in (".", "..") or path.startswith(("./", "../", "~/")):
        text = (
            f"the path {confidential.masked_path(path)[:500]!r} is relative to a folder that pods do not know: "
            "give an absolute path, a URI "
            "such as s3://bucket/model.onnx, or a path inside the store that the key names"
        )
        raise MeshError(Reason.BAD_REQUEST, text)
    if secrets := confidential.found(path, key):
        text = (
            f"a registration must hold no secret, because every client can read it and etcd stores it; found here: "
            f"{'; '.join(secrets[:5])}. Put it into the storage secret of the pods (--storage-config, "
            'docs/storage.md) and name its key here: {"storage_key": "..."}'
        )
        raise MeshError(Reason.BAD_REQUEST, text)
    last_used_ms = min(last_used_ms, now_ms)
    return ModelRecord(type=type, path=path, key=key, sha256=sha256.lower(), limits=limits, last_used_ms=last_used_ms)
