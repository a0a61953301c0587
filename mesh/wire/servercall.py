"""One call in the HTTP/1.1 server: `call.Call` on top of a connection.

This module builds the bytes of the answer and enforces the order of its parts. `serverconnection` decides when and in
which order handlers get calls, and what happens to the connection afterwards.

A unary answer is one write: head, one chunk with the frame, the last chunk, trailers. A failure is trailers-only: a
head and nothing else. Every answer says `connection: close` if the connection will not be used again, so that the peer
does not send another request on it.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from mesh import statuses
from mesh.telemetry import logs
from mesh.wire import budget as budgets
from mesh.wire import call, framing, inbox, metadata, pieces, refusals

log = logs.get(__name__)

_BIG = 64 * 1024  # bytes of a frame above which passing parts to the transport is cheaper than joining them

_OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/grpc\r\n"
_CLOSE = b"connection: close\r\n"
_CHUNKED = b"transfer-encoding: chunked\r\n"
_EMPTY = b"content-length: 0\r\n"
# The common case: a unary answer without trailers on a connection that stays open, without and with headers.
_REPLY = _OK + _CHUNKED + b"\r\n%x\r\n%b\r\n0\r\ngrpc-status: 0\r\n\r\n"
_REPLY_WITH = _OK + _CHUNKED + b"%b\r\n%x\r\n%b\r\n0\r\ngrpc-status: 0\r\n\r\n"
_REPLY_HEAD = _OK + _CHUNKED + b"%b\r\n%x\r\n"
_REPLY_TAIL = b"\r\n0\r\ngrpc-status: 0\r\n%b\r\n"

# Progress of the answer. GONE: nothing that the handler does has an effect.
OPEN, STARTED, ANSWERED, GONE = range(4)


class CallConnection(Protocol):
    """The connection that carries a call."""

    transport: asyncio.Transport
    budget: budgets.Budget
    limit: int  # bytes of a message
    whole: int  # bytes of the largest frame that is never divided
    pieces: pieces.Pieces
    peer: str
    stalled: bool  # the peer does not take what is written

    def keeps(self, made: "ServerCall") -> bool:
        """Returns whether the connection can be used again once this call is answered."""

    def answered(self, made: "ServerCall") -> None:
        """Notes that the last byte of the answer was written."""

    def hold(self, holding: bool) -> None:
        """Pauses reading while the reader of the call's messages wants no more, and resumes reading later."""

    async def room(self) -> None:
        """Waits until the peer has taken most of what was written, or the connection is closing."""


