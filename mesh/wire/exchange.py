"""One call of the client, from `send()` or `open()` to its single outcome.

An exchange connects three objects with different lifetimes: the caller's sink, the connection that carries the call
(none while one is being opened), and the reply's stream, if it has one. The first event that ends the call wins; later
events have no effect.
"""

import asyncio
from typing import Protocol

from mesh.telemetry import logs
from mesh.wire import call, inbox, streams
from mesh.wire import reply as replies

log = logs.get(__name__)

BIG = 64 * 1024  # bytes of a frame above which passing parts to the transport is cheaper than joining them
_ENDED = replies.Lost(replies.LostKind.STARTED, "the reply has ended")  # only copies of it are raised
_LAST_CHUNK = b"0\r\n\r\n"


class Sink(Protocol):
    """A receiver of a reply. Exactly one of `on_reply`, `on_stream` and `on_lost` is called, once, from the event loop
    and never from within `send()`.

    After `Exchange.cancel()`, no method is called.
    """

    @property
    def takes_pieces(self) -> bool:
        """True if large messages of a stream may arrive in pieces (`pieces`)."""

    def on_beginning(self) -> None:
        """Learns that a large reply has begun. The call cannot be sent again from then on, so the sink may free the
        request. The outcome follows separately."""

    def on_reply(self, reply: replies.Reply) -> None:
        """Takes the whole reply: OK with one message, or a failure without any."""

    def on_stream(self, stream: streams.ReplyStream) -> None:
        """Takes a reply that is read message by message, because it has several messages, or is OK without any, or has
        not ended yet."""

    def on_lost(self, lost: replies.Lost) -> None:
        """Learns that there will be no reply."""


class Carrier(Protocol):
    """The connection that carries a call."""

    transport: asyncio.Transport
    stalled: bool  # the peer does not take what is written

    @property
    def how_far(self) -> replies.LostKind:
        """The progress to report for the call if its connection ended now."""

    def drop(self) -> None:
        """Closes the connection at once, without notifying the call."""


class Line(Protocol):
    """The queue of calls that have no connection yet."""

    def forget(self, owner: "Exchange") -> None:
        """Removes a call that no longer needs a connection."""


class Exchange:
    """A call in flight, or one that has ended."""

    __slots__ = ("_pool", "_rooms", "_sink", "_stream", "connection", "ended", "over", "request")

    def __init__(self, pool: Line, sink: Sink, request: tuple[bytes, ...], ended: bool) -> None:
        self._pool = pool
        self._sink: Sink | None = sink
        self._stream: streams.ReplyStream | None = None
        self._rooms: list[asyncio.Future[None]] = []  # writers that wait for a connection or for room
        self.connection: Carrier | None = None
        self.request = request  # to be written as soon as there is a connection
        self.ended = ended  # all of the request is written, or will be with `request`
        self.over: replies.Lost | None = None  # the reason why nothing more can be written

    def cancel(self) -> None:
        """Closes the connection of this call; no callback follows. Does nothing once the call is over."""
        if self.over is not None:
            return
        connection = self.connection
        if connection is None:
            kind = replies.LostKind.UNSENT
            self._pool.forget(self)
        else:
            kind = connection.how_far
            connection.drop()
        lost = replies.Lost(kind, "cancelled by us")
        stream = self._stream
        self._finish(lost)
        if stream is not None:
            stream.ended(lost, drop=True)

    # --- called by its connection and its pool: each at most once, and none after the call is over ---

    def beginning(self) -> None:
        """Tells the sink that a large reply has begun."""
        if self._sink is not None:
            self._sink.on_beginning()

    def begun(self, headers: list[call.Header], encoding: bytes, box: inbox.Inbox) -> None:
        """Passes to the sink the stream of a reply that has begun."""
        self._stream = stream = streams.ReplyStream(self, box, headers, encoding)
        sink, self._sink = self._sink, None
        if not _tell(sink, "on_stream", stream):
            self.cancel()  # the sink did not take the stream, so nothing else would cancel it

    def answered(self, reply: replies.Reply, box: inbox.Inbox | None = None) -> None:
        """Passes the complete reply to the sink. `box` has the messages of a reply that arrived complete but does not
        have exactly one message."""
        stream, sink = self._stream, self._sink
        self._finish(_ENDED)
        if stream is not None:
            stream.ended(reply)
        elif box is not None:
            stream = streams.ReplyStream(self, box, reply.headers, reply.encoding)
            stream.ended(reply)
            _tell(sink, "on_stream", stream)
        else:
            assert sink is not None
            try:
                sink.on_reply(reply)
            except Exception:
                log.exception("a callback of a call failed", callback="on_reply")

    def lost(self, lost: replies.Lost) -> None:
        """Tells the sink that there will be no reply, or no more of it."""
        if self.over is not None:
            return
        stream, sink = self._stream, self._sink
        self._finish(lost)
        if stream is not None:
            stream.ended(lost)
        else:
            _tell(sink, "on_lost", lost)

    @property
    def takes_pieces(self) -> bool:
        """True if large messages of the reply may arrive in pieces."""
        return self._sink is not None and self._sink.takes_pieces

    def let_write(self) -> None:
        """Wakes writers, because there is now a connection with room, or because there never will be one."""
        rooms, self._rooms = self._rooms, []
        for waiter in rooms:
            if not waiter.done():
                waiter.set_result(None)

    def _finish(self, over: replies.Lost) -> None:
        """Marks the call as over, and drops all references: sinks often hold their exchange, and a cycle for each call
        would burden the garbage collector."""
        self.over = over
        self.connection = None
        self.request = ()
        self._sink = self._stream = None
        if self._rooms:
            self.let_write()

    # --- for a streaming request ---

    async def write(self, frame: bytes) -> None:
        """Sends one message as a chunk, once there is a connection and room. Raises `Lost`, and RuntimeError after
        `end()`."""
        if self.ended:
            raise RuntimeError("this request has been ended")
        while self.over is None:
            connection = self.connection
            if connection is not None and not connection.stalled:
                transport = connection.transport
                if len(frame) < BIG:
                    transport.write(b"%x\r\n%b\r\n" % (len(frame), frame))
                else:
                    transport.writelines((b"%x\r\n" % len(frame), frame, b"\r\n"))
                return
            waiter = asyncio.get_running_loop().create_future()
            self._rooms.append(waiter)
            await waiter
        raise self.over.again()

    def end(self) -> None:
        """Ends the request; further calls do nothing."""
        if self.ended:
            return
        self.ended = True
        if self.connection is not None:
            self.connection.transport.write(_LAST_CHUNK)
        elif self.over is None:
            self.request = (*self.request, _LAST_CHUNK)


def _tell(sink: Sink | None, callback: str, outcome: object) -> bool:
    """Calls a method of the sink. If it raises, logs the exception and returns False."""
    try:
        getattr(sink, callback)(outcome)
    except Exception:
        log.exception("a callback of a call failed", callback=callback)
        return False
    return True
