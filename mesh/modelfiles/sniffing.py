"""The kind of a file, recognised by its first and last bytes, for errors about files of the wrong type.

A kind is reported only if the bytes leave no doubt: a format's magic bytes, or words with which only one program begins
its files. The file's name does not count, because people rename files. `sniff` and `of_names` are pure and never raise;
`look` reads at most `HEAD` and `TAIL` bytes of one file; it also lists a folder, and reads the only visible file in it.
"""

import os
import re
import stat
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

HEAD = 4096
"""Bytes that are read from the beginning of a file."""

TAIL = 2048
"""Bytes that are read from the end of a file: the list of contents of a small zip archive, or its last entries."""

_NAMES = 1000  # names of a folder that are looked at


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of file or folder, and what can be done with it."""

    what: str  # a noun phrase with its article
    type: str = ""  # the model type under which servers take it; "": none
    todo: str = ""  # the way out, if it is not to register it with that type
    code: bool = False  # loading it runs code in it
    archive: bool = False  # it may hold a model of another kind

    @property
    def way_out(self) -> str:
        """The way out for a user who registered such a file as an ONNX model."""
        if self.todo:
            return self.todo
        if self.type:
            return f"register it with --type {self.type} if a pod's server takes that type, or export it to ONNX"
        return "export the model to ONNX"


ONNX = Kind("an ONNX model", "onnx")

_UNPACK = "unpack it, and register the model in it"
_AGAIN = "check the path, and copy the model's file there again"

EMPTY = Kind("an empty file", todo=_AGAIN)
LFS = Kind("a Git LFS pointer", todo="fetch the file that it stands for (git lfs pull), and copy that")
HTML = Kind("an HTML page", todo="check the URL: it answers with a page, such as one of an error or a login")
STORE_ERROR = Kind("a store's error message", todo=_AGAIN)

PICKLE = Kind(
    "a Python pickle", todo="export the model to ONNX, or register it with the type of its library", code=True
)
SKLEARN = Kind("a pickle of a scikit-learn model", "sklearn", code=True)
XGBOOST_PICKLE = Kind("a pickle of an XGBoost model", "xgboost", code=True)
LIGHTGBM_PICKLE = Kind("a pickle of a LightGBM model", "lightgbm", code=True)
CATBOOST_PICKLE = Kind("a pickle of a CatBoost model", "catboost", code=True)
TORCH = Kind(
    "a PyTorch checkpoint",
    todo="save the model as TorchScript (torch.jit.script), or export it to ONNX: the file may hold weights only",
    code=True,
)
TORCHSCRIPT = Kind("a TorchScript model", "pytorch", code=True)  # it can overwrite files
MAR = Kind("a TorchServe archive", "pytorch-mar", code=True)

XGBOOST_JSON = Kind("an XGBoost model in JSON", "xgboost")
XGBOOST_UBJ = Kind("an XGBoost model in UBJSON", "xgboost")
XGBOOST_BINARY = Kind("an XGBoost model in its old binary format", "xgboost")
LIGHTGBM = Kind("a LightGBM model", "lightgbm")
CATBOOST = Kind("a CatBoost model", "catboost")

KERAS_H5 = Kind("an HDF5 file, as Keras writes", "keras")
KERAS = Kind("a Keras model", "keras")
SAVED_MODEL = Kind("a TensorFlow SavedModel", "tensorflow")
TFLITE = Kind("a TensorFlow Lite model")
ORT = Kind("a model in ONNX Runtime's own format", todo="register the ONNX model that it was made from")
OPENVINO = Kind("an OpenVINO model", "openvino_ir")
PMML = Kind("a PMML model", "pmml")
SAFETENSORS = Kind("a safetensors file", todo="export the model to ONNX: it holds weights only")
GGUF = Kind("a GGUF model")
NUMPY = Kind("a NumPy array", todo="export the model to ONNX: it holds numbers only")
MLFLOW = Kind("an MLflow model", "mlflow", code=True)
HUGGING_FACE = Kind("a Hugging Face model", "huggingface")
TRITON = Kind("a folder of Triton's model repository")

ZIP = Kind("a zip archive", todo=_UNPACK, archive=True)
GZIP = Kind("a gzip file", todo=_UNPACK, archive=True)
TAR = Kind("a tar archive", todo=_UNPACK, archive=True)
JSON = Kind("a JSON text")
XML = Kind("an XML text")

_MAGIC: tuple[tuple[bytes, Kind], ...] = (
    (b"version https://git-lfs.github.com/spec/", LFS),
    (b"BZh", Kind("a bzip2 file", todo=_UNPACK, archive=True)),
    (b"\xfd7zXZ\0", Kind("an xz file", todo=_UNPACK, archive=True)),
    (b"\x28\xb5\x2f\xfd", Kind("a Zstandard file", todo=_UNPACK)),
    (b"7z\xbc\xaf\x27\x1c", Kind("a 7-Zip archive", todo=_UNPACK)),
    (b"\x89HDF\r\n\x1a\n", KERAS_H5),
    (b"\x93NUMPY", NUMPY),
    (b"GGUF", GGUF),
    (b"CBM1", CATBOOST),
    (b"tree\nversion=v", LIGHTGBM),
    (b"binf", XGBOOST_BINARY),
    (b"PAR1", Kind("a Parquet file", todo=_AGAIN)),
    (b"%PDF-", Kind("a PDF file", todo=_AGAIN)),
    (b"\x89PNG\r\n", Kind("a PNG picture", todo=_AGAIN)),
    (b"\xff\xd8\xff", Kind("a JPEG picture", todo=_AGAIN)),
    (b"\x7fELF", Kind("a program or shared library", todo=_AGAIN)),
)

_FLATBUFFERS = {b"TFL3": TFLITE, b"ORTM": ORT}
"""Identifiers of FlatBuffers files, from their fifth byte on."""

_LIBRARIES: tuple[tuple[bytes, Kind], ...] = (
    (b"xgboost", XGBOOST_PICKLE),
    (b"lightgbm", LIGHTGBM_PICKLE),
    (b"catboost", CATBOOST_PICKLE),
    (b"torch", TORCH),
    (b"sklearn", SKLEARN),
)
"""Libraries by the module names in a pickle. Wrappers of boosters have scikit-learn's classes too, so scikit-learn is
last."""

_TORCH_PICKLE = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number that begins PyTorch's old format
_PICKLES = frozenset(b"\x80" + bytes([protocol]) for protocol in (2, 3, 4, 5))
_ZLIB = frozenset((b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda"))
_OLD_PICKLE = re.compile(rb"[(\]}l]*c[A-Za-z_][\w.]*\n[A-Za-z_]\w*\n")  # protocols 0 and 1 begin with a class
_UBJ = re.compile(rb"\{[iUIlL].{0,8}(learner|version)", re.DOTALL)
_JSON = re.compile(rb'\s*(\{\s*(["}])|\[\s*[\[{"\d\]-])')
_HTML = re.compile(rb"\s*(<!--.*?-->\s*)*<(!doctype\s+html|html[\s>])", re.IGNORECASE | re.DOTALL)
_XML = re.compile(rb"\s*<\?xml\s")
_MLMODEL = re.compile(rb"^(flavors|artifact_path|mlflow_version):", re.MULTILINE)
_LOCAL_ENTRY, _CENTRAL_ENTRY, _END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"
_END_64 = b"PK\x06\x07"

# The tags of the fields that may follow a model's first field, ir_version.
_AFTER_IR_VERSION = frozenset((0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42))


def sniff(head: bytes, tail: bytes = b"") -> Kind | None:
    """Returns the kind of a file from its first bytes, `head`, and its last bytes, `tail`, or None if they leave doubt.
    The two may overlap. An empty `head` means an empty file."""
    if not head:
        return EMPTY
    if len(head) > 2 and head[0] == 0x08 and head[1] < 0x80 and head[2] in _AFTER_IR_VERSION:
        return ONNX
    if head.startswith(b"\x1f\x8b"):
        return _of_compressed(head, zlib.MAX_WBITS | 16) or GZIP
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if head.startswith((_LOCAL_ENTRY, _END)):
        return _of_zip({*_local_names(head), *_central_names(tail)})
    if head[257:262] == b"ustar":
        return TAR
    if head[4:8] in _FLATBUFFERS:
        return _FLATBUFFERS[head[4:8]]
    if head[:2] in _PICKLES or _OLD_PICKLE.match(head):
        return _of_pickle(head)
    if head[:2] in _ZLIB:
        return _of_compressed(head, zlib.MAX_WBITS)
    if len(head) > 9 and head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < 1 << 32:
        return SAFETENSORS
    return _of_text(head)


def _of_text(head: bytes) -> Kind | None:
    if _HTML.match(head):
        return HTML
    if _UBJ.match(head):
        return XGBOOST_UBJ
    if _JSON.match(head):
        return XGBOOST_JSON if b'"learner"' in head[:200] else JSON
    if _XML.match(head) or head.lstrip()[:6] in (b"<PMML ", b"<Error"):
        if b"<PMML" in head:
            return PMML
        if b"<Error>" in head:
            return STORE_ERROR
        return OPENVINO if b"<net " in head and b"<layers>" in head else XML
    if len(_MLMODEL.findall(head)) > 1:
        return Kind("an MLflow model's description", todo="register the folder that it is in, with --type mlflow")
    return None


def _of_pickle(head: bytes) -> Kind:
    if head.startswith(_TORCH_PICKLE):
        return TORCH
    return next((kind for name, kind in _LIBRARIES if name in head), PICKLE)


def _of_compressed(head: bytes, form: int) -> Kind | None:
    """Returns the kind of a file in one of zlib's forms if it holds a pickle, as files of joblib do."""
    try:
        beginning = zlib.decompressobj(form).decompress(head, HEAD)
    except zlib.error:
        return None
    return _of_pickle(beginning) if beginning[:2] in _PICKLES else None


