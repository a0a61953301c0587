"""Shared parts of the tests of `mesh.wire`: a transport without a socket, the bytes of requests and replies, and
awaitable sinks."""

import asyncio
import atexit
import functools
import itertools
import re
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import uvloop

from mesh.wire import client, framing, largebody

T = TypeVar("T")

ECHO = b"/test.Service/Echo"


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = uvloop.new_event_loop()
    atexit.register(loop.close)
    return loop


def run(scenario: Coroutine[object, object, T]) -> T:
    """Runs one example of a property test. `asyncio.run` would create a loop for each, which takes longer than most
    examples."""
    return _loop().run_until_complete(scenario)


class Transport:
    """A transport that records what a connection writes, and how the connection paused and closed it."""

    def __init__(self) -> None:
        self.written = b""
        self.unsent = 0  # bytes that the peer has not taken; the test sets this
        self.closed = self.aborted = self.eof = self.paused = False
        self.protocol: Any = None  # the protocol that reads instead of the connection

    def write(self, data: bytes) -> None:
        assert not self.eof, "bytes were written after the end"
        self.written += data

    def writelines(self, parts: Sequence[bytes]) -> None:
        self.write(b"".join(parts))

    def write_eof(self) -> None:
        self.eof = True

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = self.aborted = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        assert not self.paused
        self.paused = True

    def resume_reading(self) -> None:
        assert self.paused
        self.paused = False

    def set_protocol(self, protocol: object) -> None:
        self.protocol = protocol

    def set_write_buffer_limits(self, high: int) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def get_extra_info(self, name: str) -> object:
        return "" if name == "peername" else None


def deliver(connection: Any, data: bytes) -> None:
    """Delivers a peer's bytes to the connection's current protocol, as an event loop does."""
    while data := data[deliver_one(connection, data) :]:
        if connection.transport.closed:
            break


def deliver_one(connection: Any, data: bytes, reads: list[bytes] | None = None) -> int:
    """Delivers a peer's bytes in one read, and returns how many were read.

    Appends to `reads` what a connection without a `LargeBody` would have to be given to reach the same state. The line
    break after a large message's last chunk is therefore added to the read that completed the message.
    """
    reader = connection.transport.protocol or connection
    behind = False
    if isinstance(reader, largebody.LargeBody):
        behind = reader.whole
        buffer = reader.get_buffer(-1)
        count = min(len(buffer), len(data))
        buffer[:count] = data[:count]
        reader.buffer_updated(count)
    else:
        count = len(data)
        reader.data_received(data)
    if reads is not None and behind:
        reads[-1] += data[:count]
    elif reads is not None:
        reads.append(data[:count])
    return count


@dataclass
class Parsed:
    """A reply as `parse_replies` reads it, more simply than the code under test does."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    trailers: list[tuple[bytes, bytes]]

    def metadata(self, name: bytes) -> bytes | None:
        return dict(self.headers + self.trailers).get(name)

    @property
    def code(self) -> int | None:
        code = self.metadata(b"grpc-status")
        return None if code is None else int(code)


def _lines(block: bytes) -> list[tuple[bytes, bytes]]:
    pairs = [line.split(b": ", 1) for line in block.split(b"\r\n") if line]
    return [(name, value) for name, value in pairs]


def parse_replies(data: bytes) -> list[Parsed]:
    """Returns every reply in a server's output. Fails unless the output consists of well-formed replies."""
    replies = []
    while data:
        head, end, data = data.partition(b"\r\n\r\n")
        assert end, "a header has no end"
        status_line, _, block = head.partition(b"\r\n")
        match = re.fullmatch(rb"HTTP/1\.1 (\d{3}) [ -~]+", status_line)
        assert match is not None, status_line
        headers = _lines(block)
        body = b""
        trailers: list[tuple[bytes, bytes]] = []
        if (b"transfer-encoding", b"chunked") in headers:
            while True:
                size, _, data = data.partition(b"\r\n")
                length = int(size, 16)
                if not length:
                    break
                body += data[:length]
                assert data[length : length + 2] == b"\r\n"
                data = data[length + 2 :]
            while not data.startswith(b"\r\n"):
                line, _, data = data.partition(b"\r\n")
                trailers += _lines(line)
            data = data[2:]
        else:
            length = int(dict(headers)[b"content-length"])
            body, data = data[:length], data[length:]
        replies.append(Parsed(int(match[1]), headers, body, trailers))
    return replies


def request(
    body: bytes,
    *,
    method: bytes = ECHO,
    headers: Sequence[tuple[bytes, bytes]] = (),
    chunks: Sequence[int] | None = None,
) -> bytes:
    """Returns the bytes of a request, with `content-length` or in chunks of these sizes and a last chunk with the
    rest."""
    lines = [b"POST %b HTTP/1.1" % method, b"host: test", b"content-type: application/grpc", b"te: trailers"]
    lines += [b"%b: %b" % header for header in headers]
    if chunks is None:
        return b"\r\n".join([*lines, b"content-length: %d" % len(body), b"", body])
    return b"\r\n".join([*lines, b"transfer-encoding: chunked", b"", b""]) + chunked(body, chunks) + b"0\r\n\r\n"


def chunked(body: bytes, sizes: Sequence[int]) -> bytes:
    """Returns a body in chunks of these sizes and a chunk with the rest, without the final empty chunk."""
    pieces = []
    for size in (*sizes, len(body)):
        piece, body = body[:size], body[size:]
        if piece:
            pieces.append(b"%x\r\n%b\r\n" % (len(piece), piece))
    return b"".join(pieces)


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    """Returns the bytes cut into pieces at these places, modulo the length."""
    edges = sorted({0, len(data), *(place % max(len(data), 1) for place in places)})
    return [data[start:end] for start, end in itertools.pairwise(edges)]


def frames(*messages: bytes) -> bytes:
    return b"".join(map(framing.pack, messages))


async def fill(request: client.RequestStream) -> None:
    """Sends messages until the buffers on the way to a handler that reads nothing are full, and only the last message
    is still on the sender's side."""
    unsent = same = 0
    while same < 20:  # looks at which the same bytes were still unsent
        if not unsent:
            await request.write(frames(bytes(10_000)))
        await asyncio.sleep(0.005)
        before, unsent = unsent, request.exchange.connection.transport.get_write_buffer_size()  # type: ignore[attr-defined]
        same = same + 1 if unsent and unsent == before else 0


class Outcome:
    """A sink that can be awaited."""

    def __init__(self, *, takes_pieces: bool = False) -> None:
        self.takes_pieces = takes_pieces
        self._future: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self.calls = 0

    def _set(self, outcome: object) -> None:
        self.calls += 1
        if not self._future.done():
            self._future.set_result(outcome)

    def on_beginning(self) -> None:
        pass

    def on_reply(self, reply: client.Reply) -> None:
        self._set(reply)

    def on_stream(self, stream: client.ReplyStream) -> None:
        self._set(stream)

    def on_lost(self, lost: client.Lost) -> None:
        self._set(lost)

    @property
    def done(self) -> bool:
        return self._future.done()

    async def get(self, timeout: float = 10.0) -> object:
        return await asyncio.wait_for(asyncio.shield(self._future), timeout)

    async def reply(self) -> client.Reply:
        outcome = await self.get()
        assert isinstance(outcome, client.Reply), outcome
        return outcome

    async def stream(self) -> client.ReplyStream:
        outcome = await self.get()
        assert isinstance(outcome, client.ReplyStream), outcome
        return outcome

    async def lost(self) -> client.Lost:
        outcome = await self.get()
        assert isinstance(outcome, client.Lost), outcome
        return outcome
