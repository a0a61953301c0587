"""A server of HTTP/2 on a socket, whose answers are the frames that a test gives it, however odd they are."""

import asyncio
import struct
from collections.abc import Callable

import hpack

from mesh.wire.http2 import frames

GRPC = ((b":status", b"200"), (b"content-type", b"application/grpc"))
OK = ((b"grpc-status", b"0"),)
Answer = Callable[[int], bytes | None]


def headers(stream: int, *fields: tuple[bytes, bytes], ends: bool = False) -> bytes:
    """Returns the frames of a list of headers."""
    encoder = hpack.Encoder()
    encoder.header_table_size = 0
    block = encoder.encode(fields, huffman=False)
    parts = [block[at : at + frames.SIZE] for at in range(0, len(block), frames.SIZE)] or [b""]
    made = []
    for at, part in enumerate(parts):
        flags = frames.END_STREAM if ends and not at else 0
        flags |= frames.END_HEADERS if at == len(parts) - 1 else 0
        made.append(frames.frame(frames.CONTINUATION if at else frames.HEADERS, flags, stream, part))
    return b"".join(made)


def data(stream: int, content: bytes, *, ends: bool = False) -> bytes:
    """Returns the frames of a body."""
    parts = [content[at : at + frames.SIZE] for at in range(0, len(content), frames.SIZE)] or [b""]
    last = len(parts) - 1
    return b"".join(
        frames.frame(frames.DATA, frames.END_STREAM if ends and at == last else 0, stream, part)
        for at, part in enumerate(parts)
    )


def reply(stream: int, frame: bytes) -> bytes:
    """Returns an ordinary reply of one message."""
    return headers(stream, *GRPC) + data(stream, frame) + headers(stream, *OK, ends=True)


class FrameServer:
    """The server. It answers each whole request with the frames that `answer` returns for its stream; for None, it
    closes the connection."""

    def __init__(self, answer: Answer, *, greeting: bytes | None = frames.settings({})) -> None:
        """Makes a server. `greeting` is what it sends first; None closes each connection at once."""
        self.answer = answer
        self.connections = 0
        self.requests: list[list[tuple[bytes, bytes]]] = []  # their headers
        self._greeting = greeting
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> str:
        """Starts the server, and returns its address."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    @property
    def open(self) -> int:
        """Number of open connections."""
        return len(self._tasks)

    async def stop(self) -> None:
        """Closes all connections."""
        self._server.close()
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        decoder = hpack.Decoder()
        try:
            if self._greeting is None:
                return
            writer.write(self._greeting)
            await reader.readexactly(len(frames.PREFACE))
            while True:
                head = await reader.readexactly(frames.HEAD)
                kind, flags, stream = struct.unpack_from(">BBI", head, 3)
                content = await reader.readexactly(int.from_bytes(head[:3], "big"))
                if kind in (frames.SETTINGS, frames.PING) and not flags & frames.ACK:
                    writer.write(frames.frame(kind, frames.ACK, 0, content if kind == frames.PING else b""))
                elif kind == frames.HEADERS:
                    self.requests.append([(bytes(k), bytes(v)) for k, v in decoder.decode(content, raw=True)])
                if kind in (frames.HEADERS, frames.DATA) and flags & frames.END_STREAM:
                    answer = self.answer(stream)
                    if answer is None:
                        return
                    writer.write(answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.transport.abort()
            self._tasks.discard(task)
