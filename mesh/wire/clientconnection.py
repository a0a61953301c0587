"""One connection of a pool: it writes one request, reads the reply, and then returns to the pool or closes.

Replies are judged as gRPC requires of clients. A reply that is not gRPC gets a status from its HTTP code. A reply that
breaks the framing or is too large becomes a failure with a text. If the connection ends without a status, the call is
reported as lost, together with its progress. A connection is used again only after a complete reply.
"""

import asyncio
import http
import socket
import struct
from typing import Protocol

import httptools

from mesh import statuses
from mesh.wire import budget as budgets
from mesh.wire import call, exchange, failures, framing, heads, inbox, largebody, metadata, pieces, refusals
from mesh.wire import reply as replies
from mesh.wire.heads import Memo

_MAX_HEADERS = 64 * 1024  # bytes of a reply's head, or of its trailers
_WITH_HEAD = 1024  # bytes of a read that may bring a head and the beginning of a large message
_HEAD_ENDS = b"\r\n\r\n"
_RESET = struct.pack("ii", 1, 0)  # struct linger: on, 0 seconds
_OK = int(statuses.Code.OK)
_HTTP_OK = int(http.HTTPStatus.OK)


class Owner(Protocol):
    """The pool, as its connections see it, with the settings that they share."""

    address: str
    budget: budgets.Budget
    pieces: pieces.Pieces
    heads: Memo[tuple[list[call.Header], bytes]]
    tails: Memo[list[call.Header]]

    def release(self, connection: "ClientConnection") -> None:
        """Takes back a connection that has become idle."""

    def left(self, connection: "ClientConnection") -> None:
        """Notes that a connection has closed, or is about to close."""


