"""Changes of virtual models: a record and a request determine the new record, the reference counts, and the models to
create or delete.

The same functions decide for gRPC, for REST, and for the leader, which carries out moves. A transaction writes the
result if no record on which it is based has changed (`router.vmodels.store`).

**References.** A model's count is the number of vmodels that name it in any role. A change of the count depends only on
the sets of names before and after, so no order or repetition of requests can make a count drift. A model that was
registered with `auto_delete` is deleted with its last reference.

**Moves.** A new target does not serve calls at once: the leader first has as many copies of it loaded as the active
model has. The vmodel switches at once, in the same write, only if no call suffers from it (the active model has no
copies, or the target has as many) or if the caller insists (`force`).

**Versions.** The versions of a vmodel are in the order in which they were set. A new one is appended, and the version
that it replaces is moved right before it, so that a rollback leads to the model that served before. A version that
could not be loaded, and whose move was given up, is moved to the front. Of the versions before the present one, the
last `keep` are kept.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from placement.vmodels.record import Mirror, VModelMore, VModelRecord

KEEP = 2
"""Number of earlier versions that are kept for rollbacks, unless the vmodel sets another number."""

MOST_WEIGHTS = 16
MOST_KEPT = 10
"""Limits on what a vmodel names, because all its models must fit into one transaction, even if it deletes them."""


@dataclass(frozen=True, slots=True)
class NamedModel:
    """A model that a vmodel names, or will name."""

    registered: bool = True
    refs: int = 0  # vmodels that name it
    auto_delete: bool = False
    copies: int = 0  # loaded or being loaded
    loaded: int = 0
    differs: bool = False  # it is registered, with attributes other than the request's


MISSING = NamedModel(registered=False)

Models = Mapping[str, NamedModel]
"""The models that the record or the request names. A model that is missing here is not registered."""


@dataclass(frozen=True, slots=True)
class SetVModel:
    """A request to create or change a vmodel. Attributes that are not given stay as they are."""

    target: str = ""  # the model to move to; "": as `version`, `back` or `weights` say, or the present one
    create: bool = False  # register the target if it is not registered
    version: str = ""  # the target's name as a version; without a target, the version to move to
    back: bool = False  # move to the version before the present target
    update_only: bool = False
    force: bool = False  # switch at once
    ready: bool = False  # wait for a loaded copy of the target even if the active model has none
    expected_target: str = ""
    owner: str = ""
    default_owner: str = ""  # owner of a new vmodel if `owner` is empty
    keep: int | None = None
    weights: Mapping[str, int] | None = None  # by model id; empty: end the split
    sticky: str | None = None  # a header; "": remove it
    mirror: Mirror | None = None
    no_mirror: bool = False


class RefusalCause(enum.Enum):
    """The kinds of reasons for which a change is refused."""

    NOT_FOUND = "not found"
    NO_VERSION = "no such version"
    CONFLICT = "conflict"
    DIFFERENT = "registered with other attributes"
    PRECONDITION = "precondition"
    INVALID = "invalid"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A refused change."""

    cause: RefusalCause
    text: str


@dataclass(frozen=True, slots=True)
class Change:
    """The writes that make up a change. Either all of them are made or none."""

    before: VModelRecord | None
    after: VModelRecord | None  # None: the vmodel is deleted
    refs: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))  # new counts of models that stay
    created: str = ""  # the model to register
    deleted: tuple[str, ...] = ()  # models to unregister

    @property
    def nothing(self) -> bool:
        """True if there is nothing to write."""
        return self.before == self.after and not self.refs and not self.created


def set_vmodel(vmodel_id: str, before: VModelRecord | None, models: Models, request: SetVModel) -> Change | Refusal:
    """Decides on a request to create or change a vmodel. The order of the checks is ModelMesh's."""
    target = _target(vmodel_id, before, request)
    if isinstance(target, Refusal):
        return target
    refusal = (
        _unexpected(vmodel_id, before, request, target)
        or _unknown(before, models, request, target)
        or _unowned(vmodel_id, before, request.owner)
    )
    if refusal is not None:
        return refusal
    if before is None and request.update_only:
        return Refusal(RefusalCause.NOT_FOUND, f"vmodel {vmodel_id} not found")
    if before is None:
        after = VModelRecord(active=target, target=target, owner=request.owner or request.default_owner)
    else:
        after = _moved(before, models, request, target)
    more = _additions(vmodel_id, before, request, target)
    if isinstance(more, Refusal):
        return more
    after = _pruned(replace(after, more=replace(more, wait=after.moving and more.wait)))
    created = target if request.create and not models.get(target, MISSING).registered else ""
    return _change(before, after, models, created)


