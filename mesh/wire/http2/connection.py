"""One HTTP/2 connection to a server: its frames, its streams, and its flow control.

The connection begins with the settings of both ends, and is `usable` once the server's have arrived. `post` sends a
call at once, or returns None if the server takes no more calls now, or too many bytes of requests would wait here for
the server's windows. If the server breaks the protocol, the connection ends, so no state has to be repaired.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from mesh import statuses
from mesh.wire import budget as budgets
from mesh.wire import call, exchange, pieces
from mesh.wire import reply as replies
from mesh.wire.http2 import blocks, frames
from mesh.wire.http2.frames import Code, ProtocolError, Setting
from mesh.wire.http2.stream import WINDOW, Http2Stream

_FRAME = 64 * 1024  # bytes of the longest frame that the server may send
_CONNECTION = 16 << 20  # bytes that the server may send on all streams before the client has read them
_MAX_UNSENT = 8 << 20  # bytes of requests that wait for the server's windows
_MAX_STREAM = frames.MAX_STREAM - 1
_SOON = 0.002  # seconds in which the end of a reply usually follows its only message, if it comes in another read
_MAX_WRITTEN = 1 << 20  # bytes that the server has not read above which it gets no more calls
_OWN = 10  # headers of a request beyond its metadata, with some bytes that the block has only as numbers
_MAX_FLUSH = 1000  # answers to PING and SETTINGS while the server reads nothing
_MAX_FRAMES = 1000  # that are taken before other work gets its turn: 4 ms of tiny ones ...
_MAX_BYTES = 128 * 1024  # ... and their bytes: 20 ms of headers in Huffman codes
_MAX_BLOCK = 1 << 20  # bytes of headers that are read to their end, so that only their call fails if they are too many

_SETTINGS = {
    Setting.HEADER_TABLE_SIZE: blocks.TABLE_SIZE,
    Setting.ENABLE_PUSH: 0,
    Setting.INITIAL_WINDOW_SIZE: WINDOW,
    Setting.MAX_FRAME_SIZE: _FRAME,
    Setting.MAX_HEADER_LIST_SIZE: blocks.MAX_BYTES,
}


@dataclass(frozen=True, slots=True)
class ConnectionStatistics:
    """Current and past work of a connection."""

    streams: int
    calls: int  # sent so far
    unsent: int  # bytes of requests that wait for the server's windows
    usable: bool


class _NoLine:
    """The line of a call that has its connection from the beginning."""

    def forget(self, owner: exchange.Exchange) -> None:
        """Does nothing."""


_LINE = _NoLine()


class Http2Connection(asyncio.Protocol):
    """The client's end of one connection. For use in the event loop's thread only."""

    transport: asyncio.Transport

    def __init__(
        self,
        name: str,
        *,
        limit: int,
        budget: budgets.Budget,
        policy: pieces.Pieces | None,
        authority: bytes,
        on_fault: Callable[[ProtocolError], None],
    ) -> None:
        """Makes a connection. `name` stands for the server in texts, which callers may see. `limit` is the size of the
        largest message that is held whole, in bytes; `budget` counts the bytes of replies. Without a `policy`, no
        message is taken in pieces. `on_fault` learns how the server has broken the protocol."""
        self.name = name
        self.limit = limit
        self.budget = budget
        self.pieces = policy
        self._on_fault = on_fault
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._encoder = blocks.Encoder(authority)
        self._decoder = blocks.Decoder()
        self._streams: dict[int, Http2Stream] = {}
        self._next = 1
        self._calls = 0
        self._rest = b""  # what was read and not taken, such as the beginning of an incomplete frame
        self._crowded = False  # whole frames are among it
        self._block: tuple[int, bool, bytearray] | None = None  # stream, whether it ends, and headers to be continued
        self._leaving = False  # the server takes no new calls, or none are possible
        self._lost = False
        self._stalled = False  # the server does not take what is written
        self._flushed = 0  # answers written while it does not
        self._answers: list[bytes] = []  # to be written at the end of this turn
        self._window = frames.WINDOW  # bytes that the server takes on all streams
        self._initial = frames.WINDOW  # bytes that it takes on a new stream
        self._moved = False  # a window has changed in the current read
        self._frame = frames.SIZE  # bytes of the longest frame that it takes
        self._most = _MAX_STREAM  # streams that it takes at once
        self._headers = frames.MAX_WINDOW  # bytes of the largest list of headers that it takes
        self._unsent = 0
        self._waiting: dict[int, Http2Stream] = {}  # streams with bytes that wait for a window, in order
        self._may_come = frames.WINDOW  # bytes that the server may still send
        self._messages: list[Http2Stream] = []  # streams with a message and no end, in the current read

    # --- for the egress ---

    @property
    def ended(self) -> bool:
        """True if this connection takes no more calls."""
        return self._leaving or self._lost

    @property
    def usable(self) -> bool:
        """True if calls can be sent, as far as this end knows."""
        return self.ready.done() and not self._stalled and not self.ended and not self.transport.is_closing()

    def post(
        self,
        method: bytes,
        headers: call.Headers,
        frame: bytes,
        sink: exchange.Sink,
        *,
        timeout: bytes | None,
        encoding: bytes,
    ) -> exchange.Exchange | None:
        """Sends a request of one message; `sink` gets the outcome later, never from within this method. Returns None,
        and sends nothing, if this connection cannot take the call now. Raises ValueError for a `method`, `timeout` or
        `encoding` that is not valid, and MeshError if the headers are larger than the server accepts, because some
        servers would end the connection."""
        block = self._encoder.block(method, headers, timeout=timeout, encoding=encoding)
        if len(block) + blocks.ENTRY * (len(headers) + _OWN) > self._headers:  # only then is counting worthwhile
            self._check(blocks.size(block))
        size = len(frame)
        waits = size > self._window or size > self._initial or bool(self._waiting)
        if (
            not self.usable
            or len(self._streams) >= self._most
            or len(block) > frames.SIZE
            or (waits and self._unsent + size > _MAX_UNSENT)
        ):
            return None
        number = self._next
        self._next += 2
        self._calls += 1
        if self._next > _MAX_STREAM:
            self._leaving = True
        owner = exchange.Exchange(_LINE, sink, (), True)
        stream = Http2Stream(self, owner, number)
        self._streams[number] = stream
        begin = frames.frame(frames.HEADERS, frames.END_HEADERS, number, block)
        if waits:
            self.transport.write(begin)
            stream.unsent = memoryview(frame)
            self._unsent += size
            self._waiting[number] = stream
            self._pump()
        elif size <= self._frame:
            self._window -= size
            self.transport.write(begin + frames.frame(frames.DATA, frames.END_STREAM, number, frame))
        else:
            self._window -= size
            self.transport.writelines([begin, *self._data(number, memoryview(frame), ends=True)])
        return owner

    def close(self) -> None:
        """Ends the connection; calls in flight are lost."""
        self._leaving = True
        if not self.transport.is_closing():
            self._part(frames.goodbye(Code.NO_ERROR))

    def statistics(self) -> ConnectionStatistics:
        """Returns the current state."""
        return ConnectionStatistics(len(self._streams), self._calls, self._unsent, self.usable)

    def _check(self, size: int) -> None:
        """Raises MeshError if the server does not take headers of this size."""
        if size > self._headers:
            text = (
                f"the call has {size} bytes of headers, and {self.name} takes at most {self._headers}: send fewer or "
                "shorter ones"
            )
            raise statuses.MeshError(statuses.Reason.TOO_LARGE, text, details={"limit_bytes": str(self._headers)})

    # --- for streams ---

    def leave(self, stream: Http2Stream, code: Code | None) -> None:
        """Forgets a stream that is over, and resets it at the server if there is a code."""
        if self._streams.pop(stream.number, None) is None:
            return
        self._forget(stream)
        if code is not None:
            self._write(frames.reset(stream.number, code))
        if self._leaving and not self._streams:
            self.close()

    def grant(self, stream: Http2Stream, more: int) -> None:
        """Lets the server send more bytes on a stream."""
        self._write(frames.window_update(stream.number, more))

    # --- callbacks of the transport ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keeps the transport, and announces this end's settings."""
        self.transport = transport  # type: ignore[assignment]  # uvloop's do not derive from asyncio's
        self.transport.set_write_buffer_limits(high=_MAX_WRITTEN)
        more = _CONNECTION - frames.WINDOW
        self._may_come += more
        self.transport.write(frames.PREFACE + frames.settings(_SETTINGS) + frames.window_update(0, more))

    def data_received(self, data: bytes) -> None:
        """Takes the frames of one read."""
        self._rest = self._rest + data if self._rest else data
        self._turn()

    def _turn(self) -> None:
        """Handles the frames that have been read. If there are very many, it handles some now, and the rest after other
        work of this process. Otherwise a server that sends fast enough could occupy the event loop for seconds."""
        if self._lost:
            return
        try:
            crowded = self._read()
        except ProtocolError as error:
            self._break(error)
            return
        if crowded != self._crowded and not self.transport.is_closing():
            self._crowded = crowded
            if crowded:
                self.transport.pause_reading()
            else:
                self.transport.resume_reading()
        if crowded:
            asyncio.get_running_loop().call_soon(self._next_turn)
        if self._answers:
            answers, self._answers = self._answers, []
            self._write(b"".join(answers))
        if self._moved:
            self._moved = False
            self._pump()
        if self._messages:
            waiting, self._messages = self._messages, []
            asyncio.get_running_loop().call_later(_SOON, self._begin, waiting)

    def _next_turn(self) -> None:
        """Takes more frames. After an error, nothing would ever read the rest, so the connection ends, as it does if
        `data_received` fails."""
        try:
            self._turn()
        except Exception:
            self.transport.abort()
            raise

    def eof_received(self) -> bool:
        """Treats the connection as ended, because the server will send no more answers."""
        self.transport.abort()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Notifies all calls in flight of the end."""
        why = f"{self.name} closed the connection" if exc is None else f"connection to {self.name} broke: {exc}"
        self._lose(why)

    def pause_writing(self) -> None:
        """Takes no more calls: the server does not read."""
        self._stalled = True

    def resume_writing(self) -> None:
        """Takes calls again."""
        self._stalled = False
        self._flushed = 0
        self._pump()

    # --- frames ---

    def _read(self) -> bool:
        """Takes complete frames, as many as one turn allows. Returns whether it has left some. Raises ProtocolError."""
        data = self._rest
        at, end, count = 0, len(data), 0
        while end - at >= frames.HEAD:
            if count >= _MAX_FRAMES or at >= _MAX_BYTES:
                self._rest = data[at:]
                return True
            count += 1
            upper, lowest, kind, flags, number = frames.head_of(data, at)
            size = upper << 8 | lowest
            if not self.ready.done() and kind != frames.SETTINGS:
                raise ProtocolError("the first frame is not SETTINGS: it does not speak HTTP/2")
            if size > _FRAME:
                raise ProtocolError(
                    f"a frame has {size} bytes, more than the {_FRAME} that are allowed", Code.FRAME_SIZE_ERROR
                )
            begin = at + frames.HEAD
            after = begin + size
            if after > end:
                break
            at = after
            number &= frames.MAX_STREAM
            if self._block is not None and kind != frames.CONTINUATION:
                raise ProtocolError("headers are interrupted by another frame")
            content = data[begin:after]
            if kind == frames.DATA:
                self._on_data(number, flags, content)
            elif kind == frames.HEADERS:
                self._on_headers(number, flags, content)
            elif kind in _STEERING:
                _STEERING[kind](self, number, flags, content)
            # PRIORITY, and frames of extensions, have no meaning here (5.5)
        self._rest = data[at:]
        return False

    def _on_data(self, number: int, flags: int, content: bytes) -> None:
        size = len(content)
        self._may_come -= size
        if self._may_come < 0:
            raise ProtocolError("it sends more than it may", Code.FLOW_CONTROL_ERROR)
        if self._may_come < _CONNECTION // 2:
            self._write(frames.window_update(0, _CONNECTION - self._may_come))
            self._may_come = _CONNECTION
        stream = self._streams.get(number)
        if stream is None:
            self._known(number)
            return
        ends = bool(flags & frames.END_STREAM)
        if not stream.data(frames.unpadded(flags, content), size, ends=ends):
            raise ProtocolError("it sends more on a stream than it may", Code.FLOW_CONTROL_ERROR)
        if not ends and stream.has_message:
            self._messages.append(stream)

    def _on_headers(self, number: int, flags: int, content: bytes) -> None:
        content = frames.unpadded(flags, content)
        if flags & frames.WITH_PRIORITY:
            content = content[5:]
        if flags & frames.END_HEADERS:
            self._on_block(number, content, ends=bool(flags & frames.END_STREAM))
        else:
            self._block = (number, bool(flags & frames.END_STREAM), bytearray(content))

    def _on_continuation(self, number: int, flags: int, content: bytes) -> None:
        if self._block is None or self._block[0] != number:
            raise ProtocolError("headers are continued that have not begun")
        _, ends, block = self._block
        block += content
        if len(block) > _MAX_BLOCK or not (content or flags & frames.END_HEADERS):
            raise ProtocolError("headers do not end", Code.ENHANCE_YOUR_CALM)
        if flags & frames.END_HEADERS:
            self._block = None
            self._on_block(number, bytes(block), ends=ends)

    def _on_block(self, number: int, block: bytes, *, ends: bool) -> None:
        stream = self._streams.get(number)
        if stream is None:
            self._known(number)
        elif (fields := self._decoder.fields(block)) is None:
            stream.too_many_headers()
        else:
            stream.fields(fields, ends=ends)

    def _on_reset(self, number: int, flags: int, content: bytes) -> None:
        code = frames.number(content)
        stream = self._streams.get(number)
        if stream is None:
            self._known(number)
        else:
            stream.was_reset(code)

    def _on_settings(self, number: int, flags: int, content: bytes) -> None:
        if flags & frames.ACK:
            return
        for name, value in frames.read_settings(content):
            if name == Setting.INITIAL_WINDOW_SIZE:
                self._initial = value
                self._moved = True
            elif name == Setting.MAX_FRAME_SIZE:
                self._frame = min(value, _FRAME)
            elif name == Setting.MAX_CONCURRENT_STREAMS:
                self._most = value
            elif name == Setting.MAX_HEADER_LIST_SIZE:
                self._headers = value
        self._flush(frames.frame(frames.SETTINGS, frames.ACK, 0))
        if not self.ready.done():
            self.ready.set_result(None)

    def _on_ping(self, number: int, flags: int, content: bytes) -> None:
        if len(content) != 8:
            raise ProtocolError("a PING frame does not have 8 bytes", Code.FRAME_SIZE_ERROR)
        if not flags & frames.ACK:
            self._flush(frames.frame(frames.PING, frames.ACK, 0, content))

    def _on_goaway(self, number: int, flags: int, content: bytes) -> None:
        last = frames.number(content)
        self._leaving = True
        why = f"{self.name} ends the connection: {frames.named(frames.number(content, 4))}"
        for stream in [one for one in self._streams.values() if one.number > last]:
            stream.lost(replies.Lost(replies.LostKind.UNSENT, why))
        if not self._streams:
            self.close()

    def _on_window_update(self, number: int, flags: int, content: bytes) -> None:
        more = frames.number(content)
        if not number:
            self._window += more
            if not more or self._window > frames.MAX_WINDOW:
                raise ProtocolError("a window is out of bounds", Code.FLOW_CONTROL_ERROR)
        elif (stream := self._waiting.get(number)) is not None:
            stream.more_room += more
            if not more or self._initial + stream.more_room > frames.MAX_WINDOW:
                raise ProtocolError("a window is out of bounds", Code.FLOW_CONTROL_ERROR)
        self._moved = True

    def _on_push(self, number: int, flags: int, content: bytes) -> None:
        raise ProtocolError("it pushes a reply, which is not allowed")

    def _known(self, number: int) -> None:
        """Raises ProtocolError if a stream was never opened. Frames of calls that are over may still arrive."""
        if not number & 1 or number >= self._next:
            raise ProtocolError(f"stream {number} was never opened")

    # --- what is sent ---

    def _pump(self) -> None:
        """Sends what waits, as far as the windows allow it."""
        for stream in tuple(self._waiting.values()):
            if self._stalled or self._window <= 0:
                return
            rest = stream.unsent
            assert rest is not None
            count = min(len(rest), self._window, self._initial + stream.more_room)
            if count <= 0:
                continue
            self._window -= count
            self._unsent -= count
            stream.more_room -= count
            ends = count == len(rest)
            self.transport.writelines(self._data(stream.number, rest[:count], ends=ends))
            if ends:
                stream.unsent = None
                del self._waiting[stream.number]
            else:
                stream.unsent = rest[count:]

    def _data(self, number: int, content: memoryview, *, ends: bool) -> list[bytes]:
        size = self._frame
        last = len(content) - 1
        return [
            frames.frame(
                frames.DATA, frames.END_STREAM if ends and at + size > last else 0, number, content[at : at + size]
            )
            for at in range(0, len(content), size)
        ]

    def _flush(self, answer: bytes) -> None:
        """Sends the answer to a PING or SETTINGS frame at the end of this turn. If a server keeps asking but does not
        read, the connection ends."""
        if self._stalled:
            self._flushed += 1
            if self._flushed > _MAX_FLUSH:
                raise ProtocolError(
                    "it keeps sending frames that need an answer, but does not read the answers", Code.ENHANCE_YOUR_CALM
                )
        self._answers.append(answer)

    def _write(self, frame: bytes) -> None:
        """Sends a frame, unless the connection is ending."""
        if not self.transport.is_closing():
            self.transport.write(frame)

    # --- ends ---

    def _begin(self, streams: list[Http2Stream]) -> None:
        """Turns each reply whose end has not followed its first message into a stream."""
        for stream in streams:
            stream.begins()

    def _forget(self, stream: Http2Stream) -> None:
        if self._waiting.pop(stream.number, None) is not None and stream.unsent is not None:
            self._unsent -= len(stream.unsent)

    def _break(self, error: ProtocolError) -> None:
        """Ends a connection on which the server breaks the protocol."""
        self._on_fault(error)
        self._fail(error)
        self._lose(f"{self.name} violates HTTP/2: {error}")
        self._part(frames.goodbye(error.code, str(error)))

    def _part(self, goodbye: bytes) -> None:
        self.transport.write(goodbye)
        if self._stalled:
            self.transport.abort()  # the close would wait for the server to read
        else:
            self.transport.close()

    def _fail(self, error: Exception) -> None:
        if not self.ready.done():
            self.ready.set_exception(error)
            self.ready.exception()  # or asyncio would log it if nobody waits any more

    def _lose(self, why: str) -> None:
        if self._lost:
            return
        self._lost = True
        self._fail(ConnectionError(why))
        streams, self._streams = self._streams, {}
        self._waiting.clear()
        self._unsent = 0
        self._rest = b""
        for stream in streams.values():
            stream.lost(replies.Lost(stream.how_far, why))


_STEERING = {
    frames.RST_STREAM: Http2Connection._on_reset,
    frames.SETTINGS: Http2Connection._on_settings,
    frames.PUSH_PROMISE: Http2Connection._on_push,
    frames.PING: Http2Connection._on_ping,
    frames.GOAWAY: Http2Connection._on_goaway,
    frames.WINDOW_UPDATE: Http2Connection._on_window_update,
    frames.CONTINUATION: Http2Connection._on_continuation,
}
