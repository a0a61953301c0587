"""The conversion of a tensor between its four forms: JSON data, REST's binary blob, and gRPC's raw and typed contents.

Model servers always get raw contents, the only form that can represent every datatype, so that a request can use one
form for all inputs. A REST blob consists of the same bytes. A client's declarations are not trusted: a shape is
compared with the data before either is used, so that no memory is allocated for data that never arrive.

JSON is read strictly, because a silently changed number is worse than an error. The router refuses booleans in place of
numbers, fractions in place of integers, numbers out of range, NaN and infinity, and FP16 and BF16, which JSON numbers
cannot express exactly. Some languages write every number with a point or an exponent. A JSON parser turns such a
literal into a float, which may be another number (9007199254740993.0), so integers written this way are read again,
exactly.
"""

import binascii
import contextlib
import decimal
import itertools
import math
import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mesh.pb import inference_pb2
from mesh.statuses import MeshError, Reason
from mesh.v2.datatypes import DATATYPES, OF_NAME
from router.rest import pieces

DTYPES = {kind.name: kind.dtype for kind in DATATYPES if kind.field and kind.size}
"""The datatypes that JSON can express as numbers, in raw form: little-endian, without padding."""

CODES = {kind: np.dtype(dtype).char for kind, dtype in DTYPES.items() if dtype.kind in "iuf"}
CODES |= {"INT64": "q", "UINT64": "Q"}
"""The codes of `struct` for datatypes of numbers. `struct` accepts only numbers, distinguishes integers from other
numbers, and refuses numbers out of range, without an array (64 numbers: 1.0 us instead of 5.4; 600,000: 40 ms instead
of 97)."""

_BINARY_ONLY = frozenset(kind.name for kind in DATATYPES if not kind.field)
_MAX_DIMENSION = (1 << 63) - 1  # int64 in the protocol
_EXACT = 1 << 53  # up to here a float holds every integer
_MAX_DIGITS = 30  # more than any integer datatype has
_BEYOND: int = 10**_MAX_DIGITS
_MAX_RANK = 64  # NumPy's; it also keeps the product of all dimensions, which Python does not bound, cheap


Data = list[Any] | npt.NDArray[Any]
"""JSON data for a writer that accepts arrays, so that no object is needed for each element."""


def bad(text: str) -> MeshError:
    """Returns the error for a request that the client must correct."""
    return MeshError(Reason.BAD_REQUEST, text)


def check_datatype(what: str, datatype: object) -> str:
    """Returns the datatype. Raises MeshError if the protocol does not have it. `what` names the tensor in errors, here
    and below."""
    if not isinstance(datatype, str):
        raise bad(f"{what} has no valid datatype: use one of {', '.join(OF_NAME)}")
    if datatype not in OF_NAME:
        raise bad(f"{what}: datatype {datatype!r:.100} is not one of {', '.join(OF_NAME)}")
    return datatype


def check_shape(what: str, shape: object) -> tuple[int, ...]:
    """Returns the shape. Raises MeshError if it is not a list of integers from 0 up."""
    if not isinstance(shape, list):
        raise bad(f"{what}: shape must be a list of whole numbers")
    if len(shape) > _MAX_RANK:
        raise bad(f"{what}: shape has {len(shape)} dimensions, but at most {_MAX_RANK} are allowed")
    for size in shape:
        if type(size) is not int or not 0 <= size <= _MAX_DIMENSION:
            raise bad(f"{what}: shape contains {size!r:.100}: use whole numbers from 0 to {_MAX_DIMENSION}")
    return tuple(shape)


class NotWhole(str):
    """A literal as written, if it is not an integer, or is an integer that no float represents exactly."""

    __slots__ = ()
    __repr__ = str.__str__


