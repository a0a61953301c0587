"""One call of the client, from `send()` or `open()` to its one outcome.

It stands between three that come and go on their own: the caller's sink, the connection that carries the call (none
while one is being made), and, where the reply is a stream, that stream. Whatever happens first ends it; what happens
later finds it over.
"""

import asyncio
from typing import Protocol

from mesh.telemetry import logs
from mesh.wire import call, inbox, streams
from mesh.wire import reply as replies

log = logs.get(__name__)

BIG = 64 * 1024  # bytes of a frame above which handing parts to the transport is cheaper than joining them
_ENDED = replies.Lost(replies.LostKind.STARTED, "the reply has ended")  # never raised itself
_LAST_CHUNK = b"0\r\n\r\n"


class Sink(Protocol):
    """Who waits for a reply: exactly one of these is called, once, from the event loop, never from within `send()`.

    After `Exchange.cancel()` none is.
    """

    def on_reply(self, reply: replies.Reply) -> None:
        """The whole reply: OK with one message, or a failure without any."""

    def on_stream(self, stream: streams.ReplyStream) -> None:
        """The reply has begun, and is to be taken message by message: several, none at all with OK, or one whose end
        has not come yet."""

    def on_lost(self, lost: replies.Lost) -> None:
        """There will be no reply."""


class Carrier(Protocol):
    """The connection that carries a call."""

    transport: asyncio.Transport
    stalled: bool  # the peer does not take what is written

    @property
    def how_far(self) -> replies.LostKind:
        """What the call counts as if it is lost now."""

    def drop(self) -> None:
        """Closes at once, without telling the call."""


class Line(Protocol):
    """Where a call waits that has no connection yet."""

    def forget(self, owner: "Exchange") -> None:
        """It needs none any more."""


class Exchange:
    """A call in flight, or over."""

    __slots__ = ("_pool", "_rooms", "_sink", "_stream", "connection", "ended", "over", "request")

    def __init__(self, pool: Line, sink: Sink, request: tuple[bytes, ...], ended: bool) -> None:
        self._pool = pool
        self._sink: Sink | None = sink
        self._stream: streams.ReplyStream | None = None
        self._rooms: list[asyncio.Future[None]] = []  # writers that wait for a connection or for room
        self.connection: Carrier | None = None
        self.request = request  # what is written as soon as there is a connection
        self.ended = ended  # the whole request is written, or will be with `request`
        self.over: replies.Lost | None = None  # why nothing can be written any more

    def cancel(self) -> None:
        """Closes the connection of this call; no callback comes after this. Does nothing once the call is over."""
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

    # --- what its connection and its pool tell it: each at most once, and none after it is over ---

    def begun(self, headers: list[call.Header], encoding: bytes, box: inbox.Inbox) -> None:
        """The reply is a stream."""
        self._stream = stream = streams.ReplyStream(self, box, headers, encoding)
        sink, self._sink = self._sink, None
        if not _tell(sink, "on_stream", stream):
            self.cancel()  # nobody has the stream, so nobody else would

    def answered(self, reply: replies.Reply, box: inbox.Inbox | None = None) -> None:
        """The reply is complete. `box`: its messages, where they are not one, and it was not a stream before."""
        stream, sink = self._stream, self._sink
        self._finish(_ENDED)
        if stream is not None:
            stream.ended(reply)
        elif box is not None:
            stream = streams.ReplyStream(self, box, reply.headers, reply.encoding)
            stream.ended(reply)
            _tell(sink, "on_stream", stream)
        else:
            _tell(sink, "on_reply", reply)

    def lost(self, lost: replies.Lost) -> None:
        """There will be no reply, or no more of it."""
        if self.over is not None:
            return
        stream, sink = self._stream, self._sink
        self._finish(lost)
        if stream is not None:
            stream.ended(lost)
        else:
            _tell(sink, "on_lost", lost)

    def let_write(self) -> None:
        """There is a connection now, or room on it, or never again."""
        rooms, self._rooms = self._rooms, []
        for waiter in rooms:
            if not waiter.done():
                waiter.set_result(None)

    def _finish(self, over: replies.Lost) -> None:
        """Lets go of everything: sinks often hold their exchange, and a cycle a call is work for the collector."""
        self.over = over
        self.connection = None
        self.request = ()
        self._sink = self._stream = None
        if self._rooms:
            self.let_write()

    # --- for a streaming request ---

    async def write(self, frame: bytes) -> None:
        """Sends one message as a chunk, once there is a connection and room. Raises `Lost`."""
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
        """Ends the request; once more does nothing."""
        if self.ended:
            return
        self.ended = True
        if self.connection is not None:
            self.connection.transport.write(_LAST_CHUNK)
        elif self.over is None:
            self.request = (*self.request, _LAST_CHUNK)


def _tell(sink: Sink | None, callback: str, outcome: object) -> bool:
    """Calls the sink; what it raises is logged and harms neither the connection nor other calls."""
    try:
        getattr(sink, callback)(outcome)
    except Exception:
        log.exception("sink failed", callback=callback)
        return False
    return True
