"""The cost of processes: CPU seconds and resident memory, from /proc. A process that has ended has no cost."""

import contextlib
import os
from collections.abc import Callable
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
    """Returns the user and system time of a process so far, including its threads."""
    fields = _read(pid, "stat").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK if fields else 0.0


def exact_seconds(pid: int) -> float:
    """Returns the CPU time of the running threads of a process, to the nanosecond. (`cpu_seconds` has a resolution of a
    hundredth of a second, but includes threads that have ended.)"""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        threads = os.listdir(f"/proc/{pid}/task")
        return sum(int((_read(pid, f"task/{one}/schedstat") or "0").split()[0]) for one in threads) / 1e9
    return 0.0


def resident_bytes(pid: int) -> int:
    fields = _read(pid, "statm").split()
    return int(fields[1]) * _PAGE if fields else 0


def reset_peak(pid: int) -> None:
    """Resets the peak of a process's resident memory to its present value."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_bytes(pid: int) -> int:
    """Returns the largest resident memory of a process since `reset_peak`."""
    _, found, rest = _read(pid, "status").partition("VmHWM:")
    return int(rest.split()[0]) * 1024 if found else 0


def family(pid: int) -> list[int]:
    """Returns the ids of a process and of all processes below it."""
    return [pid, *(each for child in children(pid) for each in family(child))]


@dataclass(frozen=True, slots=True)
class Meter:
    """CPU seconds of several processes at one moment, by name."""

    pids: dict[str, list[int]]
    start: dict[str, float]
    seconds: Callable[[int], float]

    @classmethod
    def begin(cls, pids: dict[str, list[int]], seconds: Callable[[int], float] = cpu_seconds) -> "Meter":
        """Starts counting. `seconds` returns the CPU seconds of a process so far."""
        return cls(pids, {name: sum(map(seconds, group)) for name, group in pids.items()}, seconds)

    def spent(self) -> dict[str, float]:
        """Returns the CPU seconds since the beginning, by name."""
        return {name: sum(map(self.seconds, group)) - self.start[name] for name, group in self.pids.items()}