def whole(literal: str) -> int | NotWhole:
    """Returns the integer that a literal with a point or an exponent stands for. Returns the literal itself if it is
    not an integer, or if a float would round it. Meant for `parse_float` of `json`.

    For a number with too many digits for any integer datatype, returns an integer that no datatype can hold either.
    """
    try:
        number = decimal.Decimal(literal)
    except decimal.InvalidOperation:  # an exponent of twenty digits
        return NotWhole(literal)
    if not number:
        return 0
    if number.adjusted() < 0:
        return NotWhole(literal)
    if number.adjusted() > _MAX_DIGITS:
        return -_BEYOND if number.is_signed() else _BEYOND
    value = int(number)
    exact = decimal.Decimal(value) == number == decimal.Decimal(float(literal))
    return value if exact else NotWhole(literal)


def raw_from_json(
    what: str,
    datatype: str,
    shape: tuple[int, ...],
    data: object,
    *,
    exact: Callable[[], object] | None = None,
    base64: bool = False,
    careful: bool = True,
) -> bytes:
    """Returns the raw contents for nested or flat JSON data. Raises MeshError.

    `exact` returns the same data with `whole` applied to literals with a point or an exponent. It is called only if
    the data of an integer datatype have such literals. With `base64`, the strings of a BYTES tensor are in base64. Set
    `careful` to False if the data contain neither booleans nor infinite numbers, which can only be found one by one.
    """
    if datatype in _BINARY_ONLY:
        raise bad(f"{what}: {datatype} cannot be sent as JSON: send it as binary data")
    items = flattened(what, shape, data if isinstance(data, list) or shape else [data])
    if datatype == "BYTES":
        return _pack_encoded(what, items) if base64 else _pack_strings(what, items)
    if not careful and (code := CODES.get(datatype)) is not None:
        with contextlib.suppress(struct.error, OverflowError):  # not all are numbers of that datatype: see below
            return struct.pack(f"<{len(items)}{code}", *items)
    kinds = set(map(type, items))
    kind = DTYPES[datatype].kind
    if float in kinds and kind in "iu" and exact is not None:
        data = exact()
        items = flattened(what, shape, data if isinstance(data, list) or shape else [data])
        kinds = set(map(type, items))
    array = _BUILDERS[kind](what, datatype, items, kinds)
    return array.tobytes()


def check_raw(what: str, datatype: str, shape: tuple[int, ...], raw: pieces.Contents) -> None:
    """Checks that the bytes are a tensor of that datatype and shape. Raises MeshError."""
    elements = math.prod(shape)
    if datatype == "BYTES":
        found = _count_strings(what, raw[0] if len(raw) == 1 else b"".join(raw))
        if found != elements:
            raise bad(f"{what}: the data has {found} strings, but the shape {list(shape)} has {elements} elements")
        return
    width, size = width_of(datatype), sum(map(len, raw))
    if size != elements * width:
        raise bad(
            f"{what}: the data has {size} bytes, but {datatype} of the shape {list(shape)} takes {elements * width}"
        )


def width_of(datatype: str) -> int:
    """Returns the number of bytes of one element, or 0 for BYTES, whose elements differ in size."""
    return OF_NAME[datatype].size


def json_from_raw(what: str, datatype: str, raw: bytes | memoryview) -> Data:
    """Returns flat JSON data for raw contents. Raises MeshError: INTERNAL if the contents are malformed, BAD_REQUEST if
    JSON cannot express them."""
    if datatype in _BINARY_ONLY:
        raise _binary_only(what, f"{datatype} cannot be sent as JSON")
    if datatype == "BYTES":
        return [_utf8(what, item) for item in _unpack_strings(what, bytes(raw))]
    try:
        array = np.frombuffer(raw, DTYPES[datatype])
    except KeyError:
        text = f"{what}: the model server answered with the unknown datatype {datatype!r:.100}: check the model server"
        raise MeshError(Reason.INTERNAL, text) from None
    except ValueError as error:
        text = f"{what}: the model server sent {len(raw)} bytes, which is no whole number of {datatype} elements"
        raise MeshError(Reason.INTERNAL, f"{text}: check the model server") from error
    return _shown(what, array)


