"""One connection of the server for plain HTTP/1.1. `connection` has the code that it shares with gRPC.

The handler gets a request once all of it has arrived. A refused request is read to its end, within limits, and then
answered, so that the connection can be used again. The server's owner decides the form of a refusal.

The server is behind Envoy, so it takes no special care of HTTP/1.0, and supports no protocol upgrades.
"""

from typing import Protocol

from mesh.statuses import MeshError, Reason
from mesh.telemetry import logs
from mesh.wire import connection, heads, refusals
from mesh.wire.connection import Connection
from mesh.wire.plainrequest import Answer, Head, Opening, PlainRequest

log = logs.get(__name__)

_SILENCE = 1.0  # seconds without bytes of a refused body, after which it is answered because its client seems to wait
_DROPPING = 20.0  # seconds in all for a refused body

_FRAMING = frozenset({b"connection", b"content-length", b"expect", b"keep-alive", b"te", b"transfer-encoding"})


class PlainOwner(connection.Owner[PlainRequest, Head], Protocol):
    """The server as its connections see it. It also defines the form of refusals."""

    opening: Opening | None

    def refusal(self, error: MeshError) -> Answer:
        """Returns the answer to a request that no handler sees."""


class PlainConnection(Connection[PlainRequest, Head]):
    """The parser callbacks of one connection, and its refusals."""

    __slots__ = ()

    _server: PlainOwner

    # --- parser callbacks ---

    def on_headers_complete(self) -> None:
        """Creates a request from the head."""
        parser = self._parser
        framing = dict(self._headers)
        fields = [field for field in self._headers if field[0] not in _FRAMING]
        made = PlainRequest(self, Head(parser.get_method(), self._url, fields))
        self._url = b""
        self._headers = []
        made.keep_alive = parser.should_keep_alive()
        self._incoming = made
        self._queue.append(made)
        refusal = refusals.of_headers(made.head.target, fields, self._max_headers, self._overhead)
        if refusal is not None:
            made.refuse(refusal)
        elif b"transfer-encoding" not in framing:
            made.reserve(int(framing.get(b"content-length", b"0")))
        if b"expect" in framing:
            if made.refusal is not None:
                made.stop(made.refusal)
            elif self._active is None:
                self.transport.write(connection.CONTINUE)
        self._overhead = 0

    # --- for the request ---

    @property
    def opening(self) -> Opening | None:
        """The function that sees the first bytes of large bodies."""
        return self._server.opening

    def drops(self, made: PlainRequest) -> None:
        """Limits the time for reading the rest of a refused request."""
        self._loop.call_later(_SILENCE, self._look, made, made.dropped, self._loop.time() + _DROPPING)

    def _look(self, made: PlainRequest, dropped: int, until: float) -> None:
        if made.ended or made.phase or made.refusal is None or self._closing:
            return
        if made.dropped == dropped or self._loop.time() > until:
            made.stop(made.refusal)
            if self._active is None:
                self._advance()
            return
        self._loop.call_later(_SILENCE, self._look, made, made.dropped, until)

    # --- heads seen before ---

    def _recognised(self, seen: heads.Request, known: Head) -> bool:
        _, _, timeout, body = seen
        budget = self.budget
        held = budget.held + len(body)
        if timeout or len(body) > self.limit or held > budget.large:
            return False
        self._memo.missed = 0
        budget.held = held
        made = PlainRequest(self, known)
        made.whole(body)
        self._hand_out(made)
        return True

    def _learn(self, seen: heads.Request) -> None:
        if len(self._queue) != 1 or not self._between:
            return
        head, _, timeout, body = seen
        made = self._queue[0]
        good = not timeout and made.ended and made.keep_alive and made.refusal is None
        if good and b"".join(made.pieces) == body and heads.plain(head):
            self._memo.keep(head, made.head)

    # --- refusing ---

    def _broken(self) -> PlainRequest:
        return PlainRequest(self, Head(b"", b"", []))

    def _failed(self, made: PlainRequest) -> None:
        if not made.phase:
            self._answer(made, MeshError(Reason.INTERNAL, "internal error; the router's log has the cause"))

    def _refuse(self, made: PlainRequest) -> None:
        """Answers in place of the handler. The connection stays open if the whole request was read."""
        refusal = made.refusal
        assert refusal is not None
        log.debug("request refused", peer=self.peer, target=made.head.target, why=refusal.text)
        self._server.refused += 1
        if not made.ended or self._deaf:
            made.keep_alive = False
        if not made.keep_alive:
            self._forget_queue()
        error = MeshError(refusal.reason, refusal.text, details=refusal.details, retry_after=refusal.retry_after)
        self._answer(made, error)

    def _answer(self, made: PlainRequest, error: MeshError) -> None:
        status, fields, body = self._server.refusal(error)
        made.answer(status, (body,), fields=fields)
