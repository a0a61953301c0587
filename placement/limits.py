"""Limits by type: how many copies a type's models should have, unless a model has its own limits.

{"fraud": {"min": 1, "max": 4, "pinned": true}, "_default": {"max": 8}}
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from placement import bytype
from placement.copies import UNLIMITED, CopyLimits


@dataclass(frozen=True, slots=True)
class TypeLimits:
    """The limits set for types."""

    types: Mapping[str, CopyLimits] = field(default_factory=lambda: MappingProxyType({}))
    default: CopyLimits = UNLIMITED

    def of(self, model_type: str, own: CopyLimits = UNLIMITED) -> CopyLimits:
        """Returns the limits of a model: its own, completed by its type's, then by the default."""
        return own.over(self.types.get(model_type, UNLIMITED)).over(self.default)


def parse(text: str | bytes) -> TypeLimits:
    """Parses JSON; an empty text sets nothing. Raises ValueError with a text for the operator."""
    return TypeLimits(*bytype.parse(text, "type limits", _limits, UNLIMITED))


def _limits(name: str, value: Any) -> CopyLimits:
    if not isinstance(value, dict):
        raise ValueError(f'the limits of type {name!r} are not an object such as {{"min": 1, "max": 4}}')
    if unknown := sorted(value.keys() - {"min", "max", "pinned"}):
        raise ValueError(f"the limits of type {name!r} have the unknown key {unknown[0]!r}: use min, max and pinned")
    for key, kind in (("min", int), ("max", int), ("pinned", bool)):
        if value.get(key) is not None and type(value[key]) is not kind:
            raise ValueError(f"{key} of type {name!r} must be {'a whole number' if kind is int else 'true or false'}")
    try:
        return CopyLimits(value.get("min"), value.get("max"), value.get("pinned"))
    except ValueError as error:
        raise ValueError(f"type {name!r}: {error}") from error
