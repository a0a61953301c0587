"""The preloading of the most recently used models into free memory, after a restart and in new pods.

A mesh that was stopped completely starts again with empty pods and a registry of thousands of models. The leader has
the most recently used models loaded, a few at a time, so that calls do not have to wait for a load. Loads that a call
waits for always come first (see `placement.preload`).
"""

import asyncio
import time
from collections.abc import Callable, Sequence

from placement import preload
from placement.actions import Plan
from placement.footprint import Footprint
from placement.pod import Candidate
from router.leader.carrying import Carrying
from router.leader.observing import Observer
from router.leader.recency import Recency
from router.state.dynamic import Current
from router.state.view import View

CANDIDATES = 128
"""Largest number of models that are considered in one round."""

REST = 60.0
"""Seconds for which a model is not considered again if no pod has room for it, or if it may not be loaded."""


class Warming:
    """The preloads of one leader."""

    def __init__(
        self, *, view: View, observer: Observer, recency: Recency, carrying: Carrying, failure_expiry: float
    ) -> None:
        """Makes the preloads of a leader. `failure_expiry` is the time after a failed load in which a model is not
        preloaded, in seconds."""
        self._view = view
        self._failure_expiry_ms = int(failure_expiry * 1000)
        self._observer = observer
        self._recency = recency
        self._carrying = carrying
        self._loop = asyncio.get_running_loop()
        self._resting: dict[str, float] = {}  # by model: until when it is not considered

    async def plan(self, pods: Sequence[Candidate], settings: Current, *, wanted: Callable[[str], bool]) -> Plan:
        """Returns the loads to begin now, except for the `wanted` models, which another plan covers. Raises
        EtcdError."""
        if not any(pod.accepts and preload.has_space(pod) for pod in pods):
            return Plan(())
        now = self._loop.time()
        self._resting = {model_id: until for model_id, until in self._resting.items() if until > now}
        loading = {model_id for model_id, _ in self._carrying.loading()}
        newest = self._recency.newest(
            CANDIDATES,
            without=lambda model_id: (
                bool(self._view.known(model_id))
                or model_id in loading
                or model_id in self._resting
                or wanted(model_id)
                or self._carrying.resting(model_id)
            ),
        )
        if not newest:
            return Plan(())
        found = await self._observer.registrations([model_id for model_id, _ in newest])
        self._recency.forget(model_id for model_id, registration in found.items() if registration is None)
        idle = []
        for model_id, idle_ms in newest:
            registration = found.get(model_id)
            if registration is None:
                continue
            record = registration.record
            if record.quarantined or record.recent_failures(int(time.time() * 1000), self._failure_expiry_ms):
                self._resting[model_id] = now + REST
                continue
            footprint = Footprint(record.host_bytes, record.device_bytes)
            idle.append(preload.Idle(model_id, footprint, idle_ms, record.type))
        plan = preload.plan(idle, pods, constraints=settings.constraints, avoided=self._carrying.avoided())
        if not plan.actions:  # none of these models finds room: consider others next time
            self._resting |= {one.model_id: now + REST for one in idle}
        return plan
