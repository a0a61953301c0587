"""Calls whose request arrives message by message. Two coroutines carry each call, one in each direction.

The rules are the same as for unary calls (`attempts`), except for what can be sent again. The first message, and up to
64 KiB of further ones, are kept until the reply begins. A call that has sent more is not retried.

A unary call is carried here too if its end arrives later than its message. If the id is in the message, as for V2's
methods, the first message is read before a copy is chosen. It is then compared with the requests that killed servers,
as the message of a unary call is. If the id is in the metadata, messages are only passed on.
"""

import asyncio
import time
from collections.abc import Callable

from mesh.statuses import Code, MeshError, Reason
from mesh.wire import framing, metadata
from mesh.wire.call import Call, CallCancelled, Header
from mesh.wire.client import Lost, Reply, ReplyStream, RequestStream
from placement.retry import MAX_TRIES, Decision
from router.calls import aliases, answers, replies, routes
from router.calls.aliases import Destination
from router.calls.attempts import Attempts
from router.calls.diversion import REASONS, Diversion
from router.calls.forwarder import Forwarder
from router.calls.mirror import Mirrored
from router.calls.routes import MODEL, NAME, Method, Routes
from router.fencing.verify import NOTHING, Said
from router.state.pods import Copy

_KEPT = 64 * 1024  # bytes of messages kept besides the first, to be sent again


async def carry(
    forwarder: Forwarder, known: Routes, call: Call, method: Method, allow: Callable[[str], None] | None = None
) -> None:
    """Carries one call to its end, and answers it even if it fails. `allow` raises MeshError if the caller may not call
    that name; None allows all names."""
    stream = _Stream(forwarder, call, method, allow)
    code = int(Code.INTERNAL)
    task = asyncio.current_task()
    assert task is not None
    forwarder.in_flight += 1

    def gone() -> None:
        task.cancel()

    call.on_cancel(gone)
    try:
        async with asyncio.timeout_at(call.deadline):
            code = await stream.run(known)
    except TimeoutError:
        error = MeshError(Reason.DEADLINE, "the call did not end within its deadline: call with a later deadline")
        code = int(error.reason.code)
        answers.fail(call, error)
    except MeshError as error:
        code = int(error.reason.code)
        answers.fail(call, error)
    except (CallCancelled, asyncio.CancelledError):
        code = int(Code.CANCELLED)
        if not call.cancelled:  # this router is stopping
            answers.fail(call, answers.stopping())
    except Exception:
        answers.internal(call, "a stream")
    finally:
        call.on_cancel(None)
        stream.hold.counts(0)
        forwarder.in_flight -= 1
        ms = (time.perf_counter() - stream.began) * 1000
        meter = forwarder.meter
        kind = meter.cold if stream.cold else meter.hits
        meter.call(method.label, code, ms, stream.sent, stream.received, kind)
        if stream.destination is not None:
            stream.destination.meter.call(code, ms)


class _StreamPlace:
    """A call's place among those that wait for a connection to a copy's pod. A connection that becomes free is reserved
    for the call."""

    def __init__(self, forwarder: Forwarder, copy: Copy) -> None:
        self._forwarder = forwarder
        self._copy = copy
        self._came: asyncio.Future[None] = forwarder.loop.create_future()

    def resume(self) -> None:
        """Takes the connection that has become free."""
        self._forwarder.began(self._copy)
        self._came.set_result(None)

    async def wait(self) -> None:
        """Waits for a connection. If the wait is cancelled, leaves the queue, or gives back the connection that it has
        got."""
        self._forwarder.wait(self._copy, self)
        try:
            await asyncio.shield(self._came)
        except asyncio.CancelledError:
            if self._came.done():
                self._forwarder.ended(self._copy)
            else:
                self._copy.waiting.pop(self, None)
            raise


