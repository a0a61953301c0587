"""The record of a virtual model (vmodel, alias): a name that points at models and can be moved.

Its first four attributes are ModelMesh's. Mesh's additions are in `VModelMore`, which ModelMesh keeps without reading
it. `mesh.schema.vmodels` reads and writes both as JSON.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, slots=True)
class Mirror:
    """A shadow: a model that also gets a share of the calls, and whose answers are discarded."""

    target: str  # a model's id
    percent: float  # of the calls, above 0, at most 100


@dataclass(frozen=True, slots=True)
class VModelMore:
    """The attributes that Mesh adds to ModelMesh's record."""

    versions: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))  # model ids, the latest last
    keep: int | None = None  # earlier versions kept for a rollback; None: the default
    weights: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))  # by model id; empty: no split
    sticky: str = ""  # the header whose value determines the target of a split; "": chosen at random for each call
    mirror: Mirror | None = None
    wait: bool = False  # the current move waits for a loaded copy even if the active model has none
    why: str = ""  # reason why the target of the current move could not be loaded
    other: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))  # unknown attributes

    def names(self) -> frozenset[str]:
        """Returns all models that these attributes name, in any role."""
        names = {*self.versions.values(), *self.weights}
        return frozenset(names if self.mirror is None else names | {self.mirror.target})

    def version_of(self, model_id: str) -> str:
        """Returns the version that has this model, the latest of several, or "" if there is none."""
        return next((version for version, one in reversed(list(self.versions.items())) if one == model_id), "")


_NOTHING = VModelMore()


@dataclass(frozen=True, slots=True)
class VModelRecord:
    """The record of a virtual model."""

    active: str  # the model that serves calls, unless they are split; "" only in what is left of a damaged record
    target: str  # the model that it moves to; equal to `active` when it does not move
    owner: str = ""
    failed: bool = False  # the last attempt to load the target failed
    more: VModelMore = _NOTHING
    other: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))  # unknown attributes

    @property
    def moving(self) -> bool:
        """True while another model than the target still serves the calls."""
        return self.active != self.target

    def names(self) -> frozenset[str]:
        """Returns all models that the vmodel names, in any role. Each of these counts the vmodel once in its `refs`."""
        return (self.more.names() | {self.active, self.target}) - {""}
