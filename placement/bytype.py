"""Documents by model type: a JSON object with an entry for each type, and an entry `_default` for all other types."""

import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

DEFAULT = "_default"

MAX_BYTES = 1 << 20
"""Longest document that is accepted: people write these documents, so they are short."""

_T = TypeVar("_T")


def parse(text: str | bytes, what: str, one: Callable[[str, Any], _T], default: _T) -> tuple[Mapping[str, _T], _T]:
    """Parses a document, and each of its entries with the function `one`. Returns the entries by type, and the entry
    for all other types, which is `default` if the document has none. An empty text has no entries.

    Raises ValueError with a text for the operator. `what`, a plural, names the document in that text.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"{what} are longer than {MAX_BYTES} bytes")
    if not text.strip():
        return MappingProxyType({}), default
    try:
        data = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{what} are not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{what} are not a JSON object of types")
    found = {name: one(name, value) for name, value in data.items()}
    default = found.pop(DEFAULT, default)
    return MappingProxyType(found), default