class ServerCall(call.Call):
    """One request on one connection, from its head until it is answered."""

    __slots__ = (
        "_connection",
        "_inbox",
        "_on_cancel",
        "body",
        "ended",
        "head",
        "held",
        "in_pieces",
        "keep_alive",
        "phase",
        "refusal",
        "size",
    )

    def __init__(
        self,
        connection: CallConnection,
        method: bytes,
        headers: list[call.Header],
        encoding: bytes,
    ) -> None:
        self.method = method
        self.headers = headers
        self.encoding = encoding
        self.peer = connection.peer
        self.frame = None
        self.deadline = None
        self.head = None
        self.size: int | None = None  # bytes of the body by its head; None: chunked
        self.body: bytes | bytearray | memoryview = (
            b""  # the part of the body that has arrived, until the handler is called
        )
        self.held = 0  # bytes of the budget, held until the answer; the inbox holds those of a stream
        self.ended = False  # the whole request has arrived
        self.in_pieces = False  # the handler takes a large first message as it arrives
        self.keep_alive = True  # the peer may send its next request on this connection
        self.phase = OPEN
        self.refusal: refusals.Refusal | None = None  # if set, no handler sees this call
        self._connection = connection
        self._inbox: inbox.Inbox | None = None
        self._on_cancel: Callable[[], None] | None = None

    # --- for the connection ---

    def ready(self, limit: int) -> bool:
        """Returns whether the handler may get the call: all of it has arrived, or it is a stream that has not stopped
        in the middle of its first message, or the handler takes that message in pieces. A refused call is ready too.

        A client in the middle of a message will send the rest, so waiting for the rest is safe. A client that has sent
        a whole message or none may be waiting for an answer.
        """
        if self.ended or self.in_pieces or self.refusal is not None:
            return True
        if self.size is not None and self.size <= limit + framing.PREFIX:
            return False
        if not self.body:
            return self.size is None
        try:
            return framing.frame_end(self.body, 0, limit) <= len(self.body)
        except framing.FrameError as error:
            self.refusal = refusals.of_error(error)
            return True

    def prepare(self, limit: int) -> None:
        """Sets `frame` if the body is exactly one message, otherwise the stream that `read` serves. Refuses the call if
        a message is malformed or too large, or the budget has no room for it."""
        body = self.body
        try:
            if self.ended and body and not self.in_pieces and framing.frame_end(body, 0, limit) == len(body):
                # The body is a view only if the server was given `memory`, so its handler expects views.
                self.frame = self.body = bytes(body) if type(body) is bytearray else body  # type: ignore[assignment]
                return
            self.release()
            connection = self._connection
            policy = connection.pieces if self.in_pieces or connection.pieces.wanted(self) else None
            self._inbox = box = inbox.Inbox(limit, connection.hold, connection.budget, pieces=policy)
            if body:
                box.feed(bytes(body))
                self.body = b""
            if self.ended:
                box.end()
        except framing.FrameError as error:
            self.refusal = refusals.of_error(error)

    def feed(self, data: bytes) -> None:
        """Takes the next bytes of the body. After a refusal nothing is parsed, because the bytes may begin in the
        middle of a message."""
        if self.refusal is not None:
            return
        box = self._inbox
        if box is not None:
            try:
                box.feed(data)
            except framing.FrameError as error:
                self.refusal = refusals.of_error(error)
        elif self.phase:  # the call is answered, so the rest is not needed
            return
        else:
            if not self.body:
                self.body = data
            elif type(self.body) is bytearray:
                self.body += data
            else:
                self.body = bytearray(self.body) + data
            if self.held < len(self.body) or self.held < framing.PREFIX:
                connection = self._connection
                size = framing.announced(self.body, framing.MAX_LENGTH)
                if size > connection.whole:
                    size = 0 if self.divides() else min(size, connection.limit + framing.PREFIX)
                if not self.reserve(max(len(self.body), size)):
                    self.body = b""

    def divides(self) -> bool:
        """Returns whether the handler takes a large first message in pieces, and remembers it if so."""
        self.in_pieces = self.in_pieces or self._connection.pieces.wanted(self)
        return self.in_pieces

    def reserve(self, size: int) -> bool:
        """Holds at least `size` bytes of the budget; if they are not available, the call is refused."""
        more = size - self.held
        if more > 0:
            budget = self._connection.budget
            if not budget.take(more, budget.most(size)):
                self.refusal = refusals.of_error(budget.refusal(f"a request of {size} bytes"))
                return False
            self.held = size
        return True

    def release(self) -> None:
        """Gives this call's bytes back to the budget."""
        if self.held:
            self._connection.budget.give(self.held)
            self.held = 0

    @property
    def name(self) -> bytes:
        """The name for logs."""
        return self.method

    @property
    def received(self) -> int:
        """Bytes of the body that have arrived while the call waits for its turn."""
        return len(self.body)

    @property
    def missing(self) -> int:
        """Bytes of the body that are still to come in one piece, if the head has announced their number."""
        size = self.size
        if size is None or self.in_pieces or size > self._connection.limit + framing.PREFIX:
            return 0
        return size - len(self.body)

    @property
    def begun(self) -> bytes | bytearray | memoryview:
        """The part of the body that has arrived."""
        return self.body

    def fill(self, body: bytes | bytearray | memoryview) -> None:
        """Takes a body that was read in one piece."""
        self.body = body

    def stop(self, refusal: refusals.Refusal) -> None:
        """Marks the call as refused. The connection sends the refusal."""
        self.refusal = refusal

    @property
    def partial(self) -> bool:
        """True if the peer has sent only part of a message."""
        if self.ended or self.phase >= ANSWERED:
            return False
        return self._inbox is None or self._inbox.partial

    def end(self) -> None:
        """Notes the end of the request."""
        self.ended = True
        if self._inbox is not None and self.refusal is None:
            try:
                self._inbox.end()
            except framing.FrameError as error:
                self.refusal = refusals.of_error(error)

    def refused(self, refusal: refusals.Refusal) -> bytes:
        """Returns the bytes that refuse this call in place of the handler. If the answer has begun, returns the bytes
        that end it."""
        code = refusal.reason.code
        if self.phase == STARTED:
            return b"0\r\n%b%b\r\n" % (_status(code, refusal.text), refusal.trailers())
        if refusal.http:
            return refusal.over_http()
        return b"".join((_OK, _EMPTY, _CLOSE, _status(code, refusal.text), refusal.trailers(), b"\r\n"))

    def cut(self, why: str) -> None:
        """Notifies the handler that the caller has gone."""
        if self.phase >= ANSWERED:
            return
        self.phase = GONE
        self.release()
        if self._inbox is not None:
            self._inbox.fail(call.CallCancelled(why), drop=True)
        callback, self._on_cancel = self._on_cancel, None
        if callback is not None:
            try:
                callback()
            except Exception:
                log.exception("handler failed to handle a cancelled call", method=self.method, peer=self.peer)

    # --- for the handler ---

    takes_pieces = True

    @property
    def cancelled(self) -> bool:
        """True if the caller has gone."""
        return self.phase == GONE

    def on_cancel(self, callback: Callable[[], None] | None) -> None:
        """Sets the callback for a caller that disconnects or gives up before the answer."""
        if callback is not None and self.phase == GONE:
            callback()
        else:
            self._on_cancel = callback

    async def read(self) -> bytes | None:
        """Returns the next frame, or None at the end. Raises `CallCancelled`. A cancelled read loses nothing."""
        if self._inbox is not None:
            return await self._inbox.read()
        if self.phase == GONE:
            raise call.CallCancelled("the caller has gone")
        frame, self.body = self.body, b""  # `frame` stays: only the second read finds the end
        return self.frame if frame else None

    def reply(self, frame: bytes, headers: call.Headers = (), trailers: call.Headers = ()) -> None:
        """Answers with OK and one message, in one write."""
        if len(frame) >= _BIG:
            self._reply((frame,), len(frame), headers, trailers)
            return
        if self.phase:
            self._too_late("reply")
            return
        self.phase = ANSWERED
        connection = self._connection
        keep = connection.keeps(self)
        if keep and not trailers:
            if headers:
                connection.transport.write(_REPLY_WITH % (metadata.encode_headers(headers), len(frame), frame))
            else:
                connection.transport.write(_REPLY % (len(frame), frame))
        else:
            head, tail = _around(len(frame), keep, headers, trailers)
            connection.transport.write(b"".join((head, frame, tail)))
        if self.held:
            connection.budget.held -= self.held
            self.held = 0
        if self._inbox is not None:
            self._inbox.close()
        connection.answered(self)

    def reply_in_pieces(self, pieces: Sequence[bytes | memoryview], headers: call.Headers = ()) -> None:
        """Answers with OK and one message, whose pieces are not joined."""
        self._reply(pieces, sum(map(len, pieces)), headers, ())

    def _reply(
        self, pieces: Sequence[bytes | memoryview], size: int, headers: call.Headers, trailers: call.Headers
    ) -> None:
        if self.phase:
            self._too_late("reply")
            return
        self.phase = ANSWERED
        connection = self._connection
        head, tail = _around(size, connection.keeps(self), headers, trailers)
        connection.transport.writelines((head, *pieces, tail))
        self._discard_input()
        connection.answered(self)

    def forget(self) -> None:
        """Frees the request, which is not read again. Its bytes stay in the budget until it is answered."""
        self.frame = None
        self.body = b""

    def fail(self, code: int, text: str, headers: call.Headers = (), trailers: call.Headers = ()) -> None:
        """Answers with a failure and no message."""
        if self.phase == STARTED:
            self.finish(code, text, trailers)
            return
        if self.phase:
            self._too_late("fail")
            return
        self.phase = ANSWERED
        connection = self._connection
        connection.transport.write(
            b"".join(
                (
                    _OK,
                    _EMPTY if connection.keeps(self) else _EMPTY + _CLOSE,
                    _status(code, text),
                    metadata.encode_headers(headers),
                    metadata.encode_headers(trailers),
                    b"\r\n",
                )
            )
        )
        self._discard_input()
        connection.answered(self)

    def start(self, headers: call.Headers = ()) -> None:
        """Sends the initial metadata."""
        if self.phase:
            self._too_late("start")
            return
        self.phase = STARTED
        head = _OK + _CHUNKED if self._connection.keeps(self) else _OK + _CHUNKED + _CLOSE
        self._connection.transport.write(b"%b%b\r\n" % (head, metadata.encode_headers(headers)))

    async def write(self, frame: bytes) -> None:
        """Sends one message once there is room. Raises `CallCancelled`. If cancelled while waiting, it has sent
        nothing."""
        if self._connection.stalled:
            await self._connection.room()
        if self.phase == OPEN:
            self.start()
        elif self.phase == GONE:
            raise call.CallCancelled("the caller has gone")
        elif self.phase == ANSWERED:
            self._too_late("write")
        transport = self._connection.transport
        if len(frame) < _BIG:
            transport.write(b"%x\r\n%b\r\n" % (len(frame), frame))
        else:
            transport.writelines((b"%x\r\n" % len(frame), frame, b"\r\n"))

    def finish(self, code: int = 0, text: str = "", trailers: call.Headers = ()) -> None:
        """Ends the reply. If nothing was sent yet, sends the head too."""
        if self.phase == OPEN:
            if code:
                self.fail(code, text, trailers=trailers)
                return
            self.start()  # OK without a message is not a failure, so its metadata are sent as trailers
        if self.phase != STARTED:
            self._too_late("finish")
            return
        self.phase = ANSWERED
        self._connection.transport.write(b"0\r\n%b%b\r\n" % (_status(code, text), metadata.encode_headers(trailers)))
        self._discard_input()
        self._connection.answered(self)

    def _discard_input(self) -> None:
        """Gives the request's bytes back to the budget, because nothing reads more of it."""
        if self.held:
            self._connection.budget.held -= self.held
            self.held = 0
        if self._inbox is not None:
            self._inbox.close()

    def _too_late(self, what: str) -> None:
        if self.phase != GONE:
            raise RuntimeError(
                f"{what}() for {self.method!r}, which is {'begun' if self.phase == STARTED else 'answered'} already"
            )


def _around(size: int, keep: bool, headers: call.Headers, trailers: call.Headers) -> tuple[bytes, bytes]:
    """Returns the bytes before and after the frame of a unary answer."""
    lines = metadata.encode_headers(headers)
    return _REPLY_HEAD % (lines if keep else _CLOSE + lines, size), _REPLY_TAIL % metadata.encode_headers(trailers)


_STATUS_LINES = {code: b"grpc-status: %d\r\n" % code for code in statuses.Code}


def _status(code: int, text: str) -> bytes:
    line = _STATUS_LINES.get(code) or b"grpc-status: %d\r\n" % code  # type: ignore[call-overload]
    return b"%bgrpc-message: %b\r\n" % (line, metadata.encode_text(text)) if text else line
