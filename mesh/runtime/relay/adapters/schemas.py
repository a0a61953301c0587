"""The schema that may come with a model: the inputs and outputs that it states."""

import json
from pathlib import Path
from typing import Any

from mesh.runtime.relay.adapters import contents


def schema_of(key: dict[str, Any]) -> dict[str, list[Any]]:
    """Returns the lists `inputs` and `outputs` of the schema that was pulled with a model, as far as it has them.
    `key` is the load request's. Raises MeshError."""
    path = key.get("schema_path")
    if not path:
        return {}
    try:
        schema = json.loads(Path(str(path)).read_bytes())
    except OSError as error:
        raise contents.unreadable(Path(str(path)), error) from error
    except ValueError as error:
        raise contents.bad(f"the schema is not valid JSON: {error}") from error
    if not isinstance(schema, dict):
        raise contents.bad("the schema is not an object with inputs and outputs")
    return {name: schema[name] for name in ("inputs", "outputs") if isinstance(schema.get(name), list)}
