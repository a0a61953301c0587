"""One connection of a server. It turns bytes into calls, handled in order and one at a time, and decides when to close.

httptools (llhttp) does the parsing. It cannot be stopped between two requests, so everything that one read brings is
parsed. Requests that arrive before their turn wait in a queue, and reading pauses when the queue is full. A call
creates no task and no timer: everything happens in `data_received` or in the handler's own callbacks.

Subclasses define what a head means and how a request is refused: `serverconnection` for gRPC, `plainconnection` for
plain HTTP. Bad input is answered if there is a caller to answer, and ends the connection, because after an error the
beginning of the next request is unknown. The connection is not closed at once, because a close with unread bytes can
destroy the answer in transit. It stays open for a limited time and ignores its input.
"""

import asyncio
import socket
from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import httptools

from mesh.identity.identity import known
from mesh.telemetry import logs
from mesh.wire import budget as budgets
from mesh.wire import call, framing, heads, largebody, pieces, refusals
from mesh.wire.servercall import ANSWERED, STARTED

log = logs.get(__name__)

_WRITE_HIGH = 256 * 1024  # bytes not yet taken by the peer, above which write() waits
_PATIENT = 2 * _WRITE_HIGH
_LINGER = 2.0  # seconds for the peer to read the last answer
_KEEPALIVE = (  # a silent peer is asked after 30 s, and is gone if it does not answer three times within 30 s more
    (socket.TCP_KEEPIDLE, 30),
    (socket.TCP_KEEPINTVL, 10),
    (socket.TCP_KEEPCNT, 3),
)
_WITH_HEAD = 1024  # minimum bytes of a read that may contain a head and the beginning of a large message
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Inbound(Protocol):
    """A request, from its head until it is answered."""

    ended: bool  # the whole request has arrived
    keep_alive: bool  # the peer may send its next request on this connection
    phase: int
    refusal: refusals.Refusal | None  # if set, no handler sees it

    @property
    def name(self) -> bytes:
        """The request's name in logs."""

    @property
    def received(self) -> int:
        """Number of bytes of the body that have arrived while the request waits for its turn."""

    @property
    def missing(self) -> int:
        """Bytes of the body that are still wanted and have not arrived, if the head has announced their number."""

    @property
    def begun(self) -> bytes | bytearray | memoryview:
        """The part of the body that has arrived, if it is to be joined with the missing part in one piece."""

    def fill(self, body: bytes | bytearray | memoryview) -> None:
        """Takes a body that consists of `begun` and the part that was missing."""

    @property
    def partial(self) -> bool:
        """True if the peer has sent only part of a message."""

    def ready(self, limit: int) -> bool:
        """Returns whether the handler may get the request."""

    def prepare(self, limit: int) -> None:
        """Prepares the request for its handler, or refuses it."""

    def feed(self, data: bytes) -> None:
        """Takes the next bytes of the body."""

    def end(self) -> None:
        """Notes the end of the request."""

    def stop(self, refusal: refusals.Refusal) -> None:
        """Refuses the request at once, without waiting for the rest."""

    def release(self) -> None:
        """Gives the request's bytes back to the budget."""

    def cut(self, why: str) -> None:
        """Tells the handler that the caller has gone."""


M = TypeVar("M", bound=Inbound)
K = TypeVar("K")  # the parser's result for a head, for requests with an equal head


class Owner(Protocol[M, K]):
    """The server as its connections see it: their common limits, and the counters for all of them."""

    handler: Callable[[M], None]
    budget: budgets.Budget
    memory: largebody.Memory | None
    memo: heads.Memo[K]
    max_message: int  # bytes
    pieces: pieces.Pieces
    max_headers: int  # bytes
    closing: bool
    calls: int
    errors: int
    refused: int

    def joined(self, connection: "Connection[M, K]") -> None:
        """Adds a new connection."""

    def left(self, connection: "Connection[M, K]") -> None:
        """Removes a closed connection."""

    def watch(self, connection: "Connection[M, K]", unread: bool) -> None:
        """Notes that reading of a connection was paused or resumed."""

    def guard(self, connection: "Connection[M, K]") -> float:
        """Watches the rate of a connection's peer; returns how many bytes it may fall behind."""


