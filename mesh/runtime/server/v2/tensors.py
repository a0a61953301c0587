"""A model's tensors as its file declares them, and the V2 datatypes of ONNX Runtime's types.

What callers send is checked against them in `intake`; what the model answers is written by them in `reply`.
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
"""Elements of one tensor: far above any message, and far below what overflows inside numpy or ONNX Runtime."""

MAX_TEXTS = 1 << 18
"""Texts of one request. ONNX Runtime takes them one by one with the interpreter's lock held: 20 ms for so many."""

MAX_SHAPES = 64
"""Shapes remembered per tensor. A model with more variety than that computes its heads anew, which costs 2 us."""


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
"""By the type as ONNX Runtime writes it."""


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
        self._prefix = text_field(0x0A, name.encode()) + text_field(0x12, datatype.name.encode())

    def count(self, shape: tuple[int, ...]) -> int:
        """Elements of a shape of `MAX_RANK` dimensions at most. Raises `MeshError` where this tensor cannot have it."""
        count = self._counts.get(shape)
        if count is None:
            dims, name = self.dims, brief(self.name)
            if dims is not None and (
                len(dims) != len(shape) or any(n not in (-1, m) for n, m in zip(dims, shape, strict=True))
            ):
                raise bad(f"input {name!r} has shape {list(shape)}, the model takes {list(dims)}")
            if any(n < 0 for n in shape):
                raise bad(f"input {name!r} has shape {list(shape)}: no dimension of a request is negative")
            if math.prod(max(n, 1) for n in shape) > MAX_COUNT:
                raise bad(f"input {name!r} has shape {list(shape)}: more than this server handles")
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


def names(tensors: Mapping[str, Tensor]) -> str:
    """Names for texts of errors, of the first few."""
    return ", ".join(repr(brief(name)) for name in list(tensors)[:20]) or "none"


def brief(text: str) -> str:
    """Shortens a text that somebody else has chosen, for an error that repeats it: clients take no long ones."""
    return text if len(text) <= _MAX_ECHO else f"{text[:_MAX_ECHO]}..."


_MAX_ECHO = 100  # characters
