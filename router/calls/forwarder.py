"""The state that the calls of one worker share: it serves to choose copies, to note facts about pods, and to wait for
connections.

`unary` and `streams` carry calls; `attempts` decides what to do after one has failed.
"""

import asyncio
import time
from collections.abc import Iterable
from typing import Protocol

from mesh.process.tasks import Tasks
from mesh.statuses import MeshError, Reason
from mesh.telemetry import logs, metrics
from mesh.wire import budget as budgets
from mesh.wire import requestdigest
from mesh.wire.client import Lost, Pool
from placement import retry
from placement.balance import least_loaded
from router.calls import shares
from router.calls.aliases import Aliases
from router.calls.aliasmeter import AliasMeter
from router.calls.deaths import Deaths
from router.calls.meter import Meter
from router.calls.mirror import Mirrors
from router.fencing.verify import NOTHING, Said, Verifier
from router.loads.coldstart import ColdStart
from router.settings import RouterSettings
from router.state.candidates import AVOID
from router.state.pods import Copy, Pod, Waiter
from router.state.registry import Registry
from router.state.view import View
from router.state.vmodels import Vmodels

log = logs.get(__name__)

_SWEEP = 0.05  # seconds between checks for deadlines that have passed; the model server watches them more closely


class Timed(Protocol):
    """A call in flight that has a deadline."""

    deadline: float

    def expired(self) -> None:
        """Ends the call because its deadline has passed."""


