"""The schema that may come with a model: the inputs and outputs that it states."""

from pathlib import Path
from typing import Any

from mesh.runtime.relay.adapters import contents


def schema_of(key: dict[str, Any]) -> dict[str, list[Any]]:
    """Returns the lists `inputs` and `outputs` of the schema that was pulled with a model, as far as it has them.
    `key` is the load request's. Raises MeshError."""
    path = key.get("schema_path")
    if not path:
        return {}
    schema = contents.read_json(Path(str(path)), "the schema")
    if not isinstance(schema, dict):
        raise contents.bad("the schema must be a JSON object with the lists inputs and outputs")
    return {name: schema[name] for name in ("inputs", "outputs") if isinstance(schema.get(name), list)}
