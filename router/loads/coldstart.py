"""From "no copy that can be called" to a copy: one load for all who wait for the same model.

Whoever needs a copy joins the model's *flight*. The flight reads the record, lets `placement` choose a pod, asks that
pod's agent, and goes on with what it answers until there is a copy or a reason why there is none. Each waiter has its
own deadline and may leave; the flight goes on without waiters, because the next caller will want the model too.

Waiters, and the bytes of the messages they hold, are bounded for each model and in all.

What a flight learns is written where it belongs: copies into the view, debits for placement; failures of loads are put
into the model's record by the agents. Who may claim a model is decided by the agents' transactions in etcd, so two
routers with two views never load it twice: the loser's agent names the winner, and the flight goes there.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from mesh.pb import agent_pb2
from mesh.process.tasks import Tasks
from mesh.schema import records
from mesh.statuses import MeshError, Reason
from mesh.telemetry import logs
from placement import choice
from placement.constraints import NONE
from placement.debits import Debits
from placement.failures import Failure, Failures, Kind, Standing, hint
from placement.footprint import SESSION_BYTES, Footprint
from placement.pod import Pod as Candidate
from router.calls.meter import Meter
from router.loads import asking
from router.loads.agents import Agent, Timeout, Unreachable, load_request
from router.settings import RouterSettings
from router.state.dynamic import Current
from router.state.registry import Registration, Registry
from router.state.view import Copy, News, Pod, View

log = logs.get(__name__)

MAX_REFUSALS = 5
"""Pods that are asked in one go before the last refusal is the answer."""

PATIENCE = 10.0
"""Seconds that a flight waits for pods to come back or claims of dead pods to end before it gives up. A lease time."""

_WAITED = 1.0  # seconds: an agent that refuses later than this has waited for room, with whoever waited for it
_PAUSE = 0.5  # seconds between looks, where no change of the view wakes it earlier
_MAX_STALE = 5  # answers "stale" for a record just read
_COLD = 10.0  # milliseconds above which a wait counts as a cache miss, as with the predecessor


class Waiter(Protocol):
    """A call, or a management request, that waits for a copy. Exactly one of the two is called, once."""

    def on_copy(self) -> None:
        """There is a copy in the view that may be called."""

    def on_error(self, error: MeshError) -> None:
        """There will be none for you."""


@dataclass(frozen=True, slots=True)
class ColdStartStatistics:
    """What waits now."""

    flights: int
    waiters: int
    bytes: int  # of the messages that waiters hold


class _Place:
    """One waiter's place in a flight."""

    __slots__ = ("deadline", "joined", "number", "size", "timer")

    def __init__(self, number: int, joined: float, size: int, deadline: float | None) -> None:
        self.number = number  # in the order of arrival
        self.joined = joined
        self.size = size
        self.deadline = deadline
        self.timer: asyncio.TimerHandle | None = None


class _Flight:
    """One model's way to a copy."""

    __slots__ = (
        "asked",
        "asked_at",
        "began",
        "bytes",
        "changed",
        "excluded",
        "expected",
        "failed",
        "idle_ms",
        "model_id",
        "quiet",
        "refusals",
        "waiters",
        "why",
    )

    def __init__(self, model_id: str, began: float, idle_ms: int) -> None:
        self.why = ""  # it is loaded, and where
        self.model_id = model_id
        self.began = began
        self.idle_ms = idle_ms  # time since the model's last use; 0 once a call waits
        self.waiters: dict[Waiter, _Place] = {}
        self.bytes = 0
        self.expected: float | None = None  # when the load should be done, on the loop's clock
        self.changed = asyncio.Event()  # the view has changed for this model, or pods have
        self.asked = asyncio.Event()  # an agent has been asked
        self.asked_at = 0.0  # when the last one was
        self.quiet: tuple[Pod, agent_pb2.LoadRequest] | None = None  # what one is asked now, while no call waits
        self.excluded: dict[str, str] = {}  # pods not to choose, and why
        self.failed: set[str] = set()  # pods in which it failed
        self.refusals: list[tuple[Reason, str]] = []


