"""Comparison of a backup's records with those of a mesh, without regard to what a mesh adds. All functions are pure."""

import enum
import json
from dataclasses import replace
from typing import Any

from mesh.schema import vmodels
from mesh.schema.records import ModelRecord
from placement.copies import UNLIMITED
from placement.vmodels.record import VModelRecord


class Difference(enum.Enum):
    """The difference between a registered model and the same model in the backup."""

    NONE = enum.auto()
    LIMITS = enum.auto()
    REGISTRATION = enum.auto()


def difference(there: bytes, wanted: bytes) -> Difference:
    """Compares two registrations. Measurements, counts and notes that the mesh has added to a record are ignored."""
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
    """Returns the record to create, and whether the record has limits. Removes the count of references and the failed
    loads. Keeps the deaths of model servers, because the model would kill servers here too."""
    try:
        record = ModelRecord.decode(value)
    except ValueError:
        return value, False  # unreadable, but the mesh had it like this
    return replace(record, refs=0, failures=()).encode(), record.limits != UNLIMITED


def counted(value: bytes, more: int) -> bytes:
    """Returns a model's record with `more`, perhaps negative, added to the number of vmodels that name the model."""
    try:
        record = ModelRecord.decode(value)
    except ValueError:
        return value
    return replace(record, refs=max(0, record.refs + more)).encode()


def references(value: bytes) -> int | None:
    """Returns the number of vmodels that name a model according to its record, or None if the record cannot be read."""
    try:
        return ModelRecord.decode(value).refs
    except ValueError:
        return None


def of(value: bytes) -> Any:
    """Returns the JSON document in a value, or the bytes if it is not JSON."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _vmodel(value: bytes) -> VModelRecord | None:
    try:
        return vmodels.decode(value)
    except ValueError:
        return None


def named(value: bytes) -> frozenset[str]:
    """Returns the models that a vmodel names in any role. Each of these models counts the vmodel in its record."""
    record = _vmodel(value)
    return frozenset() if record is None else record.names()


def same_vmodel(there: bytes, wanted: bytes) -> bool:
    """Returns whether two vmodels have the same owner, target, versions, split and mirror; the progress of a move is
    not compared."""
    one, other = _vmodel(there), _vmodel(wanted)
    if there == wanted or one is None or other is None:
        return there == wanted
    return _meaning(one) == _meaning(other)


def _meaning(record: VModelRecord) -> VModelRecord:
    """Returns the record without the progress of its move."""
    return replace(record, active=record.target, failed=False, more=replace(record.more, wait=False, why=""), other={})
