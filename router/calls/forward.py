"""Carrying a unary call to a copy and its reply back: a small state machine of plain callbacks, no task on a hit.

A `Carry` is one call. It picks a copy from the view, sends the bytes, and passes back what comes: status, metadata,
trailers, or a stream. What may happen on the way, and what follows:

- *not here*: the pod does not hold that copy. The view forgets it; another copy, or a load.
- lost before a byte was written: another copy, or a load.
- lost after that: once more if the method is known to be safe and the model is not killing servers, else LOST.
- lost after the reply began: LOST.
- no copy: `coldstart`, which calls back.
- the caller goes away, or its deadline passes: the server is told by closing the connection.

- *verify first*: the pod cannot prove that it may answer. The record is read, and the call sent again with what that
  showed, whatever its method: nothing was run.

The record of a *suspect* copy is read before the first try, as is that of a model whose calls lost servers; see
`verify`.

How calls reach a `Carry` is `dispatch`'s, streaming requests are `streams`'.
"""

import asyncio
import time
from typing import TYPE_CHECKING

from mesh.process.tasks import Tasks
from mesh.statuses import Code, MeshError, Reason
from mesh.telemetry import logs
from mesh.wire import budget as budgets
from mesh.wire import framing, metadata, requestdigest
from mesh.wire import headers as names
from mesh.wire.call import Call, CallCancelled, Header
from mesh.wire.client import Exchange, Lost, LostKind, Pool, Reply, ReplyStream
from placement.balance import least_loaded
from router.calls import answers, routes, shares
from router.calls.deaths import Deaths
from router.calls.meter import Meter
from router.calls.routes import Method
from router.fencing.verify import AWAY, NOTHING, VERIFIED, Said, Verifier
from router.loads.coldstart import ColdStart
from router.settings import RouterSettings
from router.state.registry import Registry
from router.state.view import AVOID, Copy, Pod, View

if TYPE_CHECKING:
    from collections.abc import Iterable

log = logs.get(__name__)

MAX_SENDS = 8
"""How often a call is sent before its last trouble is the answer. The predecessor's number."""

SETTLE = 0.2
"""Seconds between the loss of a call and its second try: a pod notices its server's death at once, and writes into the
model's record who is to blame, some milliseconds later. The second try looks there first."""

_SWEEP = 0.05  # seconds between looks for deadlines that have passed; the model server watches them more closely

_OK = int(Code.OK)
_ENCODING = b"grpc-encoding"


