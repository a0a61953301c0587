"""Optimised forms of models: made in the background after a slow load, for the next load of the same files.

What the model server needs of time to go over a network's graph is the same at each load on the same version of
onnxruntime and the same processor. So after a load that took long, a process of its own writes the graph as it is
afterwards, compares, and says whether that is worth keeping (`mesh.runtime.server.onnx.optimiser`). What is kept lies
in the puller's cache, under the contents of the files that it was made of and a tag for version and processor: other
contents or another runtime never find it, and the disk's budget counts it.

One at a time, and only while the machine has memory for it: nobody waits for this.
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
"""A load in the model server that takes less is not worth looking at."""

MAX_BYTES = 64 << 20
"""Of a model's files: `optimiser` refuses larger ones."""

_MEMORY = 256 << 20  # bytes that must be free beyond several times the files
_TIMEOUT = 60.0  # seconds
_WAITING = 64  # models that wait for their turn; past that a slow load waits for its next time
_REMEMBERED = 4096  # contents that were looked at


class Keeping(Protocol):
    """The puller, as far as it keeps what was made of a model."""

    def current(self, into: str, pulled: Pulled) -> bool:
        """Whether what lies there is still what that pull brought."""

    async def keep(self, into: str, pulled: Pulled, tag: str, path: Path) -> bool:
        """Takes the file over, as made of that pull's files; False where there is no room for it, or no use."""


@dataclass(frozen=True, slots=True)
class OptimisingStatistics:
    """What it has done."""

    waiting: int
    made: int  # and kept
    in_vain: int


class Optimising:
    """See the module's text. `free_bytes` tells how much memory the machine or container has left."""

    def __init__(self, keeping: Keeping, *, free_bytes: Callable[[], int]) -> None:
        self.tag = ""  # of what is made now; empty: nothing is
        self._keeping = keeping
        self._free_bytes = free_bytes
        self._waiting: OrderedDict[str, tuple[str, Pulled]] = OrderedDict()  # digest -> model, files
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._wake = asyncio.Event()
        self._made = self._in_vain = 0

    def server(self, version: str, device: str) -> None:
        """That model server runs now. Only ours on a processor can use what is made here."""
        engine = re.search(r"onnxruntime [^;]+", version)
        self.tag = f"{engine[0]} on {processor()}" if engine is not None and device == "cpu" else ""

    def loaded(self, model_id: str, pulled: Pulled, server_ms: float) -> None:
        """A model was loaded, and the model server took so long for it."""
        digest = pulled.digest
        if not self.tag or not digest or pulled.derived is not None:
            return
        if server_ms < LEAST_MS or pulled.bytes > MAX_BYTES or digest in self._seen or len(self._waiting) >= _WAITING:
            return
        self._waiting[digest] = (model_id, pulled)
        self._wake.set()

    def statistics(self) -> OptimisingStatistics:
        """What it has done."""
        return OptimisingStatistics(len(self._waiting), self._made, self._in_vain)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                _, (model_id, pulled) = self._waiting.popitem(last=False)
                try:
                    await self._look_at(model_id, pulled)
                except OSError as error:  # a full disk, too many processes
                    self._in_vain += 1
                    log.warning("no optimised form", model=model_id, why=str(error))

    async def _look_at(self, model_id: str, pulled: Pulled) -> None:
        path = pulled.path
        if self._free_bytes() < _MEMORY + 16 * _size(path) or not self._keeping.current(model_id, pulled):
            return  # another load of it, another try
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
            why=told.get("why") or ("" if kept else "its files have gone meanwhile"),
        )


async def _run(source: Path, target: Path) -> dict[str, Any]:
    """What the optimiser says."""
    argv = process.python("mesh.runtime.server.onnx.optimiser", str(source), str(target))
    child = await process.spawn(argv, name="optimiser")
    try:
        code = await child.wait(_TIMEOUT)
    except TimeoutError:
        return {"why": f"it was not done within {_TIMEOUT:g} s"}
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
    except OSError:  # it is being removed: the optimiser will say so
        return 0


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What the graph optimisers look at: equal for processors with equal instructions."""
    features = ""
    with contextlib.suppress(OSError):
        for line in cpuinfo.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                features = " ".join(sorted(value.split()))
                break
    digest = hashlib.blake2b(features.encode(), digest_size=8).hexdigest()
    return f"{platform.machine()} {digest}"
