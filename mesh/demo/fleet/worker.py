"""A process that trains models: `python -m mesh.demo.fleet.worker FOLDER`. The process reads a recipe from each line,
and writes a line with the answer.

Training runs in separate processes because it holds the interpreter's lock, and because the libraries need hundreds of
megabytes. The processes use pipes rather than `multiprocessing`: a pipe closes however the parent ends, and then the
worker ends too. A line `{"rows": [names]}` asks for the rows of data sets instead of a model.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mesh.demo.fleet import datasets
from mesh.demo.fleet.recipes import Recipe


def serve(directory: Path, lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Yields an answer for each line, once the requested file is written. If it could not be made, the answer's `error`
    says why."""
    from mesh.demo.fleet import training  # slow to import, and the functions below do not need it

    loaded: dict[str, datasets.Dataset] = {}
    for line in lines:
        request = json.loads(line)
        try:
            if "rows" in request:
                for name in request["rows"]:
                    save(datasets.rows_file(directory, name), datasets.load(name).rows.astype(np.float32))
                yield {}
                continue
            recipe = Recipe(**request)
            if recipe.dataset not in loaded:
                loaded[recipe.dataset] = datasets.load(recipe.dataset)
            path = directory / "models" / f"{recipe.id}.onnx"
            write(path, training.export(recipe, loaded[recipe.dataset]))
            yield {"id": recipe.id}
        except Exception as error:  # whatever a library raises becomes an answer, and the next line is served
            yield {"error": f"{type(error).__name__}: {error}"}


def write(path: Path, content: bytes) -> None:
    """Writes a file completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)


def save(path: Path, rows: np.ndarray[Any, Any]) -> None:
    """Writes an array as .npy, completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.npy")
    np.save(partial, rows)
    partial.replace(path)


def main() -> None:
    """Answers the lines of standard input until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not look like an answer
    for answer in serve(Path(sys.argv[1]), iter(sys.stdin)):
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