class Connection(asyncio.Protocol, Generic[M, K]):
    """The parser and transport callbacks of one connection. Subclasses define what a head means."""

    __slots__ = (
        "_active",
        "_between",
        "_closing",
        "_credit",
        "_deaf",
        "_guarded",
        "_handler",
        "_headers",
        "_holding",
        "_incoming",
        "_lingering",
        "_loop",
        "_max_headers",
        "_memo",
        "_moved",
        "_overhead",
        "_parser",
        "_paused",
        "_queue",
        "_reader",
        "_rooms",
        "_secure",
        "_server",
        "_unsent",
        "_url",
        "budget",
        "limit",
        "mark",
        "peer",
        "pieces",
        "stalled",
        "transport",
        "whole",
    )

    transport: asyncio.Transport

    def __init__(self, owner: Owner[M, K], loop: asyncio.AbstractEventLoop, *, secure: bool = False) -> None:
        """Makes a connection. A `secure` one uses mutual TLS, and only serves peers whose certificate has the mesh's
        name."""
        self._server = owner
        self._secure = secure
        self._handler = owner.handler
        self.limit = owner.max_message
        self.pieces = owner.pieces
        self.whole = owner.pieces.above + framing.PREFIX  # bytes of the largest frame that is never divided
        self.budget = owner.budget
        self._max_headers = owner.max_headers
        self._loop = loop
        self._parser = httptools.HttpRequestParser(self)
        self._url = b""
        self._headers: list[call.Header] = []
        self._incoming: M | None = None  # its head has arrived, its end has not
        self._queue: deque[M] = deque()  # in order of arrival, not yet passed to the handler
        self._active: M | None = None  # passed to the handler, not yet answered
        self._between = True  # the parser has seen the end of a request and no byte of the next
        self._reader: largebody.LargeBody | None = None  # the protocol that reads instead of this one
        self._memo = owner.memo
        self._overhead = 0  # bytes read since the last complete head or wanted piece of a body
        self._holding = False  # the reader of a stream wants no more for now
        self._paused = False  # reading is paused
        self._closing = False  # no further request is passed to the handler
        self._deaf = False  # further input is discarded
        self._lingering: asyncio.TimerHandle | None = None
        self._rooms: list[asyncio.Future[None]] = []  # writers that wait until the peer has taken more
        self.stalled = False  # the peer does not take what is written
        self._unsent = 0  # bytes not taken yet, which count in the budget
        self._guarded = False  # the server watches how fast the peer is
        self._credit = 0.0  # bytes by which the peer may still fall behind
        self._moved = 0  # bytes received, or taken by the peer, since the server last looked
        self.peer = ""
        self.mark: object = None  # the progress when the server last looked for stuck connections

    # --- transport callbacks ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Adds the connection to the server. Closes a `secure` one whose peer has no certificate with the mesh's
        name."""
        self.transport = transport  # type: ignore[assignment]  # uvloop's do not derive from asyncio's
        self.transport.set_write_buffer_limits(high=_WRITE_HIGH)
        self.peer = _peer(self.transport)
        self._server.joined(self)
        if self._secure and not known(self.transport.get_extra_info("peercert")):
            log.warning("connection refused: the peer's certificate does not have this mesh's name", peer=self.peer)
            self._closing = self._deaf = True
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Parses the bytes, then passes ready calls to the handler."""
        if self._deaf:
            return
        seen: heads.Request | None = None
        if self._memo.rest:
            self._memo.rest -= 1
        elif self._between and self._active is None and not self._queue and not self.stalled:
            seen = heads.split_request(data)
            if seen is not None:
                known = self._memo.get(seen[0])
                if known is not None and self._recognised(seen, known):
                    return
        self._moved += len(data)
        if len(data) < _WITH_HEAD or not self._large(data):
            self._parse(data)
        if seen is not None and self._memo.worth(seen[0]):
            self._learn(seen)
        made = self._incoming
        if made is not None and made.missing >= largebody.LEAST and self._wants(made):
            begun = made.begun
            size, memory = len(begun) + made.missing, self._server.memory
            self._let_read(largebody.LargeBody(self, size, memory=memory, begun=begun), begun)
        self._parsed()

    def _parse(self, data: bytes | memoryview) -> None:
        self._overhead += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError:
            log.exception("parser callback failed", peer=self.peer)
            self._malformed("internal error: this request could not be parsed; the server's log has the cause")
        except httptools.HttpParserUpgrade:
            self._malformed("only HTTP/1.1 is supported here", upgrade=True)
        except httptools.HttpParserError as error:
            self._malformed(f"not valid HTTP/1.1: {error}")
        if self._overhead > self._max_headers:
            self._excess()

    def _parsed(self) -> None:
        """Advances the queue, or pauses reading, after input was parsed."""
        active = self._active
        if active is None:
            if self._queue:
                self._advance()
        elif active.refusal is not None:
            self._refuse(active)
        elif self._queue:
            self._throttle()
        if self._incoming is not None and not self._guarded:
            self._watch()

    def eof_received(self) -> bool:
        """Treats the peer as disconnected: this is how a cancel arrives."""
        if self._active is not None:
            self.stalled = True  # so that writers wait for the end
            self.transport.abort()  # the close would wait for the peer to read the begun answer
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Leaves the server and notifies the call in flight."""
        self._closing = self._deaf = True
        self._forget_queue()
        self._incoming = self._reader = None
        self._count_unsent(0)
        if self._lingering is not None:
            self._lingering.cancel()
        active, self._active = self._active, None
        if active is not None:
            active.cut("the caller has gone")
        self._let_write()
        self._server.left(self)

    def pause_writing(self) -> None:
        """Makes writers wait and holds back further requests, because the peer is slow."""
        self.stalled = True
        self._count_unsent(self.transport.get_write_buffer_size())
        if not self._guarded:
            self._watch()

    def resume_writing(self) -> None:
        """Resumes writers and requests, because the peer has caught up."""
        self.stalled = False
        self._moved += max(0, self._unsent - self.transport.get_write_buffer_size())
        self._count_unsent(0)
        self._let_write()
        if self._active is None and self._queue:
            self._advance()

    # --- parser callbacks ---

    def on_message_begin(self) -> None:
        """Notes the first byte of a request."""
        self._between = False

    def on_url(self, url: bytes) -> None:
        """Takes a piece of the request target."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Takes one header; trailers are ignored."""
        if self._incoming is None:
            self._headers.append((name.lower(), value))

    def on_body(self, data: bytes) -> None:
        """Takes a piece of the body; chunk boundaries do not matter."""
        made = self._incoming
        if made is not None and made.phase < ANSWERED:
            self._overhead = 0
            made.feed(data)

    def on_message_complete(self) -> None:
        """Notes the end of one request."""
        self._between = True
        self._overhead = 0
        made, self._incoming = self._incoming, None
        if made is not None:
            made.end()

    # --- large bodies ---

    def _wants(self, made: M) -> bool:
        """Returns whether the rest of a body is wanted and nothing else reads it yet."""
        wanted = made.refusal is None and not made.phase and made is not self._active
        return wanted and self._reader is None and not self._deaf

    def _let_read(self, reader: largebody.LargeBody, begun: bytes | bytearray | memoryview) -> None:
        """Lets another protocol read a large body, bypassing the parser."""
        self._reader = reader
        self._overhead = 0
        reader.put(begun)
        if self._reader is reader:  # the reader has not ended at once
            self.transport.set_protocol(reader)

    def _read_again(self) -> None:
        if self._reader is not None:
            self._reader.drop()
            self._reader = None
            self.transport.set_protocol(self)

    def body_moved(self, count: int) -> None:
        """Notes the progress of a large body."""
        self._moved += count

    def body_ended(self, body: bytes | bytearray | memoryview, rest: bytes, *, last: bool) -> None:
        """Takes a large body, and resumes reading."""
        self._read_again()
        made = self._incoming
        assert made is not None
        made.fill(body)
        if last:
            self._parser = httptools.HttpRequestParser(self)  # the old one still waits for the body
            self.on_message_complete()
        elif rest:
            self._parse(rest)
        self._parsed()

    # --- for subclasses ---

    def _large(self, data: bytes) -> bool:
        """Handles a read in which a large message begins, and lets a `LargeBody` read the rest if possible. Returns
        False if none begins: then the caller parses the read."""
        return False

    def on_headers_complete(self) -> None:
        """Creates a call from the head, and puts it into the queue."""
        raise NotImplementedError

    def _recognised(self, seen: heads.Request, known: K) -> bool:
        """Passes on a request whose head is known; returns False if the parser must judge it."""
        raise NotImplementedError

    def _learn(self, seen: heads.Request) -> None:
        """Caches the parser's result for a read that brought exactly one request."""
        raise NotImplementedError

    def _broken(self) -> M:
        """Returns a call that represents a request whose head cannot be read."""
        raise NotImplementedError

    def _refuse(self, made: M) -> None:
        """Answers in place of the handler."""
        raise NotImplementedError

    def _failed(self, made: M) -> None:
        """Answers a call whose handler raised, if it has not been answered."""
        raise NotImplementedError

    # --- for the call ---

    def keeps(self, made: M) -> bool:
        """Returns whether the connection can be used again once this call is answered."""
        return made.keep_alive and not self._server.closing

    def answered(self, made: M) -> None:
        """Notes that the answer was written. The rest of the request is read and discarded, up to a limit."""
        self._active = None
        self._holding = False
        if not made.keep_alive or self._server.closing:
            self._close(made.ended)
        elif self._queue:
            self._loop.call_soon(self._advance)  # deferred, because this runs inside the handler
        elif self._paused:
            self._throttle()

    def hold(self, holding: bool) -> None:
        """Pauses reading while the reader of the stream in flight wants no more, and resumes reading later."""
        self._holding = holding
        self._throttle()

    async def room(self) -> None:
        """Waits until the peer has taken most of what was written, or the connection is closing."""
        while self.stalled and not self._closing:
            waiter = self._loop.create_future()
            self._rooms.append(waiter)
            await waiter

    # --- for the server ---

    @property
    def busy(self) -> bool:
        """True while a call is in flight."""
        return self._active is not None

    @property
    def descriptor(self) -> int:
        """The file descriptor of the connection's socket."""
        descriptor: int = self.transport.get_extra_info("socket").fileno()
        return descriptor

    def retire(self) -> None:
        """Closes the connection if it is idle. Otherwise it is closed after the next answer, because the server is
        closing."""
        if self._active is None and not self._queue and self._incoming is None:
            self._close(True)

    def stuck(self) -> object:
        """Returns the point at which the connection waits for its peer, or None if it does not wait. Two equal results
        mean that no progress was made in between."""
        if self._closing:
            return "closing"
        if self._active is not None:
            return None
        if self._incoming is not None:
            come = self._incoming.received if self._reader is None else self._reader.filled
            return "body", id(self._incoming), come, self._overhead
        if self.stalled:
            return "writing", self.transport.get_write_buffer_size()
        return None if self._between else ("head", self._overhead)

    def fast_enough(self, least: int, grace: int) -> bool | None:
        """Returns whether the peer is fast enough, or None if it has nothing to send or to read.

        A peer may fall behind `least` bytes a second by `grace` bytes in total. Call this once a second.
        """
        owes = self._incoming is not None and self._incoming.partial
        if self._closing or not (owes or self.stalled):
            self._guarded = False
            return None
        if self.stalled:
            unsent = self.transport.get_write_buffer_size()
            self._moved += self._unsent - unsent
            self._count_unsent(unsent)
            active = self._active
            if active is not None and active.phase == STARTED and unsent <= _PATIENT and not self.budget.short:
                self._moved += least  # a stream's reader may pause, because it holds little memory
        elif self._paused:  # paused by this side
            self._moved += least
        self._credit = min(self._credit + self._moved - least, grace)
        self._moved = 0
        return self._credit >= 0

    def end_slow(self, least: int) -> None:
        """Ends the body for which the peer is too slow: refuses a request, or cuts off a reply."""
        made = self._incoming
        if self.stalled or made is None:
            self.transport.abort()
        elif made.refusal is None:
            made.stop(refusals.too_slow(least))
            if made is self._active:
                self._refuse(made)
            elif self._active is None:
                self._advance()

    def _watch(self) -> None:
        self._guarded = True
        self._moved = 0
        self._credit = self._server.guard(self)

    def _count_unsent(self, size: int) -> None:
        if size != self._unsent:
            self.budget.add(size - self._unsent)
            self._unsent = size

    def _forget_queue(self) -> None:
        for made in self._queue:
            made.release()
        self._queue.clear()

    # --- order ---

    def _advance(self) -> None:
        """Passes ready calls to the handler, in order, while none is in flight."""
        queue = self._queue
        while queue and self._active is None and not self._closing and not self.stalled:
            made = queue[0]
            if not made.ended and not made.ready(self.limit):
                break
            queue.popleft()
            if made.refusal is None:
                made.prepare(self.limit)
            if made.refusal is not None:
                self._refuse(made)
                break
            self._hand_out(made)
        if queue or self._paused:
            self._throttle()

    def _hand_out(self, made: M) -> None:
        self._active = made
        self._server.calls += 1
        try:
            self._handler(made)
        except Exception:
            self._server.errors += 1
            log.exception("handler failed", method=made.name, peer=self.peer)
            self._failed(made)

    def _throttle(self) -> None:
        """Pauses reading while a reader has enough or requests wait for their turn; otherwise resumes it."""
        pause = self._holding or (bool(self._queue) and (self._active is not None or self.stalled))
        if pause != self._paused and not self.transport.is_closing():
            self._paused = pause
            if pause:
                self.transport.pause_reading()
            else:
                self.transport.resume_reading()
            self._server.watch(self, pause)

    def _let_write(self) -> None:
        rooms, self._rooms = self._rooms, []
        for waiter in rooms:
            if not waiter.done():
                waiter.set_result(None)

    # --- refusing, closing ---

    def _excess(self) -> None:
        """Ends the input, because too much of it is neither a complete head nor a wanted body: an endless head, chunk
        extensions, trailers, or the body of a call that is already answered."""
        if self._incoming is not None and self._incoming.phase >= ANSWERED:
            self._close(False)
        else:
            self._malformed(
                f"the request has more than {self._max_headers} bytes of headers or trailers: send fewer", large=True
            )

    def _malformed(self, why: str, *, large: bool = False, upgrade: bool = False) -> None:
        """Ends the input, because nothing more on this connection can be parsed. Earlier requests are still
        answered."""
        self._deaf = True
        broken = self._queue[-1] if upgrade and self._queue else self._incoming
        if broken is None:
            broken = self._broken()
            broken.stop(refusals.of_bytes(why, grpc=False, large=large))
            self._queue.append(broken)
        elif broken.phase >= ANSWERED:
            self._close(False)
        elif broken.refusal is None:
            broken.stop(refusals.of_bytes(why, grpc=True))

    def _close(self, clean: bool) -> None:
        """Closes the connection once the output is sent. `clean` is false if some of the peer's bytes were not read."""
        if self._closing:
            return
        self._closing = self._deaf = True
        self._let_write()
        if self.transport.is_closing():
            return
        self._read_again()
        if clean:
            self.transport.close()
            return
        self._holding = False
        self._throttle()
        if not self._secure:  # TLS has no half-close: the peer closes after an answer that says `connection: close`
            self.transport.write_eof()
        self._lingering = self._loop.call_later(_LINGER, self.transport.abort)


def _peer(transport: asyncio.Transport) -> str:
    name = transport.get_extra_info("peername")
    if isinstance(name, tuple):
        connected = transport.get_extra_info("socket")
        # Otherwise a dead host would never be noticed, nor a reset that was lost on the way while reading was paused.
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            connected.setsockopt(socket.IPPROTO_TCP, option, value)
        return f"{name[0]}:{name[1]}"
    return "unix"
