"""Tensors of the V2 protocol as numpy arrays: from a request's JSON, from .npy files, generated, and to and from gRPC.

Every answer of the mesh can be shown. An input that cannot be sent is refused with a text that says what is wrong.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mesh.cli.exits import CommandError, Exit
from mesh.pb import inference_pb2
from mesh.v2.datatypes import DATATYPES, OF_NAME

Array = np.ndarray[Any, np.dtype[Any]]

BF16 = np.dtype([("bf16", "<u2")])
"""numpy's type for BF16, which numpy lacks: 16 bits, distinguished from integers by the field's name."""

DTYPES = {kind.name: BF16 if kind.name == "BF16" else kind.dtype for kind in DATATYPES}

_NAMES = {dtype: name for name, dtype in DTYPES.items() if name != "BYTES"}

_SIZE = "binary_data_size"

MAX_ELEMENTS = 2**28
"""Largest number of elements of a generated input: a mistyped shape must not exhaust the machine's memory."""


def usage(text: str) -> CommandError:
    """Returns a usage error for input that cannot be sent."""
    return CommandError(text, code=Exit.USAGE, reason="BAD_REQUEST")


def datatype(name: str, array: Array) -> str:
    """Returns the V2 datatype of the array of an input. Raises CommandError if V2 has none for it."""
    if array.dtype.kind in "OSU":
        return "BYTES"
    try:
        return _NAMES[array.dtype.newbyteorder("=")]
    except KeyError:
        text = f"input {name}: an array of {array.dtype} cannot be sent: convert it to a datatype of V2"
        raise usage(f"{text} ({', '.join(DTYPES)})") from None


