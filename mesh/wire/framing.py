"""The 5-byte prefix of gRPC messages: a flag (0 plain, 1 compressed) and the length, big-endian.

A *frame* is a prefix and its message. Most frames are only forwarded; only `unpack` and `beginning` look into a
message. The sizes that a peer controls (the length in a prefix, the size of a decompressed message) are checked against
a limit before memory is allocated. `inbox` splits a byte stream into frames.
"""

import struct

from mesh import statuses
from mesh.wire import inflate

PREFIX = 5
"""Bytes before each message."""

MAX_LENGTH = 0xFFFFFFFF
"""Bytes of the longest message that fits into a frame."""

_prefix = struct.Struct(">BI").unpack_from
_WINDOW = {b"gzip": inflate.GZIP, b"deflate": inflate.ZLIB}


class FrameError(statuses.MeshError):
    """The error for a frame that is malformed or too large, or for which the budget has no room; `reason` says
    which."""

    @classmethod
    def above(cls, what: str, limit: int, option: str = statuses.MAX_MESSAGE) -> "FrameError":
        """Returns the error for a message larger than the limit that an option sets."""
        error = statuses.too_large(what, limit, option)
        return cls(error.reason, error.text, details=error.details)


def prefix(length: int) -> bytes:
    """Returns the prefix of an uncompressed message. Raises ValueError if its length does not fit (4 GiB)."""
    if length > MAX_LENGTH:
        raise ValueError(f"a message of {length} bytes does not fit into a frame")
    return b"\0" + length.to_bytes(4, "big")


def pack(message: bytes) -> bytes:
    """Returns the frame of an uncompressed message. Raises ValueError if its length does not fit (4 GiB)."""
    return prefix(len(message)) + message


def unpack(frame: bytes, encoding: bytes = b"", *, limit: int) -> bytes:
    """Returns the message of one whole frame, decompressed if its flag says so.

    `encoding` is the value of `grpc-encoding`: b"gzip" or b"deflate"; b"" and b"identity" mean none. `limit` is the
    maximum size of the message in bytes, before and after decompression; decompression stops there. Raises
    `FrameError`.
    """
    end = frame_end(frame, 0, limit)
    if end != len(frame):
        raise FrameError(
            statuses.Reason.BAD_REQUEST, (f"a frame of {end} bytes was announced, but {len(frame)} bytes arrived")
        )
    message = frame[PREFIX:]
    return _decompress(message, encoding, limit) if frame[0] else message


def is_compressed(frame: bytes | memoryview) -> bool:
    """Returns whether the message of this frame must be decompressed before it can be read."""
    return frame[:1] == b"\1"


def frame_end(
    buffer: bytes | bytearray | memoryview, start: int, limit: int, option: str = statuses.MAX_MESSAGE
) -> int:
    """Returns the end of the frame that begins at `start`. It lies beyond the buffer if the frame is incomplete.

    Raises `FrameError` for a bad flag or a message above `limit`, which `option` sets. If the prefix is incomplete,
    returns the end of the prefix.
    """
    if len(buffer) - start < PREFIX:
        return start + PREFIX
    flag: int
    length: int
    flag, length = _prefix(buffer, start)
    if flag > 1:
        raise FrameError(
            statuses.Reason.BAD_REQUEST, f"a message begins with flag {flag}: gRPC has only the flags 0 and 1"
        )
    if length > limit:
        raise FrameError.above(f"a message of {length} bytes", limit, option)
    return start + PREFIX + length


def announced(buffer: bytes | bytearray | memoryview, limit: int) -> int:
    """Returns the bytes of the frame at the start of the buffer, prefix included. A longer message than `limit` counts
    as `limit` bytes. If the prefix is incomplete, returns the size of a prefix."""
    if len(buffer) < PREFIX:
        return PREFIX
    return PREFIX + min(int.from_bytes(buffer[1:PREFIX], "big"), limit)


def is_frame(data: bytes | memoryview, limit: int) -> bool:
    """Returns whether the data is exactly one frame, with a message within the limit."""
    if len(data) < PREFIX:
        return False
    flag: int
    length: int
    flag, length = _prefix(data)
    return flag <= 1 and length == len(data) - PREFIX and length <= limit


def beginning(frame: bytes, encoding: bytes, size: int) -> bytes:
    """Returns at least the first `size` bytes of a compressed frame's message, or all of a shorter one. Raises
    FrameError.

    Unpacks at most 256 KiB more than that, however long the message is.
    """
    try:
        return inflate.beginning(memoryview(frame)[PREFIX:], _window(encoding), size)
    except inflate.InflateError as error:
        raise _invalid(encoding, error) from error


def _decompress(message: bytes, encoding: bytes, limit: int) -> bytes:
    try:
        return inflate.whole(message, _window(encoding), limit)
    except inflate.TooLong as error:
        raise FrameError.above("a message, once decompressed,", limit) from error
    except inflate.InflateError as error:
        raise _invalid(encoding, error) from error


def _window(encoding: bytes) -> int:
    window = _WINDOW.get(encoding)
    if window is None:
        name = encoding[:60].decode("ascii", "backslashreplace") or "nothing"
        raise FrameError(
            statuses.Reason.BAD_REQUEST,
            (f"a message is compressed, but its encoding is given as {name}: use gzip, deflate or none"),
        )
    return window


def _invalid(encoding: bytes, error: inflate.InflateError) -> FrameError:
    return FrameError(statuses.Reason.BAD_REQUEST, f"a message is not valid {encoding.decode()}: {error}")