def json_from_typed(what: str, datatype: str, contents: inference_pb2.InferTensorContents) -> Data:
    """Returns flat JSON data for typed contents. Raises MeshError as `json_from_raw` does."""
    values = _typed(what, datatype, contents)
    if datatype == "BYTES":
        return [_utf8(what, item) for item in values]
    if datatype in ("FP32", "FP64"):
        return _shown(what, np.array(values, DTYPES[datatype]))
    return list(values)


def raw_from_typed(what: str, datatype: str, contents: inference_pb2.InferTensorContents) -> bytes:
    """Returns the raw contents for typed contents. Raises MeshError."""
    values = _typed(what, datatype, contents)
    if datatype == "BYTES":
        return b"".join(len(item).to_bytes(4, "little") + item for item in values)
    try:
        return np.array(values, DTYPES[datatype]).tobytes()
    except OverflowError as error:
        text = f"{what}: the model server sent a number that is out of the range of {datatype}: check the model server"
        raise MeshError(Reason.INTERNAL, text) from error


def _typed(what: str, datatype: str, contents: inference_pb2.InferTensorContents) -> Sequence[Any]:
    kind = OF_NAME.get(datatype)
    if kind is None or not kind.field:
        text = f"{what}: the model server sent typed contents of the datatype {datatype!r:.100}, for which V2 has none"
        raise MeshError(Reason.INTERNAL, f"{text}: check the model server")
    values: Sequence[Any] = getattr(contents, kind.field)
    return values


# --- JSON to arrays ---


def flattened(what: str, shape: tuple[int, ...], data: object) -> list[Any]:
    """Returns the elements in row-major order. Raises MeshError unless the data are flat, or nested exactly as the
    shape says."""
    if not isinstance(data, list):
        raise bad(f"{what}: data must be a list")
    items = data
    if len(shape) > 1 and list in set(map(type, data)):
        if len(data) != shape[0]:
            raise bad(f"{what}: data has {len(data)} rows, but its shape {list(shape)} has {shape[0]}")
        for depth, size in enumerate(shape[1:], 1):
            for item in items:
                if type(item) is not list or len(item) != size:
                    raise bad(
                        f"{what}: data is not nested like its shape {list(shape)}: dimension {depth} must have "
                        f"{size} elements everywhere"
                    )
            items = list(itertools.chain.from_iterable(items))
    elements = math.prod(shape)
    if len(items) != elements:
        raise bad(f"{what}: data has {len(items)} elements, but its shape {list(shape)} has {elements}")
    return items


def _refuse(what: str, datatype: str, items: list[Any], allowed: tuple[type, ...]) -> MeshError:
    wrong = next(item for item in items if type(item) not in allowed)
    shown = "a list" if isinstance(wrong, list) else "an object" if isinstance(wrong, dict) else f"{wrong!r:.60}"
    return bad(f"{what}: {shown} is not a valid {datatype} value")


def _booleans(what: str, datatype: str, items: list[Any], kinds: set[type]) -> npt.NDArray[Any]:
    if not kinds <= {bool, int}:
        raise _refuse(what, datatype, items, (bool, int))
    if int in kinds and not all(item in (0, 1) for item in items):
        raise bad(f"{what}: a BOOL value must be true, false, 0 or 1")
    return np.array(items, DTYPES[datatype])


def _integers(what: str, datatype: str, items: list[Any], kinds: set[type]) -> npt.NDArray[Any]:
    if not kinds <= {int, float}:
        raise _refuse(what, datatype, items, (int, float))
    if float in kinds:
        for item in items:
            # From 2**53 on, a float may differ from the integer that was written; from 2**64 on, no datatype has it.
            if type(item) is float and not (item.is_integer() and not _EXACT <= abs(item) < 1 << 64):
                raise bad(f"{what}: {item!r} is not a valid {datatype} value")
        items = [int(item) for item in items]
    bounds = np.iinfo(DTYPES[datatype])
    if items and not (bounds.min <= min(items) and max(items) <= bounds.max):
        wrong = next(item for item in items if not bounds.min <= item <= bounds.max)
        raise bad(f"{what}: {wrong!s:.60} is out of the range of {datatype}, {bounds.min} to {bounds.max}")
    return np.array(items, DTYPES[datatype])


