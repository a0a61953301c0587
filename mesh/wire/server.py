"""The server end: the listening sockets, their connections, and an orderly shutdown.

`connection` defines what a connection does, `serverconnection` what it does with gRPC, `servercall` what a handler sees
of a call. A sweep twice a minute limits how long the server waits for a peer. A connection is cut by the second sweep
that finds its request stopped in the middle, or its last answer unread. Idle connections are left alone, because their
owner, Envoy or one of our pools, closes them.

Bodies hold memory while they arrive and leave, so peers must keep up a minimum rate, which is checked once a second.
While the budget for bodies is short, the minimum rate is sixteen times as high.

Once a second, the server also looks for disconnected peers of connections whose reading is paused because their handler
takes no more.
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
from mesh.wire import call, heads, largebody, servercall, serverconnection
from mesh.wire import pieces as policy
from mesh.wire.connection import Connection, K, M

log = logs.get(__name__)

MAX_MESSAGE = 16 * 1024 * 1024
MAX_HEADERS = 64 * 1024
MIN_RATE = 32 * 1024
"""Minimum rate of a body, in bytes a second: 16 MiB may take eight minutes, or half a minute while others wait for
memory."""

PATIENCE = 10
"""Seconds by which a body may fall behind the minimum rate."""

HASTE = 16
"""Factor by which the minimum rate rises while requests are refused because the budget is exhausted."""


_HANDSHAKE = 5.0  # seconds for a client's TLS handshake
_GOODBYE = 2.0  # seconds for an orderly shutdown of TLS
_BACKLOG = 4096  # connections not yet accepted; the kernel cuts it to its own limit
_SWEEP = 30.0  # seconds
_LOOK = 1.0  # seconds
_GONE = select.POLLRDHUP | select.POLLHUP | select.POLLERR


@dataclass(frozen=True, slots=True)
class ServerStatistics:
    """Current and past work of a server."""

    connections: int
    calls_in_flight: int
    calls: int  # calls passed to the handler so far
    errors: int  # calls whose handler raised
    refused: int  # requests that the server itself refused, before or after a handler saw them
    slow: int  # bodies cut off because their peers were too slow


class Listener(Generic[M, K]):
    """Listening sockets and their connections; `Server` and `plainserver.PlainServer` define the kind of connection."""

    def __init__(
        self,
        handler: Callable[[M], None],
        *,
        max_message: int = MAX_MESSAGE,
        max_headers: int = MAX_HEADERS,
        budget: budgets.Budget = budgets.UNBOUNDED,
        min_rate: int = MIN_RATE,
        pieces: policy.Pieces = policy.NONE,
        memory: largebody.Memory | None = None,
    ) -> None:
        """Makes a server that does not listen yet. `max_message` is the largest message and `max_headers` the largest
        head of a request, in bytes. `budget` counts all bodies. `min_rate` is the lowest rate of a body, in bytes a
        second (0 for no minimum). `pieces` says which messages the handler takes in pieces instead. `memory`
        makes the memory of large messages, which the handler then gets as views of it."""
        self.handler = handler
        self.pieces = pieces.below(max_message)
        self.memory = memory
        self.budget = budget
        self.min_rate = min_rate
        self.slow = 0
        self.max_message = max_message
        self.max_headers = max_headers
        self.memo: heads.Memo[K] = heads.Memo()  # shared by all connections, because their clients are alike
        self.closing = False
        self.calls = 0
        self.errors = 0
        self.refused = 0
        self._listeners: list[asyncio.Server] = []
        self._paths: list[tuple[str, int]] = []  # of unix sockets, with their inodes
        self._connections: set[Connection[M, K]] = set()
        self._unread: set[Connection[M, K]] = set()  # connections whose reading is paused
        self._owing: set[Connection[M, K]] = set()  # connections whose peers have bytes to send or to read
        self._guard: asyncio.TimerHandle | None = None
        self._empty = asyncio.Event()
        self._sweeper: asyncio.TimerHandle | None = None
        self._looker: asyncio.TimerHandle | None = None

    async def listen_unix(self, path: str | os.PathLike[str], *, mode: int = 0o600) -> None:
        """Listens on a unix socket, which it creates, and removes when it closes.

        An existing socket, stale or not, is replaced atomically, so that a worker's successor can take over its path.
        Raises OSError if the path holds anything else, or is too long for a socket.
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

    async def listen_on(self, listening: socket.socket, *, identity: Identity | None = None) -> None:
        """Serves a socket that already listens. The socket is closed at the end, and no path is removed. An `identity`
        is for TCP only, and makes mutual TLS mandatory."""
        loop = self._started()
        if listening.family == socket.AF_UNIX:
            listener = await loop.create_unix_server(lambda: self._connection(loop), sock=listening, backlog=_BACKLOG)
        elif identity is None:
            listener = await loop.create_server(lambda: self._connection(loop), sock=listening, backlog=_BACKLOG)
        else:
            listener = await loop.create_server(
                lambda: self._connection(loop, secure=True),
                sock=listening,
                backlog=_BACKLOG,
                ssl=identity.accepting,
                ssl_handshake_timeout=_HANDSHAKE,
                ssl_shutdown_timeout=_GOODBYE,
            )
        self._listeners.append(listener)

    async def listen_tcp(self, host: str, port: int, *, identity: Identity | None = None) -> int:
        """Listens on a TCP port, 0 for any free one; returns the port. An `identity` makes mutual TLS mandatory:
        clients without a matching certificate are refused."""
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
        """Stops listening, gives calls in flight up to `grace` seconds to end, and then cuts them."""
        self.closing = True
        for listener in self._listeners:
            listener.close()
        for path, inode in self._paths:
            with contextlib.suppress(FileNotFoundError):
                if os.lstat(path).st_ino == inode:  # otherwise the path belongs to a successor
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
        """Notes that reading of a connection was paused or resumed."""
        if unread:
            self._unread.add(connection)
            if self._looker is None:
                self._looker = asyncio.get_running_loop().call_later(_LOOK, self._look)
        else:
            self._unread.discard(connection)

    def guard(self, connection: Connection[M, K]) -> float:
        """Watches the rate of a connection whose peer has bytes to send or to read. Returns how many bytes it may fall
        behind."""
        if self.min_rate:
            self._owing.add(connection)
            if self._guard is None:
                self._guard = asyncio.get_running_loop().call_later(_LOOK, self._judge)
        return float(self.min_rate * PATIENCE)

    def _judge(self) -> None:
        """Cuts off the bodies whose peers are too slow."""
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
                    log.info("body cut off: its peer is too slow", peer=connection.peer, least=least)
                    connection.end_slow(least)
        finally:
            self._guard = asyncio.get_running_loop().call_later(_LOOK, self._judge) if self._owing else None

    def _look(self) -> None:
        """Ends connections whose reading is paused and whose peer has disconnected."""
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
                log.info("connection cut: its peer has stalled", peer=connection.peer, at=place)
                connection.transport.abort()
            connection.mark = place


class Server(Listener[servercall.ServerCall, call.Head]):
    """A server that passes every gRPC call to one handler."""

    def _connection(
        self, loop: asyncio.AbstractEventLoop, *, secure: bool = False
    ) -> Connection[servercall.ServerCall, call.Head]:
        return serverconnection.ServerConnection(self, loop, secure=secure)


def _bind(path: str, fresh: str, mode: int) -> socket.socket:
    """Creates a socket at `fresh`, which the caller moves to `path` once the socket listens."""
    if os.path.lexists(path) and not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise FileExistsError(f"{path} exists and is not a socket: remove it, or use another path")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(fresh)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        before = os.umask(0o777 & ~mode)  # other users must never be able to connect
        try:
            listening.bind(fresh)
        finally:
            os.umask(before)
        os.chmod(fresh, mode)
    except BaseException:
        listening.close()
        raise
    return listening
