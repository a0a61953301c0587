"""The conversion of an input's typed contents, numbers or strings, into an array.

Protobuf has already read the contents of a small request (`fill`, `texts`). The contents of a large request are decoded
here (`read`), 64 KiB at a time: decoding 16 MB in one piece would hold the interpreter's lock for 300 ms. The input's
shape limits the number of elements before the first is read.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from google.protobuf.message import DecodeError

from mesh.pb import inference_pb2
from mesh.runtime.server.v2 import alignment
from mesh.runtime.server.v2.tensors import MAX_TEXTS, Array, Raw, Tensor, bad, brief
from mesh.statuses import MeshError
from mesh.wire import encoding

_PIECE = 65536  # bytes
_SLACK = 1000  # unknown or empty fields that are allowed in addition to those of the elements

_FIELDS = {field.number: field for field in inference_pb2.InferTensorContents.DESCRIPTOR.fields}
_NUMBERS = {field.name: number for number, field in _FIELDS.items()}
_A_TEXT = _NUMBERS["bytes_contents"] << 3 | 2
_WIRES = {"fp32_contents": (5, 2), "fp64_contents": (1, 2), "bytes_contents": (2,)}
_ELEMENTS = {number << 3 | wire for number, field in _FIELDS.items() for wire in _WIRES.get(field.name, (0, 2))}
"""Tags that protobuf reads as elements. For protobuf, all other tags are unknown fields, even if they have the same
field number."""

_parse = inference_pb2.InferTensorContents.FromString


def untyped(tensor: Tensor) -> MeshError:
    """Returns the error for typed contents of a datatype that has no typed contents."""
    return bad(f"input {brief(tensor.name)!r}: {tensor.kind.name} has no typed contents: send raw_input_contents")


def read(tensor: Tensor, encoded: Raw, count: int, shape: tuple[int, ...]) -> Array:
    """Reads encoded contents as an array of `count` elements. Must run in a thread. Raises `MeshError`."""
    kind = tensor.kind
    if not kind.field:
        raise untyped(tensor)
    if kind.dtype.hasobject and count > MAX_TEXTS:
        raise too_many_texts(tensor, count)
    number = _NUMBERS[kind.field]
    try:
        if kind.dtype.hasobject:
            return texts(tensor, _texts(tensor, memoryview(encoded), number, count, shape), shape)
        array = alignment.empty(shape, kind.dtype)
        flat = array.reshape(-1)
        filled = 0
        for piece in _pieces(memoryview(encoded), number, count + _SLACK, fixed=bool(kind.packed and kind.size > 1)):
            values = (
                np.frombuffer(piece, kind.dtype)
                if isinstance(piece, memoryview)
                else getattr(_parse(piece), kind.field)
            )
            if filled + len(values) > count:
                raise unlike(tensor, {kind.field: filled + len(values)}, shape, more=True)
            fill(tensor, flat[filled : filled + len(values)], values)
            filled += len(values)
    except _Wrong as error:
        raise unlike(tensor, {_FIELDS[error.number].name: -1}, shape) from None
    except (DecodeError, ValueError) as error:
        raise bad(f"the contents of input {brief(tensor.name)!r} cannot be read: {error}") from error
    if filled != count:
        raise unlike(tensor, {kind.field: filled} if filled else {}, shape)
    return array


class _Wrong(Exception):
    """The error for contents in the field of another datatype."""

    def __init__(self, number: int) -> None:
        self.number = number


def _own(message: memoryview, number: int, limit: int) -> Iterator[tuple[int, int, int, int]]:
    """Yields each field of that number: the tag, the start of the field, and the start and end of its value. Raises
    `_Wrong`, ValueError."""
    before = 0
    for tag, start, end in encoding.fields(message, limit=limit):
        if tag >> 3 == number:
            yield tag, before, start, end
        elif tag in _ELEMENTS and (end > start or tag == _A_TEXT):
            raise _Wrong(tag >> 3)
        before = end


def _texts(tensor: Tensor, message: memoryview, number: int, count: int, shape: tuple[int, ...]) -> list[Raw]:
    found: list[Raw] = []
    for tag, _, start, end in _own(message, number, count + _SLACK):
        if tag & 7 == 2:
            if len(found) == count:
                raise unlike(tensor, {tensor.kind.field: count + 1}, shape, more=True)
            found.append(message[start:end])
    if len(found) != count:
        raise unlike(tensor, {tensor.kind.field: len(found)} if found else {}, shape)
    return found


def _pieces(message: memoryview, number: int, limit: int, *, fixed: bool) -> Iterator[bytes | memoryview]:
    """Yields the numbers in pieces, in order. Packed numbers of a fixed size are unchanged; others are encoded contents
    for protobuf."""
    waiting: list[Raw] = []
    size = 0
    for tag, before, start, end in _own(message, number, limit):
        if tag & 7 != 2 or end - start <= _PIECE:
            waiting.append(message[before:end])
            size += end - before
            if size < _PIECE:
                continue
        if waiting:
            yield b"".join(waiting)
            waiting, size = [], 0
        if tag & 7 == 2 and end - start > _PIECE:
            packed = message[start:end]
            if fixed:
                yield packed
            else:
                for piece in _cut(packed):
                    yield encoding.varint(tag) + encoding.varint(len(piece)) + piece
    if waiting:
        yield b"".join(waiting)


def _cut(packed: memoryview) -> Iterator[bytes]:
    """Yields varints in pieces. Raises ValueError."""
    at, end = 0, len(packed)
    while at < end:
        stop = min(at + _PIECE, end)
        while stop > at and packed[stop - 1] >= 0x80:
            stop -= 1
        if stop == at:
            raise ValueError("a number is truncated")
        yield bytes(packed[at:stop])
        at = stop


def fill(tensor: Tensor, into: Array, values: Sequence[int] | Array) -> None:
    """Writes numbers into a flat array of the same length. Raises `MeshError` for a number outside the datatype's
    range."""
    dtype = into.dtype
    if isinstance(values, np.ndarray) or dtype.itemsize >= 4 or dtype.kind == "b":
        into[:] = values if isinstance(values, np.ndarray) else np.fromiter(values, dtype, len(values))
        return
    wide = np.fromiter(values, np.int64, len(values))
    into[:] = wide.astype(dtype)
    if not np.array_equal(wide, into):
        raise bad(f"input {brief(tensor.name)!r} has values outside {tensor.kind.name}: {wide.min()} to {wide.max()}")


def texts(tensor: Tensor, values: Sequence[Raw], shape: tuple[int, ...]) -> Array:
    """Decodes UTF-8 into an array of strings. Raises `MeshError` for other bytes."""
    array = np.empty(len(values), object)
    try:
        for index, value in enumerate(values):
            array[index] = value.decode() if type(value) is bytes else str(value, "utf-8")
    except UnicodeDecodeError:
        text = f"input {brief(tensor.name)!r}: element {index} is not UTF-8, which ONNX models require"
        raise bad(text) from None
    return array.reshape(shape)


def unlike(tensor: Tensor, given: Mapping[str, int], shape: tuple[int, ...], *, more: bool = False) -> MeshError:
    """Returns the error for contents that do not fit the shape. `given` is the number of elements in each field, or -1
    if it is unknown. With `more`, the number is a minimum."""
    name, kind = brief(tensor.name), tensor.kind
    count = int(np.prod(shape, dtype=object))
    what = ", ".join(f"{'some' if number < 0 else number} {field}" for field, number in given.items())
    return bad(
        f"input {name!r} has {'at least ' if more else ''}{what or 'no contents'}, "
        f"but shape {list(shape)} of {kind.name} takes {count} {kind.field}"
    )


def too_many_texts(tensor: Tensor, count: int) -> MeshError:
    """Returns the error for a shape with more strings than a request may have."""
    return bad(
        f"input {brief(tensor.name)!r} has {count} strings; a request may have {MAX_TEXTS}: send fewer in a call"
    )