class Forwarder:
    """What the calls of one worker share."""

    def __init__(
        self,
        *,
        view: View,
        coldstart: ColdStart,
        registry: Registry,
        meter: Meter,
        settings: RouterSettings,
        budget: budgets.Budget = budgets.UNBOUNDED,
    ) -> None:
        self.view = view
        self.budget = budget  # what streams keep to be sent again counts in it
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
        self.timed: set[Carry] = set()  # in flight, with a deadline
        self.in_flight = 0
        self._turn = 0
        self._sweeper: asyncio.TimerHandle | None = None

    def pick(self, copies: "list[Copy]", tried: "Iterable[Copy]" = ()) -> Copy | None:
        """The copy to call: least loaded, those of pods that have just failed last and only after a while."""
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
        """Whether a call must say what its model's record is, before this copy may be called."""
        return copy.suspect or copy.pod.wary or copy.record.blamed or copy.model in self.deaths.watched

    def refusal(self, model_id: str, frame: bytes) -> MeshError | None:
        """Why this request is not sent to a model whose record was just read: a server died in the same one lately."""
        registration = self.registry.remembered(model_id)
        if registration is None or not registration.record.blames:
            return None
        refused = registration.record.refuses(time.time_ns() // 1_000_000)
        if not refused:
            return None
        self.deaths.watch(model_id, self.loop.time())
        if requestdigest.digest(frame).hex() not in refused:
            return None
        text = f"a model server died in this very request to {model_id[:200]} less than 10 minutes ago"
        return MeshError(Reason.QUARANTINED, f"{text}: it is not sent again. Other requests are")

    def known(self, copy: Copy) -> Said:
        """Returns what a call to the copy may say without a read; NOTHING where one is needed. A model that has killed
        servers a moment ago may be quarantined by now, so its record is read for each call."""
        watched = copy.record.blamed or copy.model in self.deaths.watched
        if watched and not self.verifier.away:
            return NOTHING
        return self.verifier.known(copy)

    async def copy(
        self,
        model_id: str,
        tried: "list[Copy]",
        deadline: float | None,
        *,
        first: bytes | None = None,
        insist: bool = False,
    ) -> tuple[Copy, Said]:
        """The same for coroutines: a copy that may be called now, once there is one, and what the call says of its
        record. `first`: the request, or the first message of several, where it was read. `insist`: as `Verifier.verify`
        has it. Raises MeshError."""
        for _ in range(MAX_SENDS):
            copies = self.view.copies.get(model_id)
            copy = self.pick(copies, tried) if copies is not None else None
            if copy is None:
                tried.clear()
                await self.coldstart.load(model_id, deadline=deadline)
            elif not self.must_verify(copy):
                return copy, NOTHING
            elif not insist and (said := self.known(copy)):
                return copy, said
            else:
                said = await self.verifier.verify(copy, insist=insist)
                if first is not None and (refusal := self.refusal(model_id, first)) is not None:
                    raise refusal
                if said:
                    return copy, said
        raise MeshError(Reason.UNAVAILABLE, f"no copy of {model_id} stays where it is", retry_after=1.0)

    def other(self, copy: Copy, tried: "list[Copy]") -> bool:
        """Returns whether there is another copy of the model that has not been tried."""
        return self.pick(self.view.copies.get(copy.model, []), [*tried, copy]) is not None

    def not_verified(self, copy: Copy) -> None:
        """The pod demands that calls of its copies say what their records are."""
        self.meter.verify_first.inc()
        copy.pod.wary = True

    def unsent(self, copy: Copy, pool: Pool | None) -> bool:
        """A call could not be sent. False where that was for want of connections, which is not the pod's fault."""
        pod = copy.pod
        self.meter.unsent.inc()
        if pool is not None and pod.pool is pool:
            if pool.statistics().connections >= self.settings.max_connections_per_pod:
                return False
            self.view.failed(pod, self.loop.time())
        return True

    def exhausted(self, model_id: str, tried: "list[Copy]") -> bool:
        """Whether every copy that there is was tried."""
        return all(known in tried for known in self.view.copies.get(model_id, ()))

    def lost(self, copy: Copy, why: str) -> int:
        """A connection broke in the middle of a call: how many servers were lost so by this model."""
        self.meter.lost.inc()
        deaths = self.deaths.lost(copy.model, copy.pod, self.loop.time())
        log.info("connection lost in a call", model=copy.model, pod=copy.pod.name, deaths=deaths, why=why)
        if copy.suspect:
            self.view.drop(copy)
        return deaths

    def began(self, copy: Copy) -> None:
        """A call is on its way to a copy."""
        copy.pod.in_flight += 1
        copy.calls += 1

    def ended(self, copy: Copy) -> None:
        """A call to a copy has ended, in whatever way: those that wait for a connection to its pod go on."""
        pod = copy.pod
        pod.in_flight -= 1
        copy.calls -= 1
        if pod.waited_for:
            self._resume(copy)

    def _resume(self, ended: Copy) -> None:
        """Those of the same model first; then those of others, whose share grows with what is free."""
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
        """Whether its model may take one more connection to its pod."""
        return not shares.full(copy, self.settings.max_connections_per_pod)

    def reached(self, pod: Pod) -> None:
        """The pod has answered after it had failed."""
        pod.failed_at = 0.0

    def watch(self, carry: "Carry") -> None:
        """Sees to the deadline of a call in flight."""
        self.timed.add(carry)
        if self._sweeper is None:
            self._sweeper = self.loop.call_later(_SWEEP, self._sweep)

    def _sweep(self) -> None:
        # One look at all of them is cheaper than a timer each: nearly all calls end long before their deadline.
        now = self.loop.time()
        for carry in [carry for carry in self.timed if carry.deadline < now]:
            carry.expired()
        self._sweeper = self.loop.call_later(_SWEEP, self._sweep) if self.timed else None

    async def close(self) -> None:
        """Ends the tasks of streams."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        await self.tasks.close()
        await self.verifier.close()


class Carry:
    """One unary call on its way. A sink for the pool, a waiter for the cold start."""

    __slots__ = (
        "_began",
        "_call",
        "_cold",
        "_copy",
        "_done",
        "_exchange",
        "_forwarder",
        "_frame",
        "_headers",
        "_last",
        "_method",
        "_model_id",
        "_pool",
        "_retried",
        "_said",
        "_sends",
        "_tried",
        "_waits_for",
        "deadline",
    )

    def __init__(self, forwarder: Forwarder, call: Call, frame: bytes, method: Method, model_id: str) -> None:
        self._forwarder = forwarder
        self._call = call
        self._frame = frame
        self._method = method
        self._model_id = model_id
        passes = routes.passes
        self._headers: tuple[Header, ...] = tuple([header for header in call.headers if passes[header[0]]])
        self._copy: Copy | None = None
        self._pool: Pool | None = None
        self._exchange: Exchange | None = None
        self._sends = 0
        self._retried = False
        self._said = NOTHING
        self._tried: list[Copy] = []
        self._last = ""
        self._cold = False
        self._done = False
        self._waits_for: Copy | None = None
        self._began = time.perf_counter()
        self.deadline = 0.0

    def begin(self) -> None:
        """Sends it, or sees to it that there is something to send it to."""
        forwarder = self._forwarder
        call = self._call
        forwarder.in_flight += 1
        if call.deadline is not None:
            self.deadline = call.deadline
            forwarder.watch(self)
        copies = forwarder.view.copies.get(self._model_id)
        if (
            copies is not None
            and len(copies) == 1
            and not copies[0].pod.failed_at
            and not forwarder.must_verify(copies[0])
        ):
            self._send(copies[0])
        else:
            self._next()
        if not self._done:  # else it was refused at once, and the two would keep each other
            call.on_cancel(self.cancelled)

    # --- where to ---

    def _next(self) -> None:
        forwarder = self._forwarder
        if self._sends >= MAX_SENDS:
            self._fail(MeshError(Reason.UNAVAILABLE, f"no copy of {self._model_id} could be called: {self._last}"))
            return
        copies = forwarder.view.copies.get(self._model_id)
        copy = forwarder.pick(copies, self._tried) if copies is not None else None
        if copy is None:
            self._wait()
        elif not forwarder.must_verify(copy):
            self._send(copy)
        elif said := forwarder.known(copy):
            self._send(copy, said)
        else:
            self._verify(copy)

    def _verify(self, copy: Copy, *, insist: bool = False) -> None:
        self._forwarder.tasks.start(self._verified(copy, insist), f"verify {self._model_id}")

    async def _verified(self, copy: Copy, insist: bool) -> None:
        try:
            said = await self._forwarder.verifier.verify(copy, insist=insist)
        except MeshError as error:
            self._fail(error)
            return
        if self._done:
            return
        if (refusal := self._forwarder.refusal(self._model_id, self._frame)) is not None:
            self._fail(refusal)
        elif said:
            self._send(copy, said)
        else:
            self._next()

    def _wait(self) -> None:
        self._cold = True
        self._tried.clear()
        try:
            self._forwarder.coldstart.join(self._model_id, self, size=len(self._frame), deadline=self._call.deadline)
        except MeshError as error:
            self._fail(error)

    def _send(self, copy: Copy, said: Said = NOTHING) -> None:
        call = self._call
        pod = copy.pod
        pool = pod.pool
        if pool is None:  # it has gone meanwhile
            self._tried.append(copy)
            self._sends += 1
            self._next()
            return
        if copy.calls and not self._forwarder.has_room(copy):
            self._await_turn(copy)
            return
        deadline = call.deadline
        self._copy = copy
        self._pool = pool
        self._said = said
        self._sends += 1
        try:
            self._exchange = pool.send(
                call.method,
                self._headers + copy.headers + said,
                self._frame,
                self,
                timeout=None if deadline is None else metadata.format_timeout(deadline - self._forwarder.loop.time()),
                encoding=call.encoding,
            )
        except ValueError as error:
            self._fail(MeshError(Reason.BAD_REQUEST, str(error)))
        else:
            self._forwarder.began(copy)

    def _await_turn(self, copy: Copy) -> None:
        """Its model has its share of the connections: goes to another copy that has not, or waits for a call to end."""
        forwarder = self._forwarder
        others = forwarder.view.copies.get(self._model_id, ())
        free = [other for other in others if other not in self._tried and forwarder.has_room(other)]
        other = forwarder.pick(free)
        if other is not None and not forwarder.must_verify(other):
            self._send(other)
        elif len(copy.waiting) >= forwarder.settings.max_waiters_per_model:
            self._fail(shares.refusal(self._model_id, copy.pod.name, copy.calls))
        else:
            copy.waiting[self] = copy.pod.waited_for[copy] = None
            self._waits_for = copy

    def resume(self) -> None:
        """A call in the same pod has ended."""
        self._waits_for = None
        if not self._done:
            self._next()

    # --- from the cold start ---

    def on_copy(self) -> None:
        """There is a copy now."""
        if not self._done:
            self._next()

    def on_error(self, error: MeshError) -> None:
        """There will be none."""
        self._fail(error)

    # --- from the pool ---

    def on_reply(self, reply: Reply) -> None:
        """Passes it back, unless the pod did not hold the copy."""
        copy = self._copy
        assert copy is not None
        pod = copy.pod
        self._forwarder.ended(copy)
        self._exchange = None
        if pod.failed_at:
            self._forwarder.reached(pod)
        headers = reply.headers
        if headers:
            headers, refusal = returned(headers, pod)
            if refusal is not None and reply.code:
                self._refused(copy, refusal)
                return
        frame = reply.frame
        trailers = reply.trailers
        if trailers:
            returns = routes.returns
            trailers = [header for header in trailers if returns[header[0]]]
        if frame is not None and not reply.code:
            if reply.encoding:
                headers = [*headers, (_ENCODING, reply.encoding)]
            self._call.reply(frame, headers, trailers)
            self._ended(_OK, len(frame) - framing.PREFIX)
        else:
            self._call.fail(reply.code, reply.text, headers, trailers)
            self._ended(reply.code, -1)

    def on_stream(self, stream: ReplyStream) -> None:
        """The reply comes message by message."""
        assert self._copy is not None
        headers, _ = returned(stream.headers, self._copy.pod)
        if stream.encoding:
            headers = [*headers, (_ENCODING, stream.encoding)]
        self._forwarder.tasks.start(self._pump(stream, headers), f"reply of {self._model_id}")

    async def _pump(self, stream: ReplyStream, headers: list[Header]) -> None:
        code, size = int(Code.CANCELLED), 0
        try:
            code, size = await pump(self._call, stream, headers)
        except CallCancelled:
            stream.cancel()
        except Lost as lost:
            if not self._done:  # else it was lost because we have let go of it
                error = reply_lost(lost)
                code = int(error.reason.code)
                answers.fail(self._call, error)
        finally:
            if self._exchange is not None:
                assert self._copy is not None
                self._forwarder.ended(self._copy)
                self._exchange = None
            self._ended(code, size)

    def on_lost(self, lost: Lost) -> None:
        """Tries again where that is allowed."""
        copy, pool, forwarder = self._copy, self._pool, self._forwarder
        assert copy is not None
        forwarder.ended(copy)
        self._exchange = None
        self._last = lost.why
        if lost.kind is LostKind.UNSENT:
            self._tried.append(copy)
            if not forwarder.unsent(copy, pool) and forwarder.exhausted(copy.model, self._tried):
                self._fail(MeshError(Reason.OVERLOADED, lost.why, retry_after=0.1))
            else:
                self._next()
            return
        deaths = forwarder.lost(copy, lost.why)
        if lost.kind is LostKind.SENT and self._method.safe and not self._retried and deaths < 2:
            self._retried = True
            forwarder.meter.retried.inc()
            self._tried.append(copy)
            # By then the pod has written down whether its server died of this very request.
            forwarder.loop.call_later(SETTLE, self._again)
            return
        self._fail(call_lost(copy, lost))

    def _again(self) -> None:
        if not self._done:
            self._next()

    def _refused(self, copy: Copy, refusal: bytes) -> None:
        """The pod has run nothing: the copy is not there, or must be verified first."""
        if refusal == names.VERIFY_FIRST and self._said is not VERIFIED and self._sends < MAX_SENDS:
            self._forwarder.not_verified(copy)
            insist = self._said is AWAY
            if insist and self._forwarder.other(copy, self._tried):
                self._tried.append(copy)  # its pod reaches etcd, this router does not: elsewhere nobody has to wait
                self._next()
            else:
                self._verify(copy, insist=insist)
            return
        self._forwarder.meter.not_here.inc()
        self._forwarder.view.drop(copy)
        self._last = f"{copy.pod.name} does not hold it"
        self._next()

    # --- how it ends ---

    def cancelled(self) -> None:
        """The caller has gone."""
        if not self._done:
            self._let_go()
            self._ended(int(Code.CANCELLED), -1)

    def expired(self) -> None:
        """The deadline has passed."""
        if not self._done:
            self._fail(MeshError(Reason.DEADLINE, "the deadline has passed"))

    def _let_go(self) -> None:
        if self._exchange is not None:
            self._exchange.cancel()
            self._exchange = None
            assert self._copy is not None
            self._forwarder.ended(self._copy)
        elif self._waits_for is not None:
            self._waits_for.waiting.pop(self, None)
            self._waits_for = None
        elif self._cold:
            self._forwarder.coldstart.leave(self._model_id, self)

    def _fail(self, error: MeshError) -> None:
        if self._done:
            return
        self._let_go()
        answers.fail(self._call, error)
        self._ended(int(error.reason.code), -1)

    def _ended(self, code: int, size: int) -> None:
        if self._done:
            return
        self._done = True
        self._call.on_cancel(None)  # call and carry would keep each other, and leave it to the garbage collector
        forwarder = self._forwarder
        forwarder.in_flight -= 1
        if self.deadline:
            forwarder.timed.discard(self)
        ms = (time.perf_counter() - self._began) * 1000
        meter = forwarder.meter
        meter.call(self._method.label, code, ms, len(self._frame) - framing.PREFIX, size)
        (meter.cold if self._cold else meter.hits).observe(ms)


def returned(received: list[Header], pod: Pod) -> tuple[list[Header], bytes | None]:
    """The headers that go back to the client, and the one that says why the pod has run nothing, NOT_HERE or
    VERIFY_FIRST, if there is one; notes the pod's load on the way."""
    returns = routes.returns
    kept = []
    refusal = None
    for header in received:
        name = header[0]
        if returns[name]:
            kept.append(header)
        elif name == names.LOAD:
            try:
                pod.load = int(header[1])
            except ValueError:
                log.warning("a pod's load cannot be read", pod=pod.name, value=header[1][:50])
        elif name in (names.NOT_HERE, names.VERIFY_FIRST):
            refusal = name
    return kept, refusal


async def pump(call: Call, stream: ReplyStream, headers: list[Header]) -> tuple[int, int]:
    """Passes a reply on message by message; its code and the bytes of its messages. Raises Lost, CallCancelled."""
    size = 0
    call.start(headers)
    while (frame := await stream.read()) is not None:
        size += len(frame) - framing.PREFIX
        await call.write(frame)
    reply = await stream.result()
    returns = routes.returns
    call.finish(reply.code, reply.text, [header for header in reply.trailers if returns[header[0]]])
    return reply.code, size


def reply_lost(lost: Lost) -> MeshError:
    """What the caller is told whose reply breaks off."""
    return MeshError(Reason.LOST, f"the model server was lost in the middle of its reply: {lost.why}")


def call_lost(copy: Copy, lost: Lost) -> MeshError:
    """What the caller is told whose call may or may not have been carried out."""
    text = f"the model server of {copy.pod.name} was lost in the middle of the call: {lost.why}"
    return MeshError(Reason.LOST, text)