def delete_vmodel(before: VModelRecord | None, models: Models, owner: str) -> Change:
    """Decides on the deletion of a vmodel. It has no effect if the vmodel has another owner or does not exist."""
    if before is None or (owner and owner != before.owner):
        return Change(before, before)
    return _change(before, None, models)


def finish_move(before: VModelRecord | None, models: Models, active: str, target: str) -> Change:
    """Decides on the end of a move: the target, which is ready, becomes the active model. Nothing changes if the vmodel
    no longer makes that move."""
    if before is None or (before.active, before.target) != (active, target):
        return Change(before, before)
    more = replace(before.more, wait=False, why="")
    return _change(before, _pruned(replace(before, active=target, failed=False, more=more)), models)


def park_move(before: VModelRecord | None, active: str, target: str, why: str) -> Change:
    """Decides what to record about a move whose target could not be loaded: the reason `why`, or "" once it can be
    loaded. Nothing changes if the vmodel no longer makes that move."""
    if before is None or (before.active, before.target) != (active, target):
        return Change(before, before)
    return Change(before, replace(before, failed=bool(why), more=replace(before.more, why=why)))


def due(record: VModelRecord, active: NamedModel, target: NamedModel, most: int | None = None) -> bool:
    """Returns whether a move may end: the target has as many loaded copies as the active model, or `most` if no more
    can be loaded. An active model without copies serves no calls, so a move from it does not wait unless the last load
    of the target failed, or the caller wanted to wait."""
    if not active.copies and not (record.failed or record.more.wait):
        return True
    needed = active.loaded if most is None else min(active.loaded, most)
    return target.loaded >= max(1, needed)


# --- checks ---


def _target(vmodel_id: str, before: VModelRecord | None, request: SetVModel) -> str | Refusal:
    """Returns the model that the request asks for as target, or why there is none."""
    versions = before.more.versions if before is not None else {}
    if request.target:
        if (known := versions.get(request.version)) not in (None, request.target):
            text = f"version {request.version} of {vmodel_id} is already model {known}: name another version"
            return Refusal(RefusalCause.CONFLICT, text)
        return request.target
    if request.version:
        known = versions.get(request.version)
        if known is None and before is None:
            return Refusal(RefusalCause.NOT_FOUND, f"vmodel {vmodel_id} not found")
        if known is None:
            there = f"it has {', '.join(versions)}" if versions else "it has no versions"
            return Refusal(RefusalCause.NO_VERSION, f"{vmodel_id} has no version {request.version}: {there}")
        return known
    if request.weights:
        best = max(request.weights.values())
        heaviest = [model for model, weight in request.weights.items() if weight == best]
        return before.target if before is not None and before.target in heaviest else heaviest[0]
    if before is None:
        return Refusal(RefusalCause.NOT_FOUND, f"vmodel {vmodel_id} not found")
    if request.back:
        order = list(versions)
        place = order.index(version) if (version := before.more.version_of(before.target)) in versions else -1
        if place < 1:
            text = f"{vmodel_id} has no version before its target, model {before.target}: name a version or a target"
            return Refusal(RefusalCause.PRECONDITION, text)
        return versions[order[place - 1]]
    return before.target


def _unexpected(vmodel_id: str, before: VModelRecord | None, request: SetVModel, target: str) -> Refusal | None:
    expected = request.expected_target
    if not expected:
        return None
    if before is None:
        if expected == target:
            return None
        text = f"vmodel {vmodel_id} does not exist, so its target is not the expected {expected}"
        return Refusal(RefusalCause.PRECONDITION, text)
    if (refusal := _unowned(vmodel_id, before, request.owner)) is not None:
        return refusal
    if before.target not in (expected, target):
        text = f"Existing target model {before.target} does not match expected {expected}"
        return Refusal(RefusalCause.PRECONDITION, text)
    return None


def _unknown(before: VModelRecord | None, models: Models, request: SetVModel, target: str) -> Refusal | None:
    found = models.get(target, MISSING)
    if request.create and found.registered and found.differs:
        return Refusal(RefusalCause.DIFFERENT, f"model {target} is registered with other attributes")
    wanted = [] if request.create or (before is not None and target == before.target) else [target]
    wanted += [model for model in request.weights or () if model != target]
    wanted += [request.mirror.target] if request.mirror is not None else []
    for model in wanted:
        if not models.get(model, MISSING).registered:
            return Refusal(RefusalCause.NOT_FOUND, f"Target model {model} not found")
    return None


