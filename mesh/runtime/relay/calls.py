"""The data port of a foreign server: each call is checked as the ONNX server checks it, and passed on to the server.

Each call is a task, because `grpc.aio` has no callbacks. Whatever its shape, it is passed on as a stream of messages in
both directions. A reply of one message, the usual case, is written in one piece with its trailers. If the end does not
follow the first message at once, the reply is passed on message by message.

The caller gets the server's answer with metadata, trailers and rich errors, except in two cases. *Not found* means that
the server has lost the model: the copy is withdrawn, and the router gets *not here*, so that it asks for a load. And
UNAVAILABLE becomes INTERNAL (`verdicts`). A call whose connection breaks waits until it is known whether the server has
ended. If it has, this process ends too, and routers see the connection break, as if the ONNX server had died.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import grpc

from mesh.runtime.port import answers
from mesh.runtime.port.permission import named, permitted, proven
from mesh.runtime.relay import metadata, verdicts
from mesh.runtime.relay.link import Link
from mesh.runtime.relay.methods import Methods
from mesh.runtime.relay.splice import SpliceError, append, splice
from mesh.runtime.relay.table import RelayedCopy, Table
from mesh.runtime.sharedmemory.board import METHODS, Board
from mesh.statuses import Code, MeshError, Reason
from mesh.telemetry import logs
from mesh.v2 import PREFIX
from mesh.wire import framing, headers
from mesh.wire.call import Call, CallCancelled

log = logs.get(__name__)

_SOON = 0.005
"""Seconds within which the end of a reply must follow its only message, for both to be written in one piece."""

_METHODS = {PREFIX + name.encode(): index for index, name in enumerate(METHODS[:-1])}
_OTHER = len(METHODS) - 1
_EOF = grpc.aio.EOF  # type: ignore[attr-defined] # missing in the stubs
_MAX_METHODS = 1000  # names of methods that are kept, as clients choose them


class _NotHere(Exception):
    """The error for a call that no model has answered, so that another copy may answer it."""


class RelayPort:
    """The handler of the data port's calls. For use in the event loop's thread only."""

    def __init__(self, table: Table, board: Board, link: Link, *, max_message: int) -> None:
        self.methods: Methods | None = None  # None: the server has not reported its status yet
        self.in_flight = 0
        self._table = table
        self._board = board
        self._link = link
        self._max_message = max_message
        self._loop = asyncio.get_running_loop()
        self._calls: dict[bytes, tuple[Callable[..., Any], Callable[..., Any]]] = {}  # by method

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
        call.on_cancel(lambda: _cancel(task))

    async def _carry(self, carried: "_Carried", method: int, started_ns: int) -> None:
        call, copy = carried.call, carried.copy
        code = int(Code.INTERNAL)
        try:
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
            task = asyncio.current_task()
            assert task is not None
            copy.calls.discard(task)
            if code != Reason.NOT_HERE.code:
                self._board.observe(method, code, now - started_ns)

    # --- to the server and back

    async def _forward(self, carried: "_Carried") -> int:
        """Passes a call on and answers it. Returns the code of the answer. Raises _NotHere, MeshError."""
        call = carried.call
        if not await self._link.up():
            raise _NotHere
        try:
            sent = metadata.to_server(call.headers, carried.copy.model_id)
        except ValueError as error:
            raise MeshError(Reason.BAD_REQUEST, f"the metadata cannot be passed on: {error}") from None
        left = None if call.deadline is None else max(0.001, call.deadline - self._loop.time())
        epoch = self._link.epoch
        one, several = self._method(call.method)
        feeding = None
        if call.frame is not None:
            rpc = one(self._read(carried, call.frame), metadata=sent, timeout=left)
        else:
            rpc = several(metadata=sent, timeout=left)
            feeding = self._loop.create_task(self._feed(carried, rpc))
        try:
            return await self._reply(carried, rpc)
        except grpc.aio.AioRpcError as error:
            return await self._failed(carried, error, epoch)
        except asyncio.CancelledError:
            if carried.refused is not None:
                raise carried.refused from None
            raise
        finally:
            rpc.cancel()  # no effect after the end
            if feeding is not None:
                feeding.cancel()
                await asyncio.wait({feeding})

    async def _reply(self, carried: "_Carried", rpc: Any) -> int:
        """Passes a reply on. Raises AioRpcError for any status except OK."""
        call = carried.call
        first = await rpc.read()
        if first is _EOF:
            call.finish(0, trailers=metadata.from_server(await rpc.trailing_metadata()))
            return 0
        returned = metadata.from_server(await rpc.initial_metadata())
        following = asyncio.ensure_future(rpc.read())
        try:
            await asyncio.wait({following}, timeout=_SOON)
            frame = framing.pack(carried.named(first))
            if following.done() and following.exception() is None and following.result() is _EOF:
                call.reply(
                    frame,
                    (*returned, *answers.load(self.in_flight - 1)),
                    metadata.from_server(await rpc.trailing_metadata()),
                )
                return 0
            carried.begun = True
            call.start((*returned, *answers.load(self.in_flight - 1)))
            await call.write(frame)
            while (message := await following) is not _EOF:
                await call.write(framing.pack(carried.named(message)))
                following = asyncio.ensure_future(rpc.read())
            call.finish(0, trailers=metadata.from_server(await rpc.trailing_metadata()))
            return 0
        finally:
            following.cancel()  # no effect after the end

    async def _failed(self, carried: "_Carried", error: grpc.aio.AioRpcError, epoch: int) -> int:
        """Answers a call that failed at the server, or on the way there. Returns the code of the answer."""
        call, copy = carried.call, carried.copy
        code, text = int(error.code().value[0]), error.details() or ""
        if code == Code.UNAVAILABLE and await self._link.broken(epoch, text):
            await self._link.survived()
            raise MeshError(Reason.LOST, f"the connection to the model server was lost during the call: {text}")
        lost = not carried.begun and verdicts.model_is_lost(code, text)
        if lost and self._table.lose(copy, f"{Code(code).name}: {text}"):
            raise _NotHere
        code, text = verdicts.to_client(code, text, call.method[1:].decode(errors="replace"))
        returned = [] if carried.begun else metadata.from_server(error.initial_metadata())
        call.fail(code, text, returned, metadata.from_server(error.trailing_metadata()))
        return code

    async def _feed(self, carried: "_Carried", rpc: Any) -> None:
        """Sends the messages of a streamed request. A message that cannot be sent ends the call."""
        try:
            while (frame := await carried.call.read()) is not None:
                await rpc.write(self._read(carried, frame))
            await rpc.done_writing()
        except (MeshError, CallCancelled) as error:
            carried.refused = error
            rpc.cancel()
        except (asyncio.InvalidStateError, grpc.aio.AioRpcError):
            pass  # the call has ended, and its reply has the reason

    def _read(self, carried: "_Carried", frame: bytes) -> bytes:
        """Returns a message for the server, with the model's id in its place. Raises MeshError."""
        message = framing.unpack(frame, carried.call.encoding, limit=self._max_message)
        if not carried.path:
            return message
        try:
            return splice(message, carried.path, carried.copy.model_id.encode("utf-8", "surrogatepass"))
        except SpliceError as error:
            text = f"the model id cannot be put into the request: {error}"
            raise MeshError(Reason.BAD_REQUEST, text) from None

    def _method(self, name: bytes) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Returns the `grpc.aio` callables of a method, for a request of one message and for a streamed request."""
        made = self._calls.get(name)
        if made is None:
            channel = self._link.channel
            path = name.decode()
            made = channel.unary_stream(path, None, None), channel.stream_stream(path, None, None)
            if len(self._calls) < _MAX_METHODS:
                self._calls[name] = made
        return made


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

    def named(self, message: bytes) -> bytes:
        """Returns the message of a reply, under the alias that the call used if it is a V2 message."""
        if self.call.method == PREFIX + b"ModelInfer":
            if self._alias:
                message = splice(message, (1,), self._alias.encode())
            return splice(message, (2,), self._version.encode()) if self._version else message
        if self.call.method == PREFIX + b"ModelMetadata":
            if self._alias:
                message = splice(message, (1,), self._alias.encode())
            listed = self.call.header(headers.VERSIONS)
            return append(message, 2, [v.encode() for v in headers.read_listed(listed)]) if listed else message
        return message
