"""The egress for calls of one message: over an HTTP/2 connection of the relay's own, without a program in between.

Most inference calls have one message of moderate size. Through Envoy or `grpc.aio`, the way to the server costs such a
call more than everything else in the pod (with Envoy 180 of 315 us, measured with `tests/bench/direct.py`). Streams,
large requests, calls beyond those that the server takes at once, and calls while there is no connection go through the
other egress.
"""

import asyncio
from weakref import WeakSet

from mesh.options.values import parse_address
from mesh.runtime.relay.egress import SERVER, Answer, Egress, Outgoing
from mesh.telemetry import logs
from mesh.wire import metadata
from mesh.wire.budget import Budget
from mesh.wire.call import Headers
from mesh.wire.client import Exchange, Sink
from mesh.wire.http2.connection import Http2Connection
from mesh.wire.http2.frames import ProtocolError
from mesh.wire.pieces import ABOVE, Pieces
from mesh.wire.reply import Lost, LostKind, Reply
from mesh.wire.streams import ReplyStream

log = logs.get(__name__)

_CONNECTING = 5.0  # seconds for a connection and the server's settings
_PAUSES = (0.05, 5.0)  # seconds between attempts to connect: at first, and at most
_BROKEN = 60.0  # seconds until the next attempt once the server has broken the protocol


