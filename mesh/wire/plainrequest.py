"""One request of plain HTTP/1.1, from its head until its answer. Handlers see it instead of a gRPC call.

A handler gets a request when all of it has arrived, and answers it once, in one write; a callback tells it if the
client disconnects before that. A refused request (too large, no room) is read to its end and dropped before it is
answered, because simple clients write all of a request before they look for an answer. Bytes and time for that are
limited.

A `Head` may belong to many requests, because clients repeat their heads, and a known head (`heads`) is not parsed
again. The handler stores its own reading of the head in it.
"""

import asyncio
import http
from collections.abc import Callable, Sequence
from typing import Protocol

from mesh.statuses import too_large
from mesh.telemetry import logs
from mesh.wire import budget as budgets
from mesh.wire import call, metadata, refusals
from mesh.wire.servercall import ANSWERED, GONE, OPEN

log = logs.get(__name__)

_DROPPED = 64 << 20  # bytes of a refused body that are read and discarded
_JOINED = 64 * 1024  # bytes of an answer above which passing parts to the transport is cheaper than joining them

_CLOSE = b"connection: close\r\n"
_LINES = {status.value: b"HTTP/1.1 %d %b\r\n" % (status, status.phrase.encode()) for status in http.HTTPStatus}
_OK = _LINES[200]

Piece = bytes | memoryview
Answer = tuple[int, call.Headers, bytes]
"""Status, header fields and body of an answer."""


class Head:
    """Method, target and header fields of a request."""

    __slots__ = ("fields", "method", "note", "target")

    def __init__(self, method: bytes, target: bytes, fields: list[call.Header]) -> None:
        """Makes a head without a note. `fields` have lower-case names, and leave out the headers of the framing."""
        self.method = method
        self.target = target
        self.fields = fields
        self.note: object = None
        """The handler's own result of reading this head, kept for the next request with the same head."""


Opening = Callable[[Head, bytes, int], "tuple[bytes, object] | None"]
"""A function that takes the head of a request, the first bytes of its large body, and the size of the whole body. It
returns None, or other bytes that replace these first bytes, and a note for the handler. The rest of the body is then
read after the other bytes, into the same memory, and the handler gets all of it as one piece."""


class RequestConnection(Protocol):
    """The connection that carries a request."""

    transport: asyncio.Transport
    budget: budgets.Budget
    limit: int  # bytes of a body
    peer: str

    @property
    def opening(self) -> Opening | None:
        """The function that sees the first bytes of large bodies."""

    def keeps(self, made: "PlainRequest") -> bool:
        """Returns whether the connection can be used again once this request is answered."""

    def answered(self, made: "PlainRequest") -> None:
        """Notes that the last byte of the answer was written."""

    def drops(self, made: "PlainRequest") -> None:
        """Limits the time for reading the rest of a refused request."""


