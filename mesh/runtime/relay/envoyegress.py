"""The egress of Envoy: calls to the server through an Envoy process, a child of the relay, over gRPC on HTTP/1.1.

This egress costs less than `grpc.aio`, and statuses, messages and metadata do not pass through another gRPC
implementation in this process. `mesh.envoy.egress` runs Envoy. While Envoy is restarted, new calls wait.
"""

import asyncio
from collections.abc import Callable

from mesh.envoy.egress import LOCAL, EgressMinder
from mesh.statuses import Code
from mesh.wire import metadata
from mesh.wire.budget import Budget
from mesh.wire.call import Headers
from mesh.wire.client import Exchange, Pool, Sink
from mesh.wire.pieces import Pieces
from mesh.wire.reply import Lost, LostKind, Reply
from mesh.wire.streams import ReplyStream, RequestStream

_MAX_CONNECTIONS = 60_000  # one for each call in flight
_AGAIN = 0.02  # seconds until Envoy's end has been noticed
_CONNECTING = 10.0  # seconds; the kernel accepts at once, but a busy machine may make this process wait


class EnvoyEgress:
    """The calls through one Envoy. For use in the event loop's thread only."""

    takes_pieces = True

    def __init__(self, minder: EgressMinder, socket: str, *, max_message: int, budget: Budget) -> None:
        """Makes an egress. `max_message` is the size of the largest message that is held in one piece, in bytes.
        `budget` counts the bytes of replies."""
        self._minder = minder
        self._pool = Pool(
            f"unix:{socket}",
            max_connections=_MAX_CONNECTIONS,
            connect_timeout=_CONNECTING,
            max_message=max_message,
            budget=budget,
            idle_timeout=300,
            pieces=Pieces(),
        )

    async def up(self) -> None:
        """Waits until Envoy runs."""
        await self._minder.up()

    def send(
        self,
        method: bytes,
        headers: Headers,
        frame: bytes,
        *,
        timeout: float | None,
        encoding: bytes,
        pieces: bool = False,
    ) -> "EnvoyCall":
        """Sends a request of one message. If Envoy has just died, the request is sent again to the next Envoy, unless a
        byte of it was already written."""
        begin = self._sending(method, headers, frame, timeout=timeout, encoding=encoding, pieces=pieces)
        return EnvoyCall(self, begin(), begin)

    def _sending(
        self, method: bytes, headers: Headers, frame: bytes, *, timeout: float | None, encoding: bytes, pieces: bool
    ) -> Callable[[], RequestStream]:
        """Returns a function that sends a request of one message, each time that it is called."""
        within = _written(timeout)

        def begin() -> RequestStream:
            stream = RequestStream(takes_pieces=pieces)
            stream.exchange = self._pool.send(method, headers, frame, stream, timeout=within, encoding=encoding)
            return stream

        return begin

    def open(
        self, method: bytes, headers: Headers, *, timeout: float | None, encoding: bytes, pieces: bool = False
    ) -> "EnvoyCall":
        """Begins a request whose messages are written one by one."""
        within = _written(timeout)
        stream = self._pool.open(method, headers, timeout=within, encoding=encoding, takes_pieces=pieces)
        return EnvoyCall(self, stream, None)

    def post(
        self, method: bytes, headers: Headers, frame: bytes, sink: Sink, *, timeout: float | None, encoding: bytes
    ) -> Exchange | None:
        """Sends a request of one message, and passes the outcome to `sink`. Returns None while Envoy does not run."""
        if not self._minder.is_up:
            return None
        return self._pool.send(method, headers, frame, sink, timeout=_written(timeout), encoding=encoding)

    def is_final(self, reply: Reply) -> bool:
        """Returns False if Envoy itself has answered, in place of the server."""
        return reply.code == Code.OK or not any(name == LOCAL for name, _ in reply.headers)

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
    ) -> "EnvoyCall":
        """Returns a call that `post` has sent, with its outcome. If the call was not sent because Envoy has just died,
        sends it again, as `send` does."""
        stream = RequestStream(takes_pieces=pieces)
        stream.exchange = exchange
        if isinstance(outcome, Reply):
            stream.on_reply(outcome)
        elif isinstance(outcome, Lost):
            stream.on_lost(outcome)
        else:
            stream.on_stream(outcome)
        return EnvoyCall(
            self,
            stream,
            self._sending(method, headers, frame, timeout=timeout, encoding=encoding, pieces=pieces),
        )

    async def close(self) -> None:
        """Ends all calls, and Envoy."""
        self._pool.abort()
        await self._minder.stop()


class EnvoyCall:
    """One call through Envoy."""

    __slots__ = ("_again", "_cancelled", "_egress", "_stream")

    def __init__(self, egress: EnvoyEgress, stream: RequestStream, again: Callable[[], RequestStream] | None) -> None:
        """Wraps the stream of a call that was sent. `again` sends the request again; it is None if this is not
        possible."""
        self._egress = egress
        self._stream = stream
        self._again = again
        self._cancelled = False

    async def write(self, frame: bytes) -> None:
        """Sends one message, or a piece of one. Raises `Lost`."""
        await self._stream.write(frame)

    def end(self) -> None:
        """Ends the request."""
        self._stream.end()

    async def first(self) -> Reply | ReplyStream:
        """Returns the answer, or its stream. Raises `Lost` if the connection is lost, or if Envoy answers in place of
        the server."""
        while True:
            try:
                answer = await self._stream.first()
                break
            except Lost as lost:
                if lost.kind is not LostKind.UNSENT or self._again is None or self._cancelled:
                    raise
            await asyncio.sleep(_AGAIN)
            await self._egress.up()
            self._stream = self._again()
        if isinstance(answer, Reply) and answer.code != Code.OK:
            for name, value in answer.headers:
                if name == LOCAL:
                    raise Lost(LostKind.SENT, f"{answer.text} ({value.decode(errors='replace')})")
        return answer

    def cancel(self) -> None:
        """Ends the call at the server, by closing its connection to Envoy."""
        self._cancelled = True
        self._stream.cancel()


def _written(timeout: float | None) -> bytes | None:
    return None if timeout is None else metadata.format_timeout(timeout)
