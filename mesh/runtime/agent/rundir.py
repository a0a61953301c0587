"""A short folder of this process's own for sockets and the use board.

Short, because the path of a unix socket has at most 107 bytes; of this user only, because whoever can write there
drives the model server. It goes with the process. One that was left by an agent killed with SIGKILL is known by its
lock, which ended with that process. The next life of the same pod (`whose` says the same) reads and removes it. Other
agents leave it the files for an hour, for pods that share a machine and start together; its folders, where the models
are, they remove at once. What was nobody's is removed by whoever comes.
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
_FOUND = "found"  # made by the first that finds the folder left

KEPT = 3600.0
"""Seconds for which others keep what a pod has left, from when it was found."""
_PATIENCE = 5.0  # seconds that an owner waits for an agent that is just looking at its folder


class RunDir:
    """`path` exists until `close`."""

    def __init__(
        self, parent: Path | None = None, *, whose: str = "", on_left: Callable[[Path], None] = lambda folder: None
    ) -> None:
        """`on_left` is given each folder that a former life of the same `whose` left; "" is nobody's."""
        if parent is None:
            parent = Path(tempfile.gettempdir())
            parent = parent if len(os.fsencode(parent)) <= 60 else Path("/tmp")
        _sweep(parent, whose, on_left)
        # Locked before it has a name that a sweep looks for: else another agent might sweep it in between.
        fresh = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=parent))
        self._lock = os.open(fresh / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (fresh / _WHOSE).write_text(whose)
        self.path = fresh.rename(parent / fresh.name[1:])

    def disown(self) -> None:
        """From now on the folder is nobody's: no later life reads it."""
        (self.path / _WHOSE).unlink(missing_ok=True)

    def close(self) -> None:
        """Removes it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _sweep(parent: Path, whose: str, on_left: Callable[[Path], None]) -> None:
    for left in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # another agent's that lives, another user's, or being removed already
            if left.is_symlink() or left.stat().st_uid != os.getuid():
                continue
            lock = os.open(left / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                _take(lock, _PATIENCE if whose and _read(left / _WHOSE) == whose else 0.0)
                owner = _read(left / _WHOSE)  # as it is now: it may have been disowned while that was waited for
                if owner and owner != whose and _is_fresh(left):
                    continue
                if owner and owner == whose:
                    on_left(left)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(lock)


def _take(lock: int, patience: float) -> None:
    """Raises BlockingIOError where somebody else still has it after so many seconds."""
    end = time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                raise
            time.sleep(0.02)


def _is_fresh(left: Path) -> bool:
    """Whether the folder is to be kept for its owner. What is large goes anyway."""
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
