"""Counters of the mesh, and the memory of its processes.

The router's statistics distinguish hits from cold starts, which a client cannot. Pods count evictions. Pods that do not
answer are left out.
"""

import asyncio
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

_TIMEOUT = aiohttp.ClientTimeout(total=10.0)
_EVICTIONS = re.compile(r"^modelmesh_age_at_eviction_milliseconds_count(?:\{[^}]*\})? (\S+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Numbers:
    """Counters of the whole mesh at one moment."""

    stats: Mapping[str, Any]  # as the router answers
    evictions: float | None  # None: no pod answered
    capacity: int  # bytes, of all pods
    pods: int


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """Memory of one process, in bytes."""

    pid: int
    name: str
    depth: int  # below the root; 0: the root itself
    resident: int
    peak: int


async def ask(session: aiohttp.ClientSession, base: str) -> Numbers:
    """Reads the counters of the router at `base` and of the pods that it names. Raises aiohttp.ClientError or
    TimeoutError if the router gives no usable answer."""
    async with session.get(f"{base}/mesh/v1/stats", timeout=_TIMEOUT) as response:
        response.raise_for_status()
        stats = await response.json()
    async with session.get(f"{base}/mesh/v1/pods", timeout=_TIMEOUT) as response:
        response.raise_for_status()
        pods = (await response.json())["pods"]
    counts = await asyncio.gather(*(_evictions(session, str(pod.get("probe") or "")) for pod in pods))
    known = [count for count in counts if count is not None]
    capacity = sum(int(pod.get("capacity") or 0) for pod in pods)
    return Numbers(stats, sum(known) if known else None, capacity, len(pods))


async def _evictions(session: aiohttp.ClientSession, probe: str) -> float | None:
    if not probe:
        return None
    try:
        async with session.get(f"http://{probe}/metrics", timeout=_TIMEOUT) as response:
            text = await response.text()
    except (aiohttp.ClientError, TimeoutError):
        return None
    found = [float(value) for value in _EVICTIONS.findall(text)]
    return sum(found) if found else None


def processes(root: int, *, proc: Path = Path("/proc")) -> list[ProcessMemory]:
    """Returns the memory of the process `root` and its descendants, each followed by its children."""
    parents: dict[int, int] = {}
    for folder in proc.glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text()
        except OSError:
            continue  # it has ended meanwhile
        parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
    found: list[ProcessMemory] = []

    def visit(pid: int, depth: int) -> None:
        memory = _memory(proc / str(pid), pid, depth)
        if memory is not None:
            found.append(memory)
        for child in sorted(child for child, parent in parents.items() if parent == pid):
            visit(child, depth + 1)

    if root in parents:
        visit(root, 0)
    return found


def _memory(folder: Path, pid: int, depth: int) -> ProcessMemory | None:
    try:
        argv = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
        status = (folder / "status").read_text()
    except OSError:
        return None
    fields = dict(re.findall(r"^(VmRSS|VmHWM):\s*(\d+) kB", status, re.MULTILINE))
    if "VmRSS" not in fields:
        return None  # a thread of the kernel, or about to end
    resident, peak = (int(fields.get(name, 0)) * 1024 for name in ("VmRSS", "VmHWM"))
    return ProcessMemory(pid, _name(argv), depth, resident, peak)


def _name(argv: Iterable[str]) -> str:
    words = list(argv)
    # python -m router.process.worker --name x: the module is a better name than the interpreter.
    name = words[words.index("-m") + 1] if "-m" in words[:-1] else Path(words[0]).name
    if "--name" in words[:-1]:
        name += f" {words[words.index('--name') + 1]}"
    return name
