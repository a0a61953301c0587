"""Types of models that a pod's server takes, and whether a model's type is among them.

A pod lists types as `name` or `name:version`; a pod that lists none takes any model. A model's type is written as
ModelMesh's users write it: `onnx`, `onnx:1`, or as its controller does, `mt:onnx:1|pv:grpc-v2`. A version counts only
if both sides name one."""

from collections.abc import Iterable

ANY: frozenset[str] = frozenset()
"""The types of a pod that takes any model."""

_FORMAT = "mt:"


def takes(served: frozenset[str], model_type: str) -> bool:
    """Returns whether a pod that serves these types takes a model of the given type. The type "" is unknown."""
    if not served or not model_type or model_type in served:
        return True
    plain = _plain(model_type)
    if plain in served:
        return True
    name, _, version = plain.partition(":")
    return name in served if version else any(one.partition(":")[0] == name for one in served)


def name_of(model_type: str) -> str:
    """Returns the name of a model's type, without its version."""
    return _plain(model_type).partition(":")[0]


def untaken(model_type: str, pods: Iterable[frozenset[str]]) -> str:
    """Returns why no pod takes models of that type, or "" if a pod does or there is no pod. `pods` holds the types of
    each pod."""
    served = list(pods)
    if not served or any(takes(one, model_type) for one in served):
        return ""
    every = ", ".join(sorted(frozenset[str]().union(*served)))
    return f"no pod accepts models of type {model_type}: the pods of this mesh accept {every}"


def _plain(model_type: str) -> str:
    return model_type.partition("|")[0].removeprefix(_FORMAT)
