"""Reference answers, computed by onnxruntime in this process from the same file and the same inputs.

Integers and texts must be equal. Floats may differ by RELATIVE and ABSOLUTE, because a server that computes with more
threads, or in batches, adds numbers in another order. Over the whole fleet, the largest difference from a server with
two threads was 1e-6. One part in 10,000 is far above that, and far below the difference from another customer's model.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import cachetools
import numpy as np
import numpy.typing as npt

from mesh.demo.fleet.catalogue import Sample

RELATIVE = 1e-4
ABSOLUTE = 1e-5

Arrays = Mapping[str, npt.NDArray[Any]]


class Reference:
    """Sessions of the most recently used models. Not thread-safe."""

    def __init__(self, *, sessions: int = 256) -> None:
        import onnxruntime  # part of an extra, which is not needed to list a fleet

        self._runtime = onnxruntime
        self._options = onnxruntime.SessionOptions()
        self._options.intra_op_num_threads = self._options.inter_op_num_threads = 1
        self._options.log_severity_level = 3
        self._options.enable_cpu_mem_arena = False  # with the arena, a session takes a megabyte from its first call on
        self._sessions: cachetools.LRUCache[Path, Any] = cachetools.LRUCache(sessions)

    def prepare(self, samples: Iterable[Sample]) -> None:
        """Creates the sessions of these models in advance, which takes milliseconds for each."""
        for sample in samples:
            self._session(sample)

    def answer(self, sample: Sample, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Returns all outputs of a model, by name."""
        session = self._session(sample)
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))

    def _session(self, sample: Sample) -> Any:
        session = self._sessions.get(sample.path)
        if session is None:
            providers = ["CPUExecutionProvider"]
            session = self._runtime.InferenceSession(str(sample.path), self._options, providers=providers)
            self._sessions[sample.path] = session
        return session


def difference(expected: Arrays, answered: Arrays) -> str:
    """Returns a sentence that says what is wrong with an answer, or "" if the answer is right."""
    if set(expected) != set(answered):
        return f"outputs are {sorted(answered)}, expected {sorted(expected)}"
    for name, right in expected.items():
        got = answered[name]
        if right.shape != got.shape:
            return f"{name} has shape {list(got.shape)}, expected {list(right.shape)}"
        if right.dtype.kind == "f":
            close = np.isclose(got.astype(np.float64), right.astype(np.float64), RELATIVE, ABSOLUTE, equal_nan=True)
            if not close.all():
                where = int(np.argmin(close))
                return f"{name} is {got.flat[where]!r} at {where}, expected {right.flat[where]!r}"
        elif right.dtype.kind in "OSU":
            if _texts(right) != _texts(got):
                return f"{name} is {_texts(got)[:3]}, expected {_texts(right)[:3]}"
        elif not np.array_equal(right, got):
            return f"{name} is {got.flat[:3]}, expected {right.flat[:3]}"
    return ""


def _texts(array: npt.NDArray[Any]) -> list[str]:
    return [item.decode("utf-8", "replace") if isinstance(item, bytes) else str(item) for item in array.flat]
