"""Aliases (vmodels) as JSON documents: conversion between REST and management's requests and results."""

from collections.abc import Callable, Mapping
from typing import Any

from mesh.schema.modelstatus import VModelStatus
from mesh.statuses import MeshError, Reason, not_unicode
from placement.vmodels.changes import KEEP, SetVModel
from placement.vmodels.record import Mirror, VModelRecord
from router.management.requests import SYNC_WAIT, MoveVModel
from router.management.vmodels import VModelInfo
from router.rest import modeldocuments
from router.state.differing import DifferentError

MOVE = (
    *("target", "version", "model", "auto_delete", "load", "ready", "sync", "wait", "force", "update_only"),
    *("expected_target", "owner", "keep", "weights", "sticky", "mirror"),
)
"""The attributes of a document that creates or changes an alias."""

ROLLBACK = ("version", "sync", "wait", "force", "ready", "load", "expected_target", "owner")
"""The attributes of a document that asks for a rollback."""

_MIRROR = ("target", "share")

_MAX_WAIT = 3600.0  # seconds


def move_of(document: dict[str, Any], alias: str) -> MoveVModel:
    """Returns the request that a document describes. If the document has a `model`, it is registered as the target,
    with the id `ALIAS@VERSION` unless the document gives another id. This model is deleted with its last reference
    unless `auto_delete` is false. Raises MeshError."""
    modeldocuments.check_names(document, MOVE, "an alias")
    target, version, model = _text(document, "target"), _text(document, "version"), document.get("model")
    item = None
    if model is not None:
        if not isinstance(model, dict):
            raise MeshError(Reason.BAD_REQUEST, "model must be an object: the target's type, path and key")
        modeldocuments.check_names(model, modeldocuments.MODEL, "an alias's model")
        if not target and not version:
            raise MeshError(Reason.BAD_REQUEST, "name the model to register: a target, a version, or both")
        target = target or f"{alias}@{version}"
        item = modeldocuments.item_of(model, target)
    mirror = document.get("mirror")
    change = SetVModel(
        target=target,
        version=version,
        update_only=_flag(document, "update_only"),
        force=_flag(document, "force"),
        ready=_flag(document, "ready", default=item is not None),
        expected_target=_text(document, "expected_target"),
        owner=_text(document, "owner"),
        keep=_number(document, "keep"),
        weights=_weights(document.get("weights", {})) if "weights" in document else None,
        sticky=_text(document, "sticky") if "sticky" in document else None,
        mirror=None if mirror is None else _mirror(mirror),
        no_mirror="mirror" in document and mirror is None,
    )
    return MoveVModel(
        alias,
        change,
        item,
        auto_delete=_flag(document, "auto_delete", default=item is not None),
        load_now=_flag(document, "load", default=change.ready),
        sync=_flag(document, "sync"),
        wait=_wait(document),
    )


def rollback_of(document: dict[str, Any], alias: str) -> MoveVModel:
    """Returns the request to move back to the previous version, or to the version that the document names. Raises
    MeshError."""
    modeldocuments.check_names(document, ROLLBACK, "a rollback")
    version = _text(document, "version")
    change = SetVModel(
        version=version,
        back=not version,
        force=_flag(document, "force"),
        ready=_flag(document, "ready", default=True),
        expected_target=_text(document, "expected_target"),
        owner=_text(document, "owner"),
    )
    load = _flag(document, "load", default=change.ready)
    return MoveVModel(alias, change, load_now=load, sync=_flag(document, "sync"), wait=_wait(document))


def defined(alias: str, record: VModelRecord) -> dict[str, Any]:
    """Returns the models that an alias names, and the state of its move."""
    more = record.more
    status = VModelStatus.DEFINED
    if record.moving:
        status = VModelStatus.TRANSITION_FAILED if record.failed else VModelStatus.TRANSITIONING
    document: dict[str, Any] = {
        "id": alias,
        "owner": record.owner,
        "status": status,
        "active": record.active,
        "target": record.target,
        "version": more.version_of(record.active),
        "target_version": more.version_of(record.target),
        "versions": dict(more.versions),
        "keep": KEEP if more.keep is None else more.keep,
        "weights": dict(more.weights),
        "sticky": more.sticky,
        "mirror": None if more.mirror is None else {"target": more.mirror.target, "share": more.mirror.percent},
    }
    return document | ({"why": more.why} if more.why else {})


def status_of(info: VModelInfo, readable: Callable[[str], bool] = lambda _: True) -> dict[str, Any]:
    """Returns an alias with the status of its models, but without errors and copies of models that are not readable
    for the caller. Raises MeshError UNKNOWN_MODEL if the alias does not exist or has another owner."""
    if info.record is None:
        raise MeshError(Reason.UNKNOWN_MODEL, f"there is no alias {info.vmodel_id}, or it has another owner")
    models = {info.record.active: info.active}
    if info.target is not None:
        models[info.record.target] = info.target
    return defined(info.vmodel_id, info.record) | {
        "models": [
            {"id": model, "status": status.status}
            | ({"errors": list(status.errors), "copies": len(status.copies)} if readable(model) else {})
            for model, status in models.items()
        ]
    }


def different(error: DifferentError) -> MeshError:
    """Returns the error for a target that is already registered with other attributes. The text says what to do."""
    return error.explained("Give the new one another version")


def _text(document: Mapping[str, Any], name: str) -> str:
    value = document.get(name)
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise not_unicode(name) from error
        return value
    if value is not None:
        raise MeshError(Reason.BAD_REQUEST, f"{name} must be a string")
    return ""


def _flag(document: Mapping[str, Any], name: str, *, default: bool = False) -> bool:
    value = document.get(name, default)
    if not isinstance(value, bool):
        raise MeshError(Reason.BAD_REQUEST, f"{name} must be true or false")
    return value


def _number(document: Mapping[str, Any], name: str) -> int | None:
    value = document.get(name)
    if value is not None and type(value) is not int:
        raise MeshError(Reason.BAD_REQUEST, f"{name} must be a whole number")
    return value


def _wait(document: Mapping[str, Any]) -> float:
    value = document.get("wait", SYNC_WAIT)
    if type(value) not in (int, float) or not 0 < value <= _MAX_WAIT:
        raise MeshError(Reason.BAD_REQUEST, f"wait must be a number of seconds above 0, at most {_MAX_WAIT:g}")
    return float(value)


def _weights(value: object) -> dict[str, int]:
    if value is None:
        return {}
    if not isinstance(value, dict) or any(type(weight) is not int for weight in value.values()):
        raise MeshError(Reason.BAD_REQUEST, 'weights must be an object of whole numbers: {"MODEL": 90, "OTHER": 10}')
    return {_text({"a model's id": model}, "a model's id"): weight for model, weight in value.items()}


def _mirror(value: object) -> Mirror:
    if not isinstance(value, dict) or not isinstance(value.get("target"), str):
        raise MeshError(Reason.BAD_REQUEST, 'mirror must be null or an object: {"target": "MODEL", "share": 10}')
    modeldocuments.check_names(value, _MIRROR, "mirror")
    share = value.get("share", 100)
    if type(share) not in (int, float):
        raise MeshError(Reason.BAD_REQUEST, "share must be a percentage: a number above 0, at most 100")
    return Mirror(_text(value, "target"), float(share))
