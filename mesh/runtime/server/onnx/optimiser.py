"""`python -m mesh.runtime.server.onnx.optimiser MODEL TARGET`: writes a model's optimised form if it loads faster.

Most of the time in which ONNX Runtime makes a session of a network, it optimises the network's graph. The result is the
same each time on the same version and processor. It can be written to a file, and loaded without being optimised again.
Measured: silero-vad loads in 11 ms instead of 40, magika in 9 instead of 25; forests of trees, which have nothing to
optimise, in 10 instead of 11. The optimised form is therefore tested, and kept only if it saves enough time and gives
the same answers.

The optimiser is a separate process at the lowest priority, with a limit on its memory: its work is not urgent, and a
model that kills it does no other harm. It prints one line of JSON: `worth`, `why`, and the time of both loads.
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
"""Largest file of a model that is optimised. The load of a larger model mostly reads weights, and this process would
use memory that the pod has reserved for models."""

_MEMORY = 512 << 20  # bytes on top of a multiple of the file's size
_ROUNDS = 3
_LEAST_MS, _LEAST_SHARE = 4.0, 0.25  # the minimum saving that is worth a second file on disk


def main() -> None:
    """Writes the optimised form of MODEL to TARGET, the arguments of the command line, and prints the result as
    JSON."""
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    os.nice(19)
    try:
        print(json.dumps(optimise(source, target)), flush=True)
    except MeshError as error:
        print(json.dumps({"worth": False, "why": error.text}), flush=True)


def optimise(source: Path, target: Path) -> dict[str, object]:
    """Writes the optimised form to `target`. Returns whether it is worth keeping, the reason if it is not, and the
    times of both loads in milliseconds if they were measured. Raises MeshError."""
    file = onnxfile.find(str(source))
    if file.external:
        return {"worth": False, "why": "it keeps tensors in other files"}
    if file.bytes > MAX_BYTES:
        return {"worth": False, "why": f"its {file.bytes} bytes are more than {MAX_BYTES}"}
    bound = _MEMORY + 16 * file.bytes
    resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))
    device.find("cpu")  # afterwards the first session costs no more than the second
    plain = session.Session(file.path, device.CPU, session.Stop(), write_to=target)
    if not target.is_file():
        return {"worth": False, "why": "onnxruntime wrote nothing"}
    before = statistics.median(_timed(file.path, optimised=False) for _ in range(_ROUNDS))
    after = statistics.median(_timed(target, optimised=True) for _ in range(_ROUNDS))
    told: dict[str, object] = {"before_ms": round(before, 2), "after_ms": round(after, 2)}
    if before - after < max(_LEAST_MS, _LEAST_SHARE * before):
        return {"worth": False, "why": "it saves too little", **told}
    if not _agree(plain, session.Session(target, device.CPU, session.Stop(), optimised=True)):
        return {"worth": False, "why": "it answers differently", **told}
    return {"worth": True, "why": "", **told}


def _timed(path: Path, *, optimised: bool) -> float:
    started = time.perf_counter()
    session.Session(path, device.CPU, session.Stop(), optimised=optimised)
    return (time.perf_counter() - started) * 1000


def _agree(one: session.Session, other: session.Session) -> bool:
    """Returns whether both sessions have the same inputs and outputs, and give the same answer to generated input, or
    both refuse it. Returns False if the input would be too large."""
    feed = one.made_up()
    if feed is None or list(one.outputs) != list(other.outputs) or list(one.inputs) != list(other.inputs):
        return False
    answers = []
    for made in (one, other):
        try:
            answers.append(made.run(list(made.outputs), feed, session.run_options()))
        except Exception as error:
            answers.append([np.array(type(error).__name__)])
    if len(answers[0]) != len(answers[1]):  # only one of them failed
        return False
    return all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in zip(*answers, strict=True))


if __name__ == "__main__":
    main()
