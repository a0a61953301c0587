"""The egress of `grpc.aio`: calls to the server on the link's own channel.

`grpc.aio` has a fault (github.com/grpc/grpc/issues/36066). If a server ends a stream while the client is still writing,
`write` replaces the server's status with INTERNAL, `Internal error from Core`, and drops its initial metadata; `read`
then returns no more messages. The public interface offers no way around this fault. So `GrpcCall.write` calls the
function by which `grpc.aio` itself sends a message, without what `grpc.aio` does if that function fails: the server's
status arrives by itself. `tests/runtime/relay/test_egress.py` fails if a version of grpcio does not allow this.

Requests of one message are sent in one batch, which cannot hide a status. The initial metadata of an answer that failed
without a message is sometimes lost, because `grpc.aio` drops the metadata if it processes the status first.
"""

import asyncio
import re
from collections.abc import Callable
from typing import Any

import grpc

from mesh.runtime.relay import metadata
from mesh.runtime.relay.egress import WithoutPost
from mesh.runtime.relay.link import Link
from mesh.statuses import Code, too_large
from mesh.wire import framing
from mesh.wire import metadata as wire
from mesh.wire.call import Header, Headers
from mesh.wire.reply import Lost, LostKind, Reply

_MAX_METHODS = 1000  # names of methods that are kept, as clients choose them

_LARGE = re.compile(r"CLIENT: Received message larger than max \((\d+) vs")  # gRPC's own text

_EOF = grpc.aio.EOF  # type: ignore[attr-defined] # missing in the stubs
_Method = Callable[..., Any]


class GrpcEgress(WithoutPost):
    """The calls on one channel. For use in the event loop's thread only."""

    takes_pieces = False

    def __init__(self, link: Link, *, max_message: int) -> None:
        """Makes an egress. `max_message` is the largest message after decompression, in bytes."""
        self._max_message = max_message
        self._link = link
        self._methods: dict[bytes, tuple[_Method, _Method]] = {}

    async def up(self) -> None:
        """Returns immediately, because the link waits for the connection."""

    async def close(self) -> None:
        """Does nothing, because the link closes the channel."""

    def send(
        self,
        method: bytes,
        headers: Headers,
        frame: bytes,
        *,
        timeout: float | None,
        encoding: bytes = b"",
        pieces: bool = False,
    ) -> "GrpcCall":
        """Sends a request of one message."""
        message = framing.unpack(frame, encoding, limit=self._max_message)
        one, _ = self._method(method)
        rpc = one(message, metadata=metadata.pairs(headers), timeout=timeout)
        return GrpcCall(self._link, rpc, b"", self._max_message)

    def open(
        self, method: bytes, headers: Headers, *, timeout: float | None, encoding: bytes = b"", pieces: bool = False
    ) -> "GrpcCall":
        """Begins a request whose messages are written one by one."""
        _, several = self._method(method)
        rpc = several(metadata=metadata.pairs(headers), timeout=timeout)
        return GrpcCall(self._link, rpc, encoding, self._max_message)

    def _method(self, name: bytes) -> tuple[_Method, _Method]:
        """Returns the `grpc.aio` callables of a method, for a request of one message and for a streamed request."""
        made = self._methods.get(name)
        if made is None:
            channel, path = self._link.calls, name.decode()
            made = channel.unary_stream(path, None, None), channel.stream_stream(path, None, None)
            if len(self._methods) < _MAX_METHODS:
                self._methods[name] = made
        return made


class GrpcCall:
    """One call, and the stream of its answer."""

    __slots__ = ("_ahead", "_cancelled", "_encoding", "_epoch", "_link", "_max_message", "_rpc", "encoding", "headers")

    def __init__(self, link: Link, rpc: Any, encoding: bytes, max_message: int) -> None:
        """Wraps a call of `grpc.aio`. `encoding` names the compression of the request's frames."""
        self.headers: list[Header] = []
        self.encoding = b""  # of the answer, which gRPC has decompressed
        self._link = link
        self._epoch = link.epoch
        self._rpc = rpc
        self._encoding = encoding
        self._max_message = max_message
        self._ahead: bytes | None = None  # the first frame, until it is read
        self._cancelled = False

    # --- the request

    async def write(self, frame: bytes) -> None:
        """Sends one message. Raises `Lost` once the server has ended the call, and FrameError."""
        message = framing.unpack(frame, self._encoding, limit=self._max_message)
        try:
            await self._rpc.wait_for_connection()
            await self._rpc._cython_call.send_serialized_message(message)
        except (grpc.aio.AioRpcError, grpc.aio.InternalError):
            raise Lost(LostKind.STARTED, "the model server has ended the call") from None

    def end(self) -> None:
        """Ends the request."""
        asyncio.ensure_future(self._rpc.done_writing()).add_done_callback(_taken)

    def cancel(self) -> None:
        """Ends the call at the server."""
        self._cancelled = True
        self._rpc.cancel()

    # --- the answer

    async def first(self) -> "Reply | GrpcCall":
        """Returns the answer if it failed without a message, or else this object as the stream of the answer."""
        self._ahead = await self._next()
        if self._ahead is None and (reply := await self.result()).code != Code.OK:
            return reply
        self.headers = metadata.from_pairs(await self._rpc.initial_metadata())
        return self

    async def read(self) -> bytes | None:
        """Returns the next frame, or None at the end."""
        if self._ahead is not None:
            ahead, self._ahead = self._ahead, None
            return ahead
        return await self._next()

    async def _next(self) -> bytes | None:
        try:
            message = await self._rpc.read()
        except grpc.aio.AioRpcError:
            return None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._cancelled and not (task is not None and task.cancelling()):
                raise Lost(LostKind.STARTED, "cancelled by us") from None
            raise
        return None if message is _EOF else framing.pack(message)

    async def result(self) -> Reply:
        """Returns the server's status and trailing metadata. Raises `Lost` if the connection broke."""
        code, text = (await self._rpc.code()).value[0], await self._rpc.details() or ""
        if code == Code.UNAVAILABLE and await self._link.broken(self._epoch, text, self._link.calls):
            raise Lost(LostKind.STARTED, "the server is unavailable", text)
        if code == Code.RESOURCE_EXHAUSTED and (large := _LARGE.search(text)):
            return _refusal(int(large[1]), self._max_message)
        return Reply(
            code,
            text,
            headers=metadata.from_pairs(await self._rpc.initial_metadata()),
            trailers=metadata.from_pairs(await self._rpc.trailing_metadata()),
        )


def _refusal(size: int, limit: int) -> Reply:
    """Returns the end of an answer whose message `grpc.aio` has refused as too large, with Mesh's own error text."""
    error = too_large(f"in the reply, a message of {size} bytes", limit)
    trailers = [(wire.DETAILS, wire.encode_bin(error.grpc_details()))]
    return Reply(int(error.reason.code), error.text, trailers=trailers)


def _taken(task: "asyncio.Task[None]") -> None:
    """Retrieves the exception of a task, so that asyncio does not log it. The call's status explains the failure."""
    if not task.cancelled():
        task.exception()
