"""Records of virtual models in etcd, `vmodels/<vmodel>`.

The records are ModelMesh's JSON, with the attributes `o` (owner), `amid` (active model), `tmid` (target) and
`failed`. Attributes at their default are left out. Mesh's additions are under one attribute, `mesh`. Unknown attributes
survive a rewrite, in the record and in `mesh`. An invalid record raises `ValueError`; readers of the range skip it and
log that.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from mesh.schema.jsonfields import BAD, integer, read_object, text_of, why, write_object
from placement.vmodels.record import Mirror, VModelMore, VModelRecord

_KNOWN = frozenset({"o", "amid", "tmid", "failed", "mesh"})
_KNOWN_MESH = frozenset({"versions", "keep", "weights", "sticky", "mirror", "wait", "why"})
_SALVAGED = 40  # models: valid records name fewer, and the deletion of all must fit into one transaction


def decode(value: bytes) -> VModelRecord:
    """Decodes a record. Raises ValueError for anything else."""
    data = read_object(value)
    try:
        active, target = text_of(data.get("amid") or ""), text_of(data.get("tmid") or "")
        if not (active or target):
            raise ValueError("both amid and tmid are empty")
        return VModelRecord(
            active=active or target,
            target=target or active,
            owner=text_of(data.get("o") or ""),
            failed=data.get("failed") is True,
            more=_more(data.get("mesh") or {}),
            other=MappingProxyType({name: one for name, one in data.items() if name not in _KNOWN}),
        )
    except BAD as error:
        raise ValueError(why(error)) from error


def salvaged(value: bytes) -> VModelRecord:
    """Returns what can be read of an invalid record, for its deletion: the owner, and the models that it names, at most
    `_SALVAGED`. All of these models but the active one and the target are returned as versions. Never raises."""
    try:
        data = read_object(value)
    except ValueError:
        data = {}
    mesh = _dict(data.get("mesh"))
    versions, weights, mirror = (_dict(mesh.get(name)) for name in ("versions", "weights", "mirror"))
    listed = map(_text, (*versions.values(), *weights, mirror.get("target")))
    named = list(dict.fromkeys(name for name in listed if name))[:_SALVAGED]
    active, target, owner = (_text(data.get(name)) for name in ("amid", "tmid", "o"))
    more = VModelMore(versions=MappingProxyType({name: name for name in named}))
    return VModelRecord(active or target, target or active, owner, more=more)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    """Returns a text that may be a part of a key, or "" for anything else."""
    try:
        return text_of(value) if isinstance(value, str) and "\0" not in value else ""
    except BAD:
        return ""


def encode(record: VModelRecord) -> bytes:
    """Encodes a record as JSON."""
    data: dict[str, Any] = {"o": record.owner} if record.owner else {}
    data |= {"amid": record.active, "tmid": record.target}
    if record.failed:
        data["failed"] = True
    if mesh := _mesh(record.more):
        data["mesh"] = mesh
    return write_object(data | dict(record.other))


def _more(mesh: Mapping[str, Any]) -> VModelMore:
    keep, mirror = mesh.get("keep"), mesh.get("mirror")
    weights = {text_of(model): integer(weight) for model, weight in (mesh.get("weights") or {}).items()}
    if any(weight < 0 for weight in weights.values()):
        raise ValueError(f"the weight {min(weights.values())} is negative")
    return VModelMore(
        versions=MappingProxyType({text_of(v): _id(model) for v, model in (mesh.get("versions") or {}).items()}),
        keep=None if keep is None else max(0, integer(keep)),
        weights=MappingProxyType(weights),
        sticky=text_of(mesh.get("sticky") or ""),
        mirror=None if mirror is None else Mirror(_id(mirror["target"]), _percent(mirror.get("share", 100))),
        wait=mesh.get("wait") is True,
        why=text_of(mesh.get("why") or ""),
        other=MappingProxyType({name: one for name, one in mesh.items() if name not in _KNOWN_MESH}),
    )


def _id(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("a model's id must be a non-empty string")
    return text_of(value)


def _percent(value: Any) -> float:
    percent = float(value)
    if not 0 < percent <= 100:
        raise ValueError(f"a mirror's share must be above 0 and at most 100 percent, not {percent:g}")
    return percent


def _mesh(more: VModelMore) -> dict[str, Any]:
    mesh: dict[str, Any] = {"versions": dict(more.versions)} if more.versions else {}
    if more.keep is not None:
        mesh["keep"] = more.keep
    if more.weights:
        mesh["weights"] = dict(more.weights)
    if more.sticky:
        mesh["sticky"] = more.sticky
    if more.mirror is not None:
        percent = more.mirror.percent
        mesh["mirror"] = {"target": more.mirror.target, "share": int(percent) if percent.is_integer() else percent}
    if more.wait:
        mesh["wait"] = True
    if more.why:
        mesh["why"] = more.why
    return mesh | dict(more.other)