class DirectEgress:
    """The calls of one message, and another egress for the rest. For use in the event loop's thread only."""

    def __init__(self, other: Egress, server: str, *, max_message: int, budget: Budget) -> None:
        """Makes an egress. `server` is the address as gRPC names it, `max_message` the size of the largest message that
        is held in one piece, in bytes. `budget` counts the bytes of replies."""
        self.takes_pieces = other.takes_pieces
        self._other = other
        self._server = server
        self._max_message = max_message
        self._budget = budget
        self._pieces = Pieces().below(max_message) if other.takes_pieces else None
        self._connection: Http2Connection | None = None  # for new calls
        self._connections: WeakSet[Http2Connection] = WeakSet()  # this one, and former ones that finish their calls
        self._connecting: asyncio.Task[None] | None = None
        self._not_before = 0.0
        self._pause = _PAUSES[0]
        self._loop = asyncio.get_running_loop()
        self._closed = False

    @property
    def connected(self) -> bool:
        """True if there is a connection that can take calls."""
        return self._connection is not None and self._connection.usable

    @property
    def connecting(self) -> bool:
        """True while a connection is being opened."""
        return self._connecting is not None

    async def up(self) -> None:
        """Waits until the other egress can carry calls."""
        self._connect()
        await self._other.up()

    def send(
        self,
        method: bytes,
        headers: Headers,
        frame: bytes,
        *,
        timeout: float | None,
        encoding: bytes,
        pieces: bool = False,
    ) -> Outgoing:
        """Sends a request of one message through the other egress."""
        return self._other.send(method, headers, frame, timeout=timeout, encoding=encoding, pieces=pieces)

    def open(
        self, method: bytes, headers: Headers, *, timeout: float | None, encoding: bytes, pieces: bool = False
    ) -> Outgoing:
        """Begins a request of several messages through the other egress."""
        return self._other.open(method, headers, timeout=timeout, encoding=encoding, pieces=pieces)

    def post(
        self, method: bytes, headers: Headers, frame: bytes, sink: Sink, *, timeout: float | None, encoding: bytes
    ) -> Exchange | None:
        """Sends a request of one message, and passes the outcome to `sink`. Returns None if this is not possible at
        present."""
        connection = self._connection
        if connection is None or connection.ended:
            self._connect()
        elif len(frame) <= ABOVE:
            written = None if timeout is None else metadata.format_timeout(timeout)
            sent = connection.post(method, headers, frame, sink, timeout=written, encoding=encoding)
            if sent is not None:
                return sent
        return self._other.post(method, headers, frame, sink, timeout=timeout, encoding=encoding)

    def is_final(self, reply: Reply) -> bool:
        """Returns False for an answer that the other egress has made itself."""
        return self._other.is_final(reply)

    def resume(
        self,
        exchange: Exchange,
        outcome: Reply | ReplyStream | Lost,
        method: bytes,
        headers: Headers,
        frame: bytes,
        *,
        timeout: float | None,
        encoding: bytes,
        pieces: bool = False,
    ) -> Outgoing:
        """Returns a call that `post` has sent, with its outcome. A call that the server has certainly not seen is sent
        again, through the other egress."""
        if isinstance(outcome, Lost) and outcome.kind is LostKind.UNSENT:
            return self._other.send(method, headers, frame, timeout=timeout, encoding=encoding, pieces=pieces)
        if isinstance(outcome, Reply):
            return self._other.resume(
                exchange, outcome, method, headers, frame, timeout=timeout, encoding=encoding, pieces=pieces
            )
        return Posted(outcome)

    async def close(self) -> None:
        """Ends all calls, and the other egress."""
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
        for connection in tuple(self._connections):
            connection.close()
        await self._other.close()

    # --- the connection ---

    def _connect(self) -> None:
        """Begins to connect, unless that is under way, or the last attempt was a moment ago."""
        lasting = self._connection is not None and not self._connection.ended
        if lasting or self._connecting is not None or self._closed or self._loop.time() < self._not_before:
            return
        self._connecting = self._loop.create_task(self._connected())
        self._connecting.add_done_callback(self._done)

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._connecting = None
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("connecting to the model server failed in the relay's own code", exc_info=error)

    async def _connected(self) -> None:
        """Connects once. If that fails, calls go through the other egress, and a later call tries again."""
        made: Http2Connection | None = None
        self._not_before = self._loop.time() + self._pause  # also after a success, as the server may hang up at once
        self._pause = min(2 * self._pause, _PAUSES[1])
        try:
            async with asyncio.timeout(_CONNECTING):
                made = await self._opened()
                await made.ready
            self._connections.add(made)
            self._connection, made = made, None
            self._pause = _PAUSES[0]
        except (ProtocolError, OSError, TimeoutError) as error:
            log.debug("no connection for calls of one message", server=self._server, why=str(error))
        finally:
            if made is not None:
                made.transport.abort()

    def _broken(self, fault: ProtocolError) -> None:
        """Has calls go through the other egress for a while, because the server would break the protocol again."""
        self._not_before = self._loop.time() + _BROKEN
        log.warning(
            "the model server violates HTTP/2: calls of one message go through the egress for a while",
            server=self._server,
            why=str(fault),
            code=fault.code.name,
            seconds=_BROKEN,
        )

    async def _opened(self) -> Http2Connection:
        path = self._server.removeprefix("unix:") if self._server.startswith("unix:") else None

        def make() -> Http2Connection:
            return Http2Connection(
                SERVER,
                limit=self._max_message,
                budget=self._budget,
                policy=self._pieces,
                authority=b"localhost" if path is not None else self._server.encode(),
                on_fault=self._broken,
            )

        if path is not None:
            return (await self._loop.create_unix_connection(make, path))[1]
        host, port = parse_address(self._server)
        return (await self._loop.create_connection(make, host, port))[1]


class Posted:
    """A call that `post` has sent, once its outcome takes longer."""

    def __init__(self, outcome: ReplyStream | Lost) -> None:
        self._outcome = outcome

    async def write(self, frame: bytes) -> None:
        """Raises RuntimeError, because the request has ended."""
        raise RuntimeError("this request has been ended")

    def end(self) -> None:
        """Does nothing: the request has ended."""

    async def first(self) -> Answer:
        """Returns the stream of the answer. Raises `Lost`."""
        if isinstance(self._outcome, Lost):
            raise self._outcome
        return self._outcome

    def cancel(self) -> None:
        """Ends the call at the server."""
        if isinstance(self._outcome, ReplyStream):
            self._outcome.cancel()
