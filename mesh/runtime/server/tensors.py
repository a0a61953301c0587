"""V2 tensors and numpy arrays: what a request carries into arrays, what a model answers into a reply.

Every refusal is INVALID_ARGUMENT and names the tensor, what was sent and what the model takes, because the caller sees
nothing else of the model. Whatever passes here fits the model's declared inputs; only what the model itself cannot do
with it is left to ONNX Runtime.

The rules where V2 leaves room:
- Contents are raw for all inputs or typed for all. FP16 and BF16 have no typed field, so they are raw only.
- The reply is raw if the request was (or had no inputs), typed otherwise; but if any output asked for is FP16 or BF16
  the whole reply is raw, because a reply does not mix the two.
- BYTES are texts in ONNX: they must be UTF-8.
- Without `outputs` in the request, all outputs that V2 can carry are answered.

Requests are parsed by protobuf (upb, 0.5 us). Replies are written by hand: the head of an output (name, datatype,
shape) is kept per shape, contents are joined to it as they lie in memory, once. Measured for two small outputs: 1.7 us,
where protobuf takes 3.9; and a large output is copied once instead of four times. The same trick reads packed typed
contents: on the wire they are the array.
"""

import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mesh.pb import inference_pb2
from mesh.statuses import MeshError, Reason

Array = npt.NDArray[Any]
Raw = bytes | memoryview

MAX_RANK = 32
MAX_COUNT = 1 << 40
"""Elements of one tensor: far above any message, and far below what overflows inside numpy or ONNX Runtime."""

MAX_SHAPES = 64
"""Shapes remembered per tensor. A model with more variety than that computes its heads anew, which costs 2 us."""


@dataclass(frozen=True, slots=True)
class Datatype:
    """One datatype of V2."""

    name: str
    onnx: str  # as ONNX Runtime writes it
    dtype: np.dtype[Any]  # of the arrays; BF16 travels as its 16 bits
    size: int  # bytes of an element; 0: it varies
    plain: bool  # raw contents are the array as it is in memory
    field: str  # of InferTensorContents; "" where there is none
    packed: int  # the tag of that field, where packed contents are byte by byte the array; else 0


def _datatype(name: str, onnx: str, dtype: Any, field: str, packed: int = 0) -> Datatype:
    kind = np.dtype(dtype)
    size = 0 if kind.hasobject else kind.itemsize
    return Datatype(name, f"tensor({onnx})", kind, size, kind.kind not in "bO", field, packed)


DATATYPES = (
    _datatype("BOOL", "bool", np.bool_, "bool_contents", 0x0A),
    _datatype("UINT8", "uint8", np.uint8, "uint_contents"),
    _datatype("UINT16", "uint16", np.uint16, "uint_contents"),
    _datatype("UINT32", "uint32", np.uint32, "uint_contents"),
    _datatype("UINT64", "uint64", np.uint64, "uint64_contents"),
    _datatype("INT8", "int8", np.int8, "int_contents"),
    _datatype("INT16", "int16", np.int16, "int_contents"),
    _datatype("INT32", "int32", np.int32, "int_contents"),
    _datatype("INT64", "int64", np.int64, "int64_contents"),
    _datatype("FP16", "float16", np.float16, ""),
    _datatype("BF16", "bfloat16", np.uint16, ""),
    _datatype("FP32", "float", np.float32, "fp32_contents", 0x32),
    _datatype("FP64", "double", np.float64, "fp64_contents", 0x3A),
    _datatype("BYTES", "string", object, "bytes_contents"),
)
OF_ONNX: Mapping[str, Datatype] = {datatype.onnx: datatype for datatype in DATATYPES}


