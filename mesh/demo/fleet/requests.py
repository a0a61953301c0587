"""The inputs of requests: rows of a model's data set, in the datatypes and shapes of the model's inputs."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mesh.demo.fleet import datasets, wheels
from mesh.demo.fleet.catalogue import Sample
from mesh.v2.datatypes import OF_NAME

BATCHES = (1, 1, 1, 1, 1, 1, 2, 4, 8, 16)
"""Numbers of rows in a request, each drawn with the same probability: most requests have one row."""


def sample_inputs(sample: Sample, rng: np.random.Generator) -> dict[str, npt.NDArray[Any]]:
    """Returns the inputs of one request, by name."""
    rows = _rows(datasets.rows_file(sample.path.parents[1], sample.dataset))
    batch = int(rng.choice(BATCHES))
    chosen = rows[rng.integers(0, len(rows), batch)]
    inputs: dict[str, npt.NDArray[Any]] = {}
    for tensor in sample.inputs:
        dtype = OF_NAME[tensor.datatype].dtype
        if not tensor.shape:  # silero-vad's rate
            inputs[tensor.name] = np.array(wheels.SOUND_RATE, dtype)
        elif len(tensor.shape) == 3:  # and its state, before the first window
            inputs[tensor.name] = np.zeros([batch if size < 0 else size for size in tensor.shape], dtype)
        else:
            inputs[tensor.name] = np.ascontiguousarray(chosen, dtype)
    return inputs


@functools.lru_cache(maxsize=32)
def _rows(path: Path) -> npt.NDArray[Any]:
    rows: npt.NDArray[Any] = np.load(path)
    return rows
