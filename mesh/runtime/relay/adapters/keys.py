"""The key and the model type of a load request: the JSON of `modelKey`, and what it says about the type."""

import json
from typing import Any

from mesh.pb import modelruntime_pb2 as pb
from placement import modeltypes


def key_of(request: pb.LoadModelRequest) -> dict[str, Any]:
    """Returns the JSON object in a request's key, or an empty one if the key is not a JSON object."""
    try:
        key = json.loads(request.modelKey) if request.modelKey else {}
    except ValueError:
        return {}
    return key if isinstance(key, dict) else {}


def type_of(request: pb.LoadModelRequest) -> str:
    """Returns the model type that the key names, else the request's, in lower case and without its version."""
    own = key_of(request).get("model_type")
    name = own.get("name") if isinstance(own, dict) else own
    return modeltypes.name_of(name if isinstance(name, str) and name else request.modelType).lower()
