"""The leader's requests to agents, for plans and reloads, whose answers update the view."""

import time
from collections.abc import Callable

from mesh.pb import agent_pb2
from placement.debits import Debits
from placement.footprint import Footprint
from placement.limits import TypeLimits
from router.loads import asking
from router.loads.agents import Agent, load_request
from router.state.pods import Pod
from router.state.registry import Registration
from router.state.view import View

LOAD_TIMEOUT = 300.0
"""Seconds within which an agent must answer a request to load a model."""

UNLOAD_TIMEOUT = 60.0
"""Seconds within which an agent must answer a request to unload a model."""


class Orders:
    """The requests of one leader. `limits` returns the current limits of types."""

    def __init__(self, *, view: View, agents: Agent, limits: Callable[[], TypeLimits], debits: Debits) -> None:
        self._view = view
        self._agents = agents
        self._limits = limits
        self._debits = debits
        asking.settle(view, debits, now_ms)

    async def load(
        self,
        registration: Registration,
        pod: Pod,
        *,
        idle_ms: int,
        reason: str,
        expected_copies: int,
        generation: int = 0,
        pinned: bool | None = None,
    ) -> agent_pb2.LoadReply:
        """Has a pod load a model, or update whether its copy is pinned. If `pinned` is None, the model's limits decide.
        Returns the agent's answer, and adds a loaded copy to the view. Raises Unreachable."""
        record = registration.record
        if pinned is None:
            pinned = bool(self._limits().of(record.type, record.limits).pinned)
        request = load_request(
            registration,
            idle_ms=idle_ms,
            reason=reason,
            pinned=pinned,
            expected_copies=expected_copies,
            generation=generation,
        )
        reply = await asking.load(
            pod,
            request,
            agents=self._agents,
            debits=self._debits,
            footprint=Footprint(record.host_bytes, record.device_bytes),
            now_ms=now_ms,
            timeout=LOAD_TIMEOUT,
        )
        if reply.WhichOneof("outcome") == "loaded":
            self._view.loaded(registration.model_id, pod, asking.copy_of(registration, reply.loaded))
        return reply

    async def unload(self, pod: Pod, model_id: str, *, reason: str, create_revision: int = 0) -> None:
        """Has a pod unload a model. `create_revision` restricts this to one registration, unless it is 0. Raises
        Unreachable."""
        request = agent_pb2.UnloadRequest(model_id=model_id, create_revision=create_revision, reason=reason)
        await self._agents.unload(pod, request, timeout=UNLOAD_TIMEOUT)


def now_ms() -> int:
    """Returns the time in milliseconds on the leader's monotonic clock."""
    return int(time.monotonic() * 1000)
