"""The data port of a foreign server: each call is checked as the ONNX server checks it, and passed on to the server.

A call of one message is passed on through the `egress` without a task of its own, if the egress can do that and the
copy's calls are not limited. If its reply arrives whole, it is passed back at once. All other calls, and those whose
outcome takes longer, are tasks. A reply of one message, the usual case, is written in one piece with its trailers. If
the end does not follow the first message immediately, the reply is passed on message by message.

The caller gets the server's answer with metadata, trailers and rich errors, except in two cases. *Not found* means that
the server has lost the model: the copy is withdrawn, and the router gets *not here*, so that it asks for a load. And
UNAVAILABLE becomes INTERNAL (`verdicts`). A call whose connection breaks waits until it is known whether the server has
ended. If it has, this process ends too, and routers see the connection break, as if the ONNX server had died.
"""

import asyncio
import time

from mesh.runtime.port import answers
from mesh.runtime.port.permission import named, permitted, proven
from mesh.runtime.relay import metadata, verdicts
from mesh.runtime.relay.carried import VERSIONED, Carried
from mesh.runtime.relay.egress import Answer, Egress, Outgoing
from mesh.runtime.relay.link import Link
from mesh.runtime.relay.methods import Methods
from mesh.runtime.relay.silence import Silence
from mesh.runtime.relay.splice import SpliceError, drop, splice
from mesh.runtime.relay.table import Table
from mesh.runtime.sharedmemory.board import METHODS, Board
from mesh.statuses import Code, MeshError, Reason
from mesh.telemetry import logs
from mesh.v2 import PREFIX
from mesh.wire import framing
from mesh.wire.call import Call, CallCancelled, Header, Headers
from mesh.wire.client import ReplyStream
from mesh.wire.reply import Lost, Reply

log = logs.get(__name__)

_SOON = 0.005
"""Seconds within which the end of a reply must follow its only message, for both to be written in one piece."""

_METHODS = {PREFIX + name.encode(): index for index, name in enumerate(METHODS[:-1])}
_OTHER = len(METHODS) - 1


class _NotHere(Exception):
    """The error for a call for which no model has run, so that another copy may answer it."""


