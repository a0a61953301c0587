"""Unary calls and their replies: a state machine of plain callbacks that creates no task on a hit.

A `UnaryCall` is one call. It picks a copy from the view, sends the bytes, and passes the reply back: status, metadata,
trailers, or a stream. If no copy exists, `coldstart` calls back later. If an attempt gets no answer, `attempts` decides
what to do. If a model cannot serve, `diversion` may know another one. When the caller goes away or its deadline passes,
the connection to the server is closed.

If a call to the copy must state that the model's record was verified (`Forwarder.must_verify`), the record is read
before the first attempt. `forwarder` has the state that calls share, `dispatch` makes a `UnaryCall` for a call, and
`streams` carries streaming requests.
"""

import asyncio
import functools
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Concatenate, ParamSpec

from mesh.statuses import Code, MeshError, Reason
from mesh.telemetry import logs
from mesh.wire import framing, metadata
from mesh.wire.call import Call, CallCancelled, Header, Headers
from mesh.wire.client import Exchange, Lost, Pool, Reply, ReplyStream
from placement.retry import Decision
from router.calls import aliases, answers, replies, routes
from router.calls.aliases import Destination
from router.calls.attempts import Attempts
from router.calls.diversion import REASONS, Diversion
from router.calls.forwarder import Forwarder
from router.calls.mirror import Mirrored
from router.calls.routes import MODEL, NAME, Asked, Method
from router.fencing.verify import NOTHING, Said
from router.state.pods import Copy

log = logs.get(__name__)

P = ParamSpec("P")

_OK = int(Code.OK)


