"""The client end: a pool of connections to one address, and calls on them.

HTTP/1.1 carries one call at a time on a connection, so each call in flight needs a connection of its own. The most
recently used connection is used again first, so that the others become idle and are closed. A call never waits for
another to end: if all `max_connections` are in use, it is lost immediately, unsent, and its sender decides what to do.
It waits only while a connection is being opened, and takes the first one that becomes free. The pool never retries.

`exchange` is one call, `clientconnection` reads replies, `streams` handles messages that are sent one by one.
"""

import asyncio
import os
import random
import re
import socket
import ssl
from collections import deque
from dataclasses import dataclass

from mesh import statuses
from mesh.identity import NAME, Identity
from mesh.options import values
from mesh.wire import budget as budgets
from mesh.wire import call, clientconnection, exchange, heads, metadata
from mesh.wire import pieces as policy
from mesh.wire.exchange import Exchange, Sink
from mesh.wire.reply import Lost, LostKind, Reply
from mesh.wire.streams import ReplyStream, RequestStream

__all__ = ["Exchange", "Lost", "LostKind", "Pool", "PoolStatistics", "Reply", "ReplyStream", "RequestStream", "Sink"]

_PREFIX = b"POST %b HTTP/1.1\r\nhost: %b\r\ncontent-type: application/grpc\r\nte: trailers\r\n"
_METHOD = re.compile(rb"/[\x21-\x7e]*")
_VALUE = re.compile(rb"[\x21-\x7e]+")
_MAX_PREFIXES = 1024
_TICKS = 8  # ticks in `idle_timeout`; idle time is counted in ticks, so that no call has to read a clock
_GOODBYE = 2.0  # seconds that TLS gets for an orderly shutdown
_PATIENCE = (6, 8)  # ticks after which a connection is closed; the numbers differ, so that not all close at once


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """Current and past work of a pool."""

    connections: int
    idle: int
    connecting: int
    waiting: int  # calls that wait for a connection being made
    calls: int  # sent so far


