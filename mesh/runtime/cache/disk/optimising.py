"""Optimised forms of models: made in the background after a slow load, for the next load of the same files.

The model server's work on a network's graph is the same at each load on the same version of onnxruntime and the same
processor. So after a slow load, a separate process writes the optimised graph, compares it with the original, and
reports whether it is worth keeping (`mesh.runtime.server.onnx.optimiser`). The puller's cache keeps the optimised form
by the contents of the source files, and by a tag for version and processor. It is thus never used for other contents or
with another runtime, and counts towards the disk budget.

Models are optimised one at a time, and only while the machine has enough memory. No call waits for an optimisation.
"""

import asyncio
import contextlib
import hashlib
import json
import platform
import re
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mesh import process
from mesh.telemetry import logs
from puller.puller import Pulled

log = logs.get(__name__)

LEAST_MS = 15.0
"""Shortest duration of a load in the model server for which a model is optimised, in milliseconds."""

MAX_BYTES = 64 << 20
"""Largest size of a model's files: `optimiser` refuses more."""

_MEMORY = 256 << 20  # bytes that must be free in addition to several times the files
_TIMEOUT = 60.0  # seconds
_WAITING = 64  # models that may wait; beyond that, a slow load is examined next time
_REMEMBERED = 4096  # contents already examined


class Keeping(Protocol):
    """The part of the puller that stores optimised forms."""

    def current(self, into: str, pulled: Pulled) -> bool:
        """Returns whether the folder still holds the files of that pull."""

    async def keep(self, into: str, pulled: Pulled, tag: str, path: Path) -> bool:
        """Takes over a file that was made from that pull's files. Returns False if the disk has no room for the file,
        or if the file is no longer of use."""


@dataclass(frozen=True, slots=True)
class OptimisingStatistics:
    """The numbers of optimisations."""

    waiting: int
    made: int  # so far, made and kept
    in_vain: int  # so far, without a form that was kept


class Optimising:
    """The optimiser of one pod's models. `free_bytes` returns the free memory of the machine or container."""

    def __init__(self, keeping: Keeping, *, free_bytes: Callable[[], int]) -> None:
        self.tag = ""  # tag of the forms made now; empty: none are made
        self._keeping = keeping
        self._free_bytes = free_bytes
        self._waiting: OrderedDict[str, tuple[str, Pulled]] = OrderedDict()  # digest -> model, files
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._wake = asyncio.Event()
        self._made = self._in_vain = 0

    def server(self, version: str, device: str) -> None:
        """Notes the running model server. Only Mesh's own server on a CPU can use optimised forms."""
        engine = re.search(r"onnxruntime [^;]+", version)
        self.tag = f"{engine[0]} on {processor()}" if engine is not None and device == "cpu" else ""

    def loaded(self, model_id: str, pulled: Pulled, server_ms: float) -> None:
        """Notes a loaded model, which may be optimised. `server_ms` is the time that the model server took for the
        load."""
        digest = pulled.digest
        if not self.tag or not digest or pulled.derived is not None:
            return
        if server_ms < LEAST_MS or pulled.bytes > MAX_BYTES or digest in self._seen or len(self._waiting) >= _WAITING:
            return
        self._waiting[digest] = (model_id, pulled)
        self._wake.set()

    def statistics(self) -> OptimisingStatistics:
        """Returns the numbers of optimisations."""
        return OptimisingStatistics(len(self._waiting), self._made, self._in_vain)

    async def run(self) -> None:
        """Makes optimised forms, one after the other, until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                _, (model_id, pulled) = self._waiting.popitem(last=False)
                try:
                    await self._look_at(model_id, pulled)
                except OSError as error:  # for example a full disk, or too many processes
                    self._in_vain += 1
                    log.warning("the optimised form of a model cannot be made", model=model_id, why=str(error))

    async def _look_at(self, model_id: str, pulled: Pulled) -> None:
        path = pulled.path
        if self._free_bytes() < _MEMORY + 16 * _size(path) or not self._keeping.current(model_id, pulled):
            return  # tried again after another load of it
        self._seen[pulled.digest] = None
        while len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        tag = self.tag
        with tempfile.TemporaryDirectory(prefix="mesh-optimise-", dir=path.parent.parent) as folder:
            target = Path(folder) / "model.onnx"
            told = await _run(path, target)
            kept = bool(told.get("worth")) and await self._keeping.keep(model_id, pulled, tag, target)
        if kept:
            self._made += 1
        else:
            self._in_vain += 1
        log.info(
            "optimised form made" if kept else "no optimised form",
            model=model_id,
            before_ms=told.get("before_ms"),
            after_ms=told.get("after_ms"),
            why=told.get("why") or ("" if kept else "the disk has no room for it, or it is no longer of use"),
        )


async def _run(source: Path, target: Path) -> dict[str, Any]:
    argv = process.python("mesh.runtime.server.onnx.optimiser", str(source), str(target))
    child = await process.spawn(argv, name="optimiser")
    try:
        code = await child.wait(_TIMEOUT)
    except TimeoutError:
        return {"why": f"it took more than {_TIMEOUT:g} s"}
    finally:
        if child.returncode is None:
            child.kill()
    for line in reversed(child.tail):
        with contextlib.suppress(ValueError):
            told = json.loads(line)
            if isinstance(told, dict):
                return told
    return {"why": f"the optimiser {process.describe_exit(code)}"}


def _size(path: Path) -> int:
    try:
        return sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size
    except OSError:  # it is being removed: the optimiser will report that
        return 0


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Returns a string that is equal for processors with the same instructions, on which optimised graphs depend."""
    features = ""
    with contextlib.suppress(OSError):
        for line in cpuinfo.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                features = " ".join(sorted(value.split()))
                break
    digest = hashlib.blake2b(features.encode(), digest_size=8).hexdigest()
    return f"{platform.machine()} {digest}"
