"""The cluster's processes: starting them, and finding those that run.

No file lists the processes, since the list would be wrong after a killed run. Instead /proc is searched: a process
belongs to the cluster if it runs one of the programs as a part, or has the cluster's folder on its command line.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from deploy.cluster import layout

_ENDING = 10.0  # seconds from SIGTERM to SIGKILL


class StartError(Exception):
    """A failure of a part to start. The text includes the end of its log."""


def start(name: str, argv: Sequence[str]) -> subprocess.Popen[bytes]:
    """Starts a part, which outlives this process and writes its output to a log of that name."""
    layout.LOGS.mkdir(parents=True, exist_ok=True)
    with (layout.LOGS / f"{name}.log").open("wb") as log:
        return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def until(
    condition: Callable[[], object],
    what: str,
    *,
    timeout: float,
    started: dict[str, subprocess.Popen[bytes]],
) -> None:
    """Waits until a condition holds. Raises StartError after `timeout` s, or if a started part ends first."""
    end = time.monotonic() + timeout
    while not condition():
        for name, child in started.items():
            if child.poll() is not None:
                raise StartError(f"{name} ended with status {child.returncode}:\n{tail(name)}")
        if time.monotonic() > end:
            raise StartError(f"timed out: waited {timeout:g} s until {what}; logs are in {layout.LOGS}")
        time.sleep(0.1)


def tail(name: str) -> str:
    """Returns the last lines of a part's log."""
    with contextlib.suppress(OSError):
        return (layout.LOGS / f"{name}.log").read_text(errors="replace")[-2000:]
    return "(no log)"


def is_part(argv: Sequence[str], bin_folder: Path = layout.BIN) -> bool:
    """Returns whether a process with this command line is a part of the cluster whose programs are in `bin_folder`.

    kubectl is not a part, because people run it themselves.
    """
    if not argv:
        return False
    program = Path(argv[0])
    if program.parent == bin_folder:
        return program.name == "etcd" or (program.name == "kube" and argv[1:2] != ["kubectl"])
    return program.name.startswith("containerd") and any(str(layout.CONTAINERD) in word for word in argv)


def running(bin_folder: Path = layout.BIN) -> dict[int, list[str]]:
    """Returns the command lines of the cluster's running processes by process id."""
    return {pid: argv for pid, argv in _processes() if is_part(argv, bin_folder)}


def end(pids: Sequence[int], number: signal.Signals = signal.SIGTERM) -> None:
    """Ends processes, with SIGKILL if they do not end within 10 seconds. Raises RuntimeError if they still run after
    that."""
    for attempt in (number, signal.SIGKILL):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, attempt)
        deadline = time.monotonic() + _ENDING
        while time.monotonic() < deadline:
            pids = [pid for pid in pids if _lives(pid)]
            if not pids:
                return
            time.sleep(0.05)
    raise RuntimeError(f"these processes still run after SIGKILL: {', '.join(map(str, pids))}")


def _lives(pid: int) -> bool:
    """Returns whether a process runs. A zombie, which its parent has not reaped yet, does not."""
    with contextlib.suppress(OSError, ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # a child of this process
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def _processes() -> Iterator[tuple[int, list[str]]]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            with contextlib.suppress(OSError):
                yield int(folder.name), os.fsdecode((folder / "cmdline").read_bytes()).split("\0")[:-1]
