"""The execution of plans by requests to agents: one request at a time for each model and pod, with back-off after
failures."""

import asyncio
import time
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from typing import Any

from mesh.process.tasks import Tasks
from mesh.statuses import MeshError, Reason
from mesh.telemetry import logs
from placement.actions import Action, ActionKind
from placement.failures import FailureKind, Failures
from router.leader.orders import Orders, now_ms
from router.loads.agents import Timeout, Unreachable
from router.state.pods import News
from router.state.registry import Registry
from router.state.view import View

log = logs.get(__name__)

AT_ONCE = 32
"""Maximum number of concurrent requests to agents."""

REST = 30.0
"""Seconds of back-off for a model after a failed load; doubled after each further failure."""

REST_MOST = 900.0
"""Longest back-off of a model, in seconds."""


class _UnhealthyMeanwhile(Exception):
    """The error that the pod has become unhealthy since the load was planned, which is not the model's fault."""


@dataclass(frozen=True, slots=True)
class CarryingStatistics:
    """Counts of the actions so far."""

    loads: int
    unloads: int
    failures: int  # loads that did not succeed, without those whose agents did not answer in time


class Carrying:
    """The actions of one leader."""

    def __init__(self, *, view: View, registry: Registry, orders: Orders) -> None:
        self._view = view
        self._registry = registry
        self._orders = orders
        self._memory = Failures()  # of loads that failed
        view.listen(self._on_pod)
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._under_way: dict[tuple[str, str], tuple[asyncio.Task[None], bool]] = {}  # by model and pod; a load?
        self._resting: dict[str, tuple[float, float]] = {}  # until when, and how long the back-off was
        self._tasks = Tasks()
        self._loads = self._unloads = self._failures = 0

    def begin(self, actions: Iterable[Action]) -> list["asyncio.Task[None]"]:
        """Begins the actions, and returns their tasks. Skips an action while another one for the same model and pod is
        under way, and loads of models that back off."""
        begun = []
        for action in actions:
            names = (action.model_id, action.pod)
            if names in self._under_way or (action.kind is ActionKind.LOAD and self.resting(action.model_id)):
                continue
            loads = action.kind is ActionKind.LOAD
            work = self._load(action) if loads else self._unload(action)
            begun.append(self._begin(names, work, f"{action.kind.value} {action.model_id}", loads=loads))
        return begun

    def _begin(
        self, names: tuple[str, str], work: Coroutine[Any, Any, None], name: str, *, loads: bool
    ) -> "asyncio.Task[None]":
        task = self._tasks.start(work, name)
        self._under_way[names] = task, loads
        task.add_done_callback(lambda _: self._under_way.pop(names, None))
        return task

    def pin(self, model_id: str, pod: str, pinned: bool) -> None:
        """Tells an agent whether its copy of the model is pinned, unless a request about this copy is under way."""
        if (model_id, pod) not in self._under_way:
            self._begin((model_id, pod), self._pin(model_id, pod, pinned), f"pin {model_id}", loads=False)

    async def _pin(self, model_id: str, pod: str, pinned: bool) -> None:
        await self._ask(model_id, pod, 0, 0, "", pinned=pinned)

    def under_way(self) -> set[tuple[str, str]]:
        """Returns the requests under way, of any kind, by model and pod."""
        return set(self._under_way)

    def loading(self) -> set[tuple[str, str]]:
        """Returns the copies being loaded, by model and pod."""
        return {names for names, (_, loads) in self._under_way.items() if loads}

    def avoided(self) -> dict[str, str]:
        """Returns the pods that get no loads because loads fail there, with the reasons."""
        return self._memory.avoided(list(self._view.pods), now_ms())

    def resting(self, model_id: str) -> bool:
        """Returns whether the model backs off because its last load failed."""
        until, _ = self._resting.get(model_id, (0.0, 0.0))
        return time.monotonic() < until

    def wake(self, model_id: str) -> None:
        """Ends the back-off of a model, because the cause of its failure has been removed."""
        self._resting.pop(model_id, None)

    def statistics(self) -> CarryingStatistics:
        """Returns the counts of actions so far."""
        return CarryingStatistics(self._loads, self._unloads, self._failures)

    async def close(self) -> None:
        """Cancels the requests to agents. Agents continue what they were asked to do."""
        await self._tasks.close()

    async def _load(self, action: Action) -> None:
        try:
            async with self._turns:
                why = await self._ask(action.model_id, action.pod, action.idle_ms, action.expected_copies, action.why)
        except _UnhealthyMeanwhile:
            return
        if why is None:
            self._loads += 1
            self._resting.pop(action.model_id, None)
            return
        self._failures += 1
        _, before = self._resting.get(action.model_id, (0.0, 0.0))
        rest = min(max(REST, 2 * before), REST_MOST)
        self._resting[action.model_id] = (time.monotonic() + rest, rest)
        if len(self._resting) > 10_000:
            self._resting = {m: entry for m, entry in self._resting.items() if time.monotonic() < entry[0]}
        log.info("a planned load failed", model=action.model_id, pod=action.pod, why=why, rest=rest)

    async def _ask(
        self, model_id: str, name: str, idle_ms: int, expected: int, reason: str, *, pinned: bool | None = None
    ) -> str | None:
        """Asks an agent to load a model, or if `pinned` is not None, to change only the pinning of its copy. Returns
        the reason why the agent has not done so, or None if it has, or is still loading when the timeout passes. Raises
        _UnhealthyMeanwhile if the pod must not be asked."""
        try:
            registration = await self._registry.read(model_id)
        except MeshError as error:
            return error.text
        pod = self._view.pods.get(name)
        if registration is None or pod is None:
            return "the model or the pod has gone"
        record = registration.record
        if record.quarantined:
            return "it is quarantined"
        loads = pinned is None  # else the copy exists, and only its pinning changes
        if loads and name in self.avoided():
            raise _UnhealthyMeanwhile
        if loads:
            self._memory.tried(name, now_ms())
        try:
            reply = await self._orders.load(
                registration, pod, idle_ms=idle_ms, reason=reason, expected_copies=expected, pinned=pinned
            )
            outcome = reply.WhichOneof("outcome")
            if outcome == "loaded":
                if loads:
                    self._memory.loaded(model_id, name, now_ms())
                return None
            match outcome:
                case "refused":
                    return f"{reply.refused.reason}: {reply.refused.text}"
                case "failed":
                    if reply.failed.reason != Reason.CONTENT_CHANGED.name:  # which is not the pod's fault
                        elsewhere = any(copy.pod is not pod for copy in self._view.copies.get(model_id, ()))
                        failed, kind = reply.failed, FailureKind.named(reply.failed.kind)
                        self._memory.failed(model_id, name, now_ms(), failed.text, kind=kind, elsewhere=elsewhere)
                    return f"{reply.failed.reason}: {reply.failed.text}"
                case "elsewhere":
                    return f"{reply.elsewhere.pod} has it"
            return "it is no longer registered, or registered again"
        except Timeout:
            return None  # it is probably still loading; the next round will see
        except Unreachable as error:
            return str(error)

    def _on_pod(self, name: str, news: News) -> None:
        if news is News.GONE:
            self._memory.forget_pod(name)

    async def _unload(self, action: Action) -> None:
        pod = self._view.pods.get(action.pod)
        if pod is None:
            return
        try:
            async with self._turns:
                await self._orders.unload(pod, action.model_id, reason=action.why)
            self._unloads += 1
        except Unreachable as error:
            log.info("a copy was not unloaded", model=action.model_id, pod=action.pod, why=str(error))
