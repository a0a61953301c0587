"""From a request to what a model is fed.

Every refusal is INVALID_ARGUMENT and names the tensor, what was sent and what the model takes, because the caller sees
nothing else of the model. Whatever passes here fits the model's declared inputs; only what the model itself cannot do
with it is left to onnxruntime.

The rules where V2 leaves room: contents are raw for all inputs or typed for all; FP16 and BF16 have no typed field, so
they are raw only; BYTES are texts in ONNX, so they must be UTF-8.

Requests are parsed by protobuf (upb, 0.5 us). Packed typed contents are not taken out one by one: on the wire they are
the array.
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mesh.pb import inference_pb2
from mesh.runtime.server.encoding import fields
from mesh.runtime.server.tensors import MAX_SHAPES, Array, Raw, Tensor, bad, names


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
            raise bad(f"the model has no input {sent.name!r}; it has {names(self.tensors)}")
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
            raise bad(f"the model has no output {sent.name!r}; it has {names(tensors)}")
        for parameter in ("classification", "shared_memory_region"):
            if parameter in sent.parameters:
                raise bad(f"output {sent.name!r}: the parameter {parameter!r} is not supported")
        found.append(tensor)
    if len(set(found)) != len(found):
        raise bad(f"an output is asked for twice: {', '.join(tensor.name for tensor in found)}")
    return tuple(found)
