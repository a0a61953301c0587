"""V2's datatypes: the name of each, the layout of its elements in raw contents, and the field of its typed contents.

The model server, REST, the command line and the demo all use this table. Each decides for itself what callers may send,
and which errors they get.
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
    plain: bool  # raw contents equal the array in memory
    field: str  # field of InferTensorContents; "": none, and JSON has no faithful form for it either
    packed: int  # the tag of that field if its packed contents equal the array byte by byte; else 0


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
