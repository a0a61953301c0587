"""Protobuf's wire format, as far as messages are cut and written by hand here."""

from collections.abc import Iterator


def fields(message: memoryview) -> Iterator[tuple[int, int, int]]:
    """Tag, begin and end of the value of each field of an encoded message. Raises ValueError where malformed."""
    at, end = 0, len(message)
    while at < end:
        tag, at = _read_varint(message, at)
        wire = tag & 7
        if wire == 2:
            size, start = _read_varint(message, at)
        elif wire == 0:
            size, start = _read_varint(message, at)[1] - at, at
        elif wire in (1, 5):
            size, start = 8 if wire == 1 else 4, at
        else:
            raise ValueError(f"wire type {wire}")
        at = start + size
        if at > end:
            raise ValueError("truncated message")
        yield tag, start, at


def varint(value: int) -> bytes:
    """An unsigned number of at most 64 bits."""
    if value < 0x80:
        return _SMALL[value]
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


_SMALL = tuple(bytes((n,)) for n in range(128))


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("malformed number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def text_field(tag: int, encoded: bytes) -> bytes:
    """A text or bytes field; nothing where it is empty."""
    length = len(encoded)
    if length < 0x80:
        return b"%c%c%b" % (tag, length, encoded) if length else b""
    return b"%c%b%b" % (tag, varint(length), encoded)