class Tensor:
    """An input or output of a model as its file declares it, and the shapes seen of it so far."""

    __slots__ = ("_counts", "_heads", "_prefix", "datatype", "dims", "kind", "name", "optional", "shape")

    def __init__(
        self, name: str, datatype: Datatype, shape: Sequence[int | str | None] | None, *, optional: bool = False
    ) -> None:
        self.name = name
        self.kind = datatype
        self.datatype = datatype.name
        self.optional = optional
        # ONNX Runtime says [] of a scalar and of an unknown rank alike: both take any shape here, the model decides.
        self.dims: tuple[int, ...] | None = tuple(n if isinstance(n, int) else -1 for n in shape) if shape else None
        self.shape: tuple[int, ...] = self.dims or ()
        self._counts: dict[tuple[int, ...], int] = {}
        self._heads: dict[tuple[int, ...], tuple[bytes, bytes]] = {}
        self._prefix = _text_field(0x0A, name.encode()) + _text_field(0x12, datatype.name.encode())

    def count(self, shape: tuple[int, ...]) -> int:
        """Elements of that shape. Raises `MeshError` where this tensor cannot have it."""
        count = self._counts.get(shape)
        if count is None:
            dims = self.dims
            if dims is not None and (
                len(dims) != len(shape) or any(n not in (-1, m) for n, m in zip(dims, shape, strict=True))
            ):
                raise bad(f"input {self.name!r} has shape {list(shape)}, the model takes {list(dims)}")
            if any(n < 0 for n in shape):
                raise bad(f"input {self.name!r} has shape {list(shape)}: no dimension of a request is negative")
            if len(shape) > MAX_RANK or math.prod(max(n, 1) for n in shape) > MAX_COUNT:
                raise bad(f"input {self.name!r} has shape {list(shape)[:MAX_RANK]}: more than this server handles")
            count = math.prod(shape)
            if len(self._counts) < MAX_SHAPES:
                self._counts[shape] = count
        return count

    def head(self, shape: tuple[int, ...]) -> tuple[bytes, bytes]:
        """An output of that shape without contents: the inside of its message, and the whole field of the reply."""
        found = self._heads.get(shape)
        if found is None:
            packed = b"".join(map(varint, shape))
            inside = self._prefix + (b"\x1a" + varint(len(packed)) + packed if packed else b"")
            found = inside, b"\x2a" + varint(len(inside)) + inside
            if len(self._heads) < MAX_SHAPES:
                self._heads[shape] = found
        return found


def bad(text: str) -> MeshError:
    """The caller's mistake."""
    return MeshError(Reason.BAD_REQUEST, text)


# -- from requests


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


def split(message: memoryview) -> tuple[bytes, list[Raw]]:
    """An encoded ModelInferRequest without its raw contents, and those, uncopied. Raises ValueError where malformed.

    For large requests: protobuf would copy the contents twice.
    """
    rest = []
    raws: list[Raw] = []
    before = 0
    for tag, start, end in fields(message):
        if tag == 0x3A:
            raws.append(message[start:end])
        else:
            rest.append(message[before:end])
        before = end
    return b"".join(rest), raws


class Intake:
    """A model's inputs, and how to make arrays of what a request carries for them.

    Callers send the same name, datatype and shape again and again, so what was found good once is kept by its encoding:
    writing the few bytes anew (0.14 us) and looking them up costs less than reading and checking the fields one by one.
    """

    __slots__ = ("_known", "_needed", "tensors")

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self._needed = sum(not tensor.optional for tensor in tensors.values())
        self._known: dict[bytes, tuple[Tensor, tuple[int, ...], int]] = {}

    def decode(self, inputs: Any, raws: Sequence[Raw]) -> tuple[dict[str, Array], int]:
        """What the model is fed, by name, and its size in bytes. Raises `MeshError`.

        `inputs` is the field of the request; `raws` its raw contents, empty where they are typed.
        """
        count = len(inputs)
        feed: dict[str, Array] = {}
        size = 0
        if raws:
            if len(raws) != count:
                raise bad(f"{count} inputs have {len(raws)} raw contents: one each, in order")
            known = self._known
            for index in range(count):
                sent = inputs[index]
                tensor, shape, elements = known.get(_encoded(sent)) or self._learn(sent)
                raw = raws[index]
                kind = tensor.kind
                if kind.plain and len(raw) == elements * kind.size and type(raw) is bytes:
                    feed[tensor.name] = np.ndarray(shape, kind.dtype, raw)
                else:
                    feed[tensor.name] = from_raw(tensor, raw, elements, shape)
                size += len(raw)
        else:
            for index in range(count):
                sent = inputs[index]
                tensor = self._tensor(sent)
                shape = tuple(sent.shape)
                array = feed[tensor.name] = from_typed(tensor, sent, tensor.count(shape), shape)
                size += array.nbytes
        if len(feed) != count:
            raise bad(f"an input is given twice: {', '.join(sent.name for sent in inputs)}")
        if count < len(self.tensors) and sum(not self.tensors[name].optional for name in feed) < self._needed:
            missing = [name for name, tensor in self.tensors.items() if name not in feed and not tensor.optional]
            raise bad(f"the model also needs input {', '.join(map(repr, missing))}")
        return feed, size

    def _tensor(self, sent: inference_pb2.ModelInferRequest.InferInputTensor) -> Tensor:
        """The input that is meant, if it has the right type."""
        tensor = self.tensors.get(sent.name)
        if tensor is None:
            raise bad(f"the model has no input {sent.name!r}; it has {_names(self.tensors)}")
        if sent.datatype != tensor.datatype:
            raise bad(f"input {sent.name!r} is {sent.datatype or 'of no datatype'}, the model takes {tensor.datatype}")
        return tensor

    def _learn(self, sent: inference_pb2.ModelInferRequest.InferInputTensor) -> tuple[Tensor, tuple[int, ...], int]:
        """An input with raw contents that was not sent like this before: which, its shape, and how many elements."""
        tensor = self._tensor(sent)
        if sent.HasField("contents") and sent.contents.ListFields():
            raise bad(f"input {sent.name!r} has typed contents beside raw ones")
        shape = tuple(sent.shape)
        learnt = tensor, shape, tensor.count(shape)
        key = _encoded(sent)
        if len(self._known) < MAX_SHAPES and len(key) <= _MAX_KEY:
            self._known[key] = learnt
        return learnt


