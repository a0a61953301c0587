"""One call on an HTTP/2 connection: the unsent part of its request, and the judgement of its reply.

Replies are judged as on HTTP/1.1 (`clientconnection`): a reply that is not gRPC gets a status from its HTTP code, and a
reply that breaks the framing or is too large becomes a failure with a text. A reply of one message is collected, within
the budget for bodies. Any other reply becomes a stream, and the server may send more of it as the reader takes what has
arrived.
"""

import asyncio
import http
from typing import Protocol

from mesh import statuses
from mesh.wire import budget as budgets
from mesh.wire import exchange, failures, framing, inbox, pieces, refusals
from mesh.wire import reply as replies
from mesh.wire.http2.blocks import MAX_BYTES, Fields
from mesh.wire.http2.frames import Code, named

WINDOW = 1 << 20
"""Bytes that the server may send on a stream before the client has taken them."""

_HTTP_OK = int(http.HTTPStatus.OK)
_OK = int(statuses.Code.OK)
_MOST = framing.MAX_LENGTH


class Shared(Protocol):
    """The connection, as its streams see it, with the settings that they share."""

    transport: asyncio.Transport
    name: str
    limit: int  # bytes of the largest message that is held whole
    budget: budgets.Budget
    pieces: pieces.Pieces | None  # None: no message is taken in pieces

    def leave(self, stream: "Http2Stream", code: Code | None) -> None:
        """Forgets a stream that is over, and resets it at the server if there is a code."""

    def grant(self, stream: "Http2Stream", more: int) -> None:
        """Lets the server send more bytes on a stream."""


