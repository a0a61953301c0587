"""Methods of the example runtime that move bytes: large messages, and streams whose ends are slow or idle.

| method | shape | what it does |
| --- | --- | --- |
| `measure` | unary | answers with the size and checksum of the request |
| `produce` | unary | answers with as many bytes as the request says (`content`) |
| `flood` | server stream | answers `COUNT SIZE` with so many messages of that size, as fast as the client takes them |
| `soak` | client stream | reads nothing until `release`, then everything, and answers like `measure` |
| `echo` | bidirectional | answers each message with the same bytes, and ends with a trailer |
| `release` | unary | lets the calls of `soak` read |
| `count` | unary | answers how many messages `flood` has written and `soak` has read, and how many `soak` are open |

A message of a stream begins with its number, so a test notices if a message is lost, repeated or moved.
"""

import asyncio
import zlib
from collections.abc import AsyncIterator
from typing import Any

import grpc

_BLOCK = bytes(range(251)) * 4096  # a prime number of bytes repeats, so a shift by a chunk is noticed


def content(size: int) -> bytes:
    """Returns that many bytes, each of which depends on its position."""
    return (_BLOCK * (size // len(_BLOCK) + 1))[:size]


def measured(message: bytes) -> bytes:
    return b"%d %d" % (len(message), zlib.crc32(message))


def numbered(number: int, size: int) -> bytes:
    return (b"%08d" % number).ljust(size, b".")


def number_of(message: bytes) -> int:
    return int(message[:8])


class Bulk:
    def __init__(self) -> None:
        self._released = asyncio.Event()
        self._written = self._read = self._soaking = 0

    async def _measure(self, request: bytes, context: Any) -> bytes:
        return measured(request)

    async def _produce(self, request: bytes, context: Any) -> bytes:
        return content(int(request))

    async def _flood(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        count, size = map(int, request.split())
        self._written = 0
        for number in range(count):
            yield numbered(number, size)
            self._written = number + 1

    async def _soak(self, requests: Any, context: Any) -> bytes:
        self._released.clear()
        self._read = total = 0
        self._soaking += 1
        try:
            await self._released.wait()
            async for request in requests:
                if number_of(request) != self._read:
                    await context.abort(grpc.StatusCode.DATA_LOSS, f"{request[:8]!r} came in place of {self._read}")
                self._read += 1
                total += len(request)
        finally:
            self._soaking -= 1
        return b"%d %d" % (self._read, total)

    async def _echo(self, requests: Any, context: Any) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request
        context.set_trailing_metadata((("example-trailer", "of the server"),))

    async def _release(self, request: bytes, context: Any) -> bytes:
        self._released.set()
        return b""

    async def _count(self, request: bytes, context: Any) -> bytes:
        return b"%d %d %d" % (self._written, self._read, self._soaking)

    def handlers(self) -> dict[str, Any]:
        return {
            "measure": grpc.unary_unary_rpc_method_handler(self._measure),
            "produce": grpc.unary_unary_rpc_method_handler(self._produce),
            "flood": grpc.unary_stream_rpc_method_handler(self._flood),
            "soak": grpc.stream_unary_rpc_method_handler(self._soak),
            "echo": grpc.stream_stream_rpc_method_handler(self._echo),
            "release": grpc.unary_unary_rpc_method_handler(self._release),
            "count": grpc.unary_unary_rpc_method_handler(self._count),
        }
