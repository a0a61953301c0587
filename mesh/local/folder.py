"""The data directory of a local mesh, which only one mesh may use at a time.

The directory is locked with `flock`, so the kernel unlocks it however the process ends. Sockets are in a run folder
with a short path under /tmp, because the path of a unix socket may have at most 107 bytes. The run folder is removed
when the mesh ends. If the mesh is killed, the next mesh with this data directory removes it.
"""

import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from mesh.local.settings import UpError

_RUN_PREFIX = "mesh-up-"


class DataFolder:
    """The lock on a data directory, as a context manager. Entering it raises UpError if another mesh holds the lock, or
    if the directory cannot be used."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.run_dir = Path()
        self._lock: int | None = None

    def __enter__(self) -> Self:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise UpError(
                f"{self.path} cannot be used as the data directory ({error.strerror}): choose another with --data-dir"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(self._lock, 32, 0).decode(errors="replace").strip()
            os.close(self._lock)
            raise UpError(
                f"another mesh is using {self.path} (process {owner or 'unknown'}): "
                "stop it, or choose another folder with --data-dir"
            ) from error
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)
        self._sweep()
        self.run_dir = Path(tempfile.mkdtemp(prefix=_RUN_PREFIX, dir="/tmp"))
        (self.path / "run").write_text(str(self.run_dir))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.run_dir, ignore_errors=True)
        (self.path / "run").unlink(missing_ok=True)
        if self._lock is not None:
            os.close(self._lock)

    def _sweep(self) -> None:
        """Removes the run folder of a killed mesh, if the path certainly belongs to one."""
        try:
            left = Path((self.path / "run").read_text().strip())
        except (OSError, UnicodeDecodeError):
            return
        if left.parent == Path("/tmp") and left.name.startswith(_RUN_PREFIX) and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
