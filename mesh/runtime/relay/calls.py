"""The data port of a foreign server: each call is checked as the ONNX server checks it, and passed on to the server.

Each call is a task, which passes it on through the `egress`. A reply of one message, the usual case, is written in one
piece with its trailers. If the end does not follow the first message immediately, the reply is passed on message by
message.

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
from mesh.runtime.relay.egress import Answer, Egress, Outgoing
from mesh.runtime.relay.link import Link
from mesh.runtime.relay.methods import Methods
from mesh.runtime.relay.splice import SpliceError, append, splice
from mesh.runtime.relay.table import RelayedCopy, Table
from mesh.runtime.sharedmemory.board import METHODS, Board
from mesh.statuses import Code, MeshError, Reason
from mesh.telemetry import logs
from mesh.v2 import PREFIX
from mesh.wire import framing, headers
from mesh.wire.call import Call, CallCancelled, Header, Headers
from mesh.wire.reply import Lost, Reply

log = logs.get(__name__)

_SOON = 0.005
"""Seconds within which the end of a reply must follow its only message, for both to be written in one piece."""

_METHODS = {PREFIX + name.encode(): index for index, name in enumerate(METHODS[:-1])}
_OTHER = len(METHODS) - 1
_INFER, _METADATA = PREFIX + b"ModelInfer", PREFIX + b"ModelMetadata"


class _NotHere(Exception):
    """The error for a call that no model has answered, so that another copy may answer it."""


class RelayPort:
    """The handler of the data port's calls. For use in the event loop's thread only."""

    def __init__(self, table: Table, board: Board, link: Link, egress: Egress, *, max_message: int) -> None:
        self.methods: Methods | None = None  # None: the server has not reported its status yet
        self.in_flight = 0
        self._table = table
        self._board = board
        self._link = link
        self._egress = egress
        self._max_message = max_message
        self._loop = asyncio.get_running_loop()

    def forwards(self, call: Call) -> bool:
        """Returns whether a call's messages are only passed on, so that large ones may arrive in pieces. They are if no
        id is written into them, and if the egress can write pieces."""
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
                raise MeshError(Reason.BAD_REQUEST, "the call names no model: its router sends mm-model-id-bin")
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
        carried = _Carried(call, copy, path, named_as)
        copy.row.begin(started_ns)
        self.in_flight += 1
        task = self._loop.create_task(self._carry(carried, method, started_ns))
        copy.calls.add(task)

    async def _carry(self, carried: "_Carried", method: int, started_ns: int) -> None:
        call, copy = carried.call, carried.copy
        code = int(Code.INTERNAL)
        task = asyncio.current_task()
        assert task is not None
        try:
            # Not before this task runs: if its caller has gone by then, it would be cancelled and never count its end.
            call.on_cancel(lambda: _cancel(task))
            async with asyncio.timeout_at(call.deadline), copy.gate:
                copy.row.run()
                carried.began_ns = time.monotonic_ns()
                code = await self._forward(carried)
        except _NotHere:
            code = int(Reason.NOT_HERE.code)
            answers.not_here(call, self._board, method, started_ns)
        except MeshError as error:
            code = int(error.reason.code)
            answers.fail(call, error)
        except TimeoutError:
            code = int(Code.DEADLINE_EXCEEDED)
            answers.fail(call, MeshError(Reason.DEADLINE, "the deadline has passed"))
        except (CallCancelled, asyncio.CancelledError):
            code = int(Code.CANCELLED)
            if not call.cancelled:
                answers.fail(
                    call, MeshError(Reason.UNAVAILABLE, ("the call was ended because its copy is being unloaded"))
                )
        except Exception:
            log.exception("call failed in the relay's own code", method=call.method)
            answers.fail(call, MeshError(Reason.INTERNAL, "internal error in the relay; its log has the cause"))
        finally:
            call.on_cancel(None)
            now = time.monotonic_ns()
            ran = carried.began_ns > 0
            busy_ns = now - carried.began_ns if ran else 0
            copy.row.end(now, runs=int(ran), busy_ns=busy_ns, failed=code != Code.OK)
            self.in_flight -= 1
            copy.calls.discard(task)
            if code != Reason.NOT_HERE.code:
                self._board.observe(method, code, now - started_ns)

    # --- to the server and back

    async def _forward(self, carried: "_Carried") -> int:
        """Passes a call on and answers it. Returns the code of the answer. Raises _NotHere, MeshError."""
        call = carried.call
        if not await self._link.up():
            raise _NotHere
        await self._egress.up()
        sent = metadata.to_server(call.headers, carried.copy.model_id)
        left = None if call.deadline is None else max(0.001, call.deadline - self._loop.time())
        epoch = self._link.epoch
        feeding = None
        try:
            if call.frame is not None:
                frame = self._read(carried, call.frame)
                outgoing = self._egress.send(
                    call.method, sent, frame, timeout=left, encoding=call.encoding, pieces=not carried.renames
                )
            else:
                outgoing = self._egress.open(
                    call.method, sent, timeout=left, encoding=call.encoding, pieces=not carried.renames
                )
                feeding = self._loop.create_task(self._feed(carried, outgoing))
        except ValueError as error:
            raise MeshError(Reason.BAD_REQUEST, f"the metadata cannot be passed on: {error}") from None
        try:
            answer = await outgoing.first()
            return self._ended(carried, answer) if isinstance(answer, Reply) else await self._stream(carried, answer)
        except Lost as lost:
            if carried.refused is not None:
                raise carried.refused from None
            await self._link.noticed(epoch)
            await self._link.survived()
            text = f"the connection to the model server was lost during the call: {lost.why}"
            raise MeshError(Reason.LOST, text) from None
        finally:
            outgoing.cancel()  # no effect after the end
            if feeding is not None:
                feeding.cancel()
                await asyncio.wait({feeding})

    async def _stream(self, carried: "_Carried", answer: Answer) -> int:
        """Passes on an answer that is read message by message. Raises `Lost`."""
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

    def _ended(self, carried: "_Carried", reply: Reply, returned: Headers = ()) -> int:
        """Answers a call with the server's status, and its only message if it has one. Returns the code of the answer;
        raises _NotHere."""
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
        code, text = verdicts.to_client(reply.code, reply.text, call.method[1:].decode(errors="replace"))
        call.fail(code, text, [] if carried.begun else metadata.to_client(returned or reply.headers), trailers)
        return code

    def _returned(self, received: Headers, encoding: bytes) -> list[Header]:
        """Returns the initial metadata of an answer with messages."""
        returned = [*metadata.to_client(received), *answers.load(self.in_flight - 1)]
        if encoding:
            returned.append((b"grpc-encoding", encoding))
        return returned

    async def _feed(self, carried: "_Carried", outgoing: Outgoing) -> None:
        """Sends the messages of a streamed request. A message that cannot be sent ends the call."""
        try:
            while (frame := await carried.call.read()) is not None:
                await outgoing.write(self._read(carried, frame))
            outgoing.end()
        except (MeshError, CallCancelled) as error:
            carried.refused = error
            outgoing.cancel()
        except Lost:
            pass  # the call has ended, and its answer has the reason

    def _read(self, carried: "_Carried", frame: bytes) -> bytes:
        """Returns a frame for the server, with the model's id in its place. Raises MeshError."""
        if not carried.path:
            return frame
        message = framing.unpack(frame, carried.call.encoding, limit=self._max_message)
        try:
            spliced = splice(message, carried.path, carried.copy.model_id.encode("utf-8", "surrogatepass"))
        except SpliceError as error:
            text = f"the model id cannot be put into the request: {error}"
            raise MeshError(Reason.BAD_REQUEST, text) from None
        return framing.pack(spliced)