_encoded: Callable[[Any], bytes] = inference_pb2.ModelInferRequest.InferInputTensor.SerializeToString
_MAX_KEY = 1024  # bytes of an input without contents that are worth remembering


def from_raw(tensor: Tensor, raw: Raw, count: int, shape: tuple[int, ...]) -> Array:
    """Raw contents as an array, uncopied where the memory allows it. Raises `MeshError`."""
    kind = tensor.kind
    if kind.dtype.hasobject:
        return _texts(tensor, _split_texts(tensor, raw, count), shape)
    wanted = count * kind.dtype.itemsize
    if len(raw) != wanted:
        raise bad(
            f"input {tensor.name!r} has {len(raw)} bytes of raw contents, "
            f"shape {list(shape)} of {kind.name} takes {wanted}"
        )
    if not count:
        return np.empty(shape, kind.dtype)
    if kind.dtype.kind == "b":  # any byte may come, and only 0 and 1 are booleans in memory
        return np.not_equal(np.frombuffer(raw, np.uint8), 0).reshape(shape)
    return _aligned(np.frombuffer(raw, kind.dtype).reshape(shape))


def from_typed(
    tensor: Tensor,
    sent: inference_pb2.ModelInferRequest.InferInputTensor,
    count: int,
    shape: tuple[int, ...],
) -> Array:
    """Typed contents as an array. Raises `MeshError`."""
    kind = tensor.kind
    if not kind.field:
        raise bad(f"input {tensor.name!r}: {kind.name} has no typed contents, send raw_input_contents")
    contents = sent.contents
    values = getattr(contents, kind.field)
    if len(values) != count or len(contents.ListFields()) > 1:
        given = ", ".join(f"{len(values)} {field.name}" for field, values in contents.ListFields()) or "no contents"
        raise bad(f"input {tensor.name!r} has {given}, shape {list(shape)} of {kind.name} takes {count} {kind.field}")
    if not count:
        return np.empty(shape, kind.dtype)
    if kind.packed:
        encoded = contents.SerializeToString()  # one field, packed: tag, length, and the array as it is
        begin = len(encoded) - count * kind.dtype.itemsize
        return _aligned(np.frombuffer(encoded, kind.dtype, offset=begin).reshape(shape))
    if kind.dtype.hasobject:
        return _texts(tensor, values, shape)
    if kind.dtype.itemsize >= 4:
        return np.fromiter(values, kind.dtype, count).reshape(shape)
    wide = np.fromiter(values, np.int64, count)
    narrow = wide.astype(kind.dtype)
    if not np.array_equal(wide, narrow):
        raise bad(f"input {tensor.name!r} has values that are no {kind.name}: {wide.min()} to {wide.max()}")
    return narrow.reshape(shape)


