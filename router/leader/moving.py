"""The loads of a vmodel's move: as many copies of the target as the active model has, or as many as fit.

The first copy is loaded alone, so a model that cannot be loaded costs only one pod's time. The others follow together.
If a pod refuses, fails or does not answer, another pod is asked. The move fails only if no copy can be loaded at all.
If fewer copies fit than the active model has, these are enough.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from mesh.pb import agent_pb2
from mesh.statuses import Reason
from placement.choice import Choice
from placement.footprint import Footprint
from placement.vmodels.changes import NamedModel
from router.leader.orders import Orders
from router.loads.agents import Unreachable
from router.state.registry import Registration
from router.state.view import View

Choose = Callable[[Registration, Footprint, Mapping[str, str], int], Choice]
"""A function that chooses a pod, given the registration, its footprint, the excluded pods with the reasons, and the
milliseconds since the model's last use."""

PODS = 3
"""Number of pods in which the load of a target must fail before the move counts as failed."""

PATIENCE = 20.0
"""Seconds after which a move no longer waits for agents that do not answer. Two lease times."""

_LOOK = 0.03  # seconds before the second check of a move
_LOOK_MOST = 0.5
_SILENT = 1.0  # seconds for which an agent that did not answer is not asked again
_NO_ROOM = (Reason.NO_ROOM.name, Reason.NOWHERE.name)


@dataclass(slots=True)
class MoveNotes:
    """The results so far of the loads for one move."""

    most: int | None = None  # copies of the target that fit; None: not known
    began: float = field(default_factory=time.monotonic)
    looks: int = 0
    failed: dict[str, str] = field(default_factory=dict)  # pods in which a load failed, and why
    full: dict[str, str] = field(default_factory=dict)  # pods without room, and why
    silent: dict[str, tuple[float, str]] = field(default_factory=dict)  # pods not asked, until when and why

    def pause(self) -> float:
        """Returns the seconds until the next check. The pause grows, because most loads take milliseconds, but some
        take minutes."""
        self.looks += 1
        return min(_LOOK * 1.2**self.looks, _LOOK_MOST)

    @property
    def impatient(self) -> bool:
        """True once the move no longer waits for agents that do not answer."""
        return time.monotonic() - self.began > PATIENCE

    def excluded(self) -> dict[str, str]:
        """Returns the pods that must not be asked now, with the reasons."""
        now = time.monotonic()
        silences = {pod: why for pod, (until, why) in self.silent.items() if until > now}
        return {**silences, **self.full, **{pod: f"failed to load it: {why}" for pod, why in self.failed.items()}}


class Loads:
    """The loads of one leader's moves. `idle_ms` returns the time since a model's last use by the agents' latest
    reports, or None if they did not report it. `maximum` returns the most copies that a model may have, or None if
    there is no limit."""

    def __init__(
        self,
        *,
        view: View,
        orders: Orders,
        choose: Choose,
        idle_ms: Callable[[str], int | None],
        maximum: Callable[[Registration], int | None],
    ) -> None:
        self._view = view
        self._orders = orders
        self._choose = choose
        self._told_idle_ms = idle_ms
        self._maximum = maximum

    def active(self, model_id: str) -> NamedModel:
        """Returns the numbers of all and of loaded copies of an active model, including copies that answer calls
        although etcd has lost them."""
        known = list(self._view.known(model_id))
        return NamedModel(copies=len(known), loaded=sum(copy.callable for copy in known))

    def target(self, registration: Registration) -> NamedModel:
        """Returns the numbers of all and of loaded copies of a target. A copy counts as loaded only if every router
        knows it from etcd."""
        known = [c for c in self._view.known(registration.model_id) if c.record.create_revision == registration.created]
        loaded = sum(copy.callable and not copy.answered and not copy.suspect for copy in known)
        return NamedModel(copies=len(known), loaded=loaded)

    async def load(self, registration: Registration, active_id: str, notes: MoveNotes) -> str | None:
        """Loads the first copy, or all missing copies. Returns the reason why no copy can be loaded, or None if one is
        loaded or may still be loaded."""
        if registration.record.quarantined:
            return registration.record.quarantine(registration.model_id)
        target, goal = self.target(registration), max(1, self.active(active_id).loaded)
        if (maximum := self._maximum(registration)) is not None and maximum < goal:
            notes.most = goal = maximum
        wanted = 1 if not target.loaded else goal - target.copies
        if target.copies > target.loaded:  # a copy is being loaded already, or its key is on the way
            wanted = 0
        pods: list[tuple[str, str]] = []
        why = ""
        for _ in range(wanted):
            chosen = self._pod(registration, active_id, notes, [pod for pod, _ in pods])
            if chosen.pod is None:
                why = chosen.why
                break
            pods.append((chosen.pod, chosen.why))
        if wanted > 0 and not pods and (notes.impatient or not notes.silent):
            notes.most = target.copies
            return None if target.copies else _summary(notes, why)
        idle_ms = self._idle_ms(active_id, registration)
        expected = target.copies + len(pods) - 1
        await asyncio.gather(*(self._ask(registration, pod, idle_ms, expected, why, notes) for pod, why in pods))
        if len(notes.failed) >= PODS:
            notes.most = self.target(registration).copies
            return None if notes.most else _summary(notes, "")
        return None

    def _pod(self, registration: Registration, active_id: str, notes: MoveNotes, taken: list[str]) -> Choice:
        known = list(self._view.known(registration.model_id))
        record = registration.record
        size = Footprint(record.host_bytes, record.device_bytes)
        excluded = notes.excluded() | dict.fromkeys((copy.pod.name for copy in known), "holds a copy already")
        excluded |= dict.fromkeys(taken, "gets a copy already")
        return self._choose(registration, size, excluded, self._idle_ms(active_id, registration))

    def _idle_ms(self, active_id: str, registration: Registration) -> int:
        """Returns the time since the active model's last use, in milliseconds, which also counts for the target in the
        order of evictions."""
        told = self._told_idle_ms(active_id)
        if told is not None:
            return told
        ages = [copy.record.age_ms for copy in self._view.known(active_id)]
        return min(ages) if ages else max(0, int(time.time() * 1000) - registration.record.last_used_ms)

    async def _ask(
        self, registration: Registration, name: str, idle_ms: int, expected: int, why: str, notes: MoveNotes
    ) -> None:
        """Asks an agent to load the target, and notes the answer."""
        pod = self._view.pods.get(name)
        if pod is None:
            return
        reason = f"a vmodel moves to it: {why}"
        try:
            reply: agent_pb2.LoadReply = await self._orders.load(
                registration, pod, idle_ms=idle_ms, reason=reason, expected_copies=expected
            )
        except Unreachable as error:
            notes.silent[name] = time.monotonic() + _SILENT, error.text
            return
        notes.silent.pop(name, None)
        match reply.WhichOneof("outcome"):
            case "refused" if reply.refused.reason in _NO_ROOM:
                notes.full[name] = reply.refused.text
            case "refused":
                notes.failed[name] = reply.refused.text
            case "failed":
                notes.failed[name] = reply.failed.text
        # If it was loaded elsewhere, or is of another registration, the next look shows that.


def _summary(notes: MoveNotes, why: str) -> str:
    """Returns the reason why no copy could be loaded: the latest failure, an agent that did not answer, or `why`."""
    for pod, failure in reversed(list(notes.failed.items())):
        return f"{pod}: {failure}"
    for pod, (_, silence) in notes.silent.items():
        return f"{pod}: {silence}"
    return why
