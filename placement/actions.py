"""Actions: the idempotent loads and unloads of a plan.

An action names a model and a pod. An agent that already has the copy, or has no copy to unload, does nothing. If there
are briefly two leaders, both see the same mesh and request the same actions.
"""

import enum
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from placement.constraints import NONE, Constraints
from placement.footprint import Footprint
from placement.pod import Candidate


class ActionKind(enum.Enum):
    """The kind of an action."""

    LOAD = "load"
    UNLOAD = "unload"


@dataclass(frozen=True, slots=True)
class Action:
    """One change of one copy."""

    kind: ActionKind
    model_id: str
    pod: str
    why: str
    idle_ms: int = 0  # of a load: it takes no room from copies that were used more recently than this
    expected_copies: int = 0  # of a load: how many the model has without it, for the claim


@dataclass(frozen=True, slots=True)
class Unmet:
    """A wanted action that is impossible at the moment, and why."""

    model_id: str
    why: str


@dataclass(frozen=True, slots=True)
class Plan:
    """The actions of this round, those that are not possible, and the number of those postponed for later rounds."""

    actions: tuple[Action, ...]
    unmet: tuple[Unmet, ...] = ()
    put_off: int = 0


class PlannedPods:
    """The pods by name, with the loads of the plan so far added to their figures."""

    __slots__ = ("_constraints", "_pods", "_preferences")

    def __init__(self, pods: Iterable[Candidate], constraints: Constraints = NONE) -> None:
        self._constraints = constraints
        self._preferences: dict[str, Mapping[frozenset[str], bool]] = {}  # by type, computed on demand
        self._pods = {pod.name: pod for pod in sorted(pods, key=lambda pod: pod.name)}

    def __iter__(self) -> Iterator[Candidate]:
        return iter(self._pods.values())

    def __getitem__(self, name: str) -> Candidate:
        return self._pods[name]

    def get(self, name: str) -> Candidate | None:
        """Returns the pod with that name, or None."""
        return self._pods.get(name)

    def take(self, name: str, footprint: Footprint) -> None:
        """Adds a load to the figures of the named pod."""
        pod = self._pods[name]
        need = footprint.on(device=pod.has_device)
        self._pods[name] = pod.with_more(
            used_bytes=need.host_bytes, device_used_bytes=need.device_bytes, copies=1, loads_in_progress=1
        )

    def preferences(self, model_type: str) -> Mapping[frozenset[str], bool] | None:
        """Returns for each pod's set of labels whether a type prefers it (`Constraints.preferences`), or None if no
        type has constraints."""
        if self._constraints is NONE:
            return None
        if model_type not in self._preferences:
            labels = {pod.labels for pod in self._pods.values()}
            self._preferences[model_type] = self._constraints.preferences(model_type, labels)
        return self._preferences[model_type]

    def zones(self, names: Iterable[str]) -> list[str]:
        """Returns the zone of each of these pods, without pods that are not known."""
        return [self._pods[name].zone for name in names if name in self._pods]

    @property
    def capacity_bytes(self) -> int:
        """The capacity of all pods, in bytes of host and device memory together."""
        return sum(pod.capacity_bytes + pod.device_capacity_bytes for pod in self._pods.values())

    @property
    def free_share(self) -> float:
        """The free share of all capacity, from 0 to 1. For each pod, the fuller of its two memories counts."""
        free = 0.0
        for pod in self._pods.values():
            capacity = Footprint(pod.capacity_bytes, pod.device_capacity_bytes)
            used = Footprint(pod.used_bytes, pod.device_used_bytes).share_of(capacity)
            free += max(0.0, 1 - used) * capacity.total_bytes
        return free / max(1, self.capacity_bytes)

    @property
    def oldest_idle_ms(self) -> int:
        """The idle time of the mesh's least recently used copy, in milliseconds; 0 if there is none."""
        return max((pod.oldest_idle_ms for pod in self._pods.values()), default=0)