def _floats(what: str, datatype: str, items: list[Any], kinds: set[type]) -> npt.NDArray[Any]:
    if not kinds <= {int, float}:
        raise _refuse(what, datatype, items, (int, float))
    try:
        with np.errstate(over="ignore"):
            array = np.array(items, np.float64).astype(DTYPES[datatype], copy=False)
    except OverflowError as error:
        raise bad(f"{what}: a number is out of the range of {datatype}") from error
    if not np.isfinite(array).all():  # also 1e999, which JSON's parser reads as infinity
        raise bad(f"{what}: a number is out of the range of {datatype}")
    return array


_BUILDERS = {"b": _booleans, "i": _integers, "u": _integers, "f": _floats}


# --- strings ---


def _pack_strings(what: str, items: list[Any]) -> bytes:
    parts: list[bytes] = []
    try:
        for item in items:
            if type(item) is not str:
                raise _refuse(what, "BYTES", items, (str,))
            encoded = item.encode()
            parts.append(len(encoded).to_bytes(4, "little"))
            parts.append(encoded)
    except UnicodeEncodeError as error:
        text = f"{what}: a string contains half of a surrogate pair (\\ud800 to \\udfff): send it as binary data"
        raise bad(text) from error
    return b"".join(parts)


def _pack_encoded(what: str, items: list[Any]) -> bytes:
    parts: list[bytes] = []
    for item in items:
        if type(item) is not str:
            raise _refuse(what, "BYTES", items, (str,))
        try:
            decoded = binascii.a2b_base64(item.encode("ascii"), strict_mode=True)
        except ValueError as error:  # binascii.Error, UnicodeEncodeError
            raise bad(f"{what}: {item!r:.60} is not base64, although its content_type says so") from error
        parts.append(len(decoded).to_bytes(4, "little"))
        parts.append(decoded)
    return b"".join(parts)


def _count_strings(what: str, raw: bytes | memoryview) -> int:
    count, position, end = 0, 0, len(raw)
    while position < end:
        position += 4 + int.from_bytes(raw[position : position + 4], "little")
        count += 1
    if position != end:
        raise bad(f"{what}: the binary data ends in the middle of a string")
    return count


def _unpack_strings(what: str, raw: bytes) -> list[bytes]:
    items: list[bytes] = []
    position, end = 0, len(raw)
    while position < end:
        start = position + 4
        position = start + int.from_bytes(raw[position:start], "little")
        if position > end:
            raise MeshError(
                Reason.INTERNAL,
                f"{what}: the data from the model server ends in the middle of a string: check the model server",
            )
        items.append(raw[start:position])
    return items


# --- arrays to JSON ---


def _shown(what: str, array: npt.NDArray[Any]) -> Data:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise _binary_only(what, "it holds NaN or infinite values, which JSON cannot express")
    return widened(array)


def widened(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Returns an array with the same values, in a type that the JSON writer supports."""
    kind = array.dtype.kind
    if kind == "f":
        return array.astype(np.float64, copy=False)  # all digits of a FP32's value, not the fewest that tell it apart
    return array != 0 if kind == "b" else array  # a byte other than 0 is true


def _utf8(what: str, item: bytes) -> str:
    try:
        return item.decode()
    except UnicodeDecodeError as error:
        raise _binary_only(what, "it contains bytes that are not text, which JSON cannot express") from error


def _binary_only(what: str, why: str) -> MeshError:
    return bad(f"{what}: {why}: request it with the parameter binary_data")
