"""A short folder of this process's own for sockets and the use board.

Short, because the path of a unix socket has at most 107 bytes; of this user only, because whoever can write there
drives the model server. It goes with the process. One that was left by an agent killed with SIGKILL is known by its
lock, which ended with that process, and is removed by the next agent that starts. If that is the next life of the same
pod (`whose` says the same), it gets to read the folder before.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

_PREFIX = "mesh-pod-"
_LOCK = "lock"
_WHOSE = "whose"


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
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if whose and _read(left / _WHOSE) == whose:
                    on_left(left)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(lock)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""
