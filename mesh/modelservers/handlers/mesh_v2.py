"""The messages of V2's inference calls, read and written without a Protobuf library, which TorchServe does not bring.

This file is copied into the folder of each model of a TorchServe, whose Python imports it there. It imports nothing of
Mesh, and works with Python 3.8. A tensor is a tuple of its name, its datatype, its shape and its raw contents: bytes in
the form of V2's `raw_input_contents`.
"""

from __future__ import annotations  # for Python 3.8

import struct
from typing import TYPE_CHECKING, Any, List, Tuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Tensor = Tuple[str, str, List[int], bytes]

CODES = {
    "BOOL": "?",
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "FP16": "e",
    "FP32": "f",
    "FP64": "d",
}
"""The datatypes of numbers, and their codes in Python's module struct."""

SIZES = {**{name: struct.calcsize(f"<{code}") for name, code in CODES.items()}, "BF16": 2}
"""Bytes of one number."""

_TYPED = {
    "BOOL": 1,
    **dict.fromkeys(("INT8", "INT16", "INT32"), 2),
    "INT64": 3,
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), 4),
    "UINT64": 5,
    "FP32": 6,
    "FP64": 7,
    "BYTES": 8,
}
"""The field of InferTensorContents for each datatype."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MOST = 1 << 40  # elements of a shape; more fit into no message


class BadRequest(ValueError):
    """A request that cannot be read. The text is for the caller."""


# --- reading


def read_request(message: bytes | bytearray) -> tuple[str, str, list[Tensor], list[str], bool]:
    """Returns the parts of a ModelInferRequest: its name, its id, its input tensors, the names of the outputs that it
    asks for, and whether its contents are typed. Raises BadRequest."""
    name = number = ""
    described: list[tuple[str, str, list[int], Any]] = []
    raws: list[bytes] = []
    wanted: list[str] = []
    for field, value in _fields(memoryview(message)):
        if field == 1:
            name = _text(value)
        elif field == 3:
            number = _text(value)
        elif field == 5:
            described.append(_input(value))
        elif field == 6:
            wanted.append(_text(next((inner for at, inner in _fields(value) if at == 1), b"")))
        elif field == 7:
            raws.append(bytes(_content(value)))
    if raws and len(raws) != len(described):
        raise BadRequest(f"the request has {len(described)} inputs, but raw contents for {len(raws)}")
    tensors: list[Tensor] = []
    for place, (title, datatype, shape, contents) in enumerate(described):
        raw = raws[place] if raws else _raw(title, datatype, contents)
        _check(title, datatype, shape, raw)
        tensors.append((title, datatype, shape, raw))
    return name, number, tensors, wanted, not raws


def read_name(message: bytes | bytearray) -> str:
    """Returns the name in a ModelMetadataRequest. Raises BadRequest."""
    return "".join(_text(value) for field, value in _fields(memoryview(message)) if field == 1)


def values(datatype: str, raw: bytes) -> list[Any]:
    """Returns the elements of raw contents: a list of numbers, or of bytes."""
    if datatype == "BYTES":
        return list(_strings(raw))
    return list(struct.unpack(f"<{len(raw) // SIZES[datatype]}{CODES[datatype]}", raw))


def _input(message: Any) -> tuple[str, str, list[int], Any]:
    name = datatype = ""
    shape: list[int] = []
    contents: Any = b""
    for field, value in _fields(message):
        if field == 1:
            name = _text(value)
        elif field == 2:
            datatype = _text(value)
        elif field == 3:
            shape += _numbers(value)
        elif field == 5:
            contents = value
    return name, datatype, [_signed(one) for one in shape], contents


def _raw(name: str, datatype: str, contents: Any) -> bytes:
    """Returns typed contents as raw ones."""
    wanted = _TYPED.get(datatype)
    if wanted is None:
        text = f"{datatype} has no typed contents: send raw_input_contents" if datatype else "it has no datatype"
        raise BadRequest(f"input {name!r}: {text}")
    found = [value for field, value in _fields(memoryview(_content(contents))) if field == wanted]
    if datatype == "BYTES":
        return b"".join(struct.pack("<I", len(_content(value))) + bytes(value) for value in found)
    if datatype in ("FP32", "FP64"):
        return b"".join(bytes(_content(value)) for value in found)
    numbers = [number for value in found for number in _numbers(value)]
    if datatype.startswith("INT"):
        numbers = [_signed(number) for number in numbers]
    try:
        return struct.pack(f"<{len(numbers)}{CODES[datatype]}", *numbers)
    except struct.error:
        raise BadRequest(f"input {name!r}: a number is out of the range of {datatype}") from None


def _check(name: str, datatype: str, shape: list[int], raw: bytes) -> None:
    count = 1
    for size in shape:
        if size < 0:
            raise BadRequest(f"input {name!r}: the shape {shape} has a negative size")
        count *= size
        if count > _MOST:
            raise BadRequest(f"input {name!r}: the shape {shape[:8]} is too large")
    if datatype == "BYTES":
        found = sum(1 for _ in _strings(raw))
    elif datatype in SIZES:
        found, rest = divmod(len(raw), SIZES[datatype])
        if rest:
            raise BadRequest(f"input {name!r}: {len(raw)} bytes are not a whole number of elements of {datatype}")
    else:
        text = f"{datatype} is not a datatype of V2" if datatype else "it has no datatype"
        raise BadRequest(f"input {name!r}: {text}")
    if found != count:
        raise BadRequest(f"input {name!r}: the shape {shape} has {count} elements, but {found} were sent")


def _strings(raw: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(raw):
        end = at + 4 + int.from_bytes(raw[at : at + 4], "little")
        if at + 4 > len(raw) or end > len(raw):
            raise BadRequest("a string in the raw contents is longer than the rest of them")
        yield bytes(raw[at + 4 : end])
        at = end


def _fields(message: Any) -> Iterator[tuple[int, Any]]:
    """Yields the number of each field, and its value: an int for a varint, otherwise its bytes."""
    at, end = 0, len(_content(message))
    while at < end:
        key, at = _varint(message, at)
        kind = key & 7
        if kind == _VARINT:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if kind == _BYTES:
            length, at = _varint(message, at)
        elif kind in (_FIXED64, _FIXED32):
            length = 8 if kind == _FIXED64 else 4
        else:
            raise BadRequest(f"the request is not a message of V2: a field has the unknown wire type {kind}")
        if at + length > end:
            raise BadRequest("the request is not a message of V2: a field is longer than the rest of it")
        yield key >> 3, message[at : at + length]
        at += length


def _numbers(value: Any) -> list[int]:
    """Returns the numbers of a repeated field: one, or several that are packed."""
    if isinstance(value, int):
        return [value]
    found: list[int] = []
    at = 0
    while at < len(value):
        number, at = _varint(value, at)
        found.append(number)
    return found


def _varint(message: Any, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message) and shift < 70:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
        shift += 7
    raise BadRequest("the request is not a message of V2: a number does not end")


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number


def _content(value: Any) -> Any:
    """Returns the value of a field that holds bytes. Raises BadRequest for a number: bytes() of a number would be that
    many zeros."""
    if isinstance(value, int):
        raise BadRequest("the request is not a message of V2: a field that holds bytes is a number")
    return value


def _text(value: Any) -> str:
    try:
        return bytes(_content(value)).decode()
    except UnicodeDecodeError:
        raise BadRequest("the request is not a message of V2: a text is not UTF-8") from None


# --- writing


def response(name: str, number: str, tensors: Sequence[Tensor], typed: bool) -> bytes:
    """Returns an encoded ModelInferResponse. Its contents are typed if `typed` is true and all datatypes have typed
    contents, and raw otherwise."""
    typed = typed and all(tensor[1] in _TYPED for tensor in tensors)
    parts = [_field(1, name.encode()), _field(3, number.encode())]
    for title, datatype, shape, raw in tensors:
        inner = [_field(1, title.encode()), _field(2, datatype.encode())]
        inner.append(_field(3, b"".join(_encoded(size) for size in shape)))
        if typed:
            inner.append(_field(5, _contents(datatype, raw), always=True))
        parts.append(_field(5, b"".join(inner), always=True))
    if not typed:
        parts += [_field(6, raw, always=True) for *_, raw in tensors]
    return b"".join(parts)


def metadata(name: str, platform: str) -> bytes:
    """Returns an encoded ModelMetadataResponse."""
    return _field(1, name.encode()) + _field(3, platform.encode())


READY = b"\x08\x01"
"""An encoded ModelReadyResponse for a model that is ready. Every model with a handler is."""


def pack(datatype: str, numbers: Sequence[Any]) -> bytes:
    """Returns the raw contents of numbers, or of strings and bytes. Raises ValueError."""
    if datatype == "BYTES":
        found = [one if isinstance(one, (bytes, bytearray)) else str(one).encode() for one in numbers]
        return b"".join(struct.pack("<I", len(one)) + one for one in found)
    if datatype not in CODES:
        raise ValueError(f"{datatype!r} is not a datatype of V2 that an answer can have")
    try:
        return struct.pack(f"<{len(numbers)}{CODES[datatype]}", *numbers)
    except struct.error as error:
        raise ValueError(f"a number does not fit {datatype}: {error}") from None


def _contents(datatype: str, raw: bytes) -> bytes:
    field = _TYPED[datatype]
    if datatype == "BYTES":
        return b"".join(_field(field, one, always=True) for one in _strings(raw))
    if datatype in ("FP32", "FP64", "BOOL"):
        return _field(field, raw)
    return _field(field, b"".join(_encoded(number & 0xFFFFFFFFFFFFFFFF) for number in values(datatype, raw)))


def _field(number: int, content: bytes, always: bool = False) -> bytes:
    return b"".join((_encoded(number << 3 | _BYTES), _encoded(len(content)), content)) if content or always else b""


def _encoded(value: int) -> bytes:
    made = bytearray()
    while value > 0x7F:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    made.append(value)
    return bytes(made)