def from_json(tensor: Mapping[str, Any], number: int, what: str = "input") -> tuple[str, Array]:
    """Returns the name and the array of one input of a V2 JSON request, or of one output of an answer. `number` and
    `what` name it in errors. Raises CommandError if it is not valid."""
    try:
        name, kind, said, data = str(tensor["name"]), str(tensor["datatype"]), tensor["shape"], tensor["data"]
    except (KeyError, TypeError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else "it is not an object"
        raise usage(f"{what} {number}: {why}; each {what} needs name, datatype, shape and data") from error
    try:
        shape = tuple(int(n) for n in said)
    except (TypeError, ValueError) as error:
        raise usage(f"{what} {name}: its shape must be a list of whole numbers") from error
    if kind not in DTYPES:
        raise usage(f"{what} {name}: the datatype {kind!r} is unknown; V2 has {', '.join(DTYPES)}")
    try:
        if kind == "BYTES":
            flat = list(_flatten(data))
            array = np.empty(len(flat), dtype=np.object_)
            array[:] = [value.encode() if isinstance(value, str) else bytes(value) for value in flat]
        elif kind == "BF16":
            array = _to_bf16(np.asarray(data, np.float32))
        else:
            array = np.asarray(data, dtype=DTYPES[kind])
        return name, array.reshape(shape)
    except (TypeError, ValueError, OverflowError) as error:
        raise usage(f"{what} {name}: its data does not fit {kind} {list(shape)}: {error}") from error


def to_rest(name: str, array: Array) -> tuple[dict[str, Any], bytes]:
    """Returns an array as one input of a V2 REST request: the input's JSON, and binary data if JSON cannot represent
    the array."""
    kind = datatype(name, array)
    if OF_NAME[kind].field:
        return to_json(name, array), b""
    raw = _raw(kind, array)
    return {"name": name, "datatype": kind, "shape": list(array.shape), "parameters": {_SIZE: len(raw)}}, raw


def to_json(name: str, array: Array) -> dict[str, Any]:
    """Returns an array as one input of a V2 JSON request. Raises CommandError for bytes that are not UTF-8."""
    kind = datatype(name, array)
    try:
        data = [_bytes(v).decode() for v in array.reshape(-1)] if kind == "BYTES" else shown(array).reshape(-1).tolist()
    except UnicodeDecodeError as error:
        raise usage(f"input {name}: bytes that are not UTF-8 cannot be sent as JSON: leave out --rest") from error
    return {"name": name, "datatype": kind, "shape": list(array.shape), "data": data}


def to_grpc(model: str, inputs: Mapping[str, Array], outputs: Sequence[str] = ()) -> inference_pb2.ModelInferRequest:
    """Returns a V2 gRPC request with raw contents."""
    request = inference_pb2.ModelInferRequest(model_name=model)
    for name, array in inputs.items():
        kind = datatype(name, array)
        request.inputs.add(name=name, datatype=kind, shape=array.shape)
        request.raw_input_contents.append(_raw(kind, array))
    for name in outputs:
        request.outputs.add(name=name)
    return request


def from_grpc(response: inference_pb2.ModelInferResponse) -> dict[str, Array]:
    """Returns the outputs of a V2 gRPC answer, whose contents are raw or typed."""
    made: dict[str, Array] = {}
    for number, tensor in enumerate(response.outputs):
        if number < len(response.raw_output_contents):
            flat = _from_raw(tensor.datatype, response.raw_output_contents[number])
        else:
            kind = OF_NAME.get(tensor.datatype)
            values = getattr(tensor.contents, (kind and kind.field) or "bytes_contents")
            flat = (
                _object_array(list(values)) if tensor.datatype == "BYTES" else np.array(values, _dtype(tensor.datatype))
            )
        made[tensor.name] = flat.reshape(tuple(tensor.shape))
    return made


def from_rest(answer: Mapping[str, Any], data: bytes = b"") -> dict[str, Array]:
    """Returns the outputs of a V2 REST answer, given its JSON and the binary data after it."""
    made: dict[str, Array] = {}
    at = 0
    for number, tensor in enumerate(answer.get("outputs", ()), start=1):
        size = (tensor.get("parameters") or {}).get(_SIZE)
        if size is None:
            name, array = from_json(tensor, number, "output")
            made[name] = array
        else:
            flat = _from_raw(str(tensor["datatype"]), data[at : at + size])
            made[str(tensor["name"])] = flat.reshape(tuple(tensor["shape"]))
            at += size
    return made


def shown(array: Array) -> Array:
    """Returns the array in a form that can be printed. BF16 becomes FP32."""
    return (array["bf16"].astype(np.uint32) << 16).view(np.float32) if array.dtype == BF16 else array


def read_npy(assignment: str) -> tuple[str, Array]:
    """Parses `NAME=FILE.npy`, and returns the name and the array in the file. Raises CommandError."""
    name, equals, path = assignment.partition("=")
    if not equals or not name:
        raise usage(f"{assignment!r} does not name an input: write NAME=FILE.npy")
    try:
        array = np.load(Path(path), allow_pickle=False)
    except OSError as error:
        raise usage(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError):
        array = None  # NumPy's text would advise to allow pickles
    if not isinstance(array, np.ndarray):
        raise usage(f"{path} is not a .npy file with an array of numbers or text: save the array with numpy.save")
    return name, array


def parse_shape(assignment: str) -> tuple[str, tuple[int, ...]]:
    """Parses `NAME=1,3,224,224` into a name and a shape. Raises CommandError."""
    name, equals, text = assignment.partition("=")
    try:
        if not equals or not name:
            raise ValueError
        shape = tuple(int(part) for part in text.split(",") if part.strip())
        if any(n < 0 for n in shape):
            raise ValueError
    except ValueError:
        raise usage(f"{assignment!r}: write NAME=1,3,224,224") from None
    return name, shape


def made_up(
    inputs: Sequence[Mapping[str, Any]], *, rows: int, shapes: Mapping[str, tuple[int, ...]], random: bool, seed: int
) -> dict[str, Array]:
    """Returns an array for each input in the model's metadata: zeros, or random values determined by the seed.

    Unless `shapes` says otherwise, a variable first dimension becomes `rows`, and other variable dimensions become 1.
    """
    unknown = set(shapes) - {str(tensor.get("name")) for tensor in inputs}
    if unknown:
        names = ", ".join(str(tensor.get("name")) for tensor in inputs)
        raise usage(f"the model has no input {', '.join(sorted(unknown))}: it has {names}")
    generator = np.random.default_rng(seed)
    made: dict[str, Array] = {}
    for tensor in inputs:
        name, kind = str(tensor["name"]), str(tensor["datatype"])
        declared = [int(n) for n in tensor.get("shape", ())]
        variable = tuple(n if n >= 0 else rows if i == 0 else 1 for i, n in enumerate(declared))
        shape = shapes.get(name, variable)
        count = int(np.prod(shape, dtype=np.float64))
        if count > MAX_ELEMENTS:
            raise usage(f"input {name} of shape {list(shape)} has {count} elements: give its data with --npy or --file")
        made[name] = _values(kind, count, generator if random else None).reshape(shape)
    return made


def _values(kind: str, count: int, generator: np.random.Generator | None) -> Array:
    dtype = _dtype(kind)
    if kind == "BYTES":
        return _object_array([b"" if generator is None else generator.bytes(4).hex().encode() for _ in range(count)])
    if generator is None:
        return np.zeros(count, dtype)
    if kind == "BOOL":
        return generator.integers(0, 2, count).astype(np.bool_)
    if dtype == BF16:
        return _to_bf16(generator.standard_normal(count).astype(np.float32))
    if np.issubdtype(dtype, np.integer):
        return generator.integers(0, 10, count).astype(dtype)  # small: they are often indices
    return generator.standard_normal(count).astype(dtype)


def _dtype(kind: str) -> np.dtype[Any]:
    try:
        return DTYPES[kind]
    except KeyError:
        raise CommandError(f"this version of mesh does not know the datatype {kind!r}: use a newer one") from None


def _to_bf16(array: Array) -> Array:
    """Returns the upper 16 bits of each FP32 number. The lower 16 bits are dropped."""
    return (np.ascontiguousarray(array).view(np.uint32) >> 16).astype("<u2").view(BF16)


def _raw(kind: str, array: Array) -> bytes:
    if kind == "BYTES":
        return b"".join(len(e).to_bytes(4, "little") + e for e in map(_bytes, array.reshape(-1)))
    little = array if array.dtype == BF16 else array.astype(array.dtype.newbyteorder("<"), copy=False)
    return np.ascontiguousarray(little).tobytes()


def _from_raw(kind: str, raw: bytes) -> Array:
    if kind != "BYTES":
        return np.frombuffer(raw, _dtype(kind))
    elements, at = [], 0
    while at < len(raw):
        length = int.from_bytes(raw[at : at + 4], "little")
        elements.append(raw[at + 4 : at + 4 + length])
        at += 4 + length
    return _object_array(elements)


def _object_array(values: list[Any]) -> Array:
    array = np.empty(len(values), dtype=np.object_)
    array[:] = values
    return array


def _bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


def _flatten(data: Any) -> Any:
    if isinstance(data, list):
        for item in data:
            yield from _flatten(item)
    else:
        yield data
