"""`grpc.aio` as the edge, for machines where Envoy cannot run.

This edge passes calls to the same handler as the server behind Envoy. Messages stay bytes, and each becomes a frame. A
call takes about ten times the CPU that it takes in the HTTP/1.1 server behind Envoy, because asyncio drives `grpcio`'s
core. REST needs a separate port.

All workers listen on one port (SO_REUSEPORT), and the kernel distributes the connections. Another mesh could listen on
that port too, so it must be checked before the workers start (`mesh.process.ports.check_free`).

On the wire, unary methods cannot be recognised. Methods that are known to be unary use the fast path, which reads the
whole request first. Calls of other methods are read message by message, which works for unary methods too.
"""

import asyncio
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from mesh.options import values as addresses
from mesh.statuses import Code, MeshError
from mesh.telemetry import logs
from mesh.v2 import SERVICE
from mesh.wire import budget as budgets
from mesh.wire import call as wire
from mesh.wire import framing, metadata

log = logs.get(__name__)

_V2 = f"/{SERVICE}/"
_UNARY_SERVICES = (_V2, "/mmesh.ModelMesh/")
_STREAMS = frozenset({_V2 + "ModelStreamInfer"})
_UNARY = frozenset({"/grpc.health.v1.Health/Check"})

_STATUS = {status.value[0]: status for status in grpc.StatusCode}
_NOT_SENT = metadata.RESERVED | {b"grpc-encoding", b"grpc-accept-encoding", b"server", b"date"}
_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # missing from its stubs
_NEWS = 0.002  # seconds in which the news of a cancellation arrives; measured: 0.1 ms
_STREAM_WINDOW = 1 << 20  # bytes that a client may send ahead on a stream; the same as Envoy's (`mesh.envoy.config`)
_INTERNAL = "internal error; the router's log has the cause"

Context = Any  # grpc.aio.ServicerContext[bytes, bytes]
Metadata = list[tuple[str, str | bytes]]


@dataclass(slots=True)
class _End:
    """The outcome of a call. `frame` is a unary reply that is not sent yet."""

    code: int
    text: str = ""
    frame: bytes | None = None
    headers: wire.Headers = ()
    trailers: wire.Headers = ()