class ClientConnection(asyncio.Protocol):
    """One connection of a pool, with the callbacks of its parser and its transport. It carries one call at a time."""

    __slots__ = (
        "_body",
        "_box",
        "_complete",
        "_exchange",
        "_extra",
        "_head_done",
        "_headers",
        "_heard",
        "_held",
        "_in_pieces",
        "_interim",
        "_keep",
        "_limit",
        "_overhead",
        "_parser",
        "_paused",
        "_pool",
        "_reader",
        "_refusal",
        "_special",
        "_trailers",
        "_whole",
        "idle_since",
        "patience",
        "stalled",
        "transport",
    )

    transport: asyncio.Transport

    def __init__(self, pool: Owner, limit: int, patience: int) -> None:
        self._pool = pool
        self._limit = limit
        self._whole = pool.pieces.above + framing.PREFIX  # bytes of the largest frame that is never divided
        self._parser = httptools.HttpResponseParser(self)
        self._exchange: exchange.Exchange | None = None
        self.idle_since = 0  # the pool's tick when it became idle
        self.patience = patience  # idle ticks after which the pool closes it
        self.stalled = False  # the peer does not take what is written
        self._paused = False
        self._reader: largebody.LargeBody | None = None  # reads instead of this connection
        self._extra = False  # bytes came after the reply
        self._held = 0  # bytes of the budget for bodies
        self._reset()

    def _reset(self) -> None:
        if self._held:
            self._pool.budget.give(self._held)
            self._held = 0
        self._special: dict[bytes, bytes] = {}
        self._headers: list[call.Header] = []
        self._trailers: list[call.Header] = []
        self._body: bytes | bytearray = b""
        self._box: inbox.Inbox | None = None  # set once the reply is a stream
        self._refusal: replies.Reply | None = None  # the failure that replaces an unacceptable reply
        self._in_pieces = False  # the reply begins with a message that the call takes in pieces
        self._heard = False  # a byte of the reply has arrived
        self._head_done = False
        self._interim = False  # an informational head (1xx) was skipped
        self._complete = False
        self._keep = False
        self._overhead = 0  # bytes since the last whole head or piece of the body

    # --- for the pool and the exchange ---

    @property
    def usable(self) -> bool:
        """True if a request can be written, as far as this end knows."""
        return not self.transport.is_closing()

    @property
    def how_far(self) -> replies.LostKind:
        """The progress to report for the call in flight if the connection ended now."""
        return replies.LostKind.STARTED if self._heard else replies.LostKind.SENT

    def begin(self, owner: exchange.Exchange) -> None:
        """Writes the request of a call, which owns the connection until the call is over."""
        self._exchange = owner
        owner.connection = self
        request, owner.request = owner.request, ()
        if len(request) == 1:
            self.transport.write(request[0])
        else:
            self.transport.writelines(request)
        if not owner.ended:
            owner.let_write()

    def drop(self) -> None:
        """Closes the connection at once, without notifying the call."""
        self._exchange = None
        self._body = b""
        if self._reader is not None:
            self._reader.drop()
            self._reader = None
            self.transport.set_protocol(self)
        if self._held:
            self._pool.budget.give(self._held)
            self._held = 0
        self._pool.left(self)
        self.transport.abort()

    # --- transport callbacks ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keeps the transport, and has the connection reset when this end closes it, or this process dies.

        By default, the kernel delivers what is left of a request before it tells the peer that the connection has
        ended. A server that has paused reading, because its handler is slow, would learn of a cancel only once it reads
        on. A connection is closed when its call has ended or was given up, so the peer needs none of these bytes.
        """
        self.transport = transport  # type: ignore[assignment]  # uvloop's do not derive from asyncio's
        connected = transport.get_extra_info("socket")
        if connected is not None:
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)

    def data_received(self, data: bytes) -> None:
        """Parses the bytes, and passes the result to the call."""
        owner = self._exchange
        if owner is None:  # no request is in flight
            self.drop()
            return
        seen = None
        memo = self._pool.heads
        if memo.rest:
            memo.rest -= 1
        elif not self._heard:
            seen = heads.split_reply(data)
            if seen is not None and self._recognised(owner, seen):
                return
        if len(data) >= _WITH_HEAD and not self._heard and self._large(data):
            return
        if self._parse(data):
            self._parsed(owner, seen)

    def _parse(self, data: bytes | memoryview) -> bool:
        """Parses the bytes. Returns False if that has ended the call as lost."""
        self._heard = True
        self._overhead += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if not self._complete:
                owner = self._exchange
                assert owner is not None
                self.drop()
                self._lose(owner, f"the answer is not HTTP/1.1: {error}")
                return False
            self._extra = True
        return True

    def _parsed(self, owner: exchange.Exchange, seen: heads.Answer | None = None) -> None:
        """Passes the results of one read to the call."""
        if self._complete:
            if seen is not None:
                self._learn(seen)
            self._finish(owner)
        elif self._refusal is not None:
            self._refuse(owner, self._refusal)
        elif self._overhead > _MAX_HEADERS:
            self._refuse(
                owner,
                failures.failure(statuses.Reason.TOO_LARGE, f"the reply has more than {_MAX_HEADERS} bytes of headers"),
            )
        elif self._head_done and self._box is None:
            self._begin(owner)

    # --- large replies ---

    def _large(self, data: bytes) -> bool:
        """Handles a read in which a large message begins, and lets a `LargeBody` read the rest if possible. Returns
        False if none begins: then the caller parses the read."""
        at = data.find(_HEAD_ENDS) + len(_HEAD_ENDS)
        if at < len(_HEAD_ENDS):
            return False
        body = memoryview(data)[at:]
        begun = largebody.begins(body, self._limit)
        if begun is None:
            return False
        if not self._parse(data[:at]):
            return True
        owner = self._exchange
        assert owner is not None
        size, left, skipped = begun
        chunked = self._special.get(b"transfer-encoding") == b"chunked"
        if self._head_done and self._refusal is None and chunked and not (size > self._whole and self._divides(owner)):
            self._count(size)
            if self._refusal is None:
                owner.beginning()  # first, so that the reply may take the memory of the request
                self._reader = reader = largebody.LargeBody(self, size, left)
                self._overhead = 0
                reader.put(body[skipped:])
                if self._reader is reader:  # it has not given up at once
                    self.transport.set_protocol(reader)
                return True
        if self._parse(body):
            self._parsed(owner)
        return True

    def body_moved(self, count: int) -> None:
        """Does nothing, because replies have no minimum rate."""

    def body_ended(self, body: bytes | bytearray | memoryview, rest: bytes, *, last: bool) -> None:
        """Takes a large message, and resumes reading."""
        self._reader = None
        self.transport.set_protocol(self)
        owner = self._exchange
        assert owner is not None
        assert not isinstance(body, memoryview)
        self._body = body
        if not rest or self._parse(rest):
            self._parsed(owner)

    def eof_received(self) -> bool:
        """Treats the connection as ended, because the peer will send no more answers."""
        self.stalled = True  # so that writers wait for the end
        self.transport.abort()  # the close would wait for the peer to read the rest of the request
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Reports the call in flight as lost."""
        self._pool.left(self)
        self._reader = None
        if self._held:
            self._pool.budget.give(self._held)
            self._held = 0
        owner, self._exchange = self._exchange, None
        if owner is not None:
            self._lose(owner, "the server closed the connection" if exc is None else f"the connection broke: {exc}")

    def pause_writing(self) -> None:
        """Makes writers wait: the peer is slow."""
        self.stalled = True

    def resume_writing(self) -> None:
        """Wakes the writers: the peer has caught up."""
        self.stalled = False
        if self._exchange is not None:
            self._exchange.let_write()

    # --- parser callbacks ---

    def on_message_begin(self) -> None:
        """Raises ValueError for a second, unsolicited reply, which stops the parser."""
        if self._complete:
            raise ValueError("more than one reply")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Takes one header, or, after the head, one trailer."""
        name = name.lower()
        if name in metadata.NOT_METADATA:
            self._special[name] = value
        elif self._head_done:
            self._trailers.append((name, value))
        else:
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        """Checks whether the reply is gRPC."""
        self._overhead = 0
        status = self._parser.get_status_code()
        special = self._special
        if status == _HTTP_OK and refusals.is_grpc(special.get(b"content-type", b"")):
            self._head_done = True
        elif status < _HTTP_OK:  # informational: the actual reply follows
            self._interim = True
            self._special = {}
            self._headers = []
        else:
            self._head_done = True
            self._refusal = self._not_grpc(status)

    def on_body(self, data: bytes) -> None:
        """Takes a piece of the body; chunk boundaries do not matter."""
        self._overhead = 0
        if self._refusal is not None:
            return
        box = self._box
        if box is not None:
            try:
                box.feed(data)
            except framing.FrameError as error:
                self._refusal = failures.broken(error)
        else:
            if not self._body:
                self._body = data
            elif type(self._body) is bytearray:
                self._body += data
            else:
                self._body = bytearray(self._body) + data
            if self._held < len(self._body):
                size = framing.announced(self._body, framing.MAX_LENGTH)
                if size > self._whole:
                    owner = self._exchange
                    divided = owner is not None and self._divides(owner)
                    size = 0 if divided else min(size, self._limit + framing.PREFIX)
                self._count(max(len(self._body), size))

    def _divides(self, owner: exchange.Exchange) -> bool:
        """Returns whether the call takes a large first message in pieces, and remembers it if so."""
        if owner.takes_pieces:
            self._in_pieces = True
        return self._in_pieces

    def _count(self, size: int) -> None:
        """Counts `size` bytes of a large reply in the budget, or refuses the reply."""
        budget = self._pool.budget
        if size <= budgets.SMALL:
            return
        if budget.take(size - self._held, budget.replies):
            self._held = size
        else:
            error = budget.refusal(f"a reply of {size} bytes")
            self._refusal = failures.failed(error)
            self._body = b""

    def on_message_complete(self) -> None:
        """Notes the end of the reply."""
        if self._interim:
            self._interim = False
        else:
            self._complete = True
            self._keep = self._parser.should_keep_alive()

    # --- outcomes of a reply ---

    def _begin(self, owner: exchange.Exchange) -> None:
        """Turns a reply that has begun and not ended into a stream. If only a part of its first message has arrived,
        waits for the rest, unless the call takes the message in pieces."""
        body = self._body
        try:
            if body and not self._in_pieces and framing.frame_end(body, 0, self._limit) > len(body):
                return
            box = self._inbox(owner)
            if body:
                box.feed(bytes(body))
        except framing.FrameError as error:
            self._refuse(owner, failures.broken(error))
            return
        self._body = b""
        self._box = box
        owner.begun(self._headers, self._special.get(b"grpc-encoding", b""), box)

    def _finish(self, owner: exchange.Exchange) -> None:
        if self._refusal is not None:
            self._refuse(owner, self._refusal)
            return
        reply = self._reply()
        box = self._box
        body = self._body
        try:
            if box is not None:
                box.end()
            elif (
                body
                and reply.code == _OK
                and not self._in_pieces
                and framing.frame_end(body, 0, self._limit) == len(body)
            ):
                reply.frame = body if type(body) is bytes else bytes(body)
            elif body or reply.code == _OK:
                box = self._inbox(owner)
                if body:
                    box.feed(bytes(body))
                box.end()
        except framing.FrameError as error:
            self._refuse(owner, failures.broken(error))
            return
        keep = self._keep and owner.ended and not self._extra and not self.stalled
        self._exchange = None
        self._reset()
        self._leave(keep)
        owner.answered(reply, box)

    def _inbox(self, owner: exchange.Exchange) -> inbox.Inbox:
        """Makes an inbox for the messages of a stream. It counts them in the budget."""
        budget = self._pool.budget
        if self._held:
            budget.give(self._held)
            self._held = 0
        policy = self._pool.pieces if owner.takes_pieces else None
        return inbox.Inbox(self._limit, self._hold, budget, budget.replies, pieces=policy)

    def _leave(self, keep: bool) -> None:
        """Returns the connection to the pool if `keep` is true; closes it otherwise."""
        if keep:
            self._pool.release(self)
        else:
            self._pool.left(self)
            self.transport.abort()  # close() would wait for what the peer, which has answered, may never read

    # --- heads and trailers seen before ---

    def _recognised(self, owner: exchange.Exchange, seen: heads.Answer) -> bool:
        """Ends the call with a reply whose head and trailers are known; returns False if the parser must judge it."""
        head, body, tail = seen
        known = self._pool.heads.get(head)
        if known is None:
            return False
        trailers = self._pool.tails.get(tail)
        if trailers is None or not framing.is_frame(body, self._limit):
            return False
        if len(body) > budgets.SMALL and self._pool.budget.held + len(body) > self._pool.budget.replies:
            return False  # the parser's path refuses it
        self._pool.heads.missed = 0
        headers, encoding = known
        self._exchange = None
        self._leave(owner.ended and not self.stalled)
        owner.answered(replies.Reply(_OK, "", body, headers.copy(), trailers.copy(), encoding))
        return True

    def _learn(self, seen: heads.Answer) -> None:
        """Caches the parser's result for a read that brought exactly one ordinary reply: one message and OK."""
        special = self._special
        head, body, tail = seen
        if (
            self._keep
            and not self._extra
            and self._body == body
            and special.get(b"grpc-status") == b"0"
            and b"grpc-message" not in special
            and b"grpc-status" not in head.lower()
            and tail.startswith(b"\r\n0\r\n")
        ):
            pool = self._pool
            if pool.heads.worth(head):
                pool.heads.keep(head, (self._headers.copy(), special.get(b"grpc-encoding", b"")))
            if pool.tails.worth(tail):
                pool.tails.keep(tail, self._trailers.copy())

    def _reply(self) -> replies.Reply:
        """Returns a reply with the status and metadata received so far, and without a message."""
        return failures.reply(self._special, self._headers, self._trailers)

    def _not_grpc(self, status: int) -> replies.Reply:
        """Returns the reply to report for an answer that is not gRPC. A gRPC status in it takes precedence over the
        HTTP status."""
        return self._reply() if b"grpc-status" in self._special else failures.not_grpc(status)

    def _lose(self, owner: exchange.Exchange, why: str) -> None:
        """Reports the call as lost, before or during its reply."""
        lost = replies.Lost(self.how_far, why, self._pool.address)
        if self._box is not None:
            self._box.fail(lost, drop=False)
        owner.lost(lost)

    def _refuse(self, owner: exchange.Exchange, reply: replies.Reply) -> None:
        """Ends the call with this reply instead of the received one, and closes the connection."""
        box = self._box
        if box is not None:
            box.end(whole=False)
            reply.headers = self._headers
        self.drop()
        owner.answered(reply)

    def _hold(self, holding: bool) -> None:
        """Pauses reading while the reader of the stream wants no more, and resumes reading later."""
        if holding != self._paused and not self.transport.is_closing():
            self._paused = holding
            if holding:
                self.transport.pause_reading()
            else:
                self.transport.resume_reading()
