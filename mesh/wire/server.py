"""The server end: listens, keeps its connections, and closes them in good order.

`connection` says what a connection does, `serverconnection` what it does with gRPC, `servercall` what a handler sees of
a call. One sweep, twice a minute, bounds waiting for peers: a connection is cut at the second look if its request has
stopped in the middle, or if it does not take its last answer. Connections that are merely idle are left alone: their
owner, Envoy or a pool of ours, closes them.

Bodies hold memory while they come and go, so their peers must keep up a least rate, checked once a second; if the
budget for bodies is short, a sixteenth of the patience is left.

A connection that is not read, because its handler does not take more, would not show that its peer is gone.
"""

import asyncio
import contextlib
import os
import select
import socket
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic

from mesh.identity import Identity
from mesh.telemetry import logs
from mesh.wire import budget as budgets
from mesh.wire import heads, servercall, serverconnection
from mesh.wire.connection import Connection, K, M

log = logs.get(__name__)

MAX_MESSAGE = 16 * 1024 * 1024
MAX_HEADERS = 64 * 1024
MIN_RATE = 32 * 1024
"""Bytes a second. At this rate 16 MiB may take eight minutes, and half a minute if others wait for room."""

PATIENCE = 10
"""Seconds by which a body may fall behind."""

HASTE = 16
"""Factor of the least rate while others are refused for lack of room."""


_HANDSHAKE = 5.0  # seconds that a client has for TLS
_GOODBYE = 2.0  # seconds that TLS has to end in good order
_BACKLOG = 4096  # connections not yet accepted; the kernel cuts it to its own limit
_SWEEP = 30.0  # seconds
_LOOK = 1.0  # seconds
_GONE = select.POLLRDHUP | select.POLLHUP | select.POLLERR


@dataclass(frozen=True, slots=True)
class ServerStatistics:
    """Current and past work of a server."""

    connections: int
    calls_in_flight: int
    calls: int  # handed to the handler so far
    errors: int  # of those, the ones whose handler raised
    refused: int  # requests that no handler saw, or that were refused in their middle: malformed, above a limit
    slow: int  # bodies ended because their peers were too slow