class RelayPort:
    """The handler of the data port's calls. For use in the event loop's thread only."""

    def __init__(
        self,
        table: Table,
        board: Board,
        link: Link,
        egress: Egress,
        *,
        max_message: int,
        silence: Silence | None = None,
    ) -> None:
        """Makes the handler. `silence` watches a server that one call can block."""
        self.methods: Methods | None = None  # None: the server has not reported its status yet
        self.in_flight = 0
        self._table = table
        self._board = board
        self._link = link
        self._egress = egress
        self._max_message = max_message
        self._silence = silence
        self._loop = asyncio.get_running_loop()

    def forwards(self, call: Call) -> bool:
        """Returns whether large messages of a call may arrive in pieces: the egress can write pieces, and no id is
        written into the call's messages."""
        if not self._egress.takes_pieces or self.methods is None:
            return False
        try:
            return not self.methods.path(call.method[1:])
        except MeshError:
            return False

    def handle(self, call: Call) -> None:
        """Starts handling a call. Never raises."""
        started_ns = time.monotonic_ns()
        method = _METHODS.get(call.method, _OTHER)
        try:
            model_id, token, named_as = named(call)
            if not model_id:
                raise MeshError(
                    Reason.BAD_REQUEST, "the call names no model: send the model's id in the metadata mm-model-id-bin"
                )
            copy = self._table.copies.find(model_id, token)
            if copy is None or self.methods is None:
                answers.not_here(call, self._board, method, started_ns)
                return
            fence = self._board.fence
            if not proven(fence) and not permitted(call, self._board, fence, method, started_ns):
                return
            path = self.methods.path(call.method[1:])
        except MeshError as error:
            answers.fail(call, error)
            return
        carried = Carried(self, call, copy, path, named_as, method=method, started_ns=started_ns)
        self.in_flight += 1
        alone = call.frame is not None and not copy.limited and self._link.is_up
        copy.row.begin(started_ns, runs=int(alone))
        if not alone or not self._posted(carried):
            self._carry_on(carried)

    # --- without a task: a call of one message, whose reply comes at once ---

    def _posted(self, carried: Carried) -> bool:
        """Sends a call of one message without a task, or answers it with the error if it cannot be sent. Returns False
        if a task has to send the call."""
        call, copy = carried.call, carried.copy
        assert call.frame is not None
        carried.epoch = self._link.epoch
        try:
            sent, frame = metadata.to_server(call.headers, copy.model_id), self._read(carried, call.frame)
            left = self._left(call)
            carried.exchange = self._egress.post(
                call.method, sent, frame, carried, timeout=left, encoding=call.encoding
            )
        except Exception as error:
            carried.began_ns = carried.started_ns
            self._end(carried, self._failed(carried, _refusal(error)))
            return True
        if carried.exchange is None:
            copy.row.ran(0)
            return False
        carried.began_ns = carried.started_ns
        if self._silence is not None:
            self._silence.began(carried)
        copy.calls.add(carried)
        if call.deadline is not None:
            carried.timer = self._loop.call_at(call.deadline, carried.late)
        call.on_cancel(carried.gone)
        return True

    def replied(self, carried: Carried, reply: Reply) -> None:
        """Answers a call that was sent without a task. If the reply is not the server's own, continues with a task."""
        if not self._egress.is_final(reply):
            self.outcome(carried, reply)
            return
        try:
            code = self._ended(carried, reply)
        except Exception as error:
            code = self._failed(carried, error)
        self._end(carried, code)

    def outcome(self, carried: Carried, outcome: Reply | ReplyStream | Lost) -> None:
        """Continues with a call that was sent without a task, and whose outcome takes longer."""
        call, exchange = carried.call, carried.exchange
        assert call.frame is not None
        assert exchange is not None
        try:
            carried.outgoing = self._egress.resume(
                exchange,
                outcome,
                call.method,
                metadata.to_server(call.headers, carried.copy.model_id),
                self._read(carried, call.frame),
                timeout=self._left(call),
                encoding=call.encoding,
                pieces=carried.takes_pieces,
            )
        except Exception as error:
            self.ended(carried, error)
            return
        call.on_cancel(None)
        if carried.timer is not None:
            carried.timer.cancel()
        self._carry_on(carried)
        carried.copy.left(carried)

    def ended(self, carried: Carried, error: BaseException) -> None:
        """Ends a call that was sent without a task, before its outcome is known."""
        if carried.exchange is not None:
            carried.exchange.cancel()
        self._end(carried, self._failed(carried, error))

    def _end(self, carried: Carried, code: int) -> None:
        if carried.timer is not None:
            carried.timer.cancel()
        carried.exchange = None  # a sink and its exchange refer to each other
        carried.copy.left(carried)
        self._count(carried, code)

    # --- with a task ---

    def _carry_on(self, carried: Carried) -> None:
        task = self._loop.create_task(self._carry(carried))
        carried.copy.calls.add(task)

    async def _carry(self, carried: Carried) -> None:
        call, copy = carried.call, carried.copy
        code = int(Code.INTERNAL)
        task = asyncio.current_task()
        assert task is not None
        try:
            # Only now: a task that is cancelled before its first step would never count the call's end.
            call.on_cancel(lambda: _cancel(task))
            async with asyncio.timeout_at(call.deadline), copy.gate:
                if not carried.began_ns:
                    copy.row.run()
                    carried.began_ns = time.monotonic_ns()
                    if self._silence is not None:
                        self._silence.began(carried)
                code = await self._forward(carried)
        except (Exception, asyncio.CancelledError) as error:
            code = self._failed(carried, error)
        finally:
            copy.left(task)
            self._count(carried, code)

    def _failed(self, carried: Carried, error: BaseException) -> int:
        """Answers a call that has failed here, unless its caller has gone. Returns the code to count."""
        call = carried.call
        match error:
            case _NotHere():
                answers.not_here(call, self._board, carried.method, carried.started_ns)
                return int(Reason.NOT_HERE.code)
            case CallCancelled() | asyncio.CancelledError():
                if not call.cancelled:
                    text = "the call was ended because its copy is being unloaded: call again"
                    answers.fail(call, MeshError(Reason.UNAVAILABLE, text))
                return int(Code.CANCELLED)
            case MeshError():
                failure = error
            case TimeoutError():
                text = "the call did not end within its deadline: call with a later deadline"
                failure = MeshError(Reason.DEADLINE, text)
            case _:
                log.error("call failed in the relay's own code", method=call.method, exc_info=error)
                failure = MeshError(Reason.INTERNAL, "internal error in the relay; its log has the cause")
        answers.fail(call, failure)
        return int(failure.reason.code)

    def _count(self, carried: Carried, code: int) -> None:
        carried.call.on_cancel(None)
        if self._silence is not None:
            self._silence.ended(carried, code)
        now = time.monotonic_ns()
        ran = carried.began_ns > 0
        busy_ns = now - carried.began_ns if ran else 0
        carried.copy.row.end(now, runs=int(ran), busy_ns=busy_ns, failed=code != Code.OK)
        self.in_flight -= 1
        if code != Reason.NOT_HERE.code:
            self._board.observe(carried.method, code, now - carried.started_ns)

    # --- to the server and back

    async def _forward(self, carried: Carried) -> int:
        """Passes a call on, unless that is done already, and answers it. Returns the code of the answer. Raises
        _NotHere, MeshError."""
        feeding = None
        outgoing = carried.outgoing
        if outgoing is None:
            if not await self._link.up():
                raise _NotHere
            await self._egress.up()
            if carried.copy not in self._table.copies.all_of(carried.copy.model_id):
                raise _NotHere  # withdrawn while the call waited
            carried.epoch = self._link.epoch
            outgoing = self._sent(carried)
            if carried.call.frame is None:
                feeding = self._loop.create_task(self._feed(carried, outgoing))
        try:
            answer = await outgoing.first()
            return self._ended(carried, answer) if isinstance(answer, Reply) else await self._stream(carried, answer)
        except Lost as lost:
            if carried.refused is not None:
                raise carried.refused from None
            await self._link.noticed(carried.epoch)
            await self._link.survived()
            log.info("the connection to the model server was lost", model=carried.copy.model_id, why=str(lost))
            text = f"the connection to the model server was lost during the call: {lost.why}"
            raise MeshError(Reason.LOST, text) from None
        finally:
            outgoing.cancel()  # no effect after the end
            if feeding is not None:
                feeding.cancel()
                await asyncio.wait({feeding})

    def _sent(self, carried: Carried) -> Outgoing:
        """Sends a call's only message, or begins a request of several. Raises MeshError."""
        call = carried.call
        sent = metadata.to_server(call.headers, carried.copy.model_id)
        left, pieces = self._left(call), carried.takes_pieces
        try:
            if call.frame is None:
                return self._egress.open(call.method, sent, timeout=left, encoding=call.encoding, pieces=pieces)
            frame = self._read(carried, call.frame)
            return self._egress.send(call.method, sent, frame, timeout=left, encoding=call.encoding, pieces=pieces)
        except ValueError as error:
            raise _refusal(error) from None

    def _left(self, call: Call) -> float | None:
        """Returns the seconds until a call's deadline, at least a millisecond, or None if it has no deadline."""
        return None if call.deadline is None else max(0.001, call.deadline - self._loop.time())

    async def _stream(self, carried: Carried, answer: Answer) -> int:
        """Passes on an answer that is read message by message. Returns the code of the answer. Raises `Lost`, _NotHere,
        and MeshError for a message that cannot be read."""
        call = carried.call
        first = await answer.read()
        if first is None:
            return self._ended(carried, await answer.result(), answer.headers)
        following = asyncio.ensure_future(answer.read())
        try:
            await asyncio.wait({following}, timeout=_SOON)
            if following.done() and following.exception() is None and following.result() is None:
                reply = await answer.result()
                if reply.code == Code.OK:
                    reply.frame, reply.headers, reply.encoding = first, answer.headers, answer.encoding
                    return self._ended(carried, reply)
            carried.begun = True
            call.start(self._returned(answer.headers, answer.encoding))
            await call.write(carried.named(first, answer.encoding, limit=self._max_message))
            while (frame := await following) is not None:
                await call.write(carried.named(frame, answer.encoding, limit=self._max_message))
                following = asyncio.ensure_future(answer.read())
            return self._ended(carried, await answer.result())
        finally:
            following.cancel()  # no effect after the end

    def _ended(self, carried: Carried, reply: Reply, returned: Headers = ()) -> int:
        """Answers a call with the server's status, and with its only message if it has one. Returns the code of the
        answer. Raises _NotHere."""
        call, copy = carried.call, carried.copy
        trailers = metadata.to_client(reply.trailers)
        if reply.code == Code.OK:
            if reply.frame is not None:
                frame = carried.named(reply.frame, reply.encoding, limit=self._max_message)
                call.reply(frame, self._returned(reply.headers, reply.encoding), trailers)
                return 0
            if not carried.begun:
                call.start(self._returned(returned or reply.headers, b""))
            call.finish(0, trailers=trailers)
            return 0
        lost = not carried.begun and verdicts.model_is_lost(reply.code, reply.text)
        if lost and self._table.lose(copy, f"{Code(reply.code).name}: {reply.text}"):
            raise _NotHere
        if verdicts.model_has_died(reply.code, reply.text):
            self._table.lose(copy, reply.text)  # but no other copy is called, which this call might kill as well
        text = reply.text.replace(copy.name, copy.model_id) if copy.name != copy.model_id else reply.text
        code, text = verdicts.to_client(reply.code, text, call.method[1:].decode(errors="replace"))
        call.fail(code, text, [] if carried.begun else metadata.to_client(returned or reply.headers), trailers)
        return code

    def _returned(self, received: Headers, encoding: bytes) -> list[Header]:
        """Returns the initial metadata of an answer with messages."""
        returned = [*metadata.to_client(received), *answers.load(self.in_flight - 1)]
        if encoding:
            returned.append((b"grpc-encoding", encoding))
        return returned

    async def _feed(self, carried: Carried, outgoing: Outgoing) -> None:
        """Sends the messages of a streamed request. A message that cannot be sent ends the call."""
        try:
            while (frame := await carried.call.read()) is not None:
                await outgoing.write(self._read(carried, frame))
            outgoing.end()
        except Lost:
            pass  # the call has ended, and its answer has the reason
        except Exception as error:
            carried.refused = error
            outgoing.cancel()  # the waiter for the answer raises the error

    def _read(self, carried: Carried, frame: bytes) -> bytes:
        """Returns a frame for the server, with the server's name for the model in place of the id. Raises MeshError."""
        if not carried.path:
            return frame
        message = framing.unpack(frame, carried.call.encoding, limit=self._max_message)
        try:
            spliced = splice(message, carried.path, carried.copy.name.encode("utf-8", "surrogatepass"))
            if carried.call.method in VERSIONED and not self._link.control.takes_versions:
                spliced = drop(spliced, 2)
        except SpliceError as error:
            text = f"the model id cannot be put into the request: {error}"
            raise MeshError(Reason.BAD_REQUEST, text) from None
        return frame if spliced is message and not framing.is_compressed(frame) else framing.pack(spliced)


def _refusal(error: Exception) -> Exception:
    """Returns the error for a call that cannot be sent. A ValueError comes from the call's metadata."""
    if isinstance(error, ValueError):
        return MeshError(Reason.BAD_REQUEST, f"the call's metadata cannot be passed on: {error}")
    return error


def _cancel(task: "asyncio.Task[None]") -> None:
    task.cancel()
