"""Bounded decompression of peers' input: gzip with all of its members, and zlib.

A gzip stream is a series of members (RFC 1952, 2.2). Log shippers, `cat a.gz b.gz` and parallel compressors write
several, and a decoder that dropped all but the first would silently lose data. Python's zlib stops at the end of each
member, so this module handles the series, for whole messages and for streams.

Input is not trusted: output is produced in pieces, never more than a caller wants, and the number of members in a whole
message is bounded, because a member of only 20 bytes costs 0.8 us of CPU. zlib gets its input in small slices, because
it copies the bytes that follow a member's end, which would otherwise take quadratic time.
"""

import zlib
from collections.abc import Iterator

GZIP, ZLIB = 31, 15
"""zlib's names for the containers. HTTP and gRPC call zlib's container deflate."""

MAX_MEMBERS = 4096
"""Maximum number of members in one message. Block compressors, with 64 KiB in each member, need 256 for 16 MiB."""

_SLICE = 16 * 1024  # bytes of input
_PIECE = 256 * 1024  # bytes of output: 0.5 ms


class InflateError(ValueError):
    """Invalid compressed data; the text says why."""


class TooLong(ValueError):
    """The error for data that would exceed the limit when unpacked."""


class Inflater:
    """One compressed stream, unpacked as it arrives."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._unpacking = zlib.decompressobj(window)
        self._begun = False  # a byte of the current member has arrived
        self.members = 0  # members that have ended

    def feed(self, data: bytes | memoryview) -> Iterator[bytes]:
        """Unpacks more input, and yields non-empty pieces of bounded size. Raises InflateError.

        The same stream may be fed again once the iterator is exhausted."""
        view = memoryview(data)
        for start in range(0, len(view), _SLICE):
            rest = bytes(view[start : start + _SLICE])
            while True:
                if self._unpacking.eof:
                    self._next()
                self._begun = True
                try:
                    piece = self._unpacking.decompress(rest, _PIECE)
                except zlib.error as error:
                    raise InflateError(str(error)) from error
                rest = self._unpacking.unconsumed_tail
                if piece:
                    yield piece
                if self._unpacking.eof:
                    self.members += 1
                    rest = self._unpacking.unused_data
                # After a full piece zlib may hold more output, although it has consumed all input.
                if not rest and (self._unpacking.eof or len(piece) < _PIECE):
                    break

    def end(self) -> None:
        """Raises InflateError if the stream is not complete."""
        if not self._unpacking.eof:
            raise InflateError("it ends in the middle" if self._begun else "it is empty")

    def _next(self) -> None:
        if self._window != GZIP:
            raise InflateError("extra bytes follow its end")
        self._unpacking = zlib.decompressobj(self._window)


def whole(data: bytes | memoryview, window: int, limit: int) -> bytes:
    """Returns all of the unpacked data. `window` is `GZIP` or `ZLIB`. Raises TooLong above `limit` bytes, and
    InflateError for invalid data or more than `MAX_MEMBERS` members."""
    inflater = Inflater(window)
    parts: list[bytes] = []
    size = 0
    for start in range(0, len(data), _SLICE):
        for piece in inflater.feed(memoryview(data)[start : start + _SLICE]):
            size += len(piece)
            if size > limit:
                raise TooLong(f"more than {limit} bytes")
            parts.append(piece)
        if inflater.members > MAX_MEMBERS:
            raise InflateError(f"it has more than {MAX_MEMBERS} members")
    inflater.end()
    return b"".join(parts)


def beginning(data: bytes | memoryview, window: int, size: int) -> bytes:
    """Returns at least the first `size` bytes of the unpacked data, or all of it. Raises InflateError."""
    parts: list[bytes] = []
    found = 0
    for piece in Inflater(window).feed(data):  # lazily
        parts.append(piece)
        found += len(piece)
        if found >= size:
            break
    return b"".join(parts)