def _aligned(array: Array) -> Array:
    """ONNX Runtime uses an array's memory as it is, and its kernels may trust the alignment of the element type."""
    return array if array.flags.aligned else array.copy()


def _split_texts(tensor: Tensor, raw: Raw, count: int) -> list[bytes]:
    texts = []
    at, end = 0, len(raw)
    while at < end:
        if at + 4 > end:
            break
        (size,) = struct.unpack_from("<I", raw, at)
        at += 4 + size
        if at > end:
            break
        texts.append(bytes(raw[at - size : at]))
    if at != end:
        raise bad(f"input {tensor.name!r}: element {len(texts)} of its raw contents is truncated")
    if len(texts) != count:
        raise bad(f"input {tensor.name!r} has {len(texts)} elements in its raw contents, its shape takes {count}")
    return texts


def _texts(tensor: Tensor, values: Sequence[bytes], shape: tuple[int, ...]) -> Array:
    array = np.empty(len(values), object)
    try:
        for index, value in enumerate(values):
            array[index] = value.decode()
    except UnicodeDecodeError:
        raise bad(f"input {tensor.name!r}: element {index} is not UTF-8, and texts of ONNX models are") from None
    return array.reshape(shape)


def requested(
    wanted: Sequence[inference_pb2.ModelInferRequest.InferRequestedOutputTensor],
    tensors: Mapping[str, Tensor],
    unsupported: Mapping[str, str],
) -> tuple[Tensor, ...]:
    """The outputs that a request asks for, in its order. `unsupported`: outputs of other ONNX types, by name."""
    found = []
    for sent in wanted:
        tensor = tensors.get(sent.name)
        if tensor is None:
            if sent.name in unsupported:
                raise bad(f"output {sent.name!r} is {unsupported[sent.name]}, which V2 cannot carry")
            raise bad(f"the model has no output {sent.name!r}; it has {_names(tensors)}")
        for parameter in ("classification", "shared_memory_region"):
            if parameter in sent.parameters:
                raise bad(f"output {sent.name!r}: the parameter {parameter!r} is not supported")
        found.append(tensor)
    if len(set(found)) != len(found):
        raise bad(f"an output is asked for twice: {', '.join(tensor.name for tensor in found)}")
    return tuple(found)


# -- into replies