def _answering(step: "Callable[Concatenate[UnaryCall, P], None]") -> "Callable[Concatenate[UnaryCall, P], None]":
    """Wraps a step of a call so that the call fails if the step does."""

    def answering(self: "UnaryCall", /, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            step(self, *args, **kwargs)
        except Exception:
            self._broken()

    functools.update_wrapper(answering, step)
    return answering


class UnaryCall:
    """One unary call in progress. The pool and the cold start call its methods back."""

    __slots__ = (
        "_asked",
        "_attempts",
        "_began",
        "_call",
        "_cold",
        "_copy",
        "_destination",
        "_diversion",
        "_done",
        "_exchange",
        "_forwarder",
        "_frame",
        "_headers",
        "_method",
        "_model_id",
        "_patience",
        "_pool",
        "_said",
        "_size",
        "_waits_for",
        "deadline",
    )

    def __init__(
        self,
        forwarder: Forwarder,
        call: Call,
        frame: bytes,
        method: Method,
        asked: Asked,
        found: tuple[str, Destination | None],
    ) -> None:
        """Makes a call. `found` is the model behind the name that was `asked` for, as `Aliases` returns it."""
        self._forwarder = forwarder
        self._call = call
        self._frame = frame
        self._size = len(frame)
        self._method = method
        self._asked = asked
        self._model_id, self._destination = found
        self._headers = routes.passed(call)
        self._copy: Copy | None = None
        self._pool: Pool | None = None
        self._exchange: Exchange | None = None
        self._said = NOTHING
        self._attempts: Attempts | None = None  # of this model, from the first failed try on
        self._diversion: Diversion | None = None  # from the first model on that cannot serve
        self._patience: asyncio.TimerHandle | None = None  # while it waits for a model that another can stand in for
        self._cold = False
        self._done = False
        self._waits_for: Copy | None = None
        self._began = time.perf_counter()
        self.deadline = 0.0

    def begin(self) -> None:
        """Sends the call to a copy, or starts the search for one."""
        forwarder = self._forwarder
        call = self._call
        forwarder.in_flight += 1
        if call.deadline is not None:
            self.deadline = call.deadline
            forwarder.watch(self)
        try:
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
        except Exception:
            self._broken()
        if not self._done:  # else the call was refused at once, and the two objects would keep each other alive
            call.on_cancel(self.cancelled)

    # --- choosing a copy ---

    def _next(self) -> None:
        forwarder = self._forwarder
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
        self._start(self._verified(copy, insist), f"verify {self._model_id}")

    async def _verified(self, copy: Copy, insist: bool) -> None:
        try:
            said = await self._forwarder.verifier.verify(copy, insist=insist)
        except MeshError as error:
            self._refused(error)
            return
        if self._done:
            return
        if (refusal := self._forwarder.refusal(self._model_id, self._frame)) is not None:
            self._fail(refusal)
        elif said:
            self._send(copy, said)
        else:
            self._next()

    def _start(self, work: Coroutine[Any, Any, None], name: str) -> None:
        self._forwarder.tasks.start(self._owned(work), name)

    async def _owned(self, work: Coroutine[Any, Any, None]) -> None:
        """Awaits the work of a task on which the call depends. If it fails unexpectedly, fails the call."""
        try:
            await work
        except asyncio.CancelledError:
            self._fail(answers.stopping())
        except Exception:
            self._broken()

    def _wait(self) -> None:
        self._cold = True
        if self._attempts is not None:
            self._attempts.tried.clear()
        try:
            self._forwarder.coldstart.join(self._model_id, self, size=self._size, deadline=self._call.deadline)
        except MeshError as error:
            self._refused(error)
            return
        if self.deadline and self._destination is not None and self._diversions().others():
            loop = self._forwarder.loop
            self._patience = loop.call_later((self.deadline - loop.time()) / 2, self._impatient)

    def _send(self, copy: Copy, said: Said = NOTHING) -> None:
        call = self._call
        pod = copy.pod
        pool = pod.pool
        if pool is None:  # the pod has disappeared meanwhile
            self._after(copy, self._tries().missed, copy)
            return
        if copy.calls and not self._forwarder.has_room(copy):
            self._beyond_share(copy)
            return
        deadline = call.deadline
        self._copy = copy
        self._pool = pool
        self._said = said
        headers: Headers = copy.headers
        if self._headers or said:
            headers = self._headers + copy.headers + said
        if self._destination is not None and self._asked[1] == NAME:
            headers = *headers, *self._destination.headers(copy, self._method)
        elif self._method.describes:
            headers = *headers, *aliases.added(None, copy, self._method)
        try:
            self._exchange = pool.send(
                call.method,
                headers,
                self._frame,
                self,
                timeout=None if deadline is None else metadata.format_timeout(deadline - self._forwarder.loop.time()),
                encoding=call.encoding,
            )
        except ValueError as error:
            self._fail(MeshError(Reason.BAD_REQUEST, str(error)))
        else:
            self._forwarder.began(copy)

    def _beyond_share(self, copy: Copy) -> None:
        """Calls another copy, waits until a call in the copy's pod ends, or refuses the call, because the model has
        used up its share of the connections to that pod."""
        forwarder = self._forwarder
        try:
            other = forwarder.beyond_share(copy, self._tried)
        except MeshError as error:
            self._refused(error)
            return
        if other is not None:
            self._send(other)
        else:
            forwarder.wait(copy, self)
            self._waits_for = copy

    @_answering
    def resume(self) -> None:
        """Continues after a call in the same pod has ended."""
        self._waits_for = None
        if not self._done:
            self._next()

    # --- from the cold start ---

    @_answering
    def on_copy(self) -> None:
        """Continues, because a copy is available now."""
        self._waited()
        if self._done:
            return
        if self._asked[1] == NAME and self._destination is None:  # the read for the load may have found an alias
            found = self._forwarder.aliases.settled(self._call, self._asked)
            if found is not None:
                self._model_id, self._destination = found
        self._next()

    @_answering
    def on_error(self, error: MeshError) -> None:
        """Diverts the call to another model or fails it, because no copy will be available."""
        self._waited()
        self._refused(error)

    def _waited(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    @_answering
    def _impatient(self) -> None:
        """Stops waiting for a model's load after half of the time until the deadline, and spends the rest on another
        model."""
        self._patience = None
        self._forwarder.coldstart.leave(self._model_id, self)
        self._refused(MeshError(Reason.NOT_IN_TIME, f"{self._model_id} was not loaded within half of the call's time"))

    # --- another model ---

    def _diversions(self) -> Diversion:
        diversion = self._diversion
        if diversion is None:
            diversion = Diversion(self._forwarder.aliases, self._call, self._asked, self._destination)
            self._diversion = diversion
        return diversion

    def _refused(self, error: MeshError) -> None:
        """Diverts the call to another model of its alias, if possible, or fails it."""
        if self._done:
            return
        if self._asked[1] != MODEL and error.reason in REASONS:
            diversion = self._diversions()
            try:
                if diversion.at_once(error):
                    self._divert(diversion)
                    return
            except MeshError as unknown:
                self._fail(unknown)
                return
            if diversion.must_read(error):
                self._start(self._reread(diversion), f"read {self._asked[0]}")
                return
        self._fail(error)

    def _divert(self, diversion: Diversion) -> None:
        self._destination, self._model_id, self._attempts = diversion.destination, diversion.model, None
        self._next()

    async def _reread(self, diversion: Diversion) -> None:
        try:
            await diversion.read()
        except MeshError as error:
            self._fail(error)
        else:
            if not self._done:
                self._divert(diversion)

    # --- from the pool ---

    @property
    def takes_pieces(self) -> bool:
        """True if no part of the router needs a whole message of a stream."""
        return self._call.takes_pieces and not self._method.path

    def on_beginning(self) -> None:
        """Frees the request, because no call is retried once its reply has begun. A large reply then replaces the
        request in memory. If a shadow needs the request, it is kept."""
        if self._destination is None or self._destination.alias.mirror is None:
            self._frame = b""
            self._call.forget()

    def on_reply(self, reply: Reply) -> None:
        """Passes the reply back to the caller. If the pod refused the call without running it, tries again or fails
        the call."""
        try:
            copy = self._copy
            assert copy is not None
            pod = copy.pod
            self._forwarder.ended(copy)
            self._exchange = None
            if pod.failed_at:
                self._forwarder.reached(pod)
            headers = reply.headers
            if headers:
                headers, refusal = replies.returned(headers, pod)
                if refusal is not None and reply.code:
                    self._after(copy, self._tries().refused, copy, refusal, self._said, kept=bool(self._frame))
                    return
            frame = reply.frame
            trailers = reply.trailers
            if trailers:
                returns = routes.returns
                trailers = [header for header in trailers if returns[header[0]]]
            if frame is not None and not reply.code:
                if reply.encoding:
                    headers = [*headers, (replies.ENCODING, reply.encoding)]
                self._call.reply(frame, headers, trailers)
                self._ended(_OK, len(frame) - framing.PREFIX)
            else:
                self._call.fail(reply.code, reply.text, headers, trailers)
                self._ended(reply.code, -1)
            destination = self._destination
            if destination is not None and destination.alias.mirror is not None and self._frame:
                named = destination.headers(copy, self._method) if self._asked[1] == NAME else ()
                sent, encoding = self._headers + named, self._call.encoding
                self._forwarder.mirrors.offer(
                    destination.alias,
                    Mirrored(self._method, sent, self._frame, encoding, reply.code, frame, self._began),
                )
        except Exception:
            self._broken()

    @_answering
    def on_stream(self, stream: ReplyStream) -> None:
        """Passes back a reply that arrives message by message."""
        assert self._copy is not None
        headers, _ = replies.returned(stream.headers, self._copy.pod)
        if stream.encoding:
            headers = [*headers, (replies.ENCODING, stream.encoding)]
        self._start(self._pump(stream, headers), f"reply of {self._model_id}")

    async def _pump(self, stream: ReplyStream, headers: list[Header]) -> None:
        code, size = int(Code.CANCELLED), 0
        try:
            code, size = await replies.pump(self._call, stream, headers)
        except CallCancelled:
            stream.cancel()
        except Lost as lost:
            if not self._done:  # else the stream was lost because this side gave up the call
                assert self._copy is not None
                self._forwarder.lost(self._copy, lost)
                error = replies.broken(lost.why)
                code = int(error.reason.code)
                answers.fail(self._call, error)
        if self._exchange is not None:
            assert self._copy is not None
            self._forwarder.ended(self._copy)
            self._exchange = None
        self._ended(code, size)

    @_answering
    def on_lost(self, lost: Lost) -> None:
        """Tries the call again, if allowed, or fails it, after its connection broke or could not be opened."""
        copy, pool = self._copy, self._pool
        assert copy is not None
        self._forwarder.ended(copy)
        self._exchange = None
        self._after(copy, self._tries().lost, copy, pool, lost)

    # --- another try ---

    @property
    def _tried(self) -> Sequence[Copy]:
        return self._attempts.tried if self._attempts is not None else ()

    def _tries(self) -> Attempts:
        attempts = self._attempts
        if attempts is None:
            self._attempts = attempts = Attempts(
                self._forwarder, self._model_id, safe=self._method.safe, deadline=self._call.deadline
            )
        return attempts

    def _after(self, copy: Copy, outcome: Callable[P, Decision], *args: P.args, **kwargs: P.kwargs) -> None:
        """Carries out the decision that `outcome` makes about an attempt, or fails the call with its error."""
        try:
            decision = outcome(*args, **kwargs)
        except MeshError as error:
            self._refused(error)
            return
        if decision.verify:
            self._verify(copy, insist=decision.insist)
        elif decision.pause:
            self._forwarder.loop.call_later(decision.pause, self._again)
        else:
            self._next()

    @_answering
    def _again(self) -> None:
        if not self._done:
            self._next()

    # --- the end ---

    def cancelled(self) -> None:
        """Ends the call because its caller has gone."""
        if not self._done:
            self._withdraw()
            self._ended(int(Code.CANCELLED), -1)

    @_answering
    def expired(self) -> None:
        """Fails the call because its deadline has passed."""
        if not self._done:
            name = self._model_id[:200]
            text = f"{name} did not answer" if self._exchange is not None else f"no copy of {name} could be called"
            self._fail(MeshError(Reason.DEADLINE, f"{text} within the call's deadline: call with a later deadline"))

    def _withdraw(self) -> None:
        self._waited()
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

    def _broken(self) -> None:
        """Logs the exception that is being handled, and fails the call: otherwise a caller without a deadline would
        wait forever."""
        log.exception("a call failed in the router's own code", method=self._call.method, model=self._model_id)
        self._fail(answers.internal_error())

    def _fail(self, error: MeshError) -> None:
        if self._done:
            return
        self._withdraw()
        answers.fail(self._call, error)
        self._ended(int(error.reason.code), -1)

    def _ended(self, code: int, size: int) -> None:
        if self._done:
            return
        self._done = True
        self._call.on_cancel(None)  # else the two objects would keep each other alive until garbage collection
        forwarder = self._forwarder
        forwarder.in_flight -= 1
        if self.deadline:
            forwarder.timed.discard(self)
        ms = (time.perf_counter() - self._began) * 1000
        meter = forwarder.meter
        kind = meter.cold if self._cold else meter.hits
        meter.call(self._method.label, code, ms, self._size - framing.PREFIX, size, kind)
        if self._destination is not None:
            self._destination.meter.call(code, ms)
