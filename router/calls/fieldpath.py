"""A reader that extracts single strings from an encoded protobuf message, by a path of field numbers.

The router forwards messages as the bytes that it received, and only needs the model's id. So the reader walks the
encoding without a descriptor and stops at the string. In V2 methods the string is the first field of the message,
because encoders write fields in order.

As in ModelMesh, the *first* occurrence of each field on the path counts; protobuf would merge later ones into it.
No encoder writes a field twice unless it is repeated. How to read a handmade message that does so is the model server's
decision. Groups, for which proto3 has no fields, are skipped.
"""

from collections.abc import Sequence

MAX_FIELDS = 10_000
"""Number of fields in which the search looks before it gives up: a message of 16 MiB may have 8 million fields, at 0.15
us each."""

MAX_DEPTH = 100
"""Depth of nested groups: the limit of protobuf's own decoders."""

_LENGTH_DELIMITED, _GROUP, _GROUP_ENDS = 2, 3, 4
_FIXED = {1: 8, 5: 4}
_V2_NAME, _V2_VERSION = 0x0A, 0x12  # tags


def extract(message: bytes, path: Sequence[int], start: int = 0) -> str | None:
    """Returns the string at `path` in `message[start:]`, or None if the string or a message on the path is absent.

    Raises ValueError, and no other error, if the bytes up to that point are not a protobuf message, if the path leads
    to another wire type, or if the text is not UTF-8.
    """
    position, end = start, len(message)
    last = len(path) - 1
    for depth, number in enumerate(path):
        found = _find(message, position, end, number)
        if found is None:
            return None
        position, end = found
        if depth == last:
            break
    return message[position:end].decode()  # UnicodeDecodeError is a ValueError


def name_and_version(message: bytes, start: int = 0) -> tuple[str | None, str]:
    """Returns the name and the version in `message[start:]`, which are fields 1 and 2 of a V2 message. A missing name
    is None, a missing version is empty. Raises ValueError as `extract` does.

    The version is read only where encoders write it: directly after the name, or first if the name is missing. A search
    through all fields would slow down every call without a version.
    """
    end = len(message)
    if end - start > 2 and message[start] == _V2_NAME and message[start + 1] < 0x80:
        after = start + 2 + message[start + 1]
        if after > end:
            raise ValueError(_malformed("a field is longer than the rest of the message"))
        name: str | None = message[start + 2 : after].decode()
    else:
        found = _find(message, start, end, 1)
        name, after = (None, start) if found is None else (message[found[0] : found[1]].decode(), found[1])
    if after >= end or message[after] != _V2_VERSION:
        return name, ""
    found = _find(message, after, end, 2)
    assert found is not None
    return name, message[found[0] : found[1]].decode()


def settles(beginning: bytes) -> bool:
    """Returns whether all V2 messages with the same first bytes have the same name, and no version. `beginning` is
    expected to end with the tag after the name, or with the message."""
    return beginning[0] == _V2_NAME and beginning[1] < 0x80 and beginning[2 + beginning[1] :] != b"\x12"


def _find(message: bytes, position: int, end: int, wanted: int) -> tuple[int, int] | None:
    """Returns the start and end of the content of the first field with that number outside groups, or None if there is
    none. Raises ValueError as `extract` does."""
    groups: list[int] = []  # field numbers of the open ones; their content is skipped
    for _ in range(MAX_FIELDS):
        if position >= end:
            if groups:
                raise ValueError(_malformed("a group has no end"))
            return None
        tag = message[position]
        if tag < 0x80:
            position += 1
        else:
            tag, position = _varint(message, position, end)
        number, kind = tag >> 3, tag & 7
        if not number:
            raise ValueError(_malformed("a field has the number 0"))
        if kind == _LENGTH_DELIMITED:
            if position < end and message[position] < 0x80:
                length = message[position]
                position += 1
            else:
                length, position = _varint(message, position, end)
            if length > end - position:
                raise ValueError(_malformed("a field is longer than the rest of the message"))
            if number == wanted and not groups:
                return position, position + length
            position += length
            continue
        if number == wanted and not groups:
            raise ValueError(f"field {number}, on the path to the id, is neither a string nor a message")
        if kind == 0:
            _, position = _varint(message, position, end)
        elif kind in _FIXED:
            position += _FIXED[kind]
            if position > end:
                raise ValueError(_malformed("a field is longer than the rest of the message"))
        elif kind == _GROUP:
            groups.append(number)
            if len(groups) > MAX_DEPTH:
                raise ValueError(_malformed(f"its groups are nested more than {MAX_DEPTH} deep"))
        elif kind == _GROUP_ENDS:
            if not groups or groups.pop() != number:
                raise ValueError(_malformed("it ends a group that is not open"))
        else:
            raise ValueError(_malformed(f"a field has the unknown wire type {kind}"))
    if position < end:
        raise ValueError(f"field {wanted} is not among the first {MAX_FIELDS} fields: send it earlier in the message")
    return None


def _varint(message: bytes, position: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while position < end and shift < 70:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise ValueError(_malformed("a varint is cut off, or longer than 10 bytes"))


def _malformed(why: str) -> str:
    return f"it is not a valid protobuf message ({why})"
