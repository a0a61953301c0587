"""The type of a model, guessed from its files, for users who do not name it.

A file's content decides where it leaves no doubt (`sniffing`), then the ending of its name. A guess always says what it
rests on, because it may be wrong.
"""

import json
import tarfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

from mesh.modelfiles import mar, mlflow, pbtxt, sniffing, usercode

SETTINGS = "model-settings.json"
"""The file by which MLServer describes a model."""

CONFIG = "config.pbtxt"
"""The file by which Triton describes a model."""

_ENDINGS = {
    ".onnx": "onnx",
    ".joblib": "sklearn",
    ".pickle": "sklearn",
    ".pkl": "sklearn",
    ".bst": "xgboost",
    ".ubj": "xgboost",
    ".xgb": "xgboost",
    ".cbm": "catboost",
    ".mar": "pytorch-mar",
    ".plan": "tensorrt",
}
"""Types by the endings that usually only the files of one type have. `.json`, `.txt` and `.pt` may be anything."""

_NAMES = 1000  # names of an archive that are looked at
_PICKLES = (".joblib", ".pickle", ".pkl")


@dataclass(frozen=True, slots=True)
class Guess:
    """A guessed type, and the reason for the guess."""

    type: str
    because: str  # a clause: "its name ends in .joblib"


def of_file(path: Path) -> Guess | None:
    """Guesses the type of a file or folder on this machine. Returns None if its content and name are not conclusive.
    Raises OSError."""
    if path.is_dir():
        if (path / SETTINGS).is_file():
            return _of_settings(path / SETTINGS)
        if (path / mlflow.DESCRIPTION).is_file():
            return _of_mlflow(path)
        if (path / CONFIG).is_file():
            return _of_triton(path / CONFIG)
    if (found := usercode.type_in(path)) is not None:
        return Guess(found.type, found.because)
    kind = sniffing.look(path)
    if kind is not None and kind.archive:
        return _of_archive(path) or of_name(path.name)
    if kind is not None and kind.type:
        return Guess(kind.type, f"it is {kind.what}")
    if kind is not None and not kind.code:
        return None
    if path.is_dir():
        return None
    guess = of_name(path.name)
    if kind is not None and path.suffix.lower() not in _PICKLES:
        return None
    return guess


def of_name(name: str) -> Guess | None:
    """Returns the type that the ending of a name indicates, or None."""
    ending = PurePosixPath(name).suffix.lower()
    model_type = _ENDINGS.get(ending)
    return Guess(model_type, f"its name ends in {ending}") if model_type else None


def _of_settings(file: Path) -> Guess | None:
    try:
        settings = json.loads(file.read_bytes())
        implementation = str(settings["implementation"])
    except (ValueError, KeyError, TypeError):
        return None
    package = implementation.partition(".")[0]
    named = package.removeprefix("mlserver_") if package.startswith("mlserver_") else ""
    return Guess(named, f"its {SETTINGS} names {implementation}") if named else None


def _of_triton(file: Path) -> Guess | None:
    try:
        with file.open("rb") as opened:
            backends = pbtxt.parse(opened.read(pbtxt.MAX_BYTES)).all("backend")
    except pbtxt.BadText:
        return None
    python = backends == [b"python"]
    return Guess("triton-python" if python else "triton", f"it has a {CONFIG}" + " with the backend python" * python)


def _of_mlflow(folder: Path) -> Guess | None:
    try:
        found = mlflow.flavours(folder)
        return Guess(mlflow.type_of(found), f"it is an MLflow model with the flavors {', '.join(sorted(found))}")
    except mlflow.BadDescription:
        return None


def _of_archive(path: Path) -> Guess | None:
    """Returns the type that the names of an archive's files indicate, or None."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = [info.filename for info in archive.infolist()[:_NAMES]]
        else:
            with tarfile.open(path, "r:*") as tar:
                names = [member.name for member in islice(tar, _NAMES)]
    except (tarfile.TarError, zipfile.BadZipFile, OSError, EOFError, ValueError, IndexError):
        return None
    return _of_names(names)


def _of_names(names: Iterable[str]) -> Guess | None:
    last = [PurePosixPath(name).name for name in names]
    if mlflow.DESCRIPTION in last:
        return Guess("mlflow", "it holds an MLflow model")
    if mar.MANIFEST in last:
        return Guess("pytorch-mar", f"it holds a {mar.MANIFEST}, as TorchServe's archives do")
    guesses = [guess for name in last if (guess := of_name(name)) is not None]
    types = {guess.type for guess in guesses}
    return Guess(types.pop(), f"the name of a file in it {guesses[0].because[9:]}") if len(types) == 1 else None
