"""MLflow's model folders: what the file `MLmodel` says about the flavours in which the model can be loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

DESCRIPTION = "MLmodel"
"""The name of the file that makes a folder an MLflow model."""

_MAX_BYTES = 1 << 20
_FILES = {"sklearn": "pickled_model", "xgboost": "data", "lightgbm": "data", "catboost": "data", "onnx": "data"}
"""The attribute of each flavour that names the model's file."""

_ORDER = ("onnx", "python_function", "xgboost", "lightgbm", "catboost", "sklearn")
"""Flavours in the order in which they decide the type. ONNX is first, because it needs no server but ours."""

_TYPES = {"python_function": "mlflow"}  # others: the flavour's own name


class BadDescription(ValueError):
    """A description that does not say how to load the model. The text says why."""


def flavours(folder: Path) -> Mapping[str, Mapping[str, Any]]:
    """Returns the flavours of the model in a folder, with their attributes. Raises BadDescription."""
    file = folder / DESCRIPTION
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise BadDescription(f"{DESCRIPTION} has more than {_MAX_BYTES} bytes: save the model again")
        described = yaml.safe_load(file.read_bytes())
    except OSError as error:
        raise BadDescription(f"{DESCRIPTION} cannot be read: {error.strerror}") from error
    except BadDescription:
        raise
    except Exception as error:  # PyYAML raises many kinds for values that do not fit their tags
        raise BadDescription(f"{DESCRIPTION} is not valid YAML: save the model again") from error
    found = described.get("flavors") if isinstance(described, dict) else None
    if not isinstance(found, dict) or not found:
        raise BadDescription(f"{DESCRIPTION} names no flavors: save the model again")
    return {str(name): value if isinstance(value, dict) else {} for name, value in found.items()}


def type_of(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the model type by which a model of these flavours is served. Raises BadDescription."""
    for name in _ORDER:
        if name in found:
            return _TYPES.get(name, name)
    names = ", ".join(sorted(found))
    text = f"{DESCRIPTION} has the flavors {names}, none of which can be served"
    raise BadDescription(f"{text}: save the model with one of {', '.join(_ORDER)}")


def file_of(folder: Path, model_type: str) -> Path:
    """Returns the model's file for the flavour `model_type`. Raises BadDescription if the description does not name a
    usable one."""
    found = flavours(folder)
    attribute = _FILES.get(model_type)
    if attribute is None or model_type not in found:
        text = f"{DESCRIPTION} has no flavor {model_type}, only {', '.join(sorted(found))}"
        raise BadDescription(f"{text}: save the model with that flavor, or register it with --type mlflow")
    if found[model_type].get("serialization_format") == "skops":
        raise BadDescription(f"the flavor {model_type} is in the format skops: register the model with --type mlflow")
    name = found[model_type].get(attribute)
    if not isinstance(name, str) or not name:
        text = f"the flavor {model_type} in {DESCRIPTION} lacks {attribute}, the name of the model's file"
        raise BadDescription(f"{text}: save the model again")
    try:
        file = (folder / name).resolve()
        there = file.exists()
    except (ValueError, OSError, RuntimeError) as error:  # a NUL, names that are too long, links in a circle
        raise BadDescription(f"{DESCRIPTION} names a file by a name that cannot be used: {name[:100]!r}") from error
    if not file.is_relative_to(folder.resolve()):
        raise BadDescription(
            f"{DESCRIPTION} names a file outside of the model's folder: {name!r}; put it into the folder"
        )
    if not there:
        raise BadDescription(f"the file {name}, which {DESCRIPTION} names, is missing: add it to the model's folder")
    return file