class PlainRequest:
    """One request of plain HTTP/1.1."""

    __slots__ = (
        "_connection",
        "_on_cancel",
        "_pieces",
        "abandoned",
        "dropped",
        "ended",
        "head",
        "held",
        "keep_alive",
        "opened",
        "phase",
        "refusal",
        "size",
    )

    def __init__(self, connection: RequestConnection, head: Head) -> None:
        self.head = head
        self.size = 0  # bytes of the body that have arrived
        self.held = 0  # bytes of the budget, until the request is answered
        self.ended = False  # the whole request has arrived
        self.keep_alive = True  # the client may send its next request on this connection
        self.phase = OPEN
        self.refusal: refusals.Refusal | None = None  # if set, no handler sees this request
        self.dropped = 0  # bytes read since it was refused
        self.abandoned = False  # it is refused without waiting for the rest
        self.opened: object = None  # the note of the `Opening` that replaced the first bytes of the body
        self._connection = connection
        self._pieces: list[bytes] = []
        self._on_cancel: Callable[[], object] | None = None

    # --- for the connection ---

    @property
    def name(self) -> bytes:
        """The name for logs: the target."""
        return self.head.target

    @property
    def received(self) -> int:
        """Bytes of the body that have arrived."""
        return self.size + self.dropped

    @property
    def missing(self) -> int:
        """Bytes of the body that are still to come, if the head has announced their number. The budget has reserved
        them. If an `Opening` needs the first bytes, this is 0 until some have arrived."""
        return self.held - self.size if self.size or self._connection.opening is None else 0

    @property
    def begun(self) -> bytes:
        """The bytes that an `Opening` has put in the place of the first bytes. Otherwise empty, because the parts of
        the body need not be joined."""
        opening = self._connection.opening
        found = None if opening is None else opening(self.head, b"".join(self._pieces), self.held)
        if found is None:
            return b""
        self._pieces.clear()
        begun, self.opened = found
        return begun

    def fill(self, body: bytes | bytearray | memoryview) -> None:
        """Takes the rest of the body."""
        self._pieces.append(bytes(body))
        self.size = self.held

    def ready(self, limit: int) -> bool:
        """Returns whether the handler may get the request: all of it has arrived, or the rest will not be read."""
        return self.ended or self.abandoned

    def prepare(self, limit: int) -> None:
        """Does nothing, as a whole request is ready for its handler."""

    def whole(self, body: bytes) -> None:
        """Takes the body in one piece. The budget has already reserved its bytes."""
        self._pieces.append(body)
        self.size = self.held = len(body)
        self.ended = True

    def feed(self, data: bytes) -> None:
        """Takes the next bytes of the body."""
        if self.refusal is not None:
            self.dropped += len(data)
            if self.dropped > _DROPPED:
                self.abandoned = True
            return
        self.size += len(data)
        if self.size > self.held and not self.reserve(self.size):
            return
        self._pieces.append(data)

    def reserve(self, size: int) -> bool:
        """Holds at least `size` bytes of the budget. Refuses the request if it is too large or there is no room."""
        connection = self._connection
        if size > connection.limit:
            self.refuse(refusals.of_error(too_large(f"the body of {size} bytes or more", connection.limit)))
            return False
        more = size - self.held
        if more > 0:
            budget = connection.budget
            if not budget.take(more, budget.most(size)):
                self.refuse(refusals.of_error(budget.refusal(f"a request of {size} bytes")))
                return False
            self.held = size
        return True

    def refuse(self, refusal: refusals.Refusal) -> None:
        """Refuses the request once its rest has arrived and been dropped."""
        self.refusal = refusal
        self._pieces.clear()
        self.release()
        if not self.ended:
            self._connection.drops(self)

    def stop(self, refusal: refusals.Refusal) -> None:
        """Refuses the request at once, without waiting for the rest."""
        self.refusal = refusal
        self.abandoned = True
        self._pieces.clear()
        self.release()

    def release(self) -> None:
        """Gives the request's bytes back to the budget."""
        if self.held:
            self._connection.budget.give(self.held)
            self.held = 0

    @property
    def partial(self) -> bool:
        """True if the client has sent only part of a request that was not refused."""
        return not self.ended and self.refusal is None

    def end(self) -> None:
        """Notes the end of the request."""
        self.ended = True

    def cut(self, why: str) -> None:
        """Notifies the handler that the client has disconnected."""
        if self.phase >= ANSWERED:
            return
        self.phase = GONE
        self.release()
        self._pieces.clear()
        callback, self._on_cancel = self._on_cancel, None
        if callback is not None:
            try:
                callback()
            except Exception:
                log.exception(
                    ("handler failed to handle a cancelled request"),
                    target=self.head.target,
                    peer=self._connection.peer,
                    why=why,
                )

    # --- for the handler ---

    @property
    def peer(self) -> str:
        """The client's address, for logs."""
        return self._connection.peer

    @property
    def pieces(self) -> list[bytes]:
        """The body, in pieces as it arrived."""
        return self._pieces

    def take(self) -> list[bytes]:
        """Returns the pieces of the body and drops them."""
        pieces, self._pieces = self._pieces, []
        return pieces

    def hand_over(self, hold: budgets.Hold) -> None:
        """Transfers the bytes that the request holds in the budget to another holder."""
        hold.size += self.held
        self.held = 0

    def on_cancel(self, callback: Callable[[], object] | None) -> None:
        """Sets the callback for a client that disconnects before the answer. None removes it."""
        if callback is not None and self.phase == GONE:
            callback()
        else:
            self._on_cancel = callback

    def answer(
        self,
        status: int,
        pieces: Sequence[Piece],
        *,
        content_type: bytes = b"application/json",
        fields: call.Headers = (),
    ) -> None:
        """Answers in one write. A large piece is not copied, so it must not change until it is freed. Does nothing if
        the client has disconnected."""
        if self.phase:
            if self.phase != GONE:
                raise RuntimeError(f"{self.head.target!r} was already answered")
            return
        self.phase = ANSWERED
        self._on_cancel = None
        connection = self._connection
        size = sum(map(len, pieces))
        head = b"%bcontent-type: %b\r\ncontent-length: %d\r\n%b%b\r\n" % (
            _OK if status == 200 else _LINES.get(status) or b"HTTP/1.1 %d -\r\n" % status,
            content_type,
            size,
            b"" if connection.keeps(self) else _CLOSE,
            metadata.encode_headers(fields),
        )
        if size < _JOINED:
            connection.transport.write(b"".join((head, *pieces)))
        else:
            connection.transport.writelines((head, *pieces))
        self._pieces.clear()
        self.release()
        connection.answered(self)
