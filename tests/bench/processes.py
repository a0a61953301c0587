"""The cost of processes: CPU seconds and resident memory, from /proc."""

import os
from dataclasses import dataclass
from pathlib import Path

from tests.support.localmesh import children

_TICK = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def cpu_seconds(pid: int) -> float:
    """Returns user and system time of a process so far, its threads included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


def resident_bytes(pid: int) -> int:
    """Returns the resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE


def reset_peak(pid: int) -> None:
    """Begins a new peak of resident memory at what the process takes now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_bytes(pid: int) -> int:
    """Returns the largest resident memory of a process since `reset_peak`."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


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