class Pool:
    """A pool of connections to one address."""

    def __init__(
        self,
        address: str,
        *,
        max_connections: int = 256,
        connect_timeout: float = 2.0,
        max_message: int = 16 * 1024 * 1024,
        idle_timeout: float = 60.0,
        identity: Identity | None = None,
        budget: budgets.Budget = budgets.UNBOUNDED,
        pieces: policy.Pieces = policy.NONE,
    ) -> None:
        """Makes a pool. `address` is "host:port" or "unix:/path"; times are in seconds. `max_message` is the size of
        the largest message of a reply in bytes; for calls that take pieces, the limit of `pieces` applies instead. With
        an `identity`, TCP connections use mutual TLS, which `connect_timeout` covers too.

        Replies count in `budget` while they arrive. Connections are opened when there is something to send. Raises
        ValueError for an invalid address.
        """
        if re.fullmatch(r"[\x21-\x7e]+", address) is None:  # the address is copied into heads unchanged
            raise ValueError(f"{address!r} is not an address: write HOST:PORT or unix:/PATH")
        self.address = address
        self.budget = budget
        self.pieces = pieces.below(max_message)
        self.heads: heads.Memo[tuple[list[call.Header], bytes]] = heads.Memo()  # metadata and encoding
        self.tails: heads.Memo[list[call.Header]] = heads.Memo()  # trailing metadata
        self.calls = 0
        self._path = address.removeprefix("unix:") if address.startswith("unix:") else None
        self._host, self._port = ("localhost", 0) if self._path is not None else values.parse_address(address)
        self._max_connections = max_connections
        self._connect_timeout = connect_timeout
        self._max_message = max_message
        self._idle_timeout = idle_timeout
        self._identity = identity
        self._connections: set[clientconnection.ClientConnection] = set()
        self._idle: list[clientconnection.ClientConnection] = []  # the last one in the list is used next
        self._connecting: set[asyncio.Task[None]] = set()
        self._waiting: deque[Exchange] = deque()  # never more than connections being made
        self._tick = 0
        self._prefixes: dict[bytes, bytes] = {}  # of request heads, by method
        self._closed = False
        self._sweeper: asyncio.TimerHandle | None = None

    def send(
        self,
        method: bytes,
        headers: call.Headers,
        frame: bytes,
        sink: Sink,
        *,
        timeout: bytes | None = None,
        encoding: bytes = b"",
    ) -> Exchange:
        """Sends a unary request; `sink` gets the outcome later.

        `timeout` is a `grpc-timeout`, which is only sent to the server; the pool does not enforce it. Raises ValueError
        for a `method`, `timeout` or `encoding` that is not valid in a head.
        """
        head = b"%bcontent-length: %d\r\n%b\r\n" % (
            self._prefixes.get(method) or self._prefix(method),
            len(frame),
            _lines(headers, timeout, encoding) if timeout or encoding else metadata.encode_headers(headers),
        )
        request = (head + frame,) if len(frame) < exchange.BIG else (head, frame)
        return self._begin(Exchange(self, sink, request, True))

    def open(
        self,
        method: bytes,
        headers: call.Headers,
        *,
        timeout: bytes | None = None,
        encoding: bytes = b"",
        takes_pieces: bool = False,
    ) -> RequestStream:
        """Begins a request whose messages are written one by one. `takes_pieces` is true if large messages of the reply
        may be read in pieces. Raises ValueError as `send` does."""
        prefix = self._prefixes.get(method) or self._prefix(method)
        head = b"%btransfer-encoding: chunked\r\n%b\r\n" % (prefix, _lines(headers, timeout, encoding))
        stream = RequestStream(takes_pieces=takes_pieces)
        stream.exchange = self._begin(Exchange(self, stream, (head,), False))
        return stream

    async def call(self, method: bytes, headers: call.Headers, frame: bytes, *, timeout: float) -> Reply:
        """Makes one unary call, and returns the reply, whatever its status. Raises `Lost`, and TimeoutError after
        `timeout` seconds. Cancelling it cancels the call."""
        sink = RequestStream()
        sink.exchange = self.send(method, headers, frame, sink, timeout=metadata.format_timeout(timeout))
        try:
            async with asyncio.timeout(timeout):
                answer = await sink.first()
                return answer if isinstance(answer, Reply) else await _whole(answer)
        finally:
            sink.exchange.cancel()  # no effect after the end

    def close(self) -> None:
        """Stops taking calls and closes idle connections. Calls in flight continue; those without a connection are
        lost."""
        if self._closed:
            return
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        for task in self._connecting:
            task.cancel()
        self._connecting.clear()
        for connection in self._idle:
            connection.transport.close()
        self._idle.clear()
        waiting, self._waiting = self._waiting, deque()
        for owner in waiting:
            self._lose(owner, "this client closed the pool")

    def abort(self) -> None:
        """Closes all connections; calls in flight are lost."""
        self.close()
        for connection in tuple(self._connections):
            connection.transport.abort()

    def statistics(self) -> PoolStatistics:
        """Returns the current state."""
        return PoolStatistics(
            connections=len(self._connections),
            idle=len(self._idle),
            connecting=len(self._connecting),
            waiting=len(self._waiting),
            calls=self.calls,
        )

    # --- for exchanges and connections ---

    def release(self, connection: clientconnection.ClientConnection) -> None:
        """Takes back a connection that has become idle."""
        if self._waiting:
            connection.begin(self._waiting.popleft())
        elif self._closed:
            connection.transport.close()
        else:
            connection.idle_since = self._tick
            self._idle.append(connection)

    def left(self, connection: clientconnection.ClientConnection) -> None:
        """Notes that a connection has closed, or is about to close."""
        if connection in self._connections:
            self._connections.discard(connection)
            if connection in self._idle:
                self._idle.remove(connection)

    def forget(self, owner: Exchange) -> None:
        """Removes a waiting call that no longer needs a connection."""
        if owner in self._waiting:
            self._waiting.remove(owner)

    def _lose(self, owner: Exchange, why: str) -> None:
        asyncio.get_running_loop().call_soon(owner.lost, Lost(LostKind.UNSENT, why, self.address))

    def _prefix(self, method: bytes) -> bytes:
        if _METHOD.fullmatch(method) is None:
            raise ValueError(f"{method!r} is not the name of a method")
        host = b"localhost" if self._path is not None else self.address.encode()
        prefix = _PREFIX % (method, host)
        if len(self._prefixes) < _MAX_PREFIXES:
            self._prefixes[method] = prefix
        return prefix

    def _begin(self, owner: Exchange) -> Exchange:
        self.calls += 1
        idle = self._idle
        while idle:
            connection = idle.pop()
            if connection.usable:
                connection.begin(owner)
                return owner
        if self._closed:
            self._lose(owner, "this client closed the pool")
        elif len(self._waiting) < len(self._connecting):
            self._waiting.append(owner)
        elif len(self._connections) + len(self._connecting) >= self._max_connections:
            self._lose(owner, f"all {self._max_connections} connections are in use")
        else:
            self._waiting.append(owner)
            self._connecting.add(asyncio.get_running_loop().create_task(self._connect()))
        return owner

    async def _connect(self) -> None:
        """Opens one connection, and gives it to the call that has waited longest. If that fails, calls for which no
        other connection is being opened are lost."""
        loop = asyncio.get_running_loop()
        why = ""
        connection = None
        try:
            async with asyncio.timeout(self._connect_timeout):
                if self._path is not None:
                    _, connection = await loop.create_unix_connection(self._connection, self._path)
                elif self._identity is not None:
                    _, connection = await loop.create_connection(
                        self._connection,
                        self._host,
                        self._port,
                        ssl=self._identity.connecting,
                        server_hostname=NAME,
                        ssl_shutdown_timeout=_GOODBYE,
                    )
                else:
                    _, connection = await loop.create_connection(self._connection, self._host, self._port)
        except TimeoutError:
            why = f"cannot connect: no connection within {self._connect_timeout:g} s"
        except (OSError, UnicodeError) as error:
            why = f"cannot connect: {_without_address(error)}"
        finally:
            task = asyncio.current_task()
            assert task is not None
            self._connecting.discard(task)
        if connection is not None and not connection.usable:
            connection, why = None, "the server closed the connection immediately"
        if connection is None:
            while len(self._waiting) > len(self._connecting):
                self._waiting.popleft().lost(Lost(LostKind.UNSENT, why, self.address))
            return
        self._connections.add(connection)
        if self._sweeper is None and not self._closed:
            self._sweeper = loop.call_later(self._idle_timeout / _TICKS, self._sweep, loop)
        self.release(connection)

    def _connection(self) -> clientconnection.ClientConnection:
        return clientconnection.ClientConnection(self, self._max_message, random.randint(*_PATIENCE))

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        """Closes connections that have been idle for about `idle_timeout`."""
        self._tick += 1
        cold = [connection for connection in self._idle if self._tick - connection.idle_since > connection.patience]
        try:
            for connection in cold:
                self.left(connection)
                connection.transport.close()
        finally:
            pause = self._idle_timeout / _TICKS
            self._sweeper = loop.call_later(pause, self._sweep, loop) if self._connections else None


