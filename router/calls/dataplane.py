"""The data-plane configuration: which methods clients may call, and where each method's request has the model's id.

It is ModelMesh's JSON document. Its object `rpcConfigs` has a rule for each method, such as
`{"idExtractionPath": [1, 2], "vModelId": true}`, and `allowOtherRpcs` says whether other methods are allowed. `parse`
accepts what ModelMesh accepts, and like it refuses unknown properties. `router.process.dataplanefile` reads the
document and watches it, `routes` applies it.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

MAX_BYTES = 1 << 20
"""Longest document that is accepted, in bytes. People or a controller write it, for a few methods."""

MAX_DEPTH = 32
"""Largest number of field numbers in a path."""

MAX_FIELD = (1 << 29) - 1
"""Highest field number of protobuf."""

_ALL = "rpcConfigs"
_OTHERS = "allowOtherRpcs"
_PATH = "idExtractionPath"
_VMODEL = "vModelId"


@dataclass(frozen=True, slots=True)
class Rule:
    """The rule for one method."""

    path: tuple[int, ...] = ()  # field numbers of the id in the request; empty: the id is in the metadata
    vmodel: bool = False  # the id at the path may be an alias's name


@dataclass(frozen=True, slots=True)
class Dataplane:
    """A parsed configuration."""

    methods: Mapping[bytes, Rule]  # by full name, with its leading slash
    others: bool  # methods that are not listed are allowed, too


def parse(text: str | bytes) -> Dataplane:
    """Parses a configuration. Raises ValueError, whose text tells the operator what is wrong with it."""
    if len(text) > MAX_BYTES:
        raise ValueError(f"it is longer than the limit of {MAX_BYTES} bytes")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON: {error}") from error
    _check(data, "it", (_ALL, _OTHERS))
    listed = data.get(_ALL)
    if listed is None:
        listed = {}
    if not isinstance(listed, dict):
        raise ValueError(f"{_ALL} is not an object of methods")
    methods = {_name(name): _rule(name, value) for name, value in listed.items()}
    return Dataplane(MappingProxyType(methods), _flag(data, _OTHERS, _OTHERS))


def _name(name: str) -> bytes:
    service, slash, method = name.rpartition("/")
    if not (service and slash and method) or "/" in service:
        raise ValueError(f"{_ALL}: {name[:200]!r} is not a method's name such as pkg.Service/method")
    try:
        return b"/" + name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{_ALL}: {name[:200]!r} contains half of a surrogate pair: remove it") from error


def _rule(name: str, value: Any) -> Rule:
    _check(value, name, (_PATH, _VMODEL))
    path = value.get(_PATH)
    if path is None:
        path = []
    if not isinstance(path, list) or not all(type(one) is int and 0 < one <= MAX_FIELD for one in path):
        raise ValueError(f"{name}: {_PATH} is not a list of field numbers, which are from 1 to {MAX_FIELD}")
    if len(path) > MAX_DEPTH:
        raise ValueError(f"{name}: {_PATH} has more than {MAX_DEPTH} field numbers")
    return Rule(tuple(path), _flag(value, _VMODEL, f"{name}: {_VMODEL}"))


def _check(value: Any, what: str, known: Iterable[str]) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is not a JSON object")
    if unknown := sorted(value.keys() - set(known)):
        raise ValueError(f"{what} has an unknown property {unknown[0][:200]!r}; known properties: {', '.join(known)}")


def _flag(data: Mapping[str, Any], key: str, what: str) -> bool:
    value = data.get(key)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise ValueError(f"{what} is neither true nor false")
    return value