def _of_zip(names: set[str]) -> Kind:
    inner = {name.partition("/")[2] for name in names}
    if "MAR-INF/MANIFEST.json" in names:
        return MAR
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        return TORCHSCRIPT
    if "data.pkl" in inner:
        return TORCH
    if {"metadata.json", "config.json"} <= names:
        return KERAS
    if names and all(name.endswith(".npy") for name in names):
        return NUMPY
    return ZIP


def _local_names(head: bytes) -> Iterator[str]:
    """Yields the names of an archive's first entries. The content of an entry, which may be an archive itself, is
    skipped, unless the entry's header does not give its length."""
    at = 0
    while head.startswith(_LOCAL_ENTRY, at):
        streamed = head[at + 6 : at + 7] and head[at + 6] & 0x08
        size, length, extra = (_number(head, at + place, bytes_) for place, bytes_ in ((18, 4), (26, 2), (28, 2)))
        yield from _name(head, at + 30, length)
        at += 30 + length + extra + size
        if streamed and not size:
            at = head.find(_LOCAL_ENTRY, at)
            if at < 0:
                return


def _central_names(tail: bytes) -> Iterator[str]:
    """Yields the names in an archive's list of contents, or in the end of a list that is longer than `tail`."""
    end = tail.rfind(_END)
    if end < 0:
        return
    length = _number(tail, end + 12, 4)
    if tail.startswith(_END_64, end - 20):
        end -= 76  # the end record of large archives, which PyTorch always writes, and its locator
    at = max(0, end - length)
    while (at := tail.find(_CENTRAL_ENTRY, at, end)) >= 0:
        yield from _name(tail, at + 46, _number(tail, at + 28, 2))
        at += 4