class Listener(Generic[M, K]):
    """Listening sockets and their connections; `Server` and `plainserver.PlainServer` say which kind of connection."""

    def __init__(
        self,
        handler: Callable[[M], None],
        *,
        max_message: int = MAX_MESSAGE,
        max_headers: int = MAX_HEADERS,
        budget: budgets.Budget = budgets.UNBOUNDED,
        min_rate: int = MIN_RATE,
    ) -> None:
        """Makes a server that does not listen yet. `max_message`: bytes of one message; `max_headers`: bytes of one
        request's head; `budget`: counts all bodies; `min_rate`: least bytes a second of a body, 0: any."""
        self.handler = handler
        self.budget = budget
        self.min_rate = min_rate
        self.slow = 0
        self.max_message = max_message
        self.max_headers = max_headers
        self.memo: heads.Memo[K] = heads.Memo()  # shared by all connections, as their clients are alike
        self.closing = False
        self.calls = 0
        self.errors = 0
        self.refused = 0
        self._listeners: list[asyncio.Server] = []
        self._paths: list[tuple[str, int]] = []  # of unix sockets, with their inodes
        self._connections: set[Connection[M, K]] = set()
        self._unread: set[Connection[M, K]] = set()  # connections that are not read for now
        self._owing: set[Connection[M, K]] = set()  # connections whose peers owe bytes, or reading
        self._guard: asyncio.TimerHandle | None = None
        self._empty = asyncio.Event()
        self._sweeper: asyncio.TimerHandle | None = None
        self._looker: asyncio.TimerHandle | None = None

    async def listen_unix(self, path: str | os.PathLike[str], *, mode: int = 0o600) -> None:
        """Listens on a unix socket, which it creates, and removes when it closes.

        An existing socket, stale or not, is replaced without a moment in which there is none: so a worker's successor
        takes over its path. Raises OSError if something else is at the path, or it is too long for a socket.
        """
        loop = self._started()
        path = os.fspath(path)
        fresh = f"{path}.new"
        listening = _bind(path, fresh, mode)
        try:
            listener = await loop.create_unix_server(lambda: self._connection(loop), sock=listening, backlog=_BACKLOG)
            os.rename(fresh, path)
        except BaseException:
            listening.close()
            raise
        self._listeners.append(listener)
        self._paths.append((path, os.lstat(path).st_ino))

    async def listen_on(self, listening: socket.socket) -> None:
        """Listens on a socket that listens already and was made elsewhere: it is closed at the end, and no path is
        removed."""
        loop = self._started()
        if listening.family == socket.AF_UNIX:
            listener = await loop.create_unix_server(lambda: self._connection(loop), sock=listening, backlog=_BACKLOG)
        else:
            listener = await loop.create_server(lambda: self._connection(loop), sock=listening, backlog=_BACKLOG)
        self._listeners.append(listener)

    async def listen_tcp(self, host: str, port: int, *, identity: Identity | None = None) -> int:
        """Listens on a TCP port, 0 for any that is free; returns the port. With an `identity`, mutual TLS is required:
        a client without a matching certificate gets no connection."""
        loop = self._started()
        if identity is None:
            listener = await loop.create_server(lambda: self._connection(loop), host, port, backlog=_BACKLOG)
        else:
            listener = await loop.create_server(
                lambda: self._connection(loop, secure=True),
                host,
                port,
                backlog=_BACKLOG,
                ssl=identity.accepting,
                ssl_handshake_timeout=_HANDSHAKE,
                ssl_shutdown_timeout=_GOODBYE,
            )
        self._listeners.append(listener)
        return int(listener.sockets[0].getsockname()[1])

    async def close(self, grace: float) -> None:
        """Stops listening, lets calls in flight be answered for up to `grace` seconds, then cuts them."""
        self.closing = True
        for listener in self._listeners:
            listener.close()
        for path, inode in self._paths:
            with contextlib.suppress(FileNotFoundError):
                if os.lstat(path).st_ino == inode:  # else a successor has it
                    os.unlink(path)
        self._listeners.clear()
        self._paths.clear()
        for connection in tuple(self._connections):
            connection.retire()
        if self._connections and grace > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), grace)
        for timer in (self._sweeper, self._looker, self._guard):
            if timer is not None:
                timer.cancel()
        if self._connections:
            log.info("connections cut", count=len(self._connections), calls=self.statistics().calls_in_flight)
            self._empty.clear()
            for connection in tuple(self._connections):
                connection.transport.abort()
            await self._empty.wait()  # aborting takes at most one turn of the loop

    def statistics(self) -> ServerStatistics:
        """Returns the current state."""
        return ServerStatistics(
            connections=len(self._connections),
            calls_in_flight=sum(connection.busy for connection in self._connections),
            calls=self.calls,
            errors=self.errors,
            refused=self.refused,
            slow=self.slow,
        )

    # --- for its connections ---

    def joined(self, connection: Connection[M, K]) -> None:
        """Adds a new connection."""
        self._connections.add(connection)
        self._empty.clear()
        if self.closing:
            connection.retire()

    def left(self, connection: Connection[M, K]) -> None:
        """Removes a closed connection."""
        self._connections.discard(connection)
        self._unread.discard(connection)
        self._owing.discard(connection)
        if not self._connections:
            self._empty.set()

    def watch(self, connection: Connection[M, K], unread: bool) -> None:
        """Notes that a connection is not read for now, or is read again."""
        if unread:
            self._unread.add(connection)
            if self._looker is None:
                self._looker = asyncio.get_running_loop().call_later(_LOOK, self._look)
        else:
            self._unread.discard(connection)

    def guard(self, connection: Connection[M, K]) -> float:
        """Notes that a connection's peer owes bytes, or reading. Returns the bytes by which it may fall behind."""
        if self.min_rate:
            self._owing.add(connection)
            if self._guard is None:
                self._guard = asyncio.get_running_loop().call_later(_LOOK, self._judge)
        return float(self.min_rate * PATIENCE)

    def _judge(self) -> None:
        """Ends the bodies whose peers are too slow."""
        least = self.min_rate
        grace = least * PATIENCE
        if self.budget.short:
            least *= HASTE
        try:
            for connection in tuple(self._owing):
                fast = connection.fast_enough(least, grace)
                if fast is None:
                    self._owing.discard(connection)
                elif not fast:
                    self._owing.discard(connection)
                    self.slow += 1
                    log.info("body ended: its peer is too slow", peer=connection.peer, least=least)
                    connection.end_slow(least)
        finally:
            self._guard = asyncio.get_running_loop().call_later(_LOOK, self._judge) if self._owing else None

    def _look(self) -> None:
        """Ends connections that are not read and whose peer has gone."""
        self._looker = asyncio.get_running_loop().call_later(_LOOK, self._look) if self._unread else None
        poller = select.poll()
        unread = {connection.descriptor: connection for connection in self._unread}
        for descriptor in unread:
            poller.register(descriptor, _GONE)
        for descriptor, _ in poller.poll(0):
            unread[descriptor].transport.abort()

    def _connection(self, loop: asyncio.AbstractEventLoop, *, secure: bool = False) -> Connection[M, K]:
        raise NotImplementedError

    def _started(self) -> asyncio.AbstractEventLoop:
        if self.closing:
            raise RuntimeError("this server was closed")
        loop = asyncio.get_running_loop()
        if self._sweeper is None:
            self._sweeper = loop.call_later(_SWEEP, self._sweep, loop)
        return loop

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        self._sweeper = loop.call_later(_SWEEP, self._sweep, loop)
        for connection in tuple(self._connections):
            place = connection.stuck()
            if place is not None and place == connection.mark:
                log.info("connection cut: its peer does not go on", peer=connection.peer, at=place)
                connection.transport.abort()
            connection.mark = place


class Server(Listener[servercall.ServerCall, serverconnection.Known]):
    """Hands every gRPC call that arrives to one handler."""

    def _connection(
        self, loop: asyncio.AbstractEventLoop, *, secure: bool = False
    ) -> Connection[servercall.ServerCall, serverconnection.Known]:
        return serverconnection.ServerConnection(self, loop, secure=secure)


def _bind(path: str, fresh: str, mode: int) -> socket.socket:
    """Returns a socket at `fresh`, to be moved to `path` once it listens."""
    if os.path.lexists(path) and not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise FileExistsError(f"{path} is there already and is no socket")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(fresh)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        before = os.umask(0o777 & ~mode)  # others must not be able to connect even for a moment
        try:
            listening.bind(fresh)
        finally:
            os.umask(before)
        os.chmod(fresh, mode)
    except BaseException:
        listening.close()
        raise
    return listening
