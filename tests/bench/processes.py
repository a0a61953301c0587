"""The cost of processes: CPU seconds and resident memory, from /proc. A process that has ended costs nothing."""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from tests.support.localmesh import children

_TICK = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def _read(pid: int, name: str) -> str:
    """Returns the content of a file in /proc about a process, or "" once the process has ended."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def cpu_seconds(pid: int) -> float:
    """Returns user and system time of a process so far, its threads included."""
    fields = _read(pid, "stat").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK if fields else 0.0


def resident_bytes(pid: int) -> int:
    """Returns the resident memory of a process."""
    fields = _read(pid, "statm").split()
    return int(fields[1]) * _PAGE if fields else 0


def reset_peak(pid: int) -> None:
    """Begins a new peak of resident memory at what the process takes now."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_bytes(pid: int) -> int:
    """Returns the largest resident memory of a process since `reset_peak`."""
    _, found, rest = _read(pid, "status").partition("VmHWM:")
    return int(rest.split()[0]) * 1024 if found else 0


def family(pid: int) -> list[int]:
    """Returns a process and all processes below it."""
    return [pid, *(each for child in children(pid) for each in family(child))]


@dataclass(frozen=True, slots=True)
class Meter:
    """CPU seconds of several processes at one moment, by name."""

    pids: dict[str, list[int]]
    start: dict[str, float]

    @classmethod
    def begin(cls, pids: dict[str, list[int]]) -> "Meter":
        """Starts counting."""
        return cls(pids, {name: sum(map(cpu_seconds, group)) for name, group in pids.items()})

    def spent(self) -> dict[str, float]:
        """Returns the CPU seconds since the beginning, by name."""
        return {name: sum(map(cpu_seconds, group)) - self.start[name] for name, group in self.pids.items()}