def _name(data: bytes, at: int, length: int) -> Iterator[str]:
    name = data[at : at + length]
    if name and len(name) == length:
        yield name.decode("utf-8", "replace")


def _number(data: bytes, at: int, length: int) -> int:
    return int.from_bytes(data[at : at + length], "little")


def of_names(names: Collection[str]) -> Kind | None:
    """Returns the kind of a folder from the names in it, or None if they leave doubt."""
    if "MLmodel" in names:
        return MLFLOW
    if "MAR-INF" in names:
        return MAR
    if "saved_model.pb" in names:
        return SAVED_MODEL
    if any(name.endswith(".xml") and f"{name[:-4]}.bin" in names for name in names):
        return OPENVINO
    if "config.json" in names and any(name.endswith((".safetensors", "pytorch_model.bin")) for name in names):
        return HUGGING_FACE
    if "config.pbtxt" in names:
        return TRITON
    return None


def look(path: Path) -> Kind | None:
    """Returns the kind of the file or folder at `path`, or None if its content leaves doubt. Raises OSError."""
    if stat.S_ISDIR(path.stat().st_mode):
        with os.scandir(path) as found:
            names = {entry.name for entry in islice(found, _NAMES)}
        if (kind := of_names(names)) is not None:
            return kind
        visible = [name for name in names if not name.startswith(".")]
        return look(path / visible[0]) if len(visible) == 1 and (path / visible[0]).is_file() else None
    with path.open("rb", buffering=0) as file:
        head = file.read(HEAD) or b""
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - TAIL))
        return sniff(head, file.read(TAIL) or b"")
