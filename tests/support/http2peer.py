"""The server's end of an HTTP/2 connection, without a socket: a test sends frames, and reads those of the client."""

import asyncio
import struct
from dataclasses import dataclass
from typing import Any

import hpack

from mesh.wire import framing
from mesh.wire.budget import Budget
from mesh.wire.exchange import Exchange
from mesh.wire.http2 import frames
from mesh.wire.http2.connection import Http2Connection
from mesh.wire.http2.frames import Setting
from mesh.wire.pieces import Pieces
from mesh.wire.reply import Lost, Reply
from mesh.wire.streams import ReplyStream

HEAD = ((b":status", b"200"), (b"content-type", b"application/grpc"), (b"initial", b"1"))
TRAILERS = ((b"grpc-status", b"0"), (b"trailing", b"2"))
LIMIT = 8 << 20


@dataclass(frozen=True)
class Frame:
    """One frame of the client."""

    kind: int
    flags: int
    stream: int
    content: bytes


class Sink:
    """A sink that keeps the outcome."""

    def __init__(self, *, takes_pieces: bool = False) -> None:
        self.takes_pieces = takes_pieces
        self.outcome: Reply | ReplyStream | Lost | None = None

    def on_beginning(self) -> None:
        """Ignores the beginning."""

    def _take(self, outcome: Any) -> None:
        assert self.outcome is None, "a call has one outcome"
        self.outcome = outcome

    on_reply = on_stream = on_lost = _take


class Peer(asyncio.Transport):
    """A transport of a connection, and the server behind it."""

    def __init__(self, *, limit: int = LIMIT, budget: Budget | None = None, pieces: Pieces | None = None) -> None:
        super().__init__()
        self.sent = bytearray()
        self.ended = ""  # "closed" or "aborted"
        self.paused = False
        self.encoder = hpack.Encoder()
        self.encoder.header_table_size = 0
        self.decoder = hpack.Decoder()
        self.faults: list[str] = []
        self.connection = Http2Connection(
            "peer",
            limit=limit,
            budget=budget or Budget(64 << 20),
            policy=pieces,
            authority=b"peer",
            on_fault=lambda fault: self.faults.append(str(fault)),
        )
        self.connection.connection_made(self)

    # --- the transport ---

    def write(self, data: Any) -> None:
        assert not self.ended
        self.sent += data

    def writelines(self, parts: Any) -> None:
        self.write(b"".join(parts))

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Ignores the limits."""

    def close(self) -> None:
        self.ended = self.ended or "closed"

    def abort(self) -> None:
        self.ended = "aborted"

    def pause_reading(self) -> None:
        assert not self.paused
        self.paused = True

    def resume_reading(self) -> None:
        assert self.paused
        self.paused = False

    def is_closing(self) -> bool:
        return bool(self.ended)

    # --- the server ---

    def taken(self) -> list[Frame]:
        """Returns the frames that the client has sent since the last call."""
        data = bytes(self.sent).removeprefix(frames.PREFACE)
        self.sent.clear()
        found = []
        while data:
            size = int.from_bytes(data[:3], "big")
            kind, flags, stream = struct.unpack_from(">BBI", data, 3)
            assert len(data) >= frames.HEAD + size
            found.append(Frame(kind, flags, stream, data[frames.HEAD : frames.HEAD + size]))
            data = data[frames.HEAD + size :]
        return found

    def begin(self, settings: dict[Setting, int] | None = None) -> "Peer":
        """Sends the server's settings."""
        self.send(frames.settings(settings or {}))
        self.taken()
        return self

    def send(self, *parts: bytes) -> None:
        """Sends bytes, which the client takes at once."""
        self.connection.data_received(b"".join(parts))
        while self.paused and not self.ended:
            self.connection._turn()

    def call(
        self, message: bytes = b"m", *, sink: Sink | None = None, headers: tuple[tuple[bytes, bytes], ...] = ()
    ) -> tuple[Sink, Exchange]:
        """Posts a call."""
        sink = sink or Sink()
        exchange = self.connection.post(b"/a.B/C", headers, framing.pack(message), sink, timeout=None, encoding=b"")
        assert exchange is not None
        return sink, exchange

    def headers(self, stream: int, fields: Any = HEAD, *, ends: bool = False) -> bytes:
        """Returns a HEADERS frame and its CONTINUATION frames, if any."""
        block = self.encoder.encode(fields, huffman=True)
        parts = [block[at : at + frames.SIZE] for at in range(0, len(block), frames.SIZE)]
        made = [
            frames.frame(frames.CONTINUATION if at else frames.HEADERS, 0 if at else ends, stream, part)
            for at, part in enumerate(parts[:-1])
        ]
        flags = frames.END_HEADERS | (ends if len(parts) == 1 else 0)
        kind = frames.HEADERS if len(parts) == 1 else frames.CONTINUATION
        return b"".join((*made, frames.frame(kind, flags, stream, parts[-1])))

    def data(self, stream: int, content: bytes) -> bytes:
        """Returns DATA frames of the content."""
        return b"".join(
            frames.frame(frames.DATA, 0, stream, content[at : at + frames.SIZE])
            for at in range(0, len(content), frames.SIZE)
        )

    def reply(self, stream: int, *messages: bytes, trailers: Any = TRAILERS) -> bytes:
        """Returns a whole reply."""
        body = b"".join(map(framing.pack, messages))
        return self.headers(stream) + self.data(stream, body) + self.headers(stream, trailers, ends=True)
