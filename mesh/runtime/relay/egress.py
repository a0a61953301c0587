"""The interface of an egress, which carries calls from the relay to the foreign server as real gRPC.

The interface uses the terms of `mesh.wire`: metadata is as on the wire, messages are frames, and an answer is a
`Reply`, a stream, or a `Lost` connection. `envoyegress` sends calls through Envoy, and `grpcegress` through `grpc.aio`,
for machines without Envoy.

An egress never changes a server's status. If a call has no status because its connection was lost, `first`, `read` and
`result` raise `Lost`, and the caller asks the link what happened to the server.
"""

from typing import Protocol

from mesh.wire.call import Header, Headers
from mesh.wire.client import Exchange, ReplyStream, Sink
from mesh.wire.reply import Lost, Reply

SERVER = "the model server"
"""The server's name in texts that callers see: its address may be a path on the pod's disk."""


class Answer(Protocol):
    """An answer that is read message by message."""

    headers: list[Header]
    """The initial metadata."""

    encoding: bytes
    """The value of `grpc-encoding`."""

    async def read(self) -> bytes | None:
        """Returns the next frame, or None at the end of the answer, even if the answer failed. Raises `Lost`."""

    async def result(self) -> Reply:
        """Returns status and trailing metadata once the answer has ended. Raises `Lost`."""


class Outgoing(Protocol):
    """One call on its way to the server, whose answer may begin before the request has ended."""

    async def write(self, frame: bytes) -> None:
        """Sends one message of a streamed request, once flow control allows it. Raises `Lost` if the connection is
        lost, or if the server has ended the call and reads no more; the answer then says why."""

    def end(self) -> None:
        """Ends a streamed request, after its last message."""

    async def first(self) -> Reply | Answer:
        """Returns the complete answer if it failed without a message. If it has one message, returns the complete
        answer or a stream, depending on the egress; otherwise a stream. Raises `Lost`."""

    def cancel(self) -> None:
        """Ends the call at the server. Waiting readers get `Lost`. Has no effect after the end."""


class Egress(Protocol):
    """A way to the server. `send` and `open` return immediately. Both raise ValueError for metadata that cannot be
    sent, and `FrameError` for a message that cannot be read. The caller enforces deadlines.

    With `pieces`, large messages of the answer may be read in pieces (`mesh.wire.pieces`), if this egress supports
    pieces.
    """

    takes_pieces: bool
    """True if large messages may be written and read in pieces."""

    async def up(self) -> None:
        """Waits until calls can be sent."""

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
        """Sends a request of one message. `timeout` is in seconds, `encoding` the value of `grpc-encoding`."""

    def open(
        self, method: bytes, headers: Headers, *, timeout: float | None, encoding: bytes, pieces: bool = False
    ) -> Outgoing:
        """Begins a request whose messages are written one by one."""

    def post(
        self, method: bytes, headers: Headers, frame: bytes, sink: Sink, *, timeout: float | None, encoding: bytes
    ) -> Exchange | None:
        """Sends a request of one message, and passes the outcome to `sink`, for callers without a task of their own.
        Returns None if this is not possible, in general or at present. The caller then has to use `send`."""

    def is_final(self, reply: Reply) -> bool:
        """Returns whether a reply to `post` comes from the server itself. If it does not, call `resume`."""

    def resume(
        self,
        exchange: Exchange,
        outcome: Reply | ReplyStream | Lost,
        method: bytes,
        headers: Headers,
        frame: bytes,
        *,
        timeout: float | None,
        encoding: bytes,
        pieces: bool = False,
    ) -> Outgoing:
        """Returns a call that `post` has sent, with its outcome, as if `send` had sent it."""

    async def close(self) -> None:
        """Ends the egress, and all calls with it."""


class WithoutPost:
    """The methods of an egress that has no `post`, because each of its calls needs a task."""

    def post(self, *_: object, **__: object) -> None:
        """Returns None, so that the caller uses `send`."""

    def is_final(self, reply: Reply) -> bool:
        """Returns True, because this egress makes no replies itself."""
        return True

    def resume(self, *_: object, **__: object) -> Outgoing:
        """Raises NotImplementedError, because `post` sends nothing and so has no outcome."""
        raise NotImplementedError
