"""The conversion of a request into a model's input.

Every refusal is INVALID_ARGUMENT, or UNIMPLEMENTED for an unsupported extension. An error about a tensor names the
tensor, what was sent, and what the model accepts, because the caller may know nothing else about the model. A request
that passes fits the model's declared inputs. Only errors inside the model are left to ONNX Runtime.

The rules that V2 leaves open: contents are raw for all inputs or typed for all; FP16 and BF16 have no typed field, so
they are raw only; BYTES are strings in ONNX, so they must be UTF-8. Unknown fields are ignored.

Requests are parsed by protobuf (upb, 0.5 us), except for the contents of large ones, which `requests` has cut out: see
`contents`. Numbers are aligned as `alignment` describes.
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mesh.pb import inference_pb2
from mesh.runtime.server.v2 import alignment, contents
from mesh.runtime.server.v2.tensors import MAX_RANK, MAX_SHAPES, MAX_TEXTS, Array, Raw, Tensor, bad, brief, names
from mesh.statuses import MeshError, Reason

Place = Callable[[Raw, tuple[int, ...], "np.dtype[Any]"], Array]
"""A function that puts bytes into an aligned array: `alignment.put`, or a `Scratch`'s."""


class Intake:
    """A model's inputs, and the conversion of a request's contents into arrays.

    Callers send the same name, datatype and shape again and again, so a valid input is remembered by its encoding.
    Encoding its few bytes again (0.14 us) and looking them up costs less than checking each field.
    """

    __slots__ = ("_known", "_needed", "tensors", "texts")

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.texts = any(tensor.kind.dtype.hasobject for tensor in tensors.values())
        """True if an input is of strings, which are read one by one."""
        self._needed = sum(not tensor.optional for tensor in tensors.values())
        self._known: dict[bytes, tuple[Tensor, tuple[int, ...], int]] = {}

    def decode(
        self,
        inputs: Any,
        raws: Sequence[Raw],
        typed: Sequence[Raw] | None = None,
        *,
        put: Place = alignment.put,
    ) -> tuple[dict[str, Array], int]:
        """Returns the model's inputs by name, and their size in bytes. Raises `MeshError`.

        `inputs` is the field of the request. `raws` are the raw contents, empty if they are typed. `typed` are the
        encoded typed contents, or None if they are in `inputs`.
        """
        count = len(inputs)
        feed: dict[str, Array] = {}
        size = 0
        if count > len(self.tensors):
            self._refuse_surplus(inputs)
        if raws:
            if len(raws) != count:
                _refuse_elsewhere(inputs)
                raise bad(f"{count} inputs have {len(raws)} raw contents: send one for each input, in order")
            if typed is not None and any(len(one) for one in typed):
                raise bad("an input has both typed and raw contents: send only one kind")
            known = self._known
            for index in range(count):
                sent = inputs[index]
                tensor, shape, elements = known.get(_encoded(sent)) or self._learn(sent)
                raw = raws[index]
                kind = tensor.kind
                if kind.plain and len(raw) == elements * kind.size:
                    feed[tensor.name] = put(raw, shape, kind.dtype)
                else:
                    feed[tensor.name] = from_raw(tensor, raw, elements, shape)
                size += len(raw)
        else:
            for index in range(count):
                sent = inputs[index]
                tensor = self._tensor(sent)
                if sent.parameters:
                    _refuse_extensions(f"input {brief(sent.name)!r}", sent.parameters)
                shape = _shape(sent)
                elements = tensor.count(shape)
                if typed is None:
                    array = from_typed(tensor, sent, elements, shape, put=put)
                else:
                    array = contents.read(tensor, typed[index], elements, shape)
                feed[tensor.name] = array
                size += array.nbytes
        if len(feed) != count:
            self._refuse_surplus(inputs)
        if (
            self.texts
            and size > MAX_TEXTS
            and sum(array.size for array in feed.values() if array.dtype.hasobject) > MAX_TEXTS
        ):
            raise bad(f"the request has more than {MAX_TEXTS} strings, the limit of a request: send fewer in a call")
        if count < len(self.tensors) and sum(not self.tensors[name].optional for name in feed) < self._needed:
            missing = [name for name, tensor in self.tensors.items() if name not in feed and not tensor.optional]
            raise bad(f"the model also needs input {', '.join(repr(brief(name)) for name in missing[:20])}")
        return feed, size

    def _refuse_surplus(self, inputs: Any) -> None:
        """Raises MeshError for a request with more inputs than the model has, because one of them is unknown or given
        twice."""
        found = set()
        for sent in inputs[: len(self.tensors) + 1]:
            name = self._tensor(sent).name
            if name in found:
                raise bad(f"input {brief(name)!r} is given twice: send it once")
            found.add(name)

    def _tensor(self, sent: inference_pb2.ModelInferRequest.InferInputTensor) -> Tensor:
        """Returns the model's input that a sent input belongs to. Raises `MeshError` if the input is unknown or has
        another datatype."""
        tensor = self.tensors.get(sent.name)
        if tensor is None:
            raise bad(f"the model has no input {brief(sent.name)!r}; it has {names(self.tensors)}")
        if sent.datatype != tensor.datatype:
            given = brief(sent.datatype) or "of no datatype"
            raise bad(f"input {brief(sent.name)!r} is {given}, but the model takes {tensor.datatype}")
        return tensor

    def _learn(self, sent: inference_pb2.ModelInferRequest.InferInputTensor) -> tuple[Tensor, tuple[int, ...], int]:
        """Checks an input with raw contents whose encoding is new. Returns the model's input, the shape, and the number
        of elements."""
        tensor = self._tensor(sent)
        if sent.HasField("contents") and sent.contents.ListFields():
            raise bad(f"input {brief(sent.name)!r} has both typed and raw contents: send only one kind")
        if sent.parameters:
            _refuse_extensions(f"input {brief(sent.name)!r}", sent.parameters)
        shape = _shape(sent)
        learnt = tensor, shape, tensor.count(shape)
        key = _encoded(sent)
        if len(self._known) < MAX_SHAPES and len(key) <= _MAX_KEY:
            self._known[key] = learnt
        return learnt


