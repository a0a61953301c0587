"""The part of protobuf's wire format that Mesh reads and writes by hand."""

from collections.abc import Iterator

MAX_FIELDS = 10_000
"""Maximum number of fields that are examined. A field costs 1 us, so no message costs more than 10 ms."""

_MAX_DEPTH = 100  # nested groups, the same limit as protobuf's


def fields(message: memoryview, *, limit: int = MAX_FIELDS) -> Iterator[tuple[int, int, int]]:
    """Yields the tag of each field of an encoded message, and the start and end of its value.

    A group, which no message of Mesh has, is yielded as one field. Raises ValueError for malformed input, or for more
    than `limit` fields.
    """
    at, end = 0, len(message)
    left = limit
    while at < end:
        if left <= 0:
            raise ValueError(f"more than {limit} fields")
        left -= 1
        tag, at = _read_varint(message, at)
        wire = tag & 7
        if wire == 2:
            size, start = _read_varint(message, at)
        elif wire == 0:
            size, start = _read_varint(message, at)[1] - at, at
        elif wire in (1, 5):
            size, start = 8 if wire == 1 else 4, at
        elif wire == 3:
            begin, left = _skip_group(message, at, tag, left)
            size, start = begin - at, at
        else:
            raise ValueError(f"a field has the wrong wire type {wire}")
        at = start + size
        if at > end:
            raise ValueError("truncated message")
        yield tag, start, at


def _skip_group(message: memoryview, at: int, tag: int, left: int) -> tuple[int, int]:
    """Finds the end of a group; also returns how many fields may still be examined."""
    open_groups = [tag]
    end = len(message)
    while open_groups:
        if left <= 0 or len(open_groups) > _MAX_DEPTH:
            raise ValueError("a group with too many fields or levels")
        left -= 1
        if at >= end:
            raise ValueError("truncated group")
        tag, at = _read_varint(message, at)
        wire = tag & 7
        if wire == 2:
            size, at = _read_varint(message, at)
            at += size
        elif wire == 0:
            _, at = _read_varint(message, at)
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        elif wire == 3:
            open_groups.append(tag)
        elif wire == 4:
            if open_groups.pop() != tag - 1:
                raise ValueError("a group ends that did not begin")
        else:
            raise ValueError(f"a field has the wrong wire type {wire}")
    return at, left


def varint(value: int) -> bytes:
    """Encodes an unsigned number of at most 64 bits as a varint."""
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
            raise ValueError("a number is malformed or truncated")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def text_field(tag: int, encoded: bytes) -> bytes:
    """Encodes a string or bytes field; returns b"" for an empty one."""
    length = len(encoded)
    if length < 0x80:
        return b"%c%c%b" % (tag, length, encoded) if length else b""
    return b"%c%b%b" % (tag, varint(length), encoded)
