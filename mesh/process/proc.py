"""The state of a process, as the kernel shows it in /proc."""

import os
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_PROC = "/proc"

RUNNABLE = "R"


@dataclass(frozen=True, slots=True)
class Stat:
    """The parts of /proc/PID/stat that are used."""

    state: str  # R, S, D, T, t, Z, ...: of its main thread
    cpu: float  # seconds that all its threads have had, in user and system mode


def stat(pid: int, *, proc: str = _PROC) -> Stat | None:
    """Reads /proc/PID/stat; returns None if the process does not exist or /proc does not show it."""
    try:
        with open(f"{proc}/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()  # a name may hold blanks and parentheses
        return Stat(fields[0].decode(), (int(fields[11]) + int(fields[12])) / _TICKS)
    except (OSError, ValueError, IndexError):
        return None


def runnable(pid: int, *, proc: str = _PROC) -> bool:
    """Returns whether a thread of the process runs or waits for a processor."""
    try:
        threads = os.listdir(f"{proc}/{pid}/task")
    except OSError:
        return False
    for thread in threads:
        try:
            line = Path(f"{proc}/{pid}/task/{thread}/stat").read_bytes()
        except OSError:
            continue  # the thread has ended meanwhile
        if line.rpartition(b")")[2].split()[:1] == [RUNNABLE.encode()]:
            return True
    return False
