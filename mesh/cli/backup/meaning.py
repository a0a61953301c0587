"""Comparison of the records of a backup and of a mesh by their meaning: pure functions on their bytes."""

import enum
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mesh.schema.records import ModelRecord
from placement.copies import UNLIMITED


class Difference(enum.Enum):
    """The difference between a registered model and that of the backup."""

    NONE = enum.auto()
    LIMITS = enum.auto()
    REGISTRATION = enum.auto()


def difference(there: bytes, wanted: bytes) -> Difference:
    """Compares what was registered. What was measured, counted or noted since does not count as a difference."""
    if there == wanted:
        return Difference.NONE
    try:
        one, other = ModelRecord.decode(there), ModelRecord.decode(wanted)
    except ValueError:
        return Difference.REGISTRATION
    if (one.type, one.path, one.key, one.sha256) != (other.type, other.path, other.key, other.sha256):
        return Difference.REGISTRATION
    return Difference.NONE if one.limits == other.limits else Difference.LIMITS


def fresh(value: bytes) -> tuple[bytes, bool]:
    """Returns the record to create, and whether it has limits. References of vmodels and failed loads are removed; that
    servers died of the model is kept, as it would kill here too."""
    try:
        record = ModelRecord.decode(value)
    except ValueError:
        return value, False  # unreadable, but it is what the mesh had
    return replace(record, refs=0, failures=()).encode(), record.limits != UNLIMITED


def counted(value: bytes, more: int) -> bytes:
    """Returns a model's record after adding `more`, perhaps negative, to the number of vmodels that name it."""
    try:
        record = ModelRecord.decode(value)
    except ValueError:
        return value
    return replace(record, refs=max(0, record.refs + more)).encode()


def of(value: bytes) -> Any:
    """Returns the JSON document in a value, or the bytes if it is not JSON."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _fields(value: bytes) -> Mapping[str, Any]:
    found = of(value)
    return found if isinstance(found, dict) else {}


def named(value: bytes) -> set[str]:
    """Returns the models that a vmodel names: the active one and its target."""
    fields = _fields(value)
    return {str(fields[name]) for name in ("amid", "tmid") if fields.get(name)}


def same_vmodel(there: bytes, wanted: bytes) -> bool:
    """Tells whether two vmodels have the same owner and target; the progress of a move is not compared."""
    one, other = _fields(there), _fields(wanted)
    return there == wanted or (bool(one) and all(one.get(name) == other.get(name) for name in ("o", "tmid")))
