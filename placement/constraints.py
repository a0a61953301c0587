"""Type constraints, as in ModelMesh: which pods may hold a model of a type, and which are preferred.

A pod has labels. A type may require some labels (the pod must have **all** of them) and prefer others (**any** of them
is enough). The JSON is ModelMesh's, so that its configuration works unchanged:

    {"type-a": {"required": ["l1", "l2"]}, "type-b": {"preferred": ["l3"]}, "_default": {"required": ["none"]}}

Types that are not listed use `_default`; without a default they may go anywhere. Unknown attributes are ignored; a
label in both lists counts as required.

GPU pods and CPU pods are distinguished in the same way: pods with a device have a label; a type that requires the label
never runs without a device, and a type that prefers it falls back to other pods if no pod with a device has room.

For a type that states no preference, one is inferred, as in ModelMesh: of the pods that it may use, it prefers
those open to the fewest other types. So pods that are open to every type stay free for the others.

A change at run time creates a new `Constraints`. `copies` then moves copies off pods that are no longer allowed.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from placement import bytype
from placement.bytype import DEFAULT


@dataclass(frozen=True, slots=True)
class Constraint:
    """The labels that one type requires of a pod, and those that it prefers."""

    required: frozenset[str] = frozenset()  # all of them
    preferred: frozenset[str] = frozenset()  # any of them; required ones are left out

    def lacking(self, labels: frozenset[str]) -> frozenset[str]:
        """Returns the required labels that are missing."""
        return self.required - labels

    def prefers(self, labels: frozenset[str]) -> bool:
        """Returns whether a pod with these labels is preferred."""
        return bool(self.preferred & labels)


ANYWHERE = Constraint()


@dataclass(frozen=True, slots=True)
class Constraints:
    """The constraints of all types."""

    types: Mapping[str, Constraint] = field(default_factory=lambda: MappingProxyType({}))
    default: Constraint = ANYWHERE

    def of(self, model_type: str) -> Constraint:
        """Returns the constraint of a type: its own entry, else the default."""
        return self.types.get(model_type, self.default)

    def allows(self, model_type: str, labels: frozenset[str]) -> bool:
        """Returns whether a pod with these labels may hold that type."""
        return not self.of(model_type).lacking(labels)

    def preferences(self, model_type: str, labels: Iterable[frozenset[str]]) -> dict[frozenset[str], bool]:
        """Returns for each set of labels whether the type prefers pods with these labels, by its own list or by
        inference. If all sets are equally good, none is preferred."""
        kinds = set(labels)
        own = self.of(model_type)
        if own.preferred:
            return {kind: own.prefers(kind) for kind in kinds}
        allowed = [kind for kind in kinds if not own.lacking(kind)]
        scores = {kind: self._reserved(model_type, kind) for kind in allowed}
        best = max(scores.values(), default=0)
        alike = len(set(scores.values())) < 2
        return {kind: not alike and scores.get(kind) == best for kind in kinds}

    def _reserved(self, model_type: str, labels: frozenset[str]) -> int:
        """Scores how little the other types need pods with these labels: pods with a higher score are preferred. The
        weights are ModelMesh's. A type that may not run there counts four times as much as one that prefers such
        pods."""
        others = [constraint for name, constraint in self.types.items() if name != model_type]
        prohibited = sum(1 for constraint in others if constraint.lacking(labels))
        preferring = sum(1 for constraint in others if constraint.prefers(labels))
        return 4 * prohibited - preferring


NONE = Constraints()


def parse(text: str | bytes) -> Constraints:
    """Parses ModelMesh's JSON; an empty text means no constraints. Raises ValueError with a text for the
    operator."""
    types, default = bytype.parse(text, "type constraints", _constraint, ANYWHERE)
    return Constraints(types, default) if types or default != ANYWHERE else NONE


def render(constraints: Constraints) -> str:
    """Returns the JSON that `parse` turns into these constraints."""
    entries = dict(sorted(constraints.types.items()))
    if constraints.default != ANYWHERE:
        entries[DEFAULT] = constraints.default
    data: dict[str, dict[str, list[str]]] = {}
    for name, constraint in entries.items():
        lists = {"required": sorted(constraint.required), "preferred": sorted(constraint.preferred)}
        data[name] = {key: labels for key, labels in lists.items() if labels}
    return json.dumps(data)


def _constraint(name: str, value: Any) -> Constraint:
    if not isinstance(value, dict):
        raise ValueError(f'the constraint of type {name!r} is not an object such as {{"required": ["gpu"]}}')
    required = _labels(name, "required", value.get("required"))
    return Constraint(required, _labels(name, "preferred", value.get("preferred")) - required)


def _labels(name: str, which: str, value: Any) -> frozenset[str]:
    if value is None:
        return frozenset()
    if not isinstance(value, list) or not all(isinstance(label, str) and label for label in value):
        raise ValueError(f"the {which} labels of type {name!r} must be a list of non-empty strings")
    return frozenset(value)
