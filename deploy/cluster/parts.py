"""The cluster's processes: starting them, and finding the running ones.

No file records them, since one would be wrong after a killed run: a process is the cluster's if it runs one of its
programs as one of its parts, or has the cluster's own folder on its command line. /proc shows that.
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
    """A part that did not start. The text has the end of its log."""


def start(name: str, argv: Sequence[str]) -> subprocess.Popen[bytes]:
    """Starts a part, which outlives this process. Its output goes to a log of that name."""
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
    """Waits until a condition holds. Raises StartError if it does not within `timeout` s, or if a started part ends."""
    end = time.monotonic() + timeout
    while not condition():
        for name, child in started.items():
            if child.poll() is not None:
                raise StartError(f"{name} ended with {child.returncode}:\n{tail(name)}")
        if time.monotonic() > end:
            raise StartError(f"{what}: not within {timeout:g} s; logs are in {layout.LOGS}")
        time.sleep(0.1)


def tail(name: str) -> str:
    """Returns the last lines of a part's log."""
    with contextlib.suppress(OSError):
        return (layout.LOGS / f"{name}.log").read_text(errors="replace")[-2000:]
    return "(no log)"


def is_part(argv: Sequence[str], bin_folder: Path = layout.BIN) -> bool:
    """Returns whether a process with this command line is part of the cluster of that folder's programs.

    kubectl is not: a person runs it.
    """
    if not argv:
        return False
    program = Path(argv[0])
    if program.parent == bin_folder:
        return program.name == "etcd" or (program.name == "kube" and argv[1:2] != ["kubectl"])
    return program.name.startswith("containerd") and any(str(layout.CONTAINERD) in word for word in argv)


def running(bin_folder: Path = layout.BIN) -> dict[int, list[str]]:
    """Returns the running processes of the cluster: their command lines by process id."""
    return {pid: argv for pid, argv in _processes() if is_part(argv, bin_folder)}


def end(pids: Sequence[int], number: signal.Signals = signal.SIGTERM) -> None:
    """Ends processes; those that still exist after a while with SIGKILL."""
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
    raise RuntimeError(f"these processes do not end: {pids}")


def _lives(pid: int) -> bool:
    """Returns whether it runs; a zombie, which its parent has not reaped yet, does not."""
    with contextlib.suppress(OSError, ChildProcessError):
        os.waitpid(pid, os.WNOHANG)  # one of our own
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def _processes() -> Iterator[tuple[int, list[str]]]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            with contextlib.suppress(OSError):
                yield int(folder.name), os.fsdecode((folder / "cmdline").read_bytes()).split("\0")[:-1]