def _without_address(error: OSError | UnicodeError) -> str:
    """Returns the error's text for callers. asyncio's own texts contain the address."""
    if isinstance(error, ssl.SSLError | socket.gaierror):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    return "no connection to any address of the host" if isinstance(error, OSError) else "the host has no valid name"


def _lines(headers: call.Headers, timeout: bytes | None, encoding: bytes) -> bytes:
    """Returns the lines of a request's head that vary between calls."""
    lines = metadata.encode_headers(headers)
    for name, value in ((b"grpc-timeout", timeout), (b"grpc-encoding", encoding)):
        if value:
            if _VALUE.fullmatch(value) is None:
                raise ValueError(f"{value!r} is not a valid {name.decode()}")
            lines = b"%b: %b\r\n%b" % (name, value, lines)
    return lines


async def _whole(stream: ReplyStream) -> Reply:
    """Reads the reply to a unary call from a stream. Several messages, or OK without a message, become INTERNAL."""
    frame = await stream.read()
    if frame is not None and await stream.read() is not None:
        stream.cancel()
        return Reply(int(statuses.Code.INTERNAL), "a unary call was answered with several messages")
    reply = await stream.result()
    if reply.code == statuses.Code.OK and frame is None:
        return Reply(int(statuses.Code.INTERNAL), "a unary call was answered without a message")
    if reply.code == statuses.Code.OK:
        reply.frame = frame
    return reply
