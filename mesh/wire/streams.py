"""The client's streams: a reply that is read message by message, and a request that is sent message by message.

Both do little: received messages wait in an `inbox`, and bytes to send go to the exchange, which knows the connection.
If the connection fails, each waiting method raises `reply.Lost`.
"""

import asyncio
from typing import Protocol

from mesh.wire import call, inbox
from mesh.wire import reply as replies


class Request(Protocol):
    """The call that a stream belongs to."""

    over: replies.Lost | None  # the reason why nothing more can be written

    async def write(self, frame: bytes) -> None:
        """Sends one message, once there is a connection and room. Raises `Lost`."""

    def end(self) -> None:
        """Ends the request after its last message."""

    def cancel(self) -> None:
        """Ends the call by closing its connection."""


class ReplyStream:
    """A reply that has begun. Read it to its end, or cancel it: its connection is held until then."""

    __slots__ = ("_box", "_exchange", "_result", "_waiters", "encoding", "headers")

    headers: list[call.Header]
    """The initial metadata."""

    encoding: bytes
    """The value of `grpc-encoding`."""

    def __init__(self, owner: Request, box: inbox.Inbox, headers: list[call.Header], encoding: bytes) -> None:
        self.headers = headers
        self.encoding = encoding
        self._exchange = owner
        self._box = box
        self._result: replies.Reply | replies.Lost | None = None
        self._waiters: list[asyncio.Future[None]] = []

    async def read(self) -> bytes | None:
        """Returns the next frame, or the next piece of a large one if the call takes pieces, or None at the end, even
        of a reply that failed. Raises `Lost`, after all earlier frames."""
        return await self._box.read()

    async def result(self) -> replies.Reply:
        """Returns the status and the trailing metadata once the reply has ended, even if frames are still unread.
        Raises `Lost`."""
        while self._result is None:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter
        if isinstance(self._result, replies.Lost):
            raise self._result.again()
        return self._result

    def cancel(self) -> None:
        """Ends the call by closing its connection, unless the reply has ended. Waiting readers get `Lost`."""
        self._exchange.cancel()

    # --- for the connection ---

    def ended(self, result: replies.Reply | replies.Lost, *, drop: bool = False) -> None:
        """Ends the stream; with `drop`, frames that have arrived are dropped too."""
        if drop and isinstance(result, replies.Lost):
            self._box.fail(result, drop=True)
        if self._result is None:
            self._result = result
            for waiter in self._waiters:
                if not waiter.done():
                    waiter.set_result(None)


class RequestStream:
    """A request that is sent message by message; the reply may begin before the request has ended."""

    __slots__ = ("_answer", "_waiters", "exchange", "takes_pieces")

    def __init__(self, *, takes_pieces: bool = False) -> None:
        self.exchange: Request  # the pool sets it immediately
        self.takes_pieces = takes_pieces
        self._answer: replies.Reply | ReplyStream | replies.Lost | None = None
        self._waiters: list[asyncio.Future[None]] = []

    async def write(self, frame: bytes) -> None:
        """Sends one message, or a piece of one, once there is a connection and flow control allows it. If cancelled
        while waiting, it has sent nothing. Raises `Lost` if the connection is lost, the call was cancelled, or the
        reply has ended, because the server then reads no more. Raises RuntimeError after `end()`."""
        await self.exchange.write(frame)

    def end(self) -> None:
        """Ends the request, after its last message."""
        self.exchange.end()

    async def first(self) -> replies.Reply | ReplyStream:
        """Waits for the reply. Returns a `Reply` if it arrived complete, with one message or as a failure without any;
        otherwise returns its stream. Raises `Lost`."""
        while self._answer is None:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter
        if isinstance(self._answer, replies.Lost):
            raise self._answer.again()
        return self._answer

    def cancel(self) -> None:
        """Ends the call by closing its connection. Waiting readers get `Lost`."""
        self.exchange.cancel()
        if self.exchange.over is not None:
            self._set(self.exchange.over)

    # --- as a sink ---

    def on_reply(self, reply: replies.Reply) -> None:
        """Takes a whole reply."""
        self._set(reply)

    def on_stream(self, stream: ReplyStream) -> None:
        """Takes a reply that has begun."""
        self._set(stream)

    def on_beginning(self) -> None:
        """Does nothing: what was sent is not kept here."""

    def on_lost(self, lost: replies.Lost) -> None:
        """Learns that there will be no reply."""
        self._set(lost)

    def _set(self, answer: "replies.Reply | ReplyStream | replies.Lost") -> None:
        if self._answer is None:
            self._answer = answer
            for waiter in self._waiters:
                if not waiter.done():
                    waiter.set_result(None)