class GrpcCall(wire.Call):
    """One call that `grpc.aio` carries."""

    __slots__ = ("_cancelled", "_context", "_gone", "_limit", "_on_cancel", "_starting", "_unread", "encodings", "end")

    def __init__(self, method: str, context: Context, frame: bytes | None, limit: int) -> None:
        loop = asyncio.get_running_loop()
        self.method = method.encode()
        self.headers = _headers(context.invocation_metadata() or ())
        self.frame = frame
        self.encoding = b""  # the transport has decompressed it
        remaining = context.time_remaining()
        self.deadline = None if remaining is None else loop.time() + remaining
        self.peer = context.peer()
        self.end: asyncio.Future[_End] = loop.create_future()
        self.encodings = b""  # of the reply's messages, from its headers
        self._context = context
        self._limit = limit
        self._unread = frame
        self._cancelled = False
        self._gone: asyncio.Future[None] = loop.create_future()
        self._on_cancel: Callable[[], None] | None = None
        self._starting: asyncio.Task[None] | None = None

    @property
    def cancelled(self) -> bool:
        """True once the caller has gone."""
        return self._cancelled

    def on_cancel(self, callback: Callable[[], None] | None) -> None:
        """Sets the function to call when the caller goes away before the answer. Calls it immediately if the caller has
        already gone."""
        if callback is not None and self._cancelled:
            callback()
        else:
            self._on_cancel = callback

    def cut(self) -> None:
        """Notes that the caller has gone, and calls the callback of `on_cancel`. Does nothing once the call is
        answered."""
        if self._cancelled or (self.end.done() and not self.end.cancelled()):
            return
        self._cancelled = True
        self._gone.set_result(None)
        callback, self._on_cancel = self._on_cancel, None
        if callback is not None:
            try:
                callback()
            except Exception:
                log.exception("handler failed to handle a cancelled call", method=self.method, peer=self.peer)

    async def read(self) -> bytes | None:
        """Returns the next frame, or None at the end. Raises `CallCancelled`."""
        if self._cancelled:
            raise wire.CallCancelled("the caller has gone")
        if self.frame is not None:
            frame, self._unread = self._unread, None
            return frame
        try:
            message = await self._context.read()
        except (grpc.aio.AbortError, grpc.RpcError, asyncio.InvalidStateError) as error:
            raise wire.CallCancelled(f"the caller has gone: {error}") from error
        if message is not _EOF:
            return framing.pack(message)
        # A cancelled call looks like one that has ended until the cancellation arrives.
        await asyncio.wait((self._gone,), timeout=_NEWS)
        if self._cancelled:
            raise wire.CallCancelled("the caller has gone")
        return None

    def reply(self, frame: bytes, headers: wire.Headers = (), trailers: wire.Headers = ()) -> None:
        """Answers with OK and one message."""
        self._settle(_End(Code.OK, "", frame, headers, trailers))

    def fail(self, code: int, text: str, headers: wire.Headers = (), trailers: wire.Headers = ()) -> None:
        """Answers with a status other than OK."""
        # Without a message, headers and trailers are one block, which clients read as trailing metadata.
        self._settle(_End(code, text, None, (), (*headers, *trailers)))

    def start(self, headers: wire.Headers = ()) -> None:
        """Sends the initial metadata."""
        if not self._cancelled and self._starting is None:
            self._starting = asyncio.create_task(self._send_headers(headers))

    async def write(self, frame: bytes) -> None:
        """Sends one message. Raises `CallCancelled`."""
        if self._cancelled:
            raise wire.CallCancelled("the caller has gone")
        await self.started()
        try:
            await self._context.write(self.unpacked(frame))
        except (grpc.aio.AbortError, grpc.RpcError, asyncio.InvalidStateError) as error:
            raise wire.CallCancelled(f"the caller has gone: {error}") from error

    def finish(self, code: int = 0, text: str = "", trailers: wire.Headers = ()) -> None:
        """Ends a reply that `start()` began."""
        self._settle(_End(code, text, None, (), trailers))

    async def started(self) -> None:
        """Waits until `start()` has sent the initial metadata."""
        if self._starting is not None:
            await self._starting

    def unpacked(self, frame: bytes) -> bytes:
        """Returns the message in a frame of the reply. Raises `FrameError`."""
        return framing.unpack(frame, self.encodings, limit=self._limit)

    async def _send_headers(self, headers: wire.Headers) -> None:
        self.take_encoding(headers)
        await self._context.send_initial_metadata(_metadata(headers))

    def take_encoding(self, headers: wire.Headers) -> None:
        """Notes how the messages of the reply are compressed."""
        self.encodings = next((value for name, value in headers if name == b"grpc-encoding"), b"")

    def _settle(self, end: _End) -> None:
        self._on_cancel = None
        if not self.end.done():
            self.end.set_result(end)