class Http2Stream:
    """One call and its reply."""

    __slots__ = (
        "_body",
        "_box",
        "_head",
        "_held",
        "_holding",
        "_in_pieces",
        "_owed",
        "_owner",
        "_shared",
        "_window",
        "more_room",
        "number",
        "stalled",
        "transport",
        "unsent",
    )

    def __init__(self, shared: Shared, owner: exchange.Exchange, number: int) -> None:
        self.number = number
        self.more_room = 0  # bytes that the server takes beyond its initial window; counted only for what waits
        self.unsent: memoryview | None = None  # the rest of the request
        self.transport = shared.transport
        self.stalled = False
        self._shared = shared
        self._owner = owner
        self._head: Fields | None = None
        self._body: bytes | bytearray = b""
        self._box: inbox.Inbox | None = None  # set once the reply is a stream
        self._in_pieces = False
        self._held = 0  # bytes of the budget
        self._window = WINDOW  # bytes that the server may still send
        self._owed = 0  # bytes that were taken, for which the server may send as many more once `grant` has told it
        self._holding = False  # the reader of the stream wants no more
        owner.connection = self

    # --- for the exchange ---

    @property
    def how_far(self) -> replies.LostKind:
        """The progress to report for the call if its connection ended now."""
        return replies.LostKind.SENT if self._head is None else replies.LostKind.STARTED

    def drop(self) -> None:
        """Ends the stream at the server, without notifying the call."""
        self._leave(Code.CANCEL)

    # --- for the connection ---

    def fields(self, fields: Fields, *, ends: bool) -> None:
        """Takes the head of the reply, or its trailers."""
        if self._head is not None:
            if ends:
                self._finish(fields)
            else:
                self._lose("sent trailers that do not end the reply", Code.PROTOCOL_ERROR)
            return
        if 100 <= fields.status < _HTTP_OK and not ends:
            return  # informational: the actual reply follows
        self._head = fields
        if fields.status != _HTTP_OK or not refusals.is_grpc(fields.special.get(b"content-type", b"")):
            self._refuse(self._not_grpc(fields))
        elif ends:
            self._finish(fields)

    def too_many_headers(self) -> None:
        """Ends the call with a failure, because the headers or trailers of the reply are too large."""
        text = f"the reply has more than {MAX_BYTES} bytes of headers"
        self._refuse(failures.failure(statuses.Reason.TOO_LARGE, text))

    def data(self, data: bytes, size: int, *, ends: bool) -> bool:
        """Takes a piece of the body; `size` counts its padding too. Returns False if it exceeds the window."""
        self._window -= size
        if self._window < 0:
            return False
        if self._head is None:
            self._lose("sent a body before its head", Code.PROTOCOL_ERROR)
            return True
        try:
            self._take(data)
        except framing.FrameError as error:
            self._refuse(failures.broken(error))
            return True
        if self._owner.over is not None:  # refused
            return True
        if ends:
            self._finish(Fields())
        else:
            self._owed += size
            self._settle()
        return True

    def was_reset(self, code: int) -> None:
        """Ends the call because the server has reset the stream."""
        unsent = code == Code.REFUSED_STREAM and self._head is None
        kind = replies.LostKind.UNSENT if unsent else self.how_far
        self._end(replies.Lost(kind, f"{self._shared.name} has reset the call: {named(code)}"), None)

    def lost(self, lost: replies.Lost) -> None:
        """Ends the call because its connection is lost, or the server will not process it."""
        self._end(lost, None)

    # --- the reply ---

    def _take(self, data: bytes) -> None:
        """Adds to the body or to the stream. Raises FrameError."""
        if self._box is not None:
            self._box.feed(data)
            return
        if not self._body:
            self._body = data
        else:
            if not isinstance(self._body, bytearray):
                self._body = bytearray(self._body)
            self._body += data
        body, shared = self._body, self._shared
        whole = framing.announced(body, _MOST)
        policy = shared.pieces
        if policy is not None and whole > policy.above + framing.PREFIX and self._owner.takes_pieces:
            self._in_pieces = True
            self.begin()
            return
        framing.frame_end(body, 0, shared.limit)
        size = max(len(body), whole)
        if size <= budgets.SMALL or size <= self._held:
            return
        if shared.budget.take(size - self._held, shared.budget.replies):
            self._held = size
        else:
            self._refuse(failures.failed(shared.budget.refusal(f"a reply of {size} bytes")))

    @property
    def has_message(self) -> bool:
        """True if a complete message is here, and the reply is not a stream yet."""
        body = self._body
        return self._box is None and len(body) >= framing.PREFIX and framing.announced(body, _MOST) <= len(body)

    def begin(self) -> None:
        """Turns the reply into a stream. Raises FrameError."""
        head = self._head
        assert head is not None
        box = self._inbox()
        box.feed(bytes(self._body))
        self._body = b""
        self._box = box
        self._owner.begun(head.metadata.copy(), head.special.get(b"grpc-encoding", b""), box)

    def begins(self) -> None:
        """Turns the reply into a stream if a complete message is here, and its end has not come."""
        if self._owner.over is None and self.has_message:
            try:
                self.begin()
            except framing.FrameError as error:
                self._refuse(failures.broken(error))

    def _settle(self) -> None:
        """Lets the server send more, unless the reader of the stream has to catch up."""
        if not self._holding and self._owed >= WINDOW // 2:
            self._window += self._owed
            self._shared.grant(self, self._owed)
            self._owed = 0

    def _hold(self, holding: bool) -> None:
        self._holding = holding
        if self._owner.over is None:
            self._settle()

    def _inbox(self) -> inbox.Inbox:
        """Makes an inbox for the messages of a stream. It counts them in the budget."""
        self._free()
        budget = self._shared.budget
        policy = self._shared.pieces if self._owner.takes_pieces else None
        return inbox.Inbox(self._shared.limit, self._hold, budget, budget.replies, pieces=policy)

    def _finish(self, last: Fields) -> None:
        """Ends the call with the whole reply. `last` are its trailers, or its head if it has no others."""
        head = self._head
        assert head is not None
        trailers_only = last is head
        special = head.special if trailers_only else {**head.special, **last.special}
        reply = failures.reply(special, head.metadata.copy(), [] if trailers_only else last.metadata.copy())
        box, body = self._box, self._body
        try:
            if box is not None:
                box.end()
            elif (
                body
                and reply.code == _OK
                and not self._in_pieces
                and framing.frame_end(body, 0, self._shared.limit) == len(body)
            ):
                reply.frame = body if isinstance(body, bytes) else bytes(body)
            elif body or reply.code == _OK:
                box = self._inbox()
                if body:
                    box.feed(bytes(body))
                box.end()
        except framing.FrameError as error:
            self._refuse(failures.broken(error))
            return
        self._leave(None if self.unsent is None else Code.NO_ERROR)
        self._owner.answered(reply, box)

    def _not_grpc(self, head: Fields) -> replies.Reply:
        """Returns the reply to report for an answer that is not gRPC. A gRPC status in it takes precedence over the
        HTTP status."""
        if b"grpc-status" in head.special:
            return failures.reply(head.special, head.metadata.copy(), [])
        return failures.not_grpc(head.status)

    def _lose(self, what: str, code: Code) -> None:
        """Ends the call because the server breaks the protocol."""
        lost = replies.Lost(self.how_far, f"{self._shared.name} {what}")
        self._end(lost, code)

    def _end(self, lost: replies.Lost, code: Code | None) -> None:
        if self._box is not None:
            self._box.fail(lost, drop=False)
        self._leave(code)
        self._owner.lost(lost)

    def _refuse(self, reply: replies.Reply) -> None:
        """Ends the call with this reply instead of the received one."""
        if self._box is not None:
            self._box.end(whole=False)
            reply.headers = self._head.metadata.copy() if self._head is not None else []
        self._leave(Code.CANCEL)
        self._owner.answered(reply)

    def _leave(self, code: Code | None) -> None:
        self._free()
        self._body = b""
        self._box = None  # which refers to this stream
        self._shared.leave(self, code)

    def _free(self) -> None:
        if self._held:
            self._shared.budget.give(self._held)
            self._held = 0
