"""`python -m mesh.runtime.server.onnx.optimiser MODEL TARGET`: whether a model loads quicker in its optimised form.

Making a session of a network is mostly onnxruntime going over its graph, with the same result each time on the same
version and processor. That result can be written to a file and loaded without going over it again. Measured: silero-vad
40 ms to 11, magika 25 to 9; forests of trees 11 to 10, for they have nothing to optimise. So it is tried, and kept only
where it is worth it and answers the same.

A process of its own, at the lowest priority and with a bound on its memory: what it does is needed by nobody right
now, and a model that kills it kills nothing else. It prints one line of JSON: `worth`, `why`, and what both ways took.
"""

import json
import os
import resource
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from mesh.runtime.server.onnx import device, onnxfile, session
from mesh.statuses import MeshError

MAX_BYTES = 64 << 20
"""Of the model's file. Beyond it reading the weights is what takes the time, and this process would take memory that
the pod has given to models."""

_MEMORY = 512 << 20  # bytes beyond what the file takes several times over
_ROUNDS = 3
_LEAST_MS, _LEAST_SHARE = 4.0, 0.25  # saved, to be worth a second file on disk


def main() -> None:
    """The process."""
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    os.nice(19)
    try:
        print(json.dumps(optimise(source, target)), flush=True)
    except MeshError as error:
        print(json.dumps({"worth": False, "why": error.text}), flush=True)


def optimise(source: Path, target: Path) -> dict[str, object]:
    """Writes the optimised form and says whether it is worth keeping. Raises MeshError."""
    file = onnxfile.find(str(source))
    if file.external or file.bytes > MAX_BYTES:
        return {"worth": False, "why": "it is too large, or keeps tensors in other files"}
    bound = _MEMORY + 16 * file.bytes
    resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))
    device.find("cpu")  # from now on the first session costs no more than the second
    plain = session.Session(file.path, device.CPU, session.Stop(), write_to=target)
    if not target.is_file():
        return {"worth": False, "why": "onnxruntime wrote nothing"}
    before = statistics.median(_timed(file.path, optimised=False) for _ in range(_ROUNDS))
    after = statistics.median(_timed(target, optimised=True) for _ in range(_ROUNDS))
    told: dict[str, object] = {"before_ms": round(before, 2), "after_ms": round(after, 2)}
    if before - after < max(_LEAST_MS, _LEAST_SHARE * before):
        return {"worth": False, "why": "it saves too little", **told}
    if not _agree(plain, session.Session(target, device.CPU, session.Stop(), optimised=True)):
        return {"worth": False, "why": "it answers otherwise", **told}
    return {"worth": True, "why": "", **told}


def _timed(path: Path, *, optimised: bool) -> float:
    started = time.perf_counter()
    session.Session(path, device.CPU, session.Stop(), optimised=optimised)
    return (time.perf_counter() - started) * 1000


def _agree(one: session.Session, other: session.Session) -> bool:
    """Whether both answer made-up input alike, to the bit; also where both refuse it, or it is too large to try."""
    feed = one.made_up()
    if feed is None or list(one.outputs) != list(other.outputs) or list(one.inputs) != list(other.inputs):
        return False
    answers = []
    for made in (one, other):
        try:
            answers.append(made.run(list(made.outputs), feed, session.run_options()))
        except Exception as error:
            answers.append([np.array(type(error).__name__)])
    return all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in zip(*answers, strict=True))


if __name__ == "__main__":
    main()
