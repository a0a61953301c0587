"""A file with grants, in TOML or JSON: one table `grants`, with a table for each grant. The file is valid as a whole or
not at all."""

import json
import tomllib
from typing import Any

from mesh.access.grants import Grant
from mesh.schema import auth

MAX_BYTES = 4 << 20


def document(text: str) -> dict[str, Any]:
    """Returns the tables of the grants by their names. Raises ValueError."""
    if len(text.encode(errors="replace")) > MAX_BYTES:
        raise ValueError(f"it is longer than the limit of {MAX_BYTES} bytes")
    kind, load = ("JSON", json.loads) if text.lstrip().startswith("{") else ("TOML", tomllib.loads)
    try:
        found = load(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not valid {kind}: {error}") from error
    grants = found.get("grants")
    if not isinstance(grants, dict) or set(found) != {"grants"}:
        raise ValueError("it must have one table, `grants`, with a table for each grant")
    return grants


def parse(text: str) -> dict[str, Grant]:
    """Returns the grants by their names. Raises ValueError, which names the invalid grant, if one is invalid."""
    found = {}
    for name, one in document(text).items():
        auth.check_name(name, "a grant")
        try:
            if not isinstance(one, dict):
                raise ValueError("it must be a table with role, models and to")
            found[name] = auth.grant_of(one)
        except ValueError as error:
            raise ValueError(f"the grant {name}: {error}") from error
    return found
