"""What the slow loops ask for: a copy here, none there. The same list carried out twice has the effect of once.

An action names the model and the pod, so an agent that has the copy already, or has none to let go, is done at once;
and two leaders that see the same mesh for a moment ask for the same.
"""

import enum
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from placement.constraints import NONE, Constraints
from placement.footprint import Footprint
from placement.pod import Pod


class Kind(enum.Enum):
    """What is to be done."""

    LOAD = "load"
    UNLOAD = "unload"


@dataclass(frozen=True, slots=True)
class Action:
    """One change of one copy."""

    kind: Kind
    model_id: str
    pod: str
    why: str
    idle_ms: int = 0  # of a load: it takes no room from copies that were used more recently than this
    expected_copies: int = 0  # of a load: how many the model has without it, for the claim


@dataclass(frozen=True, slots=True)
class Unmet:
    """What would be wanted and cannot be done now."""

    model_id: str
    why: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done now, what cannot be, and how much waits for another round because too much moves already."""

    actions: tuple[Action, ...]
    unmet: tuple[Unmet, ...] = ()
    put_off: int = 0


class Room:
    """The pods by name, corrected by the loads of the plan that is being made."""

    __slots__ = ("_constraints", "_pods", "_preferences")

    def __init__(self, pods: Iterable[Pod], constraints: Constraints = NONE) -> None:
        self._constraints = constraints
        self._preferences: dict[str, Mapping[frozenset[str], bool]] = {}  # by type, as they are asked for
        self._pods = {pod.name: pod for pod in sorted(pods, key=lambda pod: pod.name)}

    def __iter__(self) -> Iterator[Pod]:
        return iter(self._pods.values())

    def __getitem__(self, name: str) -> Pod:
        return self._pods[name]

    def get(self, name: str) -> Pod | None:
        """A pod, where it is there."""
        return self._pods.get(name)

    def take(self, name: str, footprint: Footprint) -> None:
        """A load is sent there."""
        pod = self._pods[name]
        need = footprint.on(device=pod.has_device)
        self._pods[name] = pod.with_more(
            used_bytes=need.host_bytes, device_used_bytes=need.device_bytes, copies=1, loads_in_progress=1
        )

    def preferences(self, model_type: str) -> Mapping[frozenset[str], bool] | None:
        """Which labels of pods that type prefers, stated or inferred; None where no type asks anything."""
        if self._constraints is NONE:
            return None
        if model_type not in self._preferences:
            labels = {pod.labels for pod in self._pods.values()}
            self._preferences[model_type] = self._constraints.preferences(model_type, labels)
        return self._preferences[model_type]

    def zones(self, names: Iterable[str]) -> list[str]:
        """The zones of those pods."""
        return [self._pods[name].zone for name in names if name in self._pods]

    @property
    def capacity_bytes(self) -> int:
        """Of all pods, both memories."""
        return sum(pod.capacity_bytes + pod.device_capacity_bytes for pod in self._pods.values())

    @property
    def free_share(self) -> float:
        """Of that, how much is free: in each pod, of the memory that is fuller."""
        free = 0.0
        for pod in self._pods.values():
            capacity = Footprint(pod.capacity_bytes, pod.device_capacity_bytes)
            used = Footprint(pod.used_bytes, pod.device_used_bytes).share_of(capacity)
            free += max(0.0, 1 - used) * capacity.total_bytes
        return free / max(1, self.capacity_bytes)

    @property
    def oldest_idle_ms(self) -> int:
        """How long the stalest copy of the mesh has been idle."""
        return max((pod.oldest_idle_ms for pod in self._pods.values()), default=0)
