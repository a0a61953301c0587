"""A model's tensors as its file declares them, and the V2 datatypes of ONNX Runtime's types.

`intake` compares callers' inputs with them; `reply` writes the model's answers with them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy.typing as npt

from mesh.statuses import MeshError, Reason
from mesh.v2.datatypes import OF_NAME, Datatype
from mesh.wire.encoding import text_field, varint

Array = npt.NDArray[Any]
Raw = bytes | memoryview

MAX_RANK = 32
MAX_COUNT = 1 << 40
"""Largest number of elements of a tensor: more than a message can contain, and too few to overflow in numpy or ONNX
Runtime."""

MAX_TEXTS = 1 << 18
"""Maximum number of strings in a request. ONNX Runtime reads them with the interpreter's lock held: 20 ms for all."""

MAX_SHAPES = 64
"""Number of shapes that are cached for each tensor. For further shapes, heads are computed each time, in 2 us."""


_ONNX = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "bfloat16": "BF16",
    "float": "FP32",
    "double": "FP64",
    "string": "BYTES",
}

OF_ONNX: Mapping[str, Datatype] = {f"tensor({onnx})": OF_NAME[name] for onnx, name in _ONNX.items()}
"""V2's datatypes by the names of ONNX Runtime's types."""


class Tensor:
    """An input or output of a model as its file declares it, and the shapes that it has had so far."""

    __slots__ = ("_counts", "_heads", "_prefix", "datatype", "dims", "kind", "name", "optional", "shape")

    def __init__(
        self, name: str, datatype: Datatype, shape: Sequence[int | str | None] | None, *, optional: bool = False
    ) -> None:
        self.name = name
        self.kind = datatype
        self.datatype = datatype.name
        self.optional = optional
        # ONNX Runtime reports [] for a scalar and for an unknown rank: both accept any shape here, the model decides.
        self.dims: tuple[int, ...] | None = tuple(n if isinstance(n, int) else -1 for n in shape) if shape else None
        self.shape: tuple[int, ...] = self.dims or ()
        self._counts: dict[tuple[int, ...], int] = {}
        self._heads: dict[tuple[int, ...], tuple[bytes, bytes]] = {}
        self._prefix = text_field(0x0A, name.encode()) + text_field(0x12, datatype.name.encode())

    def count(self, shape: tuple[int, ...]) -> int:
        """Counts the elements of a shape of at most `MAX_RANK` dimensions. Raises `MeshError` if the tensor cannot have
        this shape."""
        count = self._counts.get(shape)
        if count is None:
            dims, name = self.dims, brief(self.name)
            if dims is not None and (
                len(dims) != len(shape) or any(n not in (-1, m) for n, m in zip(dims, shape, strict=True))
            ):
                raise bad(f"input {name!r} has shape {list(shape)}, but the model takes {list(dims)}")
            if any(n < 0 for n in shape):
                raise bad(f"input {name!r} has shape {list(shape)}: dimensions must not be negative")
            if math.prod(max(n, 1) for n in shape) > MAX_COUNT:
                raise bad(f"input {name!r} has shape {list(shape)}: the limit is {MAX_COUNT} elements")
            count = math.prod(shape)
            if len(self._counts) < MAX_SHAPES:
                self._counts[shape] = count
        return count

    def head(self, shape: tuple[int, ...]) -> tuple[bytes, bytes]:
        """Returns the encoding of an output of that shape in two forms, both without contents: the fields of its
        message, to which typed contents are added, and the whole message as a field of the reply."""
        found = self._heads.get(shape)
        if found is None:
            packed = b"".join(map(varint, shape))
            inside = self._prefix + (b"\x1a" + varint(len(packed)) + packed if packed else b"")
            found = inside, b"\x2a" + varint(len(inside)) + inside
            if len(self._heads) < MAX_SHAPES:
                self._heads[shape] = found
        return found


def bad(text: str) -> MeshError:
    """Returns the error for a caller's mistake."""
    return MeshError(Reason.BAD_REQUEST, text)


def names(tensors: Mapping[str, Tensor]) -> str:
    """Returns the first few names, for an error's text."""
    return ", ".join(repr(brief(name)) for name in list(tensors)[:20]) or "none"


def brief(text: str) -> str:
    """Shortens a string from a caller or a model so that an error can quote it: clients refuse long errors."""
    return text if len(text) <= _MAX_ECHO else f"{text[:_MAX_ECHO]}..."


_MAX_ECHO = 100  # characters