class Forwarder:
    """The shared state of the calls of one worker."""

    def __init__(
        self,
        *,
        view: View,
        coldstart: ColdStart,
        registry: Registry,
        meter: Meter,
        counted: metrics.Registry,
        vmodels: Vmodels,
        settings: RouterSettings,
        budget: budgets.Budget = budgets.UNBOUNDED,
    ) -> None:
        self.view = view
        self.budget = budget  # includes what streams keep to send again
        self.coldstart = coldstart
        self.registry = registry
        self.meter = meter
        self.settings = settings
        self.verifier = Verifier(
            registry,
            view,
            timeout=settings.verify_timeout,
            reach=lambda timeout: registry.etcd.get(registry.keys.owner, timeout=timeout),
        )
        self.deaths = Deaths()
        self.tasks = Tasks()
        self.loop = asyncio.get_running_loop()
        self.aliases = Aliases(
            vmodels,
            view=view,
            registry=registry,
            coldstart=coldstart,
            meter=AliasMeter(counted),
            now=self.loop.time,
            start=self.tasks.start,
        )
        self.mirrors = Mirrors(self, vmodels, counted, warm=self.aliases.warm)
        self.timed: set[Timed] = set()  # in flight, with a deadline
        self.in_flight = 0
        self._turn = 0
        self._sweeper: asyncio.TimerHandle | None = None

    def pick(self, copies: list[Copy], tried: Iterable[Copy] = ()) -> Copy | None:
        """Returns the least loaded copy that may be called. Leaves out copies in `tried`, and copies of pods that
        failed less than `AVOID` seconds ago. Returns None if no copy is left."""
        now = self.loop.time()
        fit = [
            copy
            for copy in copies
            if copy not in tried and not (copy.pod.failed_at and now - copy.pod.failed_at < AVOID)
        ]
        if not fit:
            return None
        if len(fit) == 1:
            return fit[0]
        self._turn += 1
        return fit[least_loaded(fit, self._turn)]

    def must_verify(self, copy: Copy) -> bool:
        """Returns whether a call to this copy must state that the model's record was verified, or that etcd is
        unavailable (`router.fencing.verify`)."""
        return copy.suspect or copy.pod.wary or copy.record.blamed or copy.model in self.deaths.watched

    def refusal(self, model_id: str, frame: bytes) -> MeshError | None:
        """Returns the error for a request that recently killed a server and must not be sent to the model again, or
        None if it may be sent. The model's record must have been read just before."""
        registration = self.registry.remembered(model_id)
        if registration is None or not registration.record.blames:
            return None
        refused = registration.record.refuses(time.time_ns() // 1_000_000)
        if not refused:
            return None
        self.deaths.watch(model_id, self.loop.time())
        if requestdigest.digest(frame).hex() not in refused:
            return None
        text = f"a model server died while it ran this very request to {model_id[:200]}, less than 10 minutes ago"
        until = "the request is refused until 10 minutes have passed; other requests are not"
        return MeshError(Reason.QUARANTINED, f"{text}: {until}")

    def known(self, copy: Copy) -> Said:
        """Returns what a call to the copy may state about the model's record without reading the record, or NOTHING if
        the record must be read. A model that has just killed a server may be quarantined by now, so each of its calls
        reads the record."""
        watched = copy.record.blamed or copy.model in self.deaths.watched
        if watched and not self.verifier.away:
            return NOTHING
        return self.verifier.known(copy)

    def other(self, copy: Copy, tried: list[Copy]) -> bool:
        """Returns whether the model has another copy that has not been tried and may be called."""
        return self.pick(self.view.copies.get(copy.model, []), [*tried, copy]) is not None

    def not_verified(self, copy: Copy) -> None:
        """Notes that the copy's pod requires calls to be verified."""
        self.meter.verify_first.inc()
        copy.pod.wary = True

    def unsent(self, copy: Copy, pool: Pool | None, lost: Lost) -> bool:
        """Notes that a call could not be sent. Returns False if the pod is not the cause, because all of this worker's
        connections to it are in use."""
        pod = copy.pod
        self.meter.unsent.inc()
        if pool is not None and pod.pool is pool:
            if pool.statistics().connections >= self.settings.max_connections_per_pod:
                return False
            if not pod.failed_at:
                log.info("a pod cannot be reached", pod=pod.name, why=str(lost))
            self.view.failed(pod, self.loop.time())
        return True

    def lost(self, copy: Copy, lost: Lost) -> int:
        """Notes that a connection broke in the middle of a call, and drops a suspect copy. Returns the number of
        servers that calls of the model have lost recently."""
        self.meter.lost.inc()
        deaths = self.deaths.lost(copy.model, copy.pod, self.loop.time())
        log.info(
            "the connection to a pod broke in the middle of a call",
            model=copy.model,
            pod=copy.pod.name,
            deaths=deaths,
            why=str(lost),
        )
        if copy.suspect:
            self.view.drop(copy)
        return deaths

    def began(self, copy: Copy) -> None:
        """Counts a call to a copy, as one that uses a connection to the copy's pod. The caller must call `ended`
        later."""
        copy.pod.in_flight += 1
        copy.calls += 1

    def ended(self, copy: Copy) -> None:
        """Counts a call to a copy as over, however it ended. Resumes calls that wait for a connection to the copy's
        pod."""
        pod = copy.pod
        pod.in_flight -= 1
        copy.calls -= 1
        if pod.waited_for:
            self._resume(copy)

    def _resume(self, ended: Copy) -> None:
        """Resumes waiting calls of the same model first, then those of other models, as far as their shares allow."""
        waited_for = ended.pod.waited_for
        for copy in (ended, *waited_for):
            waiting = copy.waiting
            while waiting and not shares.full(copy, self.settings.max_connections_per_pod):
                waiter = next(iter(waiting))
                del waiting[waiter]
                waiter.resume()
            if not waiting:
                waited_for.pop(copy, None)

    def has_room(self, copy: Copy) -> bool:
        """Returns whether the copy's model may take one more connection to the copy's pod."""
        return not shares.full(copy, self.settings.max_connections_per_pod)

    def beyond_share(self, copy: Copy, tried: Iterable[Copy], *, unary: bool = True) -> Copy | None:
        """Returns another copy for a call whose model has used up its share of the connections to this copy's pod.
        Returns None if the call must wait for a connection (`wait`). Raises MeshError OVERLOADED if the call is not
        `unary`, or if too many calls wait already."""
        others = self.view.copies.get(copy.model, ())
        other = self.pick([other for other in others if other not in tried and self.has_room(other)])
        elsewhere = other is not None and not self.must_verify(other)
        most = self.settings.max_waiters_per_model
        beyond = retry.beyond_share(elsewhere=elsewhere, unary=unary, waiting=len(copy.waiting), most=most)
        if beyond is retry.Beyond.REFUSE:
            raise shares.refusal(copy.model, copy.pod.name, copy.calls)
        return other if beyond is retry.Beyond.ELSEWHERE else None

    def wait(self, copy: Copy, waiter: Waiter) -> None:
        """Queues a waiter. It is resumed when a call in the copy's pod ends, it is the waiter's turn, and the model's
        share has room."""
        copy.waiting[waiter] = copy.pod.waited_for[copy] = None

    def reached(self, pod: Pod) -> None:
        """Notes that a pod has answered after a failure."""
        pod.failed_at = 0.0

    def watch(self, carry: Timed) -> None:
        """Watches the deadline of a call in flight: calls its `expired` once the deadline has passed. A call that ends
        earlier removes itself from `timed`."""
        self.timed.add(carry)
        if self._sweeper is None:
            self._sweeper = self.loop.call_later(_SWEEP, self._sweep)

    def _sweep(self) -> None:
        # One pass over all calls is cheaper than a timer for each: nearly all end long before their deadline.
        now = self.loop.time()
        try:
            for carry in [carry for carry in self.timed if carry.deadline < now]:
                carry.expired()
        finally:
            self._sweeper = self.loop.call_later(_SWEEP, self._sweep) if self.timed else None

    async def close(self) -> None:
        """Ends all tasks, among them those of streams, and all shadow calls."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        self.mirrors.close()
        await self.tasks.close()
        await self.verifier.close()
