"""V2's datatypes: how each is called, how its elements lie in raw contents, and which field its typed contents have.

The one table of them, for the model server, REST, the command line and the demo. What a caller may send, and which
errors there are, is theirs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Datatype:
    """One datatype of V2."""

    name: str
    dtype: np.dtype[Any]  # of arrays and raw contents, little-endian; BF16, which numpy lacks, as its 16 bits
    size: int  # bytes of an element; 0: it varies
    plain: bool  # raw contents are the array as it is in memory
    field: str  # of InferTensorContents; "": it has none, and neither has JSON a faithful form for it
    packed: int  # the tag of that field, where packed contents are byte by byte the array; else 0


def _datatype(name: str, dtype: Any, field: str, packed: int = 0) -> Datatype:
    kind = np.dtype(dtype)
    size = 0 if kind.hasobject else kind.itemsize
    return Datatype(name, kind, size, kind.kind not in "bO", field, packed)


DATATYPES = (
    _datatype("BOOL", "?", "bool_contents", 0x0A),
    _datatype("UINT8", "<u1", "uint_contents"),
    _datatype("UINT16", "<u2", "uint_contents"),
    _datatype("UINT32", "<u4", "uint_contents"),
    _datatype("UINT64", "<u8", "uint64_contents"),
    _datatype("INT8", "<i1", "int_contents"),
    _datatype("INT16", "<i2", "int_contents"),
    _datatype("INT32", "<i4", "int_contents"),
    _datatype("INT64", "<i8", "int64_contents"),
    _datatype("FP16", "<f2", ""),
    _datatype("BF16", "<u2", ""),
    _datatype("FP32", "<f4", "fp32_contents", 0x32),
    _datatype("FP64", "<f8", "fp64_contents", 0x3A),
    _datatype("BYTES", object, "bytes_contents"),
)

OF_NAME: Mapping[str, Datatype] = {datatype.name: datatype for datatype in DATATYPES}