class Answer:
    """The outputs that some requests ask for, and how to write replies of them.

    All of a reply but its contents and its `id` follows from the shapes of the arrays, so it is kept for each
    combination of them, except where the length of the contents does not follow from the shape (BYTES).
    """

    __slots__ = ("_known", "_model", "_raw_only", "_texts", "names", "tensors")

    def __init__(self, model_id: str, tensors: Sequence[Tensor]) -> None:
        self.tensors = tuple(tensors)
        self.names = [tensor.name for tensor in tensors]
        self._model = _text_field(0x0A, model_id.encode())
        self._raw_only = any(not tensor.kind.field for tensor in tensors)
        self._texts = any(tensor.kind.dtype.hasobject for tensor in tensors)
        # By shapes: a whole reply up to its contents where it has no id; the part of that after the id; tag and length
        # of each contents; bytes of the message without an id.
        self._known: dict[tuple[tuple[int, ...], ...], tuple[bytes, bytes, tuple[bytes, ...], int]] = {}

    def encode(self, arrays: Sequence[Array], request_id: bytes, *, raw: bool) -> bytes:
        """A framed ModelInferResponse. Raises `MeshError` where the model answered what V2 cannot carry."""
        if not raw and not self._raw_only:
            return self._typed(arrays, request_id)
        shapes = tuple([array.shape for array in arrays])
        start, heads, tags, size = self._known.get(shapes) or self._learn(shapes, arrays)
        if request_id:
            field = _text_field(0x1A, request_id)
            size += len(field)
            parts: list[Raw] = [_PREFIX(0, size), self._model, field, heads]
        else:
            parts = [start]
        if size < _LARGE:
            for tag, array in zip(tags, arrays, strict=True):
                parts += (tag, array.tobytes())
        else:
            for tag, array in zip(tags, arrays, strict=True):
                parts += (tag, _memory(array))
        frame = b"".join(parts)
        if len(frame) != size + 5:  # texts, or arrays of another type than the model's file says
            return self._unlike(arrays, request_id)
        return frame

    def _learn(
        self, shapes: tuple[tuple[int, ...], ...], arrays: Sequence[Array]
    ) -> tuple[bytes, bytes, tuple[bytes, ...], int]:
        heads = b"".join([tensor.head(shape)[1] for tensor, shape in zip(self.tensors, shapes, strict=True)])
        lengths = [array.size * tensor.kind.size for tensor, array in zip(self.tensors, arrays, strict=True)]
        tags = tuple([b"\x32" + varint(length) for length in lengths])
        size = len(self._model) + len(heads) + sum(map(len, tags)) + sum(lengths)
        learnt = _PREFIX(0, size) + self._model + heads, heads, tags, size
        if not self._texts and len(self._known) < MAX_SHAPES:
            for tensor, array in zip(self.tensors, arrays, strict=True):
                _check(tensor, array)
            self._known[shapes] = learnt
        return learnt

    def _unlike(self, arrays: Sequence[Array], request_id: bytes) -> bytes:
        """A raw reply whose length does not follow from the shapes."""
        parts: list[Raw] = [tensor.head(array.shape)[1] for tensor, array in zip(self.tensors, arrays, strict=True)]
        for tensor, array in zip(self.tensors, arrays, strict=True):
            contents = to_raw(tensor, array)
            parts.append(b"\x32" + varint(len(contents)))
            parts.append(contents)
        return self._framed(parts, request_id)

    def _typed(self, arrays: Sequence[Array], request_id: bytes) -> bytes:
        parts: list[Raw] = []
        for tensor, array in zip(self.tensors, arrays, strict=True):
            inside = tensor.head(array.shape)[0]
            contents = to_typed(tensor, array)
            length = varint(len(contents))
            parts.append(b"\x2a" + varint(len(inside) + 1 + len(length) + len(contents)))
            parts.append(inside)
            parts.append(b"\x2a" + length)
            parts.append(contents)
        return self._framed(parts, request_id)

    def _framed(self, parts: list[Raw], request_id: bytes) -> bytes:
        parts = [self._model, _text_field(0x1A, request_id), *parts]
        return b"".join([_PREFIX(0, sum(map(len, parts))), *parts])


_LARGE = 65536
"""Bytes of contents from which on they are joined from where they lie, without a copy in between."""

_PREFIX = struct.Struct(">BI").pack


def _check(tensor: Tensor, array: Array) -> None:
    if array.dtype != tensor.kind.dtype:
        raise MeshError(
            Reason.INTERNAL, f"output {tensor.name!r} came as {array.dtype}, the model's file says {tensor.kind.onnx}"
        )


def _memory(array: Array) -> Raw:
    """The contents of an array; its own memory where it is large."""
    if array.nbytes < _LARGE or not array.flags.c_contiguous:
        return array.tobytes()
    return array.data.cast("B")


def to_raw(tensor: Tensor, array: Array) -> Raw:
    """An array as raw contents; its own memory where it is large."""
    _check(tensor, array)
    if array.dtype.hasobject:
        texts = [text.encode() for text in array.ravel().tolist()]
        return b"".join([part for text in texts for part in (struct.pack("<I", len(text)), text)])
    return _memory(array)


def to_typed(tensor: Tensor, array: Array) -> Raw:
    """An array as an encoded InferTensorContents."""
    kind = tensor.kind
    _check(tensor, array)
    if not array.size:
        return b""
    if kind.packed:
        contents = array.tobytes()
        return b"".join((bytes((kind.packed,)), varint(len(contents)), contents))
    values = array.ravel().tolist()
    if array.dtype.hasobject:
        values = [text.encode() for text in values]
    return _CONTENTS(**{kind.field: values}).SerializeToString()


_CONTENTS: Callable[..., inference_pb2.InferTensorContents] = inference_pb2.InferTensorContents


def _names(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name!r}" for name in list(tensors)[:50]) or "none"


# -- protobuf's wire format


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


def _text_field(tag: int, encoded: bytes) -> bytes:
    length = len(encoded)
    if length < 0x80:
        return b"%c%c%b" % (tag, length, encoded) if length else b""
    return b"%c%b%b" % (tag, varint(length), encoded)
