"""Insertion of an id, or any other text, into an encoded protobuf message at a path of field numbers.

All elements of the path except the last name embedded messages, and the last one a string. The result is the message
with that field set: earlier occurrences are removed, missing embedded messages are added, and nothing else is parsed,
copied twice or changed. The cost grows with the number of fields, not with their size. A message whose field already
has the value, which is usual, is not copied at all.
"""

from collections.abc import Iterator, Sequence

_VARINT, _FIXED64, _BYTES, _GROUP, _GROUP_ENDS, _FIXED32 = range(6)
_FIXED = {_FIXED64: 8, _FIXED32: 4}
_MAX_DEPTH = 100  # protobuf's own limit on nesting
_BEYOND = "it is not a valid protobuf message (a field is longer than the rest of the message)"


class SpliceError(ValueError):
    """A message that cannot be read, or that has another kind of field at the path."""


def splice(message: bytes, path: Sequence[int], value: bytes) -> bytes:
    """Returns the message with the string at `path` set to `value`. Raises SpliceError."""
    if len(path) == 1:
        return _set(message, path[0], value)
    return b"".join(_spliced(message, 0, len(message), tuple(path), value))


def append(message: bytes, number: int, values: Sequence[bytes]) -> bytes:
    """Returns the message with `values` added to the repeated field `number`."""
    return message + b"".join(_field(number, value) for value in values)


def drop(message: bytes, number: int) -> bytes:
    """Returns the message without the field `number`. If it does not have the field, returns the same object. Raises
    SpliceError."""
    if not any(True for _ in _fields(message, 0, len(message), number)):
        return message
    return b"".join(_without(message, 0, len(message), (number,)))


def _set(message: bytes, number: int, value: bytes) -> bytes:
    """Returns the message with the string in field `number` set. Does the same as `splice` for a path of one field, but
    in one pass."""
    wanted = number << 3 | _BYTES
    parts: list[bytes] = []
    at = kept = same = 0
    end = len(message)
    try:
        while at < end:
            begin = at
            key = message[at]
            if key < 0x80:
                at += 1
            else:
                key, at = _varint(message, at, end)
            if key & 7 == _BYTES and key > 7:
                length = message[at]
                if length < 0x80:
                    content = at + 1
                else:
                    length, content = _varint(message, at, end)
                at = content + length
            elif key > 7:
                content, at = _skipped(message, at, end, key >> 3, key & 7)
            else:
                raise SpliceError("it is not a valid protobuf message (a field has the number 0)")
            if key == wanted:
                parts.append(message[kept:begin])
                kept = at
                same += message[content:at] == value
            elif key >> 3 == number:
                raise SpliceError(f"field {number} is neither a string nor an embedded message")
    except IndexError:
        raise SpliceError("it is not a valid protobuf message (a varint is cut off)") from None
    if at > end:
        raise SpliceError(_BEYOND)
    if same and len(parts) == 1:
        return message
    return b"".join((*parts, message[kept:], _field(number, value)))


def _spliced(message: bytes, start: int, end: int, path: tuple[int, ...], value: bytes) -> list[bytes]:
    number, *rest = path
    found = [(begin, content, after, kind) for begin, content, after, kind in _fields(message, start, end, number)]
    if any(kind != _BYTES for *_, kind in found):
        raise SpliceError(f"field {number} is neither a string nor an embedded message")
    parts: list[bytes] = []
    at = start
    inner: list[bytes] = []
    for place, (begin, content, after, _) in enumerate(found):
        parts.append(message[at:begin])
        at = after
        if rest and place < len(found) - 1:
            inner.append(b"".join(_without(message, content, after, tuple(rest))))
    parts.append(message[at:end])
    if not rest:
        parts.append(_field(number, value))
        return parts
    # Several occurrences of an embedded message mean one, merged in order, so they are merged here.
    if found:
        _, content, after, _ = found[-1]
        inner += _spliced(message, content, after, tuple(rest), value)
    else:
        inner += _spliced(b"", 0, 0, tuple(rest), value)
    parts.append(_field(number, b"".join(inner)))
    return parts


def _without(message: bytes, start: int, end: int, path: tuple[int, ...]) -> list[bytes]:
    """Returns the parts of a message without the field at `path`."""
    number, *rest = path
    parts: list[bytes] = []
    at = start
    for begin, content, after, kind in _fields(message, start, end, number):
        if kind != _BYTES:
            raise SpliceError(f"field {number} is neither a string nor an embedded message")
        parts.append(message[at:begin])
        at = after
        if rest:
            parts.append(_field(number, b"".join(_without(message, content, after, tuple(rest)))))
    parts.append(message[at:end])
    return parts


def _fields(message: bytes, start: int, end: int, wanted: int) -> Iterator[tuple[int, int, int, int]]:
    """Yields, for each occurrence of a field: the offset of the field, the offsets at which its content begins and
    ends, and its wire type."""
    at = start
    while at < end:
        begin = at
        key, at = _varint(message, at, end)
        number, kind = key >> 3, key & 7
        if not number:
            raise SpliceError("it is not a valid protobuf message (a field has the number 0)")
        content, at = _skipped(message, at, end, number, kind)
        if number == wanted:
            yield begin, content, at, kind


def _skipped(message: bytes, at: int, end: int, number: int, kind: int) -> tuple[int, int]:
    """Returns the offset at which a field's content begins, and the offset at which the field ends."""
    if kind == _VARINT:
        content = at
        _, at = _varint(message, at, end)
    elif kind == _BYTES:
        length, content = _varint(message, at, end)
        at = content + length
    elif kind in _FIXED:
        content, at = at, at + _FIXED[kind]
    elif kind == _GROUP:
        content, at = at, _group_end(message, at, end, number)
    else:
        raise SpliceError(f"it is not a valid protobuf message (a field has the unknown wire type {kind})")
    if at > end:
        raise SpliceError(_BEYOND)
    return content, at


def _group_end(message: bytes, at: int, end: int, number: int) -> int:
    open_groups = [number]
    while open_groups:
        key, at = _varint(message, at, end)
        kind = key & 7
        if kind == _GROUP:
            open_groups.append(key >> 3)
            if len(open_groups) > _MAX_DEPTH:
                raise SpliceError(
                    f"it is not a valid protobuf message (its groups are nested more than {_MAX_DEPTH} deep)"
                )
        elif kind == _GROUP_ENDS:
            if open_groups.pop() != key >> 3:
                raise SpliceError("it is not a valid protobuf message (it ends a group that is not open)")
        else:
            _, at = _skipped(message, at, end, key >> 3, kind)
    return at


def _varint(message: bytes, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise SpliceError("it is not a valid protobuf message (a varint is cut off, or longer than 10 bytes)")


def _field(number: int, content: bytes) -> bytes:
    return b"".join((_encoded(number << 3 | _BYTES), _encoded(len(content)), content))


def _encoded(value: int) -> bytes:
    made = bytearray()
    while value > 0x7F:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    made.append(value)
    return bytes(made)
