"""Calls whose request comes message by message: carried by two coroutines, one each way, full duplex.

The same rules as for unary calls (`forward`). What differs is what can be sent a second time: the messages that have
been passed on are kept until the reply begins, the first one always, more of them up to a bound. A call that has sent
more than that is not tried again.

Unary calls come here too when their end arrives later than their message. So the first message is held against the
requests in which servers have died, as a unary one is. That is done where its model is named in it, as V2 has it: of
other methods nothing is read before a server is chosen, and what servers died in is only known of V2's.
"""

import asyncio
import time

from mesh.statuses import Code, MeshError, Reason
from mesh.telemetry import logs
from mesh.wire import framing, metadata
from mesh.wire import headers as names
from mesh.wire.call import Call, CallCancelled
from mesh.wire.client import Lost, LostKind, Reply, ReplyStream, RequestStream
from router.calls import answers, routes, shares
from router.calls.forward import MAX_SENDS, Forwarder, call_lost, pump, reply_lost, returned
from router.calls.routes import Method, Routes
from router.fencing.verify import AWAY, VERIFIED
from router.state.view import Copy

log = logs.get(__name__)

_KEPT = 64 * 1024  # bytes of messages kept beside the first, to be sent again

_ENCODING = b"grpc-encoding"


async def carry(forwarder: Forwarder, known: Routes, call: Call, method: Method) -> None:
    """Carries one call to its end, whatever that is."""
    began = time.perf_counter()
    stream = _Stream(forwarder, call, method)
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
        error = MeshError(Reason.DEADLINE, "the deadline has passed")
        code = int(error.reason.code)
        answers.fail(call, error)
    except MeshError as error:
        code = int(error.reason.code)
        answers.fail(call, error)
    except (CallCancelled, asyncio.CancelledError):
        code = int(Code.CANCELLED)
        if not call.cancelled:  # this router stops
            answers.fail(call, MeshError(Reason.UNAVAILABLE, "this router is stopping"))
    finally:
        call.on_cancel(None)
        stream.hold.counts(0)
        forwarder.in_flight -= 1
        ms = (time.perf_counter() - began) * 1000
        forwarder.meter.call(method.label, code, ms, stream.sent, stream.received)
        (forwarder.meter.cold if stream.cold else forwarder.meter.hits).observe(ms)


class _Stream:
    """One call and what is kept of it."""

    def __init__(self, forwarder: Forwarder, call: Call, method: Method) -> None:
        self._forwarder = forwarder
        self._call = call
        self._method = method
        self._kept: list[bytes] = []
        self._kept_bytes = 0
        self.hold = forwarder.budget.hold()  # the bytes of those that are kept
        self._keeping = True  # the reply has not begun
        self._whole = True  # everything that was read is kept
        self._ended = False
        self.cold = False
        self.sent = 0  # bytes of messages
        self.received = -1

    async def run(self, known: Routes) -> int:
        """The code it ended with. Raises MeshError, CallCancelled."""
        call, method, forwarder = self._call, self._method, self._forwarder
        first = await self._read() if method.path else None
        model_id = known.model_id(call, method, first)
        self.cold = model_id not in forwarder.view.copies
        passes = routes.passes
        headers = tuple(header for header in call.headers if passes[header[0]])
        tried: list[Copy] = []
        retried = insist = False
        for _ in range(MAX_SENDS):
            copy, said = await forwarder.copy(model_id, tried, call.deadline, first=first, insist=insist)
            insist = False
            pool = copy.pod.pool
            if pool is None:
                tried.append(copy)
                continue
            if not forwarder.has_room(copy):
                raise shares.refusal(model_id, copy.pod.name, copy.calls)
            deadline = call.deadline
            timeout = None if deadline is None else metadata.format_timeout(deadline - forwarder.loop.time())
            try:
                request = pool.open(call.method, headers + copy.headers + said, timeout=timeout, encoding=call.encoding)
            except ValueError as error:
                raise MeshError(Reason.BAD_REQUEST, str(error)) from error
            forwarder.began(copy)
            sender = asyncio.create_task(self._send(request))
            try:
                answer = await request.first()
                refusal = returned(answer.headers, copy.pod)[1] if isinstance(answer, Reply) and answer.code else None
                if refusal is not None:
                    if refusal == names.VERIFY_FIRST and said is not VERIFIED:
                        forwarder.not_verified(copy)
                        insist = said is AWAY
                        if insist and forwarder.other(copy, tried):
                            tried.append(copy)
                            insist = False
                        why = "must verify it first"
                    else:
                        forwarder.meter.not_here.inc()
                        forwarder.view.drop(copy)
                        why = "does not hold it"
                    if not self._whole:
                        text = f"{model_id}: {copy.pod.name} {why}, and too much was sent to send it again"
                        raise MeshError(Reason.UNAVAILABLE, text, retry_after=0)
                    continue
                self._keeping = False
                self._kept.clear()
                self.hold.counts(0)
                if copy.pod.failed_at:
                    forwarder.reached(copy.pod)
                return await self._answer(copy, answer)
            except Lost as lost:
                if not self._keeping:
                    raise reply_lost(lost) from lost
                if lost.kind is LostKind.UNSENT:
                    if not forwarder.unsent(copy, pool) and forwarder.exhausted(model_id, [*tried, copy]):
                        # All connections are in use: trying again would find the same, at once, as often as it may.
                        raise MeshError(Reason.OVERLOADED, lost.why, retry_after=0.1) from lost
                elif forwarder.lost(copy, lost.why) >= 2 or retried or not method.safe:
                    raise call_lost(copy, lost) from lost
                elif lost.kind is LostKind.STARTED:
                    raise reply_lost(lost) from lost
                else:
                    retried = True
                    forwarder.meter.retried.inc()
                if not self._whole:
                    raise call_lost(copy, lost) from lost
                tried.append(copy)
            finally:
                sender.cancel()
                request.cancel()
                forwarder.ended(copy)
                await asyncio.gather(sender, return_exceptions=True)
        raise MeshError(Reason.UNAVAILABLE, f"no copy of {model_id} could be called", retry_after=1.0)

    async def _read(self) -> bytes | None:
        frame = await self._call.read()
        if frame is None:
            self._ended = True
            return None
        self.sent += len(frame) - framing.PREFIX
        if self._keeping:
            if not self._kept or self._kept_bytes + len(frame) <= _KEPT:
                self._kept.append(frame)
                self._kept_bytes += len(frame) if len(self._kept) > 1 else 0
                self.hold.counts(self.hold.size + len(frame))
            else:
                self._whole = False
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
            pass  # whoever waits for the reply is told too

    async def _answer(self, copy: Copy, answer: Reply | ReplyStream) -> int:
        call = self._call
        if isinstance(answer, Reply):
            headers, _ = returned(answer.headers, copy.pod)
            returns = routes.returns
            trailers = [header for header in answer.trailers if returns[header[0]]]
            if answer.frame is not None and not answer.code:
                self.received = len(answer.frame) - framing.PREFIX
                if answer.encoding:
                    headers.append((_ENCODING, answer.encoding))
                call.reply(answer.frame, headers, trailers)
            else:
                call.fail(answer.code, answer.text, headers, trailers)
            return answer.code
        headers, _ = returned(answer.headers, copy.pod)
        if answer.encoding:
            headers.append((_ENCODING, answer.encoding))
        code, self.received = await pump(call, answer, headers)
        return code