class _Again(Exception):
    """Nothing can be done right now; look again after a change of the view, or soon. `why` if that lasts."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class _Next(Exception):
    """That agent cannot be reached; another may."""


class ColdStart:
    """The flights of one worker. `wall` gives ms since the epoch, for the times in records."""

    def __init__(
        self,
        *,
        view: View,
        registry: Registry,
        agents: Agent,
        meter: Meter,
        settings: RouterSettings,
        current: Callable[[], Current] = Current,
        wall: Callable[[], int] = lambda: int(time.time() * 1000),
    ) -> None:
        self._view = view
        self._registry = registry
        self._agents = agents
        self._meter = meter
        self._current = current
        self._settings = settings
        self._wall = wall
        self._debits = Debits()
        self._failures = Failures(expiry_ms=int(settings.failure_expiry * 1000))
        self._flights: dict[str, _Flight] = {}
        self._waiters = 0
        self._arrivals = 0
        self._bytes = 0
        self._tasks = Tasks()
        self._loop = asyncio.get_running_loop()
        self._closed = False
        asking.settle(view, self._debits, self._now_ms)
        view.listen(self._on_pod)

    # --- waiting ---

    def join(self, model_id: str, waiter: Waiter, *, size: int, deadline: float | None, idle_ms: int = 0) -> None:
        """Waits for a copy, and has it made. `size` is what the waiter holds meanwhile, in bytes; `deadline` is on the
        loop's clock. Raises MeshError: OVERLOADED, NOT_IN_TIME, DEADLINE, UNAVAILABLE.

        The waiter is told later, never from within this call.
        """
        settings = self._settings
        now = self._loop.time()
        if self._closed:
            raise MeshError(Reason.UNAVAILABLE, "this router is stopping")
        if deadline is not None and deadline <= now:
            raise MeshError(Reason.DEADLINE, "the deadline has passed")
        if self._waiters >= settings.max_waiters:
            raise MeshError(Reason.OVERLOADED, f"{self._waiters} calls wait for models to load", retry_after=1.0)
        if self._bytes + size > settings.max_waiting_bytes:
            text = f"calls that wait for models to load hold {self._bytes} bytes"
            raise MeshError(Reason.OVERLOADED, text, retry_after=1.0)
        flight = self._flights.get(model_id)
        if flight is not None and len(flight.waiters) >= settings.max_waiters_per_model:
            text = f"{len(flight.waiters)} calls wait for model {model_id} to load"
            raise MeshError(Reason.OVERLOADED, text, retry_after=1.0)
        if flight is None:
            flight = self._begin(model_id, now, idle_ms)
        self._arrivals += 1
        place = _Place(self._arrivals, now, size, deadline)
        if (late := self._too_late(flight, place, now)) is not None:
            raise late
        flight.idle_ms = min(flight.idle_ms, idle_ms)
        if flight.quiet is not None and not flight.idle_ms:
            quiet, flight.quiet = flight.quiet, None
            self._tasks.start(self._hurry(*quiet), f"hurry {model_id}")
        flight.waiters[waiter] = place
        flight.bytes += size
        self._waiters += 1
        self._bytes += size
        limit = now + settings.load_wait
        when = limit if deadline is None else min(limit, deadline)
        place.timer = self._loop.call_at(when, self._expire, flight, waiter)

    def leave(self, model_id: str, waiter: Waiter) -> None:
        """The waiter has gone; it is not told anything. The load goes on."""
        flight = self._flights.get(model_id)
        if flight is not None and waiter in flight.waiters:
            self._release(flight, waiter)

    async def load(self, model_id: str, *, idle_ms: int = 0, deadline: float | None = None) -> None:
        """Returns once there is a copy. Raises MeshError for what kept it from being made, or from being waited for."""
        waiter = _Future(self._loop)
        self.join(model_id, waiter, size=0, deadline=deadline, idle_ms=idle_ms)
        try:
            await waiter.future
        finally:
            self.leave(model_id, waiter)

    async def begin(self, model_id: str, *, idle_ms: int = 0) -> None:
        """Returns once an agent was asked to load it, or there is a copy. Raises what kept it from being asked."""
        waiter = _Future(self._loop)
        self.join(model_id, waiter, size=0, deadline=None, idle_ms=idle_ms)
        asked = self._tasks.start(_until(self._flights[model_id].asked), f"asked {model_id}")
        try:
            await asyncio.wait((waiter.future, asked), return_when=asyncio.FIRST_COMPLETED)
            if waiter.future.done():
                waiter.future.result()
        finally:
            asked.cancel()
            waiter.future.cancel()
            self.leave(model_id, waiter)

    def loading(self, model_id: str) -> bool:
        """Whether a flight of this model is under way here."""
        return model_id in self._flights

    def candidates(self, model_id: str) -> list[Candidate]:
        """The pods as a load would look at them now, what was just sent to them included."""
        return self._debits.apply(self._view.candidates(self._loop.time(), model_id), self._now_ms())

    def choose(
        self, model_id: str, record: records.ModelRecord, *, excluded: Mapping[str, str], idle_ms: int = 0
    ) -> choice.Choice:
        """Where a load of the model would go now. `excluded` are pods not to use, and why.

        What was just sent to a pod may be counted twice for a while, once as sent and once as published. That is good
        enough to prefer another one, but no reason to refuse: then the agents decide, who know."""
        published = self._view.candidates(self._loop.time(), model_id)
        asked = self._current().constraints
        preferences = asked.preferences(record.type, {pod.labels for pod in published}) if asked is not NONE else None
        holders = {copy.pod.name for copy in self._view.known(model_id)}

        def choose(pods: list[Candidate]) -> choice.Choice:
            return choice.choose(
                model_id,
                self.footprint_of(record),
                pods,
                excluded=excluded,
                idle_ms=idle_ms,
                constraint=asked.of(record.type),
                preferences=preferences,
                zones=[pod.zone for pod in pods if pod.name in holders],
            )

        debited = self._debits.apply(published, self._now_ms())
        chosen = choose(debited)
        return choose(published) if chosen.verdict is choice.Verdict.NO_ROOM and debited != published else chosen

    def footprint_of(self, record: records.ModelRecord) -> Footprint:
        """What a load is reckoned with: measured by an earlier one, else what copies here have on the average, those on
        devices where there are any."""
        if record.host_bytes:
            return Footprint(record.host_bytes, record.device_bytes)
        pods = [pod.record for pod in self._view.pods.values() if pod.record is not None]
        devices = [pod for pod in pods if pod.device_capacity_bytes and pod.copies]
        seen = devices or pods
        on_devices = [pod.device_capacity_bytes for pod in pods if pod.device_capacity_bytes]
        copies = sum(pod.copies for pod in seen) or 1
        # A guess must never be the reason why a model is refused, by a pod of either kind.
        host = min([sum(pod.used_bytes for pod in seen) // copies, *(pod.capacity_bytes for pod in pods)])
        device = min(
            [
                sum(pod.device_used_bytes for pod in seen) // copies,
                *on_devices,
                *(pod.capacity_bytes - host for pod in pods),
            ]
        )
        if not device:
            host = min([host, *(max(0, capacity - SESSION_BYTES) for capacity in on_devices)])
        return Footprint(host, device)

    def nowhere(self, model_id: str, record: records.ModelRecord) -> str:
        """Why no pod can ever hold the model, by what it was measured to need; "" where one can, or nobody knows."""
        if not record.host_bytes and not record.device_bytes:
            return ""
        chosen = self.choose(model_id, record, excluded={})
        return chosen.why if chosen.verdict is choice.Verdict.NOWHERE else ""

    def statistics(self) -> ColdStartStatistics:
        """What waits now."""
        return ColdStartStatistics(len(self._flights), self._waiters, self._bytes)

    async def close(self) -> None:
        """Tells all waiters that this router stops. The agents go on with what they load."""
        self._closed = True
        await self._tasks.close()
        for flight in list(self._flights.values()):
            self._end(flight, MeshError(Reason.UNAVAILABLE, "this router is stopping"))

    # --- one flight ---

    def _begin(self, model_id: str, now: float, idle_ms: int) -> _Flight:
        flight = self._flights[model_id] = _Flight(model_id, now, idle_ms)
        self._tasks.start(self._fly(flight), f"load {model_id}")
        return flight

    async def _fly(self, flight: _Flight) -> None:
        unwatch = self._view.watch(flight.model_id, flight.changed.set)
        error: MeshError | None = None
        try:
            await self._find(flight)
        except MeshError as failure:
            error = failure
        except Exception as failure:
            log.exception("cold start failed", model=flight.model_id)
            error = MeshError(Reason.INTERNAL, f"loading {flight.model_id} failed inside the router: {failure!r}")
        finally:
            unwatch()
        self._end(flight, error)

    async def _find(self, flight: _Flight) -> None:
        """Returns once the view has a copy; raises MeshError for why there is none."""
        registration = self._registry.remembered(flight.model_id)
        if registration is None or registration.record.failures or registration.record.killed:
            registration = await self._read(flight)
        waiting_since: float | None = None
        joined: Pod | None = None  # to be asked next, because it is said to have the copy or to be making it
        stale = 0
        while True:
            now = self._loop.time()
            flight.changed.clear()
            if self._usable(registration) is not None:
                return
            try:
                pod = joined or self._claimed(flight, registration) or self._choose(flight, registration)
                joined = None
                reply = await self._ask(flight, pod, registration)
                match reply.WhichOneof("outcome"):
                    case "loaded":
                        if self._loaded(pod, registration, reply.loaded) is None:
                            raise _Again(f"{pod.name} has just started anew")
                        return
                    case "elsewhere":
                        joined = self._elsewhere(flight, pod, reply.elsewhere.pod)
                    case "failed":
                        self._failed(flight, pod, registration, reply.failed)
                    case "refused":
                        if self._refused(flight, pod, reply.refused) is Reason.NOWHERE:
                            # Its record says by now what it needs: no pod is asked that is no larger.
                            self._registry.forget(flight.model_id)
                            registration = await self._read(flight, fresh=True)
                    case "stale":
                        self._registry.forget(flight.model_id)
                        before, registration = registration, await self._read(flight, fresh=True)
                        stale = stale + 1 if registration.created == before.created else 0
                        if stale:
                            if stale > _MAX_STALE:
                                text = f"{pod.name} does not accept the current registration of {flight.model_id}"
                                raise MeshError(Reason.UNAVAILABLE, text, retry_after=1.0)
                            raise _Again(f"{pod.name} has an older view of the registry")
                    case _:
                        raise _Again(f"{pod.name} gave an answer that this router does not understand")
                waiting_since = None
            except _Next:
                continue
            except _Again as again:
                waiting_since = now if waiting_since is None else waiting_since
                # Claims of pods that have died end with their leases, and pods come back; only nobody waits for ever.
                patience = self._settings.load_wait if flight.waiters else PATIENCE
                if now - waiting_since > min(patience, 3 * PATIENCE):
                    raise MeshError(Reason.UNAVAILABLE, again.why, retry_after=1.0) from None
                await self._change(flight)
                registration = await self._read(flight)

    def _usable(self, registration: Registration) -> Copy | None:
        """A copy of this registration that may be called and whose pod has not just failed."""
        for copy in self._view.copies.get(registration.model_id, ()):
            if copy.record.create_revision == registration.created and not copy.pod.failed_at:
                return copy
        return None

    def _standing(self, flight: _Flight, registration: Registration) -> Standing:
        """Where it may be loaded now, as far as its failures say."""
        return self._failures.standing(
            flight.model_id, self._view.pods, self._now_ms(), created=registration.created, tried=flight.failed
        )

    def _recall(self, registration: Registration) -> None:
        """Takes over what the record says of failures, but for those of another storage secret than a pod has now."""
        now, wall = self._now_ms(), self._wall()
        recorded = []
        for failure in registration.record.failures:
            pod = self._view.pods.get(failure.pod)
            if pod is not None and pod.record is not None and pod.record.secrets != failure.secrets:
                continue
            # Clocks of hosts differ: an age is never negative, and from the first look on it is this clock's.
            at = now - max(0, wall - failure.at_ms)
            since = at - max(0, failure.at_ms - (failure.since_ms or failure.at_ms))
            recorded.append(
                Failure(failure.pod, at, failure.text, failure.kind, since, failure.asked_ms, failure.at_ms)
            )
        self._failures.recall(registration.model_id, registration.created, recorded)

    def _claimed(self, flight: _Flight, registration: Registration) -> Pod | None:
        """A pod that is known to have a copy, or to be loading one: it is asked first, and joins us to it.

        Not where that load has failed: its claim has gone, or will have in a moment, for all that the view shows."""
        now = self._loop.time()
        failed = self._standing(flight, registration).excluded
        for copy in self._view.known(flight.model_id):
            pod = copy.pod
            if (
                copy.record.create_revision == registration.created
                and pod.record is not None
                and pod.record.incarnation == copy.record.incarnation
                and not pod.suspect
                and pod.name not in flight.excluded
                and pod.name not in failed
                and not (pod.agent_failed_at and now - pod.agent_failed_at < _PAUSE)
            ):
                return pod
        return None

    def _choose(self, flight: _Flight, registration: Registration) -> Pod:
        record = registration.record
        if record.quarantined:
            raise quarantined(flight.model_id, record)
        standing = self._standing(flight, registration)
        if standing.answer is not None:
            raise _load_failed(flight.model_id, standing, standing.answer)
        excluded = self._failures.avoided(self._view.pods, self._now_ms())
        excluded |= {**standing.excluded, **flight.excluded}
        chosen = self.choose(flight.model_id, record, excluded=excluded, idle_ms=flight.idle_ms)
        if chosen.pod is not None and len(flight.refusals) < MAX_REFUSALS:
            cause = "a call needs it" if not flight.idle_ms else "its load was asked for"
            flight.why = f"{cause}: {chosen.why}"
            return self._view.pods[chosen.pod]
        if standing.newest is not None:
            raise _load_failed(flight.model_id, standing, standing.newest)
        if chosen.verdict is choice.Verdict.NOWHERE:
            raise MeshError(Reason.NOWHERE, chosen.why)
        if chosen.verdict is choice.Verdict.NO_ROOM:
            raise MeshError(Reason.NO_ROOM, f"Nowhere available to load: {chosen.why}", retry_after=1.0)
        refusals, flight.refusals = flight.refusals, []
        for reason, text in refusals:
            if reason in (Reason.NO_ROOM, Reason.OVERLOADED):
                raise MeshError(reason, text, retry_after=1.0)
        if refusals and all(reason is Reason.NOWHERE for reason, _ in refusals):
            raise MeshError(Reason.NOWHERE, refusals[-1][1])
        if not chosen.refused:
            raise MeshError(Reason.UNAVAILABLE, chosen.why, retry_after=1.0)
        flight.excluded.clear()  # whatever kept them may have passed when we look again
        raise _Again(refusals[-1][1] if refusals else chosen.why)

    async def _ask(self, flight: _Flight, pod: Pod, registration: Registration) -> agent_pb2.LoadReply:
        """One agent's answer. Raises _Next where there is none."""
        record = registration.record
        pinned = bool(self._current().limits.of(record.type, record.limits).pinned)
        # A pod that has been away may hold what a reload has replaced since: that is no answer any more.
        generation = record.generation if record.digest else 0
        request = load_request(
            registration, idle_ms=flight.idle_ms, reason=flight.why, pinned=pinned, generation=generation
        )
        now = self._loop.time()
        if record.load_ms and flight.expected is None:
            flight.expected = now + record.load_ms / 1000
            for waiter, place in list(flight.waiters.items()):
                if (late := self._too_late(flight, place, now)) is not None:
                    self._release(flight, waiter)
                    waiter.on_error(late)
        self._failures.tried(pod.name, self._now_ms())
        flight.asked.set()
        flight.asked_at = now
        flight.quiet = (pod, request) if flight.idle_ms else None
        try:
            reply = await asking.load(
                pod,
                request,
                agents=self._agents,
                debits=self._debits,
                footprint=self.footprint_of(record),
                now_ms=self._now_ms,
                timeout=self._settings.load_wait,
            )
            pod.agent_failed_at = 0.0
            return reply
        except Timeout as error:
            raise _Next from error  # it is loading still, most likely: then it is joined again
        except Unreachable as error:
            log.info("agent cannot be reached", pod=pod.name, model=flight.model_id, why=str(error))
            pod.agent_failed_at = self._loop.time()
            if pod.suspect:
                self._view.failed(pod, self._loop.time())
            raise _Next from error
        finally:
            flight.quiet = None

    async def _hurry(self, pod: Pod, request: agent_pb2.LoadRequest) -> None:
        """Tells the agent that a call waits now for what it was asked to load in its own time. It joins the two."""
        urgent = agent_pb2.LoadRequest()
        urgent.CopyFrom(request)
        urgent.idle_ms = 0
        try:
            await self._agents.load(pod, urgent, timeout=self._settings.load_wait)
        except (Timeout, Unreachable):
            pass  # whoever asked first is told the same, and acts on it

    def _loaded(self, pod: Pod, registration: Registration, answer: agent_pb2.LoadReply.Loaded) -> Copy | None:
        if answer.load_ms:
            self._meter.loads.inc()
        copy = self._view.loaded(
            registration.model_id,
            pod,
            answer.incarnation,
            registration.created,
            answer.host_bytes,
            answer.device_bytes,
            answer.generation,
            answer.digest,
            blamed=answer.blamed,
        )
        if copy is not None:
            pod.failed_at = 0.0
        self._failures.loaded(registration.model_id, pod.name, self._now_ms())
        return copy

    def _elsewhere(self, flight: _Flight, asked: Pod, name: str) -> Pod:
        pod = self._view.pods.get(name)
        now = self._loop.time()
        if pod is None or pod is asked or pod.record is None:
            raise _Again(f"{flight.model_id} is claimed by {name or 'nobody'}, which is not there")
        if pod.agent_failed_at and now - pod.agent_failed_at < _PAUSE:
            raise _Again(f"{flight.model_id} is claimed by {name}, which does not answer")
        return pod

    def _failed(
        self, flight: _Flight, pod: Pod, registration: Registration, answer: agent_pb2.LoadReply.Failed
    ) -> None:
        self._meter.load_failures.inc()
        self._registry.forget(flight.model_id)  # the agent has written it into the record: the next flight reads it
        if answer.reason in (Reason.QUARANTINED.name, Reason.NOWHERE.name, Reason.CONTENT_CHANGED.name):
            raise MeshError(Reason[answer.reason], answer.text)
        flight.failed.add(pod.name)
        self._failures.failed(
            flight.model_id,
            pod.name,
            self._now_ms(),
            answer.text,
            created=registration.created,
            kind=Kind.named(answer.kind),
            asked_ms=answer.asked_ms,
        )

    def _refused(self, flight: _Flight, pod: Pod, answer: agent_pb2.LoadReply.Refused) -> Reason:
        """Another pod is next. Raises where each would refuse it, or where nobody is left who waited for room."""
        reason = _reason(answer.reason)
        if reason in (Reason.QUARANTINED, Reason.UNKNOWN_MODEL):
            raise MeshError(reason, answer.text)
        flight.excluded[pod.name] = f"refuses it: {answer.text}"
        flight.refusals.append((reason, answer.text))
        waited = self._loop.time() - flight.asked_at > _WAITED
        if reason is Reason.NO_ROOM and waited and not flight.waiters:
            raise MeshError(reason, answer.text, retry_after=1.0)
        return reason

    async def _read(self, flight: _Flight, *, fresh: bool = False) -> Registration:
        """The registration. Raises UNKNOWN_MODEL for all who had come when the read began; who came later is read for
        again, because the model may have been registered in between."""
        while True:
            arrivals = self._arrivals
            registration = await self._registry.read(flight.model_id, fresh=fresh)
            if registration is not None:
                self._recall(registration)
                return registration
            error = MeshError(Reason.UNKNOWN_MODEL, "model not found", details={"model": flight.model_id[:200]})
            late = [waiter for waiter, place in flight.waiters.items() if place.number > arrivals]
            if not late:
                raise error
            for waiter in [waiter for waiter in flight.waiters if waiter not in late]:
                self._release(flight, waiter)
                waiter.on_error(error)

    async def _change(self, flight: _Flight) -> None:
        try:
            async with asyncio.timeout(_PAUSE):
                await flight.changed.wait()
        except TimeoutError:
            pass

    # --- waiters ---

    def _too_late(self, flight: _Flight, place: _Place, now: float) -> MeshError | None:
        """Whether the waiter's deadline comes before the load is expected to be done."""
        if flight.expected is None or place.deadline is None or place.deadline >= flight.expected:
            return None
        left = flight.expected - now
        if left <= 0:
            return None  # later than expected already: nobody knows any more
        text = f"loading {flight.model_id} takes {left:.1f} s more, the deadline is in {place.deadline - now:.1f} s"
        return MeshError(Reason.NOT_IN_TIME, text, retry_after=left)

    def _expire(self, flight: _Flight, waiter: Waiter) -> None:
        place = flight.waiters.get(waiter)
        if place is None:
            return
        self._release(flight, waiter)
        now = self._loop.time()
        if place.deadline is not None and place.deadline <= now + 0.001:
            waiter.on_error(MeshError(Reason.DEADLINE, f"{flight.model_id} was not loaded by the deadline"))
            return
        text = f"{flight.model_id} was not loaded within {self._settings.load_wait:g} s; its load goes on"
        waiter.on_error(MeshError(Reason.NOT_IN_TIME, text, retry_after=5.0))

    def _release(self, flight: _Flight, waiter: Waiter) -> None:
        place = flight.waiters.pop(waiter)
        if place.timer is not None:
            place.timer.cancel()
        flight.bytes -= place.size
        self._waiters -= 1
        self._bytes -= place.size
        waited = (self._loop.time() - place.joined) * 1000
        if waited > _COLD:
            self._meter.misses.observe(waited)

    def _end(self, flight: _Flight, error: MeshError | None) -> None:
        if self._flights.get(flight.model_id) is flight:
            del self._flights[flight.model_id]
        for waiter in list(flight.waiters):
            self._release(flight, waiter)
            try:
                if error is None:
                    waiter.on_copy()
                else:
                    waiter.on_error(error)
            except Exception:
                log.exception("waiter failed", model=flight.model_id)

    def _on_pod(self, name: str, news: News) -> None:
        if news is News.GONE:
            self._failures.forget_pod(name)
        for flight in self._flights.values():
            flight.changed.set()

    def _now_ms(self) -> int:
        return int(self._loop.time() * 1000)