def _unowned(vmodel_id: str, before: VModelRecord | None, owner: str) -> Refusal | None:
    if before is None or not owner or owner == before.owner:
        return None
    text = f'vmodel {vmodel_id} already exists with different owner "{before.owner}"'  # COMPAT
    return Refusal(RefusalCause.CONFLICT, text)


# --- effects ---


def _moved(before: VModelRecord, models: Models, request: SetVModel, target: str) -> VModelRecord:
    """Returns the record with a new target, which becomes active immediately if no call suffers from that."""
    after = before
    if target != before.target:
        after = replace(before, target=target, failed=False)
    if not after.moving:
        return replace(after, failed=False)
    active = models.get(after.active, MISSING)
    waits = replace(after, more=replace(after.more, wait=request.ready and active.registered))
    if request.force or (target != before.target and due(waits, active, models.get(target, MISSING))):
        return replace(after, active=target, failed=False)
    return after


def _additions(vmodel_id: str, before: VModelRecord | None, request: SetVModel, target: str) -> VModelMore | Refusal:
    more = before.more if before is not None else VModelMore()
    new = before is None or target != before.target
    if new:
        more = replace(more, wait=request.ready, why="", weights=MappingProxyType({}))
        if before is not None and before.moving and before.failed and (bad := more.version_of(before.target)):
            more = replace(more, versions=MappingProxyType({bad: before.target, **more.versions}))
        if more.mirror is not None and more.mirror.target == target:
            more = replace(more, mirror=None)
    elif request.force:
        more = replace(more, wait=False, why="")
    if request.weights is not None:
        if len(request.weights) > MOST_WEIGHTS:
            return Refusal(RefusalCause.INVALID, f"{vmodel_id} can be split among {MOST_WEIGHTS} models at most")
        more = replace(more, weights=MappingProxyType(dict(request.weights)))
    if request.keep is not None:
        if not 0 <= request.keep <= MOST_KEPT:
            return Refusal(RefusalCause.INVALID, f"keep must be a number of versions from 0 to {MOST_KEPT}")
        more = replace(more, keep=request.keep)
    if request.sticky is not None:
        more = replace(more, sticky=request.sticky)
    if request.mirror is not None or request.no_mirror:
        more = replace(more, mirror=request.mirror)
    if request.version and request.target and request.version not in more.versions:
        versions = dict(more.versions)
        if before is not None and (replaced := more.version_of(before.target)):
            versions[replaced] = versions.pop(replaced)
        versions[request.version] = target
        more = replace(more, versions=MappingProxyType(versions))
    return more


def _pruned(record: VModelRecord) -> VModelRecord:
    """Returns the record without the versions that are too old to keep, unless their models have another role."""
    more = record.more
    version = more.version_of(record.target)
    if not version:
        return record
    order = list(more.versions)
    earlier = order[: order.index(version)]
    keep = KEEP if more.keep is None else more.keep
    used = {record.active, *more.weights, *([more.mirror.target] if more.mirror is not None else [])}
    dropped = {name for name in earlier[: max(0, len(earlier) - keep)] if more.versions[name] not in used}
    if not dropped:
        return record
    versions = {name: model for name, model in more.versions.items() if name not in dropped}
    return replace(record, more=replace(more, versions=MappingProxyType(versions)))


def _change(before: VModelRecord | None, after: VModelRecord | None, models: Models, created: str = "") -> Change:
    """Returns the change, including the reference counts and deletions that follow from the names."""
    named = before.names() if before is not None else frozenset()
    names = after.names() if after is not None else frozenset()
    refs: dict[str, int] = {}
    deleted = []
    for model in sorted(named ^ names):
        found = models.get(model, MISSING)
        if model == created:
            refs[model] = 1
        elif not found.registered:
            continue  # an earlier version of Mesh, or a restored backup, has left a name without a model
        elif model in names:
            refs[model] = found.refs + 1
        elif found.refs <= 1 and found.auto_delete:
            deleted.append(model)
        else:
            refs[model] = max(0, found.refs - 1)
    if created and created not in refs:
        refs[created] = 1
    return Change(before, after, MappingProxyType(refs), created, tuple(deleted))