class _Stream:
    """One call, and the messages kept to send it again."""

    def __init__(self, forwarder: Forwarder, call: Call, method: Method, allow: Callable[[str], None] | None) -> None:
        self._forwarder = forwarder
        self._allow = allow
        self._call = call
        self._method = method
        self._kept: list[bytes] = []
        self._kept_bytes = 0
        self.hold = forwarder.budget.hold()  # the bytes of the messages kept
        self._keeping = True  # the reply has not begun
        self._whole = True  # everything that was read is kept
        self._in_pieces = call.takes_pieces and not method.path  # nobody here needs to see a whole message
        self._ended = False
        self._unsendable: Exception | None = None  # why the rest of the request cannot be sent
        self.began = time.perf_counter()
        self.cold = False  # the call has waited for a load
        self.destination: Destination | None = None  # of the alias that the call names
        self._mirrored: tuple[bytes, tuple[Header, ...]] | None = None  # frame and headers of a call with a shadow
        self.sent = 0  # bytes of messages
        self.received = -1

    async def run(self, known: Routes) -> int:
        """Carries the call and returns the code it ended with. Raises MeshError, CallCancelled."""
        call, method, forwarder = self._call, self._method, self._forwarder
        first = await self._read() if method.path else None
        asked = known.asked(call, method, first)
        if self._allow is not None:
            self._allow(asked[0])
        _, self.destination = await forwarder.aliases.resolve(call, asked)
        headers = routes.passed(call)
        diversion = Diversion(forwarder.aliases, call, asked, self.destination)
        while True:
            try:
                return await self._call_model(diversion.model, headers, first, named=asked[1] == NAME)
            except MeshError as error:
                if asked[1] == MODEL or error.reason not in REASONS or not (self._keeping and self._whole):
                    raise
                if not diversion.at_once(error):
                    if not diversion.must_read(error):
                        raise
                    await diversion.read()
                self.destination = diversion.destination

    async def _call_model(self, model_id: str, headers: tuple[Header, ...], first: bytes | None, *, named: bool) -> int:
        """Carries the call to one model and returns the code it ended with. If `named`, the reply contains the name
        that the caller used. Raises MeshError, CallCancelled."""
        forwarder = self._forwarder
        attempts = Attempts(forwarder, model_id, safe=self._method.safe, deadline=self._call.deadline)
        copy, said = await self._place(model_id, attempts, first)
        while True:
            sent = headers + aliases.added(self.destination if named else None, copy, self._method)
            if first is not None and self._method.unary and self.destination is not None:
                self._mirrored = (first, sent) if self.destination.alias.mirror is not None else None
            try:
                outcome = await self._try(copy, sent, said, attempts)
            finally:
                forwarder.ended(copy)
            if isinstance(outcome, int):
                return outcome
            if outcome.pause:
                await asyncio.sleep(outcome.pause)
            again = copy if outcome.verify else None
            copy, said = await self._place(model_id, attempts, first, again, insist=outcome.insist)

    # --- choosing a copy ---

    async def _place(
        self, model_id: str, attempts: Attempts, first: bytes | None, again: Copy | None = None, *, insist: bool = False
    ) -> tuple[Copy, Said]:
        """Waits for a copy that may be called, and takes a connection to its pod. Returns the copy, and what the call
        states about the model's record. `again` is the copy to use if it still exists. `insist` is as in
        `Verifier.verify`. Raises MeshError.
        """
        forwarder, tried = self._forwarder, attempts.tried
        for _ in range(MAX_TRIES):
            copies = forwarder.view.copies.get(model_id, [])
            copy, again = again if again in copies else forwarder.pick(copies, tried), None
            if copy is None:
                self.cold = True
                tried.clear()
                await forwarder.coldstart.load(model_id, deadline=self._call.deadline)
                continue
            said = await self._verified(copy, first, insist=insist)
            insist = False
            if said is None:
                continue
            if forwarder.has_room(copy):
                forwarder.began(copy)
                return copy, said
            other = forwarder.beyond_share(copy, tried, unary=self._method.unary)
            if other is not None:
                forwarder.began(other)
                return other, NOTHING
            await _StreamPlace(forwarder, copy).wait()
            if copy in forwarder.view.copies.get(model_id, ()):
                if not forwarder.must_verify(copy):
                    return copy, NOTHING
                if said := forwarder.known(copy):
                    return copy, said
            forwarder.ended(copy)
        text = f"no copy of {model_id} stayed available in {MAX_TRIES} attempts: retry"
        raise MeshError(Reason.UNAVAILABLE, text, retry_after=1.0)

    async def _verified(self, copy: Copy, first: bytes | None, *, insist: bool) -> Said | None:
        """Returns what the call may state about the copy's record, or None if the copy is gone. Raises MeshError if the
        record cannot be verified, or if the request has killed a server."""
        forwarder = self._forwarder
        if not insist:
            if not forwarder.must_verify(copy):
                return NOTHING
            if said := forwarder.known(copy):
                return said
        said = await forwarder.verifier.verify(copy, insist=insist)
        if first is not None and (refusal := forwarder.refusal(copy.model, first)) is not None:
            raise refusal
        return said or None

    # --- one try ---

    async def _try(self, copy: Copy, headers: tuple[Header, ...], said: Said, attempts: Attempts) -> int | Decision:
        """Sends the call to the copy. Returns the code that the call ended with, or what to do next. Raises MeshError
        if the call is given up, and CallCancelled."""
        call, forwarder, pool = self._call, self._forwarder, copy.pod.pool
        if pool is None:
            return attempts.missed(copy, kept=self._whole)
        deadline = call.deadline
        timeout = None if deadline is None else metadata.format_timeout(deadline - forwarder.loop.time())
        try:
            request = pool.open(
                call.method,
                headers + copy.headers + said,
                timeout=timeout,
                encoding=call.encoding,
                takes_pieces=self._in_pieces,
            )
        except ValueError as error:
            raise MeshError(Reason.BAD_REQUEST, str(error)) from error
        sender = asyncio.create_task(self._send(request))
        try:
            answer = await request.first()
            if isinstance(answer, Reply) and answer.code:
                refusal = replies.returned(answer.headers, copy.pod)[1]
                if refusal is not None:
                    return attempts.refused(copy, refusal, said, kept=self._whole)
            self._keeping = False
            self._kept.clear()
            self.hold.counts(0)
            if copy.pod.failed_at:
                forwarder.reached(copy.pod)
            return await self._answer(copy, answer)
        except Lost as lost:
            if self._unsendable is not None:
                raise self._unsendable from None
            if self._keeping:
                return attempts.lost(copy, pool, lost, kept=self._whole)
            forwarder.lost(copy, lost)
            raise replies.broken(lost.why) from lost
        finally:
            sender.cancel()
            request.cancel()
            await asyncio.gather(sender, return_exceptions=True)

    async def _read(self) -> bytes | None:
        frame = await self._call.read()
        if frame is None:
            self._ended = True
            return None
        self.sent += len(frame) - framing.PREFIX
        if self._keeping:
            if self._whole and (not self._kept or self._kept_bytes + len(frame) <= _KEPT):
                self._kept.append(frame)
                self._kept_bytes += len(frame) if len(self._kept) > 1 else 0
                self.hold.counts(self.hold.size + len(frame))
            else:
                self._whole = False
                self._kept.clear()
                self.hold.counts(0)
        return frame

    async def _send(self, request: RequestStream) -> None:
        try:
            for frame in tuple(self._kept):
                await request.write(frame)
            while not self._ended:
                read = await self._read()
                if read is not None:
                    await request.write(read)
            request.end()
        except (Lost, CallCancelled):
            pass  # the waiter for the reply gets the error as well
        except Exception as error:
            self._unsendable = error
            request.cancel()  # the waiter for the reply raises the error

    async def _answer(self, copy: Copy, answer: Reply | ReplyStream) -> int:
        call = self._call
        if isinstance(answer, Reply):
            headers, _ = replies.returned(answer.headers, copy.pod)
            returns = routes.returns
            trailers = [header for header in answer.trailers if returns[header[0]]]
            if answer.frame is not None and not answer.code:
                self.received = len(answer.frame) - framing.PREFIX
                if answer.encoding:
                    headers.append((replies.ENCODING, answer.encoding))
                call.reply(answer.frame, headers, trailers)
            else:
                call.fail(answer.code, answer.text, headers, trailers)
            self._mirror(answer)
            return answer.code
        headers, _ = replies.returned(answer.headers, copy.pod)
        if answer.encoding:
            headers.append((replies.ENCODING, answer.encoding))
        code, self.received = await replies.pump(call, answer, headers)
        return code

    def _mirror(self, answer: Reply) -> None:
        """Offers an answered unary call to the shadow of its alias, if there is one."""
        if self._mirrored is None or self.destination is None:
            return
        frame, headers = self._mirrored
        encoding = self._call.encoding
        call = Mirrored(self._method, headers, frame, encoding, answer.code, answer.frame, self.began)
        self._forwarder.mirrors.offer(self.destination.alias, call)