def _cancel(task: "asyncio.Task[None]") -> None:
    task.cancel()


class _Carried:
    """One call on its way."""

    __slots__ = ("_alias", "_version", "began_ns", "begun", "call", "copy", "path", "refused")

    def __init__(self, call: Call, copy: RelayedCopy, path: tuple[int, ...], named_as: bytes | None) -> None:
        self.call = call
        self.copy = copy
        self.path = path
        self.began_ns = 0  # when the call was sent to the server
        self.begun = False  # the reply is passed on message by message
        self.refused: MeshError | CallCancelled | None = None  # why the rest of the request cannot be sent
        self._alias = self._version = ""
        if named_as is not None:
            self._alias, self._version = headers.read_as(named_as)

    @property
    def renames(self) -> bool:
        """True if the alias or version that the call used is written into the reply."""
        return bool(self._alias or self._version) and self.call.method in (_INFER, _METADATA)

    def named(self, frame: bytes, encoding: bytes, *, limit: int) -> bytes:
        """Returns the frame of a reply, under the alias that the call used if it is a V2 message."""
        if not self.renames:
            return frame
        call = self.call
        message = framing.unpack(frame, encoding, limit=limit)
        if self._alias:
            message = splice(message, (1,), self._alias.encode())
        if call.method == _METADATA:
            listed = call.header(headers.VERSIONS)
            message = append(message, 2, [v.encode() for v in headers.read_listed(listed)]) if listed else message
        elif self._version:
            message = splice(message, (2,), self._version.encode())
        return framing.pack(message)
