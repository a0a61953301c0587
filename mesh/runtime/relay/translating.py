"""An egress that translates V2's calls into those of a server that answers V2 in another form, or not at all.

It lies between the relay's port and the egress that carries calls. Only adapters whose servers need it have a
`Translation`. Calls of other methods pass as they are.
"""

from typing import Protocol

from mesh.runtime.relay.egress import Answer, Egress, Outgoing, WithoutPost
from mesh.statuses import MeshError
from mesh.wire import framing
from mesh.wire.call import Header, Headers
from mesh.wire.reply import Reply


class Translation(Protocol):
    """The translation of the calls of one kind of server. Methods are as on the wire, with a leading slash."""

    def method(self, method: bytes) -> bytes | None:
        """Returns the server's method for a method of the caller, or None if its calls are not translated."""

    def request(self, method: bytes, message: bytes) -> bytes:
        """Returns the message for the server. Raises MeshError."""

    def reply(self, method: bytes, message: bytes) -> bytes:
        """Returns the message for the caller. Raises MeshError if it stands for an error."""

    def status(self, code: int, text: str) -> MeshError | None:
        """Returns the error for a call that the server has failed, or None to pass on the server's own status."""


class TranslatingEgress(WithoutPost):
    """The translated calls of one server. For use in the event loop's thread only."""

    takes_pieces = False  # a message is translated as a whole

    def __init__(self, carrier: Egress, translation: Translation, *, max_message: int) -> None:
        """Makes an egress whose calls `carrier` carries. `max_message` is the largest message in bytes."""
        self._carrier = carrier
        self._translation = translation
        self._max_message = max_message

    async def up(self) -> None:
        """Waits until calls can be sent."""
        await self._carrier.up()

    def send(
        self,
        method: bytes,
        headers: Headers,
        frame: bytes,
        *,
        timeout: float | None,
        encoding: bytes,
        pieces: bool = False,
    ) -> Outgoing:
        """Sends a request of one message. Raises MeshError if it cannot be translated."""
        theirs = self._translation.method(method)
        if theirs is None:
            return self._carrier.send(method, headers, frame, timeout=timeout, encoding=encoding)
        frame = self.translated(method, frame, encoding)
        sent = self._carrier.send(theirs, headers, frame, timeout=timeout, encoding=b"")
        return _TranslatedCall(self, sent, method, encoding)

    def open(
        self, method: bytes, headers: Headers, *, timeout: float | None, encoding: bytes, pieces: bool = False
    ) -> Outgoing:
        """Begins a request whose messages are written one by one."""
        theirs = self._translation.method(method)
        if theirs is None:
            return self._carrier.open(method, headers, timeout=timeout, encoding=encoding)
        return _TranslatedCall(
            self, self._carrier.open(theirs, headers, timeout=timeout, encoding=b""), method, encoding
        )

    async def close(self) -> None:
        """Ends the egress, and all calls with it."""
        await self._carrier.close()

    def translated(self, method: bytes, frame: bytes, encoding: bytes) -> bytes:
        """Returns the frame of a request for the server. Raises MeshError."""
        message = framing.unpack(frame, encoding, limit=self._max_message)
        return framing.pack(self._translation.request(method, message))

    def returned(self, method: bytes, frame: bytes, encoding: bytes) -> bytes:
        """Returns the frame of an answer for the caller. Raises MeshError."""
        message = framing.unpack(frame, encoding, limit=self._max_message)
        return framing.pack(self._translation.reply(method, message))

    def checked(self, reply: Reply) -> Reply:
        """Returns the end of an answer as it is. Raises MeshError if the server's status stands for an error of another
        kind."""
        error = self._translation.status(reply.code, reply.text) if reply.code else None
        if error is not None:
            raise error
        return reply


class _TranslatedCall:
    """One translated call, and the stream of its answer."""

    __slots__ = ("_answer", "_call", "_egress", "_encoding", "_method", "encoding", "headers")

    def __init__(self, egress: TranslatingEgress, call: Outgoing, method: bytes, encoding: bytes) -> None:
        """Takes over a call. `encoding` names the compression of the request's frames."""
        self.headers: list[Header] = []
        self.encoding = b""  # of the answer, which is decompressed
        self._egress = egress
        self._call = call
        self._method = method
        self._encoding = encoding
        self._answer: Answer | None = None

    async def write(self, frame: bytes) -> None:
        """Sends one message. Raises `Lost` and MeshError."""
        await self._call.write(self._egress.translated(self._method, frame, self._encoding))

    def end(self) -> None:
        """Ends the request."""
        self._call.end()

    def cancel(self) -> None:
        """Ends the call at the server."""
        self._call.cancel()

    async def first(self) -> "Reply | _TranslatedCall":
        """Returns the complete answer, or this object as its stream. Raises `Lost` and MeshError."""
        answer = await self._call.first()
        if not isinstance(answer, Reply):
            self.headers, self._answer = answer.headers, answer
            return self
        if answer.frame is not None:
            answer.frame = self._egress.returned(self._method, answer.frame, answer.encoding)
            answer.encoding = b""
        return self._egress.checked(answer)

    async def read(self) -> bytes | None:
        """Returns the next frame, or None at the end. Raises `Lost` and MeshError."""
        assert self._answer is not None
        frame = await self._answer.read()
        return None if frame is None else self._egress.returned(self._method, frame, self._answer.encoding)

    async def result(self) -> Reply:
        """Returns status and trailing metadata. Raises `Lost` and MeshError."""
        assert self._answer is not None
        return self._egress.checked(await self._answer.result())
