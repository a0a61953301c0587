"""Answers to the requests of cold starts, with the record from the registry, the copies from the view, and replies from
agents.

Each request of `placement.coldstart` gets one answer. The finder also updates what later choices depend on: the copies
in the view, the debits, and the times at which agents failed to answer.
"""

from collections.abc import Callable

from mesh.pb import agent_pb2
from mesh.statuses import MeshError
from mesh.telemetry import logs
from placement.coldstart import events
from placement.coldstart.events import Answer, Record, Sighting
from placement.coldstart.instructions import Ask, Choose, Hurry, Look, Read, Request
from placement.coldstart.problems import ProblemReason
from placement.failures import Failure, FailureKind
from placement.recorded import on_clock
from router.loads import asking, errors
from router.loads.agents import Agent, Timeout, Unreachable, load_request
from router.loads.choosing import Choosing
from router.loads.counts import Counts
from router.state.pods import Pod
from router.state.registry import Registration, Registry
from router.state.view import View

log = logs.get(__name__)


class Finder:
    """The finder of one worker. `wall` returns milliseconds since the epoch, for the times in records. `timeout` bounds
    one load, in seconds."""

    def __init__(
        self,
        *,
        view: View,
        registry: Registry,
        agents: Agent,
        choosing: Choosing,
        counts: Counts,
        wall: Callable[[], int],
        timeout: float,
    ) -> None:
        self._view = view
        self._registry = registry
        self._agents = agents
        self._choosing = choosing
        self._counts = counts
        self._wall = wall
        self._timeout = timeout
        self._registrations: dict[str, Registration] = {}  # of the flights under way

    def forget(self, model_id: str) -> None:
        """Forgets the record that a flight used."""
        self._registrations.pop(model_id, None)

    async def find_out(self, request: Request) -> Answer:
        """Answers an `Ask`, `Read` or `Recall`: asks an agent, or returns the record, read or remembered."""
        match request:
            case Ask():
                return await self.ask(request)
            case Read():
                return await self.read(request)
        return self.recall(request)

    # --- the record ---

    def recall(self, request: Request) -> Answer:
        """Returns the remembered record, or none."""
        registration = self._registry.remembered(request.model_id)
        record = None if registration is None else self._record(registration)
        return events.Recalled(*self._head(request), record)

    async def read(self, request: Read) -> Answer:
        """Reads the record from etcd. Returns an answer even if the read fails or finds no record."""
        try:
            registration = await self._registry.read(request.model_id, fresh=request.fresh)
        except MeshError as error:
            return events.ReadFailed(*self._head(request), errors.problem_of(error))
        if registration is None:
            return events.RecordMissing(*self._head(request))
        return events.RecordRead(*self._head(request), self._record(registration))

    def _record(self, registration: Registration) -> Record:
        model_id, record = registration.model_id, registration.record
        self._registrations[model_id] = registration
        failures: tuple[Failure, ...] = ()
        if record.failures:
            pods = (self._view.pods.get(failure.pod) for failure in record.failures)
            secrets = {pod.name: pod.record.secrets for pod in pods if pod is not None and pod.record is not None}
            failures = on_clock(record.failures, secrets=secrets, now_ms=self._choosing.now_ms(), wall_ms=self._wall())
        return Record(
            registration.created,
            record.load_ms,
            record.quarantine(model_id) if record.quarantined else "",
            failures,
            marked=bool(record.failures or record.killed),
        )

    # --- the view ---

    def look(self, request: Look) -> Answer:
        """Returns the copies in the view, and the pods that the model may use. Requires that the flight has the model's
        record."""
        copies = []
        for copy in self._view.known(request.model_id):
            pod = copy.pod
            present = pod.record is not None and pod.record.incarnation == copy.record.incarnation and not pod.suspect
            usable = copy.callable and not pod.failed_at
            copies.append(Sighting(pod.name, copy.record.create_revision, usable, present, _silent_ms(pod)))
        record = self._registrations[request.model_id].record
        return events.Seen(*self._head(request), tuple(copies), self._choosing.open_to(record.type))

    def choose(self, request: Choose) -> Answer:
        """Chooses a pod for the load. Requires that the flight has the model's record."""
        record = self._registrations[request.model_id].record
        chosen = self._choosing.choose(request.model_id, record, excluded=request.excluded, idle_ms=request.idle_ms)
        return events.Chosen(*self._head(request), chosen)

    # --- agents ---

    async def ask(self, ask: Ask) -> Answer:
        """Asks an agent for the load. Returns an answer even if the agent cannot be reached."""
        pod, registration = self._view.pods.get(ask.pod), self._registrations[ask.model_id]
        if pod is None:
            return events.Unreachable(*self._head(ask))
        try:
            reply = await asking.load(
                pod,
                self._load_request(registration, ask.idle_ms, ask.why),
                agents=self._agents,
                debits=self._choosing.debits,
                footprint=self._choosing.footprint_of(registration.record),
                now_ms=self._choosing.now_ms,
                timeout=self._timeout,
            )
        except Timeout:
            return events.TimedOut(*self._head(ask))
        except Unreachable as error:
            log.info("an agent did not answer a request to load", pod=pod.name, model=ask.model_id, why=str(error))
            pod.agent_failed_at = now = self._choosing.now()
            if pod.suspect:
                self._view.failed(pod, now)
            return events.Unreachable(*self._head(ask))
        pod.agent_failed_at = 0.0
        return self._answer(ask, pod, registration, reply)

    async def hurry(self, hurry: Hurry) -> None:
        """Tells an agent that a call now waits for a load that was requested without urgency."""
        pod, registration = self._view.pods.get(hurry.pod), self._registrations.get(hurry.model_id)
        if pod is None or registration is None:
            return  # the load is over
        try:
            await self._agents.load(pod, self._load_request(registration, 0, hurry.why), timeout=self._timeout)
        except Unreachable:
            pass  # the first request gets the same answer, and handles it

    def _load_request(self, registration: Registration, idle_ms: int, why: str) -> agent_pb2.LoadRequest:
        record = registration.record
        return load_request(
            registration,
            idle_ms=idle_ms,
            reason=why,
            pinned=self._choosing.pinned(record),
            # A pod that was away may hold content that a reload has replaced since: its answer no longer counts.
            generation=record.generation if record.digest else 0,
        )

    def _answer(self, ask: Ask, pod: Pod, registration: Registration, reply: agent_pb2.LoadReply) -> Answer:
        head = self._head(ask)
        match reply.WhichOneof("outcome"):
            case "loaded":
                return events.Loaded(*head, self._loaded(pod, registration, reply.loaded))
            case "elsewhere":
                found = self._view.pods.get(reply.elsewhere.pod)
                there = found is not None and found.record is not None
                silent_ms = None if found is None else _silent_ms(found)
                return events.Elsewhere(*head, reply.elsewhere.pod, there, silent_ms)
            case "failed":
                self._counts.load_failures.inc()
                failed = reply.failed
                kind, reason = FailureKind.named(failed.kind), ProblemReason.named(failed.reason)
                return events.Failed(*head, failed.text, kind, failed.asked_ms, reason)
            case "refused":
                return events.Refused(*head, ProblemReason.named(reply.refused.reason), reply.refused.text)
            case "stale":
                return events.Stale(*head)
        return events.Garbled(*head)

    def _loaded(self, pod: Pod, registration: Registration, answer: agent_pb2.LoadReply.Loaded) -> bool:
        """Adds the copy to the view. Returns False if the view does not accept the copy."""
        if answer.load_ms:
            self._counts.loads.inc()
        copy = self._view.loaded(registration.model_id, pod, asking.copy_of(registration, answer))
        if copy is not None:
            pod.failed_at = 0.0
        return copy is not None

    def _head(self, request: Request) -> tuple[int, str, int]:
        return self._choosing.now_ms(), request.model_id, request.cause


def _silent_ms(pod: Pod) -> int | None:
    """Returns the time at which the pod's agent last failed to answer, in ms on the view's clock. Returns None if the
    agent has answered since, or never failed to."""
    return round(pod.agent_failed_at * 1000) if pod.agent_failed_at else None
