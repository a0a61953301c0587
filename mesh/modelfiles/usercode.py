"""Python code that is a model: for MLServer a class with `predict`, for Triton's Python backend TritonPythonModel."""

import ast
from dataclasses import dataclass
from pathlib import Path

TYPE = "python"
CODE = "model.py"
"""The name of the file with the class, in a folder."""

SUFFIX = ".py"

_TRITON = "TritonPythonModel"
_MAX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class CodeType:
    """The type of a model that is Python code."""

    type: str
    because: str  # a clause


def type_in(path: Path) -> CodeType | None:
    """Returns the type of a file of Python code, or of a folder with `model.py`, or None if no class in it is a
    model. Reads the file without running it. Raises OSError."""
    file = path / CODE if path.is_dir() else path
    if file.suffix.lower() != SUFFIX or not file.is_file():
        return None
    with file.open("rb") as opened:
        code = opened.read(_MAX_BYTES)
    try:
        classes = [one for one in ast.parse(code).body if isinstance(one, ast.ClassDef)]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if any(one.name == _TRITON for one in classes):
        return CodeType("triton-python", f"{file.name} defines the class {_TRITON}")
    for one in classes:
        if any(isinstance(part, ast.FunctionDef) and part.name == "predict" for part in one.body):
            return CodeType(TYPE, f"{file.name} defines the class {one.name} with the method predict")
    return None
