"""Models as JSON documents: conversion between REST and management's requests and results."""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

from mesh.schema import confidential
from mesh.schema.modelstatus import ModelStatus
from mesh.schema.records import ModelRecord
from mesh.statuses import MeshError, Reason, not_unicode
from placement.copies import UNLIMITED, CopyLimits
from router.management.requests import Item
from router.management.status import StatusInfo
from router.state.differing import DifferentError

LIMITS = ("min_copies", "max_copies", "pinned")
"""The limits that a document may set for a model's copies."""

_LIMITS = frozenset(LIMITS)

MODEL = ("type", "path", "key", "sha256", *LIMITS)
"""The attributes of a model."""

MODELS = "a model"
"""The term for documents with these attributes in error texts."""

MAX_COPIES = 1000
"""Largest number of copies that a limit may name."""

_HINTS = {
    "version": "PUT /mesh/v1/aliases/NAME registers versions",
    "labels": "labels belong to pods; the setting type_constraints says where a type may run",
}
"""What to do instead, for each attribute that callers expect but that models do not have."""


def check_names(document: Mapping[str, Any], names: Collection[str], what: str) -> None:
    """Checks that a document has only the known attributes. `what` describes the document in errors. Raises
    MeshError."""
    unknown = sorted(document.keys() - set(names))
    if not unknown:
        return
    hints = "".join(f"; {_HINTS[name]}" for name in unknown if name in _HINTS and what == MODELS)
    text = f"{', '.join(unknown)[:200]}: no such attribute of {what}; there are {', '.join(names)}{hints}"
    raise MeshError(Reason.BAD_REQUEST, text)


def item_of(item: dict[str, Any], model_id: object) -> Item:
    """Returns the item that a document registers. The document's key may be a string or an object. Raises MeshError.

    Management checks the id itself."""
    if not isinstance(model_id, str):
        raise MeshError(Reason.BAD_REQUEST, "id must be a string")
    key = item.get("key")
    if isinstance(key, dict):
        key = json.dumps(key, separators=(",", ":"))
    texts = [model_id]
    for name, value in (
        ("type", item.get("type")),
        ("path", item.get("path")),
        ("key", key),
        ("sha256", item.get("sha256")),
    ):
        text = "" if value is None else value
        if not isinstance(text, str):
            raise MeshError(Reason.BAD_REQUEST, f"{name} must be a string{' or an object' * (name == 'key')}")
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise not_unicode(name) from error
        texts.append(text)
    if not texts[1]:
        raise MeshError(Reason.BAD_REQUEST, "Must provide non-empty model type string")
    id_, type_, path, key_, sha256 = texts
    return Item(id_, type_, path, key_, sha256, limits_of(item))


def limits_of(item: dict[str, Any], base: CopyLimits = UNLIMITED) -> CopyLimits:
    """Returns the limits of `base` with the document's changes. A null removes a limit. Raises MeshError."""
    if _LIMITS.isdisjoint(item):
        return base
    values: list[int | bool | None] = [base.minimum, base.maximum, base.pinned]
    for index, name in enumerate(LIMITS):
        if name not in item:
            continue
        value = item[name]
        kind = bool if name == "pinned" else int
        if value is not None and type(value) is not kind:
            raise MeshError(
                Reason.BAD_REQUEST, f"{name} must be {'true, false' if kind is bool else 'a whole number'} or null"
            )
        values[index] = value
    if any(isinstance(value, int) and value > MAX_COPIES for value in values[:2]):
        raise MeshError(
            Reason.BAD_REQUEST,
            f"min_copies and max_copies must be at most {MAX_COPIES}, not {max(v or 0 for v in values[:2])}",
        )
    try:
        return CopyLimits(values[0], values[1], None if values[2] is None else bool(values[2]))
    except ValueError as error:
        raise MeshError(Reason.BAD_REQUEST, str(error)) from error


def registered(model_id: str, record: ModelRecord) -> dict[str, Any]:
    """Returns the registered attributes, without secrets."""
    document: dict[str, Any] = {
        "id": model_id,
        "type": record.type,
        "path": confidential.masked_path(record.path),
        "key": confidential.masked_key(record.key),
    }
    for name, text in (("sha256", record.sha256), ("digest", record.digest)):
        if text:
            document[name] = text
    limits = record.limits
    for name, value in zip(LIMITS, (limits.minimum, limits.maximum, limits.pinned), strict=True):
        if value is not None:
            document[name] = value
    return document


def status_of(model_id: str, status: StatusInfo) -> dict[str, Any]:
    """Returns a model's status as JSON. Raises MeshError if the model is not registered."""
    record = status.record
    if status.status is ModelStatus.NOT_FOUND:
        raise MeshError(Reason.UNKNOWN_MODEL, f"model {model_id} is not registered")
    document: dict[str, Any] = {"id": model_id, "type": "", "path": "", "key": ""}
    if record is not None:
        document |= registered(model_id, record)
    return document | {
        "status": status.status,
        "errors": list(status.errors),
        "copies": [asdict(copy) for copy in status.copies],
        "digest": record.digest if record else "",
        "digest_ms": record.digest_ms if record else 0,
        "generation": record.generation if record else 0,
        "reload": {"generation": status.reload.generation, "why": status.reload.why} if status.reload else None,
        "host_bytes": record.host_bytes if record else 0,
        "device_bytes": record.device_bytes if record else 0,
        "load_ms": record.load_ms if record else 0,
        "references": record.refs if record else 0,  # aliases that name it, so that it cannot be unregistered
        "quarantined": record.quarantined if record else False,
        "killed": list(record.killed) if record else [],
        **({"notes": list(status.notes)} if status.notes else {}),
    }


def different(error: DifferentError) -> MeshError:
    """Returns the error for a model that is already registered with other attributes. The text names the ways to change
    a model."""
    return error.explained(
        f"To replace it without a failed call, register a version (`mesh register {error.model_id} FILE --version N`, "
        "or PUT /mesh/v1/aliases/NAME); for new content at the same path, reload it; to change anything else, "
        "unregister it first"
    )