def _refuse_elsewhere(inputs: Any) -> None:
    """Raises MeshError for an input whose contents are in shared memory, which the server does not read."""
    for sent in inputs:
        _refuse_extensions(f"input {brief(sent.name)!r}", sent.parameters)


def _refuse_extensions(what: str, parameters: Mapping[str, Any]) -> None:
    """Raises MeshError for a parameter of an extension that would change how this tensor is read or answered."""
    for name in parameters:
        if name.startswith("shared_memory_"):
            text = f"{what}: {brief(name)}: the shared memory extensions are not supported, send the tensor's data"
            raise MeshError(Reason.UNSUPPORTED, text)
        if name == "classification":
            text = f"{what}: classification: the classification extension is not supported, ask for the tensor itself"
            raise MeshError(Reason.UNSUPPORTED, text)


_encoded: Callable[[Any], bytes] = inference_pb2.ModelInferRequest.InferInputTensor.SerializeToString
_MAX_KEY = 1024  # bytes of an input without contents that are worth remembering


def _shape(sent: Any) -> tuple[int, ...]:
    shape = sent.shape
    if len(shape) > MAX_RANK:
        raise bad(f"input {brief(sent.name)!r} has {len(shape)} dimensions; this server supports at most {MAX_RANK}")
    return tuple(shape)


def from_raw(tensor: Tensor, raw: Raw, count: int, shape: tuple[int, ...]) -> Array:
    """Reads raw contents as an array. Raises `MeshError`."""
    kind = tensor.kind
    if kind.dtype.hasobject:
        return contents.texts(tensor, _split_texts(tensor, raw, count), shape)
    wanted = count * kind.dtype.itemsize
    if len(raw) != wanted:
        raise bad(
            f"input {brief(tensor.name)!r} has {len(raw)} bytes of raw contents, "
            f"but shape {list(shape)} of {kind.name} takes {wanted}"
        )
    array = alignment.empty(shape, kind.dtype)
    if kind.dtype.kind == "b":  # callers may send any byte, but only 0 and 1 are booleans in memory
        np.not_equal(np.frombuffer(raw, np.uint8).reshape(shape), 0, out=array)
    elif count:
        array[...] = np.frombuffer(raw, kind.dtype).reshape(shape)
    return array


def from_typed(tensor: Tensor, sent: Any, count: int, shape: tuple[int, ...], *, put: Place = alignment.put) -> Array:
    """Converts typed contents, as protobuf has read them, into an array. Raises `MeshError`."""
    kind = tensor.kind
    if not kind.field:
        raise contents.untyped(tensor)
    given = sent.contents
    values = getattr(given, kind.field)
    if len(values) != count or len(given.ListFields()) > 1:
        raise contents.unlike(tensor, {field.name: len(values) for field, values in given.ListFields()}, shape)
    if kind.packed and count:
        encoded = given.SerializeToString()  # one field, packed: tag, length, and the array's bytes
        size = count * kind.size
        if len(encoded) - size > 1 + (size.bit_length() + 6) // 7:  # there are unknown fields too
            given.DiscardUnknownFields()
            encoded = given.SerializeToString()
        return put(encoded[-size:], shape, kind.dtype)
    if kind.dtype.hasobject:
        return contents.texts(tensor, values, shape)
    array = alignment.empty(shape, kind.dtype)
    contents.fill(tensor, array.reshape(-1), values)
    return array


def _split_texts(tensor: Tensor, raw: Raw, count: int) -> list[bytes]:
    if count > MAX_TEXTS:
        raise contents.too_many_texts(tensor, count)
    texts: list[bytes] = []
    at, end = 0, len(raw)
    while at < end and len(texts) < count:
        if at + 4 > end:
            break
        (size,) = struct.unpack_from("<I", raw, at)
        at += 4 + size
        if at > end:
            break
        texts.append(bytes(raw[at - size : at]))
    if at == end and len(texts) == count:
        return texts
    name = brief(tensor.name)
    if len(texts) == count:
        raise bad(f"input {name!r} has more elements in its raw contents than the {count} of its shape")
    if at != end:
        raise bad(f"input {name!r}: element {len(texts)} of its raw contents is truncated")
    raise bad(f"input {name!r} has {len(texts)} elements in its raw contents, but its shape takes {count}")


def requested(
    wanted: Sequence[inference_pb2.ModelInferRequest.InferRequestedOutputTensor],
    tensors: Mapping[str, Tensor],
    unsupported: Mapping[str, str],
) -> tuple[Tensor, ...]:
    """Returns the outputs that a request asks for, in the request's order. `unsupported` has the ONNX types of the
    outputs that V2 cannot carry, by name. Raises `MeshError`."""
    found: list[Tensor] = []
    for sent in wanted:
        tensor = tensors.get(sent.name)
        if tensor is None:
            if sent.name in unsupported:
                raise bad(f"output {brief(sent.name)!r} is {unsupported[sent.name]}, which V2 cannot carry")
            raise bad(f"the model has no output {brief(sent.name)!r}; it has {names(tensors)}")
        if tensor in found:
            raise bad(f"output {brief(sent.name)!r} is requested twice: request it once")
        if sent.parameters:
            _refuse_extensions(f"output {brief(sent.name)!r}", sent.parameters)
        found.append(tensor)
    return tuple(found)
