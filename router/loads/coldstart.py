"""Cold starts: one load for all calls that wait for a copy of the same model.

`placement.coldstart` decides, as a state machine without I/O. This module carries out its instructions. Waiters join
and get their answers. `finder` answers requests with events. Changes of the view, and the passing of time, become
events too.

The agents' transactions in etcd decide which pod gets the claim, so two routers with different views never load a model
twice. The agent that lost names the winner, and the flight continues with the winner.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

from mesh.process.tasks import Tasks
from mesh.statuses import MeshError
from mesh.telemetry import logs
from placement.coldstart import instructions
from placement.coldstart.events import (
    Answer,
    Broke,
    Closed,
    CopiesChanged,
    Event,
    Joined,
    Left,
    PodChanged,
    TimePassed,
)
from placement.coldstart.instructions import Instruction, Request
from placement.coldstart.machine import Machine, MachineStatistics
from placement.coldstart.problems import Problem
from placement.coldstart.rules import Rules
from router.loads.agents import Agent
from router.loads.choosing import Choosing
from router.loads.counts import Counts
from router.loads.errors import error_of
from router.loads.finder import Finder
from router.settings import RouterSettings
from router.state.dynamic import Current
from router.state.pods import News
from router.state.registry import Registry
from router.state.view import View

log = logs.get(__name__)

_COLD = 10  # milliseconds above which a wait counts as a cache miss, as in ModelMesh


class Waiter(Protocol):
    """A call or management request that waits for a copy. Exactly one of the methods is called, once, unless the waiter
    leaves."""

    def on_copy(self) -> None:
        """Continues, because the view has a copy that may be called."""

    def on_error(self, error: MeshError) -> None:
        """Fails the waiter, because it gets no copy."""

    def __hash__(self) -> int: ...


class ColdStart:
    """The cold starts of one worker. `wall` returns milliseconds since the epoch, for the times in records."""

    def __init__(
        self,
        *,
        view: View,
        registry: Registry,
        agents: Agent,
        meter: Counts,
        settings: RouterSettings,
        current: Callable[[], Current] = Current,
        wall: Callable[[], int] = lambda: int(time.time() * 1000),
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._view = view
        self._registry = registry
        self._meter = meter
        self._machine = Machine(_rules(settings))
        self.choosing = Choosing(view, now=self._loop.time, current=current)
        self._finder = Finder(
            view=view,
            registry=registry,
            agents=agents,
            choosing=self.choosing,
            counts=meter,
            wall=wall,
            timeout=settings.load_wait,
        )
        self._watches: dict[
            str, Callable[[], None]
        ] = {}  # by model with a flight under way: the function that ends the watch
        self._timer: asyncio.TimerHandle | None = None
        self._tasks = Tasks()
        view.listen(self._on_pod)

    # --- waiting ---

    def join(
        self,
        model_id: str,
        waiter: Waiter,
        *,
        size: int,
        deadline: float | None,
        idle_ms: int = 0,
        until_asked: bool = False,
    ) -> None:
        """Adds a waiter for a copy, and starts a load if none is under way. `size` is the number of bytes that the
        waiter keeps in memory meanwhile. `deadline` is on the loop's clock. With `until_asked`, `on_copy` is called as
        soon as an agent was asked to load the model. Raises MeshError: OVERLOADED, NOT_IN_TIME, DEADLINE, UNAVAILABLE.

        The waiter's methods are called later, never from within this call.
        """
        deadline_ms = None if deadline is None else round(deadline * 1000)
        refusal: Problem | None = None
        for instruction in self._machine.handle(
            Joined(self.choosing.now_ms(), model_id, waiter, size, deadline_ms, idle_ms, until_asked)
        ):
            if isinstance(instruction, instructions.TellProblem):
                refusal = instruction.problem
            else:
                for request in self._carry(instruction):
                    self._begin(request)
        if refusal is not None:
            raise error_of(refusal)

    def leave(self, model_id: str, waiter: Waiter) -> None:
        """Removes a waiter whose caller has gone. Its methods are not called. The load continues."""
        self._feed(Left(self.choosing.now_ms(), model_id, waiter))

    async def load(self, model_id: str, *, idle_ms: int = 0, deadline: float | None = None) -> None:
        """Waits until a copy is available. `deadline` is on the loop's clock. Raises MeshError if the load or the wait
        fails."""
        await self._wait(model_id, idle_ms=idle_ms, deadline=deadline)

    async def begin(self, model_id: str, *, idle_ms: int = 0) -> None:
        """Waits until an agent has been asked to load the model, or a copy is available. Raises MeshError if no agent
        could be asked."""
        await self._wait(model_id, idle_ms=idle_ms, until_asked=True)

    async def _wait(self, model_id: str, *, deadline: float | None = None, **more: Any) -> None:
        waiter = _Future(self._loop)
        self.join(model_id, waiter, size=0, deadline=deadline, **more)
        try:
            await waiter.future
        finally:
            self.leave(model_id, waiter)

    def loading(self, model_id: str) -> bool:
        """Returns whether a flight of this model is under way in this worker."""
        return self._machine.loading(model_id)

    def statistics(self) -> MachineStatistics:
        """Returns the current numbers of flights and waiters."""
        return self._machine.statistics()

    async def close(self) -> None:
        """Fails all waiters, because this router is stopping. The agents continue their loads."""
        self._feed(Closed(self.choosing.now_ms()))
        if self._timer is not None:
            self._timer.cancel()
        await self._tasks.close()

    # --- events ---

    def _feed(self, event: Event) -> None:
        """Passes an event to the state machine. Requests that take time are answered in the background."""
        for request in self._follow(event):
            self._begin(request)

    def _follow(self, event: Event) -> Sequence[Request]:
        """Passes an event to the state machine, and carries out the resulting instructions. Returns the requests that
        take time."""
        try:
            given = self._machine.handle(event)
        except Exception:
            log.exception("a cold start cannot continue", happened=type(event).__name__)
            if isinstance(event, Answer) and not isinstance(event, Broke):
                return self._follow(Broke(event.now_ms, event.model_id, event.answers))
            return ()
        return [request for instruction in given for request in self._carry(instruction)]

    def _on_time(self) -> None:
        self._timer = None
        self._feed(TimePassed(self.choosing.now_ms()))

    def _on_copies(self, model_id: str) -> None:
        self._feed(CopiesChanged(self.choosing.now_ms(), model_id))

    def _on_pod(self, name: str, news: News) -> None:
        self._feed(PodChanged(self.choosing.now_ms(), name, news is News.GONE))

    # --- instructions ---

    def _carry(self, instruction: Instruction) -> Sequence[Request]:
        """Carries out one instruction. Returns the requests that take time: the instruction itself, or those that
        follow its answer."""
        match instruction:
            case instructions.Release():
                self._release(instruction)
            case instructions.Look():
                return self._answer(instruction, self._finder.look)
            case instructions.Choose():
                return self._answer(instruction, self._finder.choose)
            case instructions.Ask() | instructions.Read():
                return (instruction,)
            case instructions.Recall(_, model_id):
                self._watches[model_id] = self._view.watch(model_id, lambda: self._on_copies(model_id))
                return (instruction,)
            case instructions.Ended(_, model_id):
                self._watches.pop(model_id)()
                self._finder.forget(model_id)
            case instructions.ForgetRecord(_, model_id):
                self._registry.forget(model_id)
            case instructions.Hurry(_, model_id):
                self._tasks.start(self._finder.hurry(instruction), f"hurry {model_id}")
            case instructions.WaitUntil(_, at_ms):
                if self._timer is not None:
                    self._timer.cancel()
                self._timer = self._loop.call_at(at_ms / 1000, self._on_time)
        return ()

    def _answer(self, request: Any, find: Callable[[Any], Answer]) -> Sequence[Request]:
        try:
            answer = find(request)
        except Exception as error:
            answer = self._broke(request, error)
        return self._follow(answer)

    def _begin(self, request: Request) -> None:
        self._tasks.start(self._find_out(request), f"load {request.model_id}")

    async def _find_out(self, request: Request) -> None:
        """Answers a request and the next ones of the same flight, so that one task serves a flight that does not
        pause."""
        following: Sequence[Request] = (request,)
        while following:
            (request,) = following
            try:
                answer = await self._finder.find_out(request)
            except Exception as error:
                answer = self._broke(request, error)
            following = self._follow(answer)

    def _broke(self, request: Request, error: Exception) -> Answer:
        log.error("a cold start failed in the router's own code", model=request.model_id, exc_info=error)
        return Broke(self.choosing.now_ms(), request.model_id, request.cause)

    def _release(self, instruction: instructions.Release) -> None:
        if instruction.waited_ms > _COLD:
            self._meter.misses.observe(instruction.waited_ms)
        waiter = cast(Waiter, instruction.waiter)
        try:
            match instruction:
                case instructions.TellCopy() | instructions.TellAsked():
                    waiter.on_copy()
                case instructions.TellProblem():
                    waiter.on_error(error_of(instruction.problem))
        except Exception:
            log.exception("a waiter failed when it was told the outcome of a cold start")


class _Future:
    """A waiter for coroutines."""

    __slots__ = ("future",)

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.future: asyncio.Future[None] = loop.create_future()

    def on_copy(self) -> None:
        """Ends the wait."""
        if not self.future.done():
            self.future.set_result(None)

    def on_error(self, error: MeshError) -> None:
        """Ends the wait with an error."""
        if not self.future.done():
            self.future.set_exception(error)


def _rules(settings: RouterSettings) -> Rules:
    return Rules(
        load_wait_ms=round(settings.load_wait * 1000),
        max_waiters=settings.max_waiters,
        max_waiters_per_model=settings.max_waiters_per_model,
        max_waiting_bytes=settings.max_waiting_bytes,
        failure_expiry_ms=round(settings.failure_expiry * 1000),
    )
