"""The steps that move one model's copies to new content: the present copies, the requests to agents, and how their
answers affect the next step. `placement.reload` chooses the next step; `reloading` begins and reports moves.

If a pod has no room for both contents, or its agent does not answer, the move notes this, and the next step takes it
into account. A move fails only if the new content cannot be loaded.
"""

import asyncio
import time
from collections.abc import Callable, Mapping

from mesh.pb import agent_pb2
from mesh.statuses import Reason
from placement import reload
from placement.choice import Choice
from placement.footprint import Footprint
from router.leader.orders import Orders
from router.loads.agents import Unreachable
from router.state.pods import Pod
from router.state.registry import Registration
from router.state.view import View

_AGAIN = 1.0  # seconds after which an agent that did not answer is asked again
_QUIET_MS = 60_000  # the least time for which a model that agents do not report counts as idle
_NO_ROOM = (Reason.NO_ROOM.name, Reason.NOWHERE.name)

Choose = Callable[[Registration, Footprint, Mapping[str, str], int], Choice]
"""A function that chooses a pod, given the registration, its footprint, the excluded pods with the reasons, and the
milliseconds since the model's last use."""


class Move:
    """The facts that one move has learned about pods."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.no_room: dict[str, str] = {}  # pods that cannot hold both contents, and why
        self._silent: dict[str, tuple[float, str]] = {}  # until when a silent pod is not asked again, and why

    def hush(self, pod: str, why: str) -> None:
        """Notes that the agent of a pod does not answer, so that it is not asked for a second. The pod may have died
        with all its copies."""
        self._silent[pod] = (time.monotonic() + _AGAIN, why)

    def hear(self, pod: str) -> None:
        """Notes that the agent of a pod has answered."""
        self._silent.pop(pod, None)

    @property
    def waits_for(self) -> str:
        """The reason why the move waits for an agent, or "" if all have answered."""
        return next((why for _, why in self._silent.values()), "")

    def silent(self, pod: str) -> bool:
        """Returns whether a pod must not be asked now."""
        return self._silent.get(pod, (0.0, ""))[0] > time.monotonic()

    def silences(self) -> dict[str, str]:
        """Returns the pods that must not be asked now, with the reasons."""
        return {pod: "does not answer" for pod in self._silent if self.silent(pod)}


class Steps:
    """The steps of one leader's moves. `idle_ms` returns the time since a model's last use, by the agents' latest
    reports, or None if they did not report it."""

    def __init__(self, *, view: View, orders: Orders, choose: Choose, idle_ms: Callable[[str], int | None]) -> None:
        self._view = view
        self._orders = orders
        self._choose = choose
        self._told_idle_ms = idle_ms

    def held(self, registration: Registration, move: Move) -> list[reload.ReloadingCopy]:
        """Returns the copies of a registration in the form that `placement.reload` takes."""
        found = []
        for copy in self._view.known(registration.model_id):
            if copy.record.create_revision != registration.created:
                continue  # the copy will be withdrawn anyway
            pod = copy.pod
            reachable = pod.record is not None and not pod.suspect and not pod.leaving and not move.silent(pod.name)
            # A copy that is only known from an agent's answer is not known to other routers yet.
            loaded = copy.callable and not (copy.answered and copy.record.generation >= registration.record.generation)
            found.append(reload.ReloadingCopy(pod.name, copy.record.generation, loaded, reachable))
        return found

    async def take(self, registration: Registration, todo: reload.ReloadStep, move: Move) -> str | None:
        """Carries out one step. Returns the reason why the new content cannot be loaded, or None if it can be loaded or
        if this is unknown."""
        if todo.elsewhere:
            return await self._load_elsewhere(registration, todo.why, move)
        loads = [self._load(registration, name, move) for name in todo.beside]
        unloads = [self._unload(registration, name, todo.why, move) for name in todo.unload]
        failures = await asyncio.gather(*loads, *unloads)
        return next((why for why in failures if why is not None), None)

    async def _load(self, registration: Registration, name: str, move: Move) -> str | None:
        pod = self._view.pods.get(name)
        if pod is None:
            return None
        idle_ms = self._idle_ms(registration.model_id)
        reply = await self._ask(registration, pod, move, idle_ms, expected=0, reason="its content was reloaded")
        if reply is None:
            return None
        match reply.WhichOneof("outcome"):
            case "loaded" if reply.loaded.generation < registration.record.generation:
                move.no_room[name] = f"the agent of {name} is of a version that cannot reload a model in place"
            case "refused" if reply.refused.reason in _NO_ROOM:
                move.no_room[name] = f"{name}: {reply.refused.text}"
            case "refused":
                return f"{name}: {reply.refused.text}"
            case "failed":
                return f"{name}: {reply.failed.text}"
        return None

    async def _load_elsewhere(self, registration: Registration, why: str, move: Move) -> str | None:
        known = list(self._view.known(registration.model_id))
        record = registration.record
        sizes = (Footprint(copy.record.host_bytes, copy.record.device_bytes) for copy in known)
        size = next((size for size in sizes if size.total_bytes), Footprint(record.host_bytes, record.device_bytes))
        idle_ms = self._idle_ms(registration.model_id)
        holders = {copy.pod.name: "holds a copy already" for copy in known} | move.silences()
        chosen = self._choose(registration, size, holders, idle_ms)
        if chosen.pod is None:
            return f"{why}; and elsewhere: {chosen.why}"
        pod = self._view.pods[chosen.pod]
        reason = f"its content was reloaded: {chosen.why}"
        reply = await self._ask(registration, pod, move, idle_ms, expected=len(known), reason=reason)
        if reply is None:
            return None
        match reply.WhichOneof("outcome"):
            case "refused":
                return f"{why}; and {chosen.pod}: {reply.refused.text}"
            case "failed":
                return f"{chosen.pod}: {reply.failed.text}"
        return None

    def _idle_ms(self, model_id: str) -> int:
        """Returns the milliseconds since the model's last use, so that its new content does not evict models used more
        recently. Agents report only models that are called; all others have been idle for a while."""
        told = self._told_idle_ms(model_id)
        if told is not None:
            return told
        return max(_QUIET_MS, min((copy.record.age_ms for copy in self._view.known(model_id)), default=0))

    async def _ask(
        self, registration: Registration, pod: Pod, move: Move, idle_ms: int, *, expected: int, reason: str
    ) -> agent_pb2.LoadReply | None:
        """Asks an agent for a load, and returns the answer. If the agent does not answer, notes this and returns
        None."""
        try:
            reply = await self._orders.load(
                registration,
                pod,
                idle_ms=idle_ms,
                reason=reason,
                expected_copies=expected,
                generation=registration.record.generation,
            )
        except Unreachable as error:
            move.hush(pod.name, error.text)
            return None
        move.hear(pod.name)
        return reply

    async def _unload(self, registration: Registration, name: str, why: str, move: Move) -> None:
        pod = self._view.pods.get(name)
        if pod is None:
            return
        reason = f"its content was reloaded: {why}, and this pod has no room for both"
        try:
            await self._orders.unload(pod, registration.model_id, reason=reason, create_revision=registration.created)
        except Unreachable as error:
            move.hush(name, error.text)
