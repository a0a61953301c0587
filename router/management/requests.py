"""Management requests and their validation."""

import re
from dataclasses import dataclass
from typing import NamedTuple

from mesh.schema import confidential, records
from mesh.schema.records import ModelRecord
from mesh.statuses import MeshError, Reason, not_unicode
from placement.copies import UNLIMITED, CopyLimits
from placement.vmodels.changes import SetVModel

HOUR_MS = 3_600_000
RECENCY_LOAD_NOW_MS = HOUR_MS
"""Assumed idle time, in ms, of a model that is loaded when it is registered: an hour, so that it does not evict models
in use."""
RECENCY_MS = 6 * HOUR_MS
"""Assumed idle time, in ms, of a model that is registered without a load."""

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


class Item(NamedTuple):
    """A registration with ModelMesh's attributes and optional further ones."""

    model_id: str
    type: str
    path: str = ""
    key: str = ""
    sha256: str = ""  # hex, of the model's file; "": not named
    limits: CopyLimits = UNLIMITED  # of its copies


@dataclass(frozen=True, slots=True)
class Register:
    """A request to register a model. With `load_now` the model is also loaded; with `sync` the answer waits for the
    load."""

    item: Item
    load_now: bool = False
    sync: bool = False
    last_used_ms: int = 0  # epoch; 0: some hours ago


@dataclass(frozen=True, slots=True)
class Load:
    """A request to load a model that has no copy. With `sync` the answer waits for the load."""

    model_id: str
    sync: bool = False
    last_used_ms: int = 0  # epoch; 0: now


SYNC_WAIT = 240.0
"""Seconds for which a request with `sync` waits for the end of a move: ModelMesh's value."""

_VERSION = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HEADER = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]{1,100}")
_MOST_WEIGHT = 1_000_000


@dataclass(frozen=True, slots=True)
class MoveVModel:
    """A request to create, move or otherwise change a vmodel. With `load_now` its target is loaded even if the active
    model is not. With `sync` the answer waits for the end of the move, at most `wait` seconds."""

    vmodel_id: str
    change: SetVModel
    item: Item | None = None  # the target, which is registered if it is not
    auto_delete: bool = False  # a target that this request registers is deleted with its last reference
    load_now: bool = False
    sync: bool = False
    wait: float = SYNC_WAIT


def named(request: MoveVModel) -> list[str]:
    """Returns the models that a request to change a vmodel names, in any role."""
    change = request.change
    found = [change.target] if change.target else []
    found += [request.item.model_id] if request.item is not None and request.item.model_id != change.target else []
    return [*found, *(change.weights or {}), *([change.mirror.target] if change.mirror is not None else [])]


def check_move(request: MoveVModel) -> None:
    """Checks a request to change a vmodel, except for the existence of its models. Raises BAD_REQUEST."""
    check_vmodel_id(request.vmodel_id)
    change = request.change
    mirror, sticky, version, weights = change.mirror, change.sticky, change.version, change.weights or {}
    for model_id in named(request):
        check_id(model_id)
    wrong = ""
    if version and _VERSION.fullmatch(version) is None:
        wrong = f"a version is 1 to 64 letters, digits, dots, dashes or underscores, not {version[:80]!r}"
    elif sticky and _HEADER.fullmatch(sticky) is None:
        wrong = f"sticky names a header in lower case, not {sticky[:80]!r}"
    elif mirror is not None and not 0 < mirror.percent <= 100:
        wrong = f"a mirror's share is a percentage above 0, at most 100, not {mirror.percent:g}"
    elif any(not 0 <= weight <= _MOST_WEIGHT for weight in weights.values()):
        wrong = f"a weight is a whole number from 0 to {_MOST_WEIGHT}, such as 90"
    elif weights and not any(weights.values()):
        wrong = "the weights add up to 0: no model would get calls"
    elif change.target and weights and change.target not in weights:
        wrong = f"the target, model {change.target[:200]}, has no weight: give it one, or name another target"
    if wrong:
        raise MeshError(Reason.BAD_REQUEST, wrong)


def check_vmodel_id(vmodel_id: str) -> None:
    """Checks that the id is valid for a vmodel. Raises BAD_REQUEST."""
    if not vmodel_id:
        raise MeshError(Reason.BAD_REQUEST, "Must provide vModelId")
    try:
        records.check_id(vmodel_id, "vmodel")
    except ValueError as error:
        raise MeshError(Reason.BAD_REQUEST, str(error)) from error


def check_id(model_id: str) -> None:
    """Checks that the id is valid for a model. Raises BAD_REQUEST."""
    try:
        records.check_id(model_id)
    except ValueError as error:
        raise MeshError(Reason.BAD_REQUEST, str(error)) from error


def record_of(item: Item, *, now_ms: int, load_now: bool = False, last_used_ms: int = 0) -> ModelRecord:
    """Returns the record that registers the item. Raises BAD_REQUEST."""
    model_id, type, path, key, sha256, limits = item
    check_id(model_id)
    if not type:
        raise MeshError(Reason.BAD_REQUEST, "Must provide non-empty model type string")
    if last_used_ms <= 0:
        last_used_ms = now_ms - (RECENCY_LOAD_NOW_MS if load_now else RECENCY_MS)
    try:
        for text in (type, path, key):
            text.encode()
    except UnicodeEncodeError as error:
        raise not_unicode("the type, path or key") from error
    if sha256 and _SHA256.fullmatch(sha256) is None:
        text = f"sha256 must be 64 hexadecimal digits, as `sha256sum` prints them, not {sha256[:80]!r}"
        raise MeshError(Reason.BAD_REQUEST, text)
    if path in (".", "..") or path.startswith(("./", "../", "~/")):
        text = (
            f"the path {confidential.masked_path(path)[:500]!r} is relative to a folder that pods do not know: "
            "give an absolute path, a URI "
            "such as s3://bucket/model.onnx, or a path inside the store that the key names"
        )
        raise MeshError(Reason.BAD_REQUEST, text)
    if secrets := confidential.found(path, key):
        if confidential.too_deep(key):
            text = "the key is nested too deeply to be searched for secrets: give a key with fewer levels"
            raise MeshError(Reason.BAD_REQUEST, text)
        text = (
            f"a registration must hold no secret, because every client can read it and etcd stores it; found here: "
            f"{'; '.join(secrets[:5])}. Put it into the storage secret of the pods (--storage-config, "
            'docs/storage.md) and name its key here: {"storage_key": "..."}'
        )
        raise MeshError(Reason.BAD_REQUEST, text)
    last_used_ms = min(last_used_ms, now_ms)
    return ModelRecord(type=type, path=path, key=key, sha256=sha256.lower(), limits=limits, last_used_ms=last_used_ms)
