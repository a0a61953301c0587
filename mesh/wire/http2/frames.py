"""The frames of HTTP/2 (RFC 9113, 4 and 6): their heads, and the small ones that only control the connection."""

import enum
import struct

HEAD = 9
"""Bytes of a frame's head."""

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""The bytes with which a client begins (3.4)."""

WINDOW = 65_535
"""Bytes of every window at first (6.9.2)."""

SIZE = 16_384
"""Bytes of the longest frame that every peer accepts (4.2)."""

MAX_WINDOW = (1 << 31) - 1
MAX_STREAM = (1 << 31) - 1

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)

END_STREAM = ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8
WITH_PRIORITY = 0x20


class Setting(enum.IntEnum):
    """The settings of a connection that matter here (6.5.2)."""

    HEADER_TABLE_SIZE = 1
    ENABLE_PUSH = 2
    MAX_CONCURRENT_STREAMS = 3
    INITIAL_WINDOW_SIZE = 4
    MAX_FRAME_SIZE = 5
    MAX_HEADER_LIST_SIZE = 6


class Code(enum.IntEnum):
    """The error codes (7)."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    SETTINGS_TIMEOUT = 4
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    CONNECT_ERROR = 10
    ENHANCE_YOUR_CALM = 11
    INADEQUATE_SECURITY = 12
    HTTP_1_1_REQUIRED = 13


class ProtocolError(Exception):
    """A connection on which the peer breaks the protocol, so that it cannot be used any more."""

    def __init__(self, text: str, code: Code = Code.PROTOCOL_ERROR) -> None:
        super().__init__(text)
        self.code = code


_number = struct.Struct(">I")
_setting = struct.Struct(">HI")

head_of = struct.Struct(">HBBBI").unpack_from
"""Reads a frame's head: the upper two bytes and the lowest byte of its length, its type, its flags, its stream."""


def frame(kind: int, flags: int, stream: int, content: bytes | memoryview = b"") -> bytes:
    """Returns the bytes of a frame. The content must be shorter than 16 MiB."""
    head = b"%b%c%c%b" % (len(content).to_bytes(3, "big"), kind, flags, _number.pack(stream))
    return b"".join((head, content))


def settings(values: dict[Setting, int]) -> bytes:
    """Returns the frame that announces settings."""
    return frame(SETTINGS, 0, 0, b"".join(_setting.pack(*one) for one in values.items()))


def read_settings(content: bytes) -> list[tuple[int, int]]:
    """Returns the pairs of a SETTINGS frame, in order. Raises ProtocolError."""
    if len(content) % _setting.size:
        raise ProtocolError("a SETTINGS frame has the wrong length", Code.FRAME_SIZE_ERROR)
    pairs = list(_setting.iter_unpack(content))
    for name, value in pairs:
        if name == Setting.INITIAL_WINDOW_SIZE and value > MAX_WINDOW:
            raise ProtocolError(f"an initial window of {value} bytes is not allowed", Code.FLOW_CONTROL_ERROR)
        if name == Setting.MAX_FRAME_SIZE and not SIZE <= value < 1 << 24:
            raise ProtocolError(f"frames of {value} bytes are not allowed")
    return pairs


def window_update(stream: int, more: int) -> bytes:
    """Returns the frame that lets the peer send more bytes."""
    return frame(WINDOW_UPDATE, 0, stream, _number.pack(more))


def reset(stream: int, code: Code) -> bytes:
    """Returns the frame that ends a stream."""
    return frame(RST_STREAM, 0, stream, _number.pack(code))


def goodbye(code: Code, text: str = "") -> bytes:
    """Returns the frame with which a client announces that it ends the connection, and why."""
    return frame(GOAWAY, 0, 0, _number.pack(0) + _number.pack(code) + text.encode()[:200])


def number(content: bytes, at: int = 0) -> int:
    """Returns four bytes as a number, without the reserved bit. Raises ProtocolError if they are not there."""
    if len(content) < at + 4:
        raise ProtocolError("a frame is too short for its type", Code.FRAME_SIZE_ERROR)
    return int(_number.unpack_from(content, at)[0]) & MAX_STREAM


def unpadded(flags: int, content: bytes) -> bytes:
    """Returns the content of a DATA or HEADERS frame without its padding. Raises ProtocolError."""
    if not flags & PADDED:
        return content
    if not content or content[0] >= len(content):
        raise ProtocolError("a frame has more padding than content")
    return content[1 : len(content) - content[0]]


def named(code: int) -> str:
    """Returns the name of an error code, for messages."""
    try:
        return Code(code).name
    except ValueError:
        return f"error {code}"
