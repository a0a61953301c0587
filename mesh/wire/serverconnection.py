"""One connection of the gRPC server: the parts of a `connection` that are specific to gRPC.

A request whose head is refused gets a gRPC status if its content type is gRPC, and a plain HTTP answer otherwise.
"""

import asyncio

from mesh import statuses
from mesh.telemetry import logs
from mesh.wire import call, connection, framing, heads, largebody, metadata, refusals, servercall

log = logs.get(__name__)

_HEAD_ENDS = b"\r\n\r\n"


class ServerConnection(connection.Connection[servercall.ServerCall, call.Head]):
    """Parser callbacks of one connection, and its refusals."""

    __slots__ = ("_special",)

    def __init__(
        self,
        owner: connection.Owner[servercall.ServerCall, call.Head],
        loop: asyncio.AbstractEventLoop,
        *,
        secure: bool = False,
    ) -> None:
        """Makes a connection. A `secure` one uses mutual TLS, and only serves peers whose certificate has the mesh's
        name."""
        super().__init__(owner, loop, secure=secure)
        self._special: dict[bytes, bytes] = {}

    def on_header(self, name: bytes, value: bytes) -> None:
        """Takes one header, or ignores one trailer: gRPC gives trailers of requests no meaning."""
        if self._incoming is not None:
            return
        name = name.lower()
        if name in metadata.NOT_METADATA:
            self._special[name] = value
        else:
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        """Creates the call from its head."""
        special = self._special
        parser = self._parser
        made = servercall.ServerCall(self, self._url, self._headers, special.get(b"grpc-encoding", b""))
        self._url = b""
        self._headers = []
        self._special = {}
        if b"transfer-encoding" not in special:
            made.size = int(special.get(b"content-length", b"0"))
        timeout = special.get(b"grpc-timeout")
        if timeout is not None:
            seconds = metadata.parse_timeout(timeout)
            if seconds is not None:
                made.deadline = self._loop.time() + seconds
        if not parser.should_keep_alive():
            made.keep_alive = False
        if parser.get_method() != b"POST":
            made.refusal = refusals.NO_POST
        elif not refusals.is_grpc(special.get(b"content-type", b"")):
            made.refusal = refusals.NO_GRPC
        elif made.method[:1] != b"/":
            made.refusal = refusals.NO_PATH
        elif (not made.keep_alive or b"connection" in special) and parser.get_http_version() != "1.1":
            made.refusal = refusals.OLD_HTTP
        else:
            made.refusal = refusals.of_headers(made.method, made.headers, self._max_headers, self._overhead)
            if made.size and made.refusal is None and (made.size <= self.whole or not made.divides()):
                made.reserve(min(made.size, self.limit + framing.PREFIX))
            if b"expect" in special and made.refusal is None and self._active is None and not self._queue:
                self.transport.write(connection.CONTINUE)  # harmless at the end, when the peer no longer needs it
        self._overhead = 0
        self._incoming = made
        self._queue.append(made)

    # --- large messages ---

    def _large(self, data: bytes) -> bool:
        at = data.find(_HEAD_ENDS) + len(_HEAD_ENDS) if self._between else 0
        if at < len(_HEAD_ENDS):
            return False
        body = memoryview(data)[at:]
        begun = largebody.begins(body, self.limit)
        if begun is None:
            return False
        self._parse(data[:at])
        made = self._incoming
        size, left, skipped = begun
        wanted = made is not None and made.size is None and self._wants(made)
        if made is not None and wanted and not (size > self.whole and made.divides()) and made.reserve(size):
            made.body = bytes(body[skipped : skipped + framing.PREFIX])  # so its turn waits for the rest
            reader = largebody.LargeBody(self, size, left, memory=self._server.memory, begun=body[skipped:])
            self._let_read(reader, body[skipped:])
        elif not self._deaf:
            self._parse(body)
        return True

    # --- heads seen before ---

    def _recognised(self, seen: heads.Request, known: call.Head) -> bool:
        _, sized, timeout, body = seen
        if sized is not known.sized or not framing.is_frame(body, self.limit):
            return False
        budget = self.budget
        held = budget.held + len(body)
        if held > budget.large:  # the parser's path decides whether it is admitted
            return False
        self._memo.missed = 0
        made = servercall.ServerCall(self, known.method, known.headers.copy(), known.encoding)
        made.head = known
        made.frame = made.body = body
        made.ended = True
        made.held = len(body)
        budget.held = held
        if timeout:
            seconds = metadata.parse_timeout(timeout)
            if seconds is not None:
                made.deadline = self._loop.time() + seconds
        self._hand_out(made)
        return True

    def _learn(self, seen: heads.Request) -> None:
        if len(self._queue) != 1 or not self._between:
            return
        head, sized, _, body = seen
        made = self._queue[0]
        if made.ended and made.keep_alive and made.refusal is None and made.body == body and heads.plain(head):
            self._memo.keep(head, call.Head(made.method, made.headers.copy(), made.encoding, sized))

    # --- refusing ---

    def _broken(self) -> servercall.ServerCall:
        return servercall.ServerCall(self, b"", [], b"")

    def _failed(self, made: servercall.ServerCall) -> None:
        if made.phase < servercall.ANSWERED:
            made.fail(statuses.Reason.INTERNAL.code, "internal error; the server's log has the cause")

    def _refuse(self, made: servercall.ServerCall) -> None:
        """Answers in place of the handler, notifies the handler if it was called, and ends the connection."""
        refusal = made.refusal
        assert refusal is not None
        log.debug("request refused", peer=self.peer, method=made.method, why=refusal.text)
        self._server.refused += 1
        self._active = None
        self._forget_queue()
        self.transport.write(made.refused(refusal))
        made.cut(refusal.text)
        self._close(made.ended and not self._deaf)
