"""What the records of a backup and of a mesh mean, compared: pure functions on their bytes."""

import enum
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mesh.schema.records import ModelRecord
from placement.copies import UNLIMITED


class Difference(enum.Enum):
    """In what a registered model is not the one of the backup."""

    NONE = enum.auto()
    LIMITS = enum.auto()
    REGISTRATION = enum.auto()


def difference(there: bytes, wanted: bytes) -> Difference:
    """Compares what was registered. What has been measured, counted or noted since is no difference."""
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
    """The record as it is created, and whether it has limits: no vmodel names it yet, and no pod has failed to load it.
    That servers died of it is kept: it would kill here too."""
    try:
        record = ModelRecord.decode(value)
    except ValueError:
        return value, False  # whatever it is: the admin had it
    return replace(record, refs=0, failures=()).encode(), record.limits != UNLIMITED


def counted(value: bytes, more: int) -> bytes:
    """A model's record with so many more vmodels that name it, or fewer."""
    try:
        record = ModelRecord.decode(value)
    except ValueError:
        return value
    return replace(record, refs=max(0, record.refs + more)).encode()


def of(value: bytes) -> Any:
    """A value as what its JSON says; its bytes where it is none."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _fields(value: bytes) -> Mapping[str, Any]:
    found = of(value)
    return found if isinstance(found, dict) else {}


def named(value: bytes) -> set[str]:
    """The models that a vmodel names: the active one and the one it moves to."""
    fields = _fields(value)
    return {str(fields[name]) for name in ("amid", "tmid") if fields.get(name)}


def same_vmodel(there: bytes, wanted: bytes) -> bool:
    """Whether it belongs to the same owner and goes to the same model; how far it has come is not compared."""
    one, other = _fields(there), _fields(wanted)
    return there == wanted or (bool(one) and all(one.get(name) == other.get(name) for name in ("o", "tmid")))
