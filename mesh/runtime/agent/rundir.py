"""The private folder of this process, for sockets and the use board.

Its path is short because the path of a unix socket has at most 107 bytes. Only this user may use it, because anyone who
can write into it controls the model server. The folder is removed at the end of the process. If an agent was killed
with SIGKILL, its folder is recognised by its lock, which ended with the process. The next agent of the same pod (the
same `whose`) reads the folder and removes it. Agents of other pods keep the folder's files for an hour, because pods
that share a machine may start together, but remove its subfolders, which contain the models, immediately. A folder
without an owner is removed by the first agent that finds it.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

_PREFIX = "mesh-pod-"
_LOCK = "lock"
_WHOSE = "whose"
_FOUND = "found"  # made by the first agent that finds the folder abandoned

KEPT = 3600.0
"""Seconds for which agents of other pods keep an abandoned folder after they have found it."""
_PATIENCE = 5.0  # seconds that an owner waits while another agent looks at its folder


class RunDir:
    """A run directory; `path` exists until `close`."""

    def __init__(
        self, parent: Path | None = None, *, whose: str = "", on_left: Callable[[Path], None] = lambda folder: None
    ) -> None:
        """Creates the folder, in `parent` or in a temporary folder of the system. `on_left` is called with each folder
        that an earlier agent of the same `whose` has left. With "" as `whose`, the folder has no owner. Raises
        OSError."""
        if parent is None:
            parent = Path(tempfile.gettempdir())
            parent = parent if len(os.fsencode(parent)) <= 60 else Path("/tmp")
        _sweep(parent, whose, on_left)
        # Locked before it gets a name that sweeps look for, or another agent might remove it in between.
        fresh = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=parent))
        self._lock = os.open(fresh / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (fresh / _WHOSE).write_text(whose)
        self.path = fresh.rename(parent / fresh.name[1:])

    def disown(self) -> None:
        """Removes the owner's mark from the folder, so that no later agent of the pod reads it."""
        (self.path / _WHOSE).unlink(missing_ok=True)

    def close(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _sweep(parent: Path, whose: str, on_left: Callable[[Path], None]) -> None:
    for left in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # it belongs to a live agent or another user, or is already being removed
            if left.is_symlink() or left.stat().st_uid != os.getuid():
                continue
            lock = os.open(left / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                _take(lock, _PATIENCE if whose and _read(left / _WHOSE) == whose else 0.0)
                owner = _read(left / _WHOSE)  # read again, as it may have been disowned during the wait
                if owner and owner != whose and _is_fresh(left):
                    continue
                if owner and owner == whose:
                    on_left(left)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(lock)


def _take(lock: int, patience: float) -> None:
    """Takes the lock. Raises BlockingIOError if another process still has it after `patience` seconds."""
    end = time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                raise
            time.sleep(0.02)


def _is_fresh(left: Path) -> bool:
    """Returns whether to keep an abandoned folder for its owner. Removes the folder's large contents in any case."""
    found = left / _FOUND
    if not found.exists():
        for entry in left.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
        found.touch(mode=0o600)
    return time.time() - found.stat().st_mtime < KEPT


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""
