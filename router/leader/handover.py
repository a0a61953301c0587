"""Handovers: copies of draining pods are loaded in other pods, and then unloaded.

A draining pod has little time, so handovers do not wait for the leader's rounds.
"""

import asyncio
from collections.abc import Callable, Iterator

from mesh.process.tasks import Tasks
from mesh.telemetry import logs
from placement import drain
from placement.actions import Action, ActionKind
from placement.footprint import Footprint
from placement.pod import Candidate as Candidate
from router.leader.carrying import Carrying
from router.leader.observing import Observer
from router.state.dynamic import Current
from router.state.pods import Copy, Pod
from router.state.view import View

log = logs.get(__name__)

LOOK = 0.1
"""Seconds between two checks of a draining pod."""

SETTLE = 0.5
"""Seconds between the time when the leader sees a copy in another pod and the unloading of the draining pod's copy. The
views of other routers may be behind the leader's by this much. Without the pause, their calls would wait for a load."""


class Handover:
    """The handovers of one leader. `candidates` and `settings` return current values. `idle` returns the milliseconds
    since each model's last use, as agents reported them; the handovers add newer reports."""

    def __init__(
        self,
        *,
        view: View,
        observer: Observer,
        carrying: Carrying,
        candidates: Callable[[], list[Candidate]],
        settings: Callable[[], Current],
        idle: Callable[[], dict[str, int]],
    ) -> None:
        self._view = view
        self._observer = observer
        self._carrying = carrying
        self._candidates = candidates
        self._settings = settings
        self._idle = idle
        self._leaving: dict[str, asyncio.Task[None]] = {}
        self._seen: dict[tuple[str, str], float] = {}  # when a model was first seen loaded in a pod
        self._tasks = Tasks()

    def due(self) -> bool:
        """Returns whether a pod is draining but not being emptied yet."""
        return next(self._about_to_leave(), None) is not None

    def begin(self) -> None:
        """Begins to empty the draining pods that are not being emptied yet."""
        for pod in list(self._about_to_leave()):
            self._leaving[pod.name] = self._tasks.start(self._hand_over(pod), f"empty {pod.name}")

    async def close(self) -> None:
        """Stops the handovers under way. Agents continue what they were asked to do."""
        await self._tasks.close()

    def _about_to_leave(self) -> Iterator[Pod]:
        for pod in self._view.pods.values():
            if pod.leaving and not pod.suspect and pod.copies and pod.name not in self._leaving:
                yield pod

    async def _hand_over(self, pod: Pod) -> None:
        """Moves a draining pod's copies to other pods, as far as their memory and the time allow, and unloads the
        rest."""
        try:
            await self._empty(pod)
        finally:
            self._leaving.pop(pod.name, None)
            if not self._leaving:
                self._seen.clear()

    async def _empty(self, pod: Pod) -> None:
        log.info("a pod leaves: its copies are loaded in other pods", pod=pod.name, copies=len(pod.copies))
        unmet: dict[str, str] = {}
        while self._view.pods.get(pod.name) is pod and pod.leaving and pod.copies:
            async for idle in self._observer.idle(pod):
                self._idle().update(idle)
            held = [self.held(copy) for copy in list(pod.copies.values()) if copy.callable]
            plan = drain.plan(
                pod.name,
                held,
                self._candidates(),
                constraints=self._settings().constraints,
                avoided=self._carrying.avoided(),
            )
            self._carrying.begin(plan.actions)
            unmet = {one.model_id: one.why for one in plan.unmet}
            here = {copy.model_id for copy in held}
            waiting = any(copy.loading_in or not copy.settled for copy in held)
            moving = waiting or any(model in here for model, _ in self._carrying.under_way())
            if not plan.actions and not moving:
                break
            await asyncio.sleep(LOOK)
        for model_id, why in unmet.items():
            log.info("no other pod can take a copy of a pod that leaves", model=model_id, pod=pod.name, why=why)
        # The pod need not wait for copies that will not move.
        left = [
            Action(ActionKind.UNLOAD, copy.model, pod.name, "the pod leaves, and no other pod has room")
            for copy in list(pod.copies.values())
        ]
        await asyncio.gather(*self._carrying.begin(left), return_exceptions=True)

    def held(self, copy: Copy) -> drain.DrainingCopy:
        """Returns a copy in the form that `placement.drain` takes."""
        others = [other for other in self._view.known(copy.model) if other.pod is not copy.pod]
        loading = {pod for model, pod in self._carrying.loading() if model == copy.model and pod != copy.pod.name}
        # A copy that is only known from an agent's answer is not known to other routers yet: they would find none.
        ready = [o for o in others if o.callable and not o.answered and not o.pod.leaving]
        now = asyncio.get_running_loop().time()
        loaded = {o.pod.name for o in ready}
        settled = [o for o in ready if now - self._seen.setdefault((o.model, o.pod.name), now) >= SETTLE]
        loading |= {o.pod.name for o in others if o.pod.name not in loaded and not o.pod.leaving}
        return drain.DrainingCopy(
            copy.model,
            Footprint(copy.record.host_bytes, copy.record.device_bytes),
            self._idle().get(copy.model, copy.record.age_ms),
            copy.record.type,
            tuple(sorted(loaded)),
            tuple(sorted(loading - loaded)),
            not ready or bool(settled),
        )