class _Future:
    """A waiter for coroutines."""

    __slots__ = ("future",)

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.future: asyncio.Future[None] = loop.create_future()

    def on_copy(self) -> None:
        """Done."""
        if not self.future.done():
            self.future.set_result(None)

    def on_error(self, error: MeshError) -> None:
        """Failed."""
        if not self.future.done():
            self.future.set_exception(error)


async def _until(event: asyncio.Event) -> None:
    await event.wait()


def quarantined(model_id: str, record: records.ModelRecord) -> MeshError:
    """What callers of a quarantined model are told."""
    return MeshError(Reason.QUARANTINED, record.quarantine(model_id))


def _load_failed(model_id: str, standing: Standing, failure: Failure) -> MeshError:
    """The model's own error, the way out, and where else it failed."""
    passing = failure.kind is Kind.PASSING
    text = failure.why or "the model could not be loaded"
    return MeshError(
        Reason.NOT_FETCHED if passing else Reason.NO_ROOM if failure.kind is Kind.MEMORY else Reason.LOAD_FAILED,
        f"{text} ({hint(model_id, failure.kind, standing.retry_ms)})",
        retry_after=max(standing.retry_ms / 1000, 0.1) if passing else None,
        details={"pods": ", ".join(standing.pods)[:500]},
    )


def _reason(name: str) -> Reason:
    try:
        return Reason[name]
    except KeyError:
        return Reason.UNAVAILABLE