class GrpcEdge:
    """A `grpc.aio` server that passes every call to one handler."""

    def __init__(
        self,
        handler: wire.Handler,
        *,
        max_message: int = 16 << 20,
        max_headers: int = 64 << 10,
        credentials: grpc.ServerCredentials | None = None,
        shared: bool = False,
        budget: budgets.Budget = budgets.UNBOUNDED,
    ) -> None:
        """Creates the server. Sizes are in bytes. `credentials` turn on TLS. If `shared`, other processes share the
        port. `budget` counts the messages once grpcio has read them."""
        self._handler = handler
        self._budget = budget
        self._max_message = max_message
        self._credentials = credentials
        self._in_flight: set[GrpcCall] = set()
        self._server = grpc.aio.server(
            options=(
                ("grpc.so_reuseport", int(shared)),
                ("grpc.max_receive_message_length", max_message),
                ("grpc.max_send_message_length", -1),  # the limit was applied when the model server's answer arrived
                ("grpc.max_metadata_size", max_headers),
                ("grpc.absolute_max_metadata_size", max_headers),
                ("grpc.max_concurrent_streams", 1024),
                # By default the window of a stream follows the measured bandwidth: 1 GiB to a slow reader then made a
                # worker grow by 34 to 37 MiB, with this window by 10 to 14.
                ("grpc.http2.bdp_probe", 0),
                ("grpc.http2.lookahead_bytes", _STREAM_WINDOW),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.keepalive_permit_without_calls", 1),
            )
        )
        self._server.add_generic_rpc_handlers((_Handlers(self),))

    async def listen(self, host: str, port: int) -> int:
        """Listens on `port`, or on any free port if it is 0. Returns the port. Raises OSError if the port is taken."""
        address = addresses.format_address(host, port)
        try:
            if self._credentials is None:
                bound = self._server.add_insecure_port(address)
            else:
                bound = self._server.add_secure_port(address, self._credentials)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}: {error}") from error
        await self._server.start()
        return bound

    async def close(self, grace: float) -> None:
        """Stops accepting calls, waits up to `grace` seconds for calls in flight, then cancels them."""
        await self._server.stop(grace)
        for call in tuple(self._in_flight):  # grpc.aio does not always cancel the calls that it has given up
            call.end.cancel()
            call.cut()

    async def unary(self, method: str, request: bytes, context: Context) -> bytes:
        """Serves a call whose request has arrived in one piece."""
        call = GrpcCall(method, context, framing.pack(request), self._max_message)
        with self._budget.hold() as hold:
            try:
                hold.request(len(request))
            except MeshError as error:
                trailing = _metadata(((metadata.DETAILS, metadata.encode_bin(error.grpc_details())),))
                await context.abort(_STATUS[int(error.reason.code)], error.text, tuple(trailing))
            end = await self._answered(call)
        if end.headers:
            call.take_encoding(end.headers)
            await context.send_initial_metadata(_metadata(end.headers))
        else:
            await call.started()
        message = b"" if end.frame is None else self._message(call, end)
        await self._conclude(call, context, end)
        return message

    async def stream(self, method: str, _: Any, context: Context) -> None:
        """Serves a call whose messages are read and written one by one."""
        call = GrpcCall(method, context, None, self._max_message)
        end = await self._answered(call)
        if end.headers:
            call.take_encoding(end.headers)
            await context.send_initial_metadata(_metadata(end.headers))
        else:
            await call.started()
        if end.frame is not None:
            message = self._message(call, end)
            if end.code == Code.OK:
                await context.write(message)
        await self._conclude(call, context, end)

    async def _answered(self, call: GrpcCall) -> _End:
        self._in_flight.add(call)
        try:
            try:
                self._handler(call)
            except Exception:
                log.exception("handler failed", method=call.method, peer=call.peer)
                return _End(Code.INTERNAL, _INTERNAL)
            return await call.end
        finally:
            self._in_flight.discard(call)
            call.cut()

    def _message(self, call: GrpcCall, end: _End) -> bytes:
        assert end.frame is not None
        try:
            return call.unpacked(end.frame)
        except framing.FrameError as error:
            failed = MeshError(error.reason, f"the model server's answer: {error.text}", details=error.details)
            end.code, end.text = failed.reason.code, failed.text
            end.trailers = [(metadata.DETAILS, metadata.encode_bin(failed.grpc_details()))]
            return b""

    async def _conclude(self, call: GrpcCall, context: Context, end: _End) -> None:
        trailing = _metadata(end.trailers)
        if end.code != Code.OK:
            status = _STATUS.get(end.code, grpc.StatusCode.UNKNOWN)
            await context.abort(status, end.text, tuple(trailing))
        if trailing:
            context.set_trailing_metadata(tuple(trailing))


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic in its stubs only
    """The choice between the fast path and the general path for each method."""

    def __init__(self, edge: GrpcEdge) -> None:
        self._edge = edge

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Returns a handler for any method, which passes messages as bytes."""
        method = handler_call_details.method
        if method in _UNARY or (method.startswith(_UNARY_SERVICES) and method not in _STREAMS):
            return grpc.unary_unary_rpc_method_handler(functools.partial(self._edge.unary, method))
        return grpc.stream_stream_rpc_method_handler(functools.partial(self._edge.stream, method))


def _headers(received: Any) -> list[wire.Header]:
    """Returns gRPC's metadata as sent on the wire, with binary values in base64."""
    headers: list[wire.Header] = []
    for key, value in received:
        name = key.encode()
        if name not in metadata.NOT_METADATA:
            headers.append((name, metadata.encode_bin(value) if isinstance(value, bytes) else value.encode("latin-1")))
    return headers


def _metadata(headers: wire.Headers) -> Metadata:
    """Returns headers as gRPC metadata. Drops headers of the transport and headers that cannot be sent."""
    sent: Metadata = []
    for name, value in headers:
        if name in _NOT_SENT:
            continue
        try:
            if name.endswith(b"-bin"):
                sent.append((name.decode("ascii"), metadata.decode_bin(value)))
            else:
                sent.append((name.decode("ascii"), value.decode("ascii")))
        except ValueError:
            log.warning("metadata left out: it cannot be sent", name=name)
    return sent
