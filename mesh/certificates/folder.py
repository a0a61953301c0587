"""The certificates in a folder, replaced as Kubernetes replaces a mounted Secret: all files at once, by one rename.

The files are links through `..data` to a hidden folder, one for each version. A lock keeps two processes from writing
at once.
"""

import asyncio
import fcntl
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from mesh.certificates.keeping import StoreError
from mesh.certificates.renewal import ENTRIES

_DATA, _PREFIX, _LOCK = "..data", "..version-", "..lock"
_TURN = 0.05  # seconds between two attempts at the lock


class Folder:
    """A store in a folder. `read` creates a missing folder, with access for this user only. `timeout` is the time to
    wait for the lock, in seconds."""

    def __init__(self, path: Path, *, timeout: float = 10.0) -> None:
        self.path = path
        self._timeout = timeout
        self._lock = -1

    async def read(self) -> tuple[Mapping[str, bytes], object]:
        """Locks the folder. Returns the contents of the existing certificate files by name, and None, because the lock
        replaces a version."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            await self._hold()
            found = {name: path for name in ENTRIES if (path := self.path / name).exists()}
            return {name: path.read_bytes() for name, path in found.items()}, None
        except OSError as error:
            raise StoreError(f"{error.filename or self.path} cannot be created or read: {error.strerror}") from error

    async def write(self, content: Mapping[str, bytes], version: object) -> bool:
        """Replaces the certificate files, and returns True: the lock excludes other writers."""
        try:
            self._write(content)
        except OSError as error:
            raise StoreError(f"{error.filename or self.path} cannot be written: {error.strerror}") from error
        return True

    def close(self) -> None:
        """Unlocks the folder."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    async def _hold(self) -> None:
        if self._lock >= 0:
            return
        self._lock = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            async with asyncio.timeout(self._timeout):
                while True:
                    try:
                        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        return
                    except BlockingIOError:
                        await asyncio.sleep(_TURN)
        except TimeoutError as error:
            raise StoreError(
                f"another `mesh certificates` has locked {self.path}: wait for it, or stop it, and try again"
            ) from error

    def _write(self, content: Mapping[str, bytes]) -> None:
        fresh = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self.path))  # for this user alone
        try:
            for name in ENTRIES:
                mode = 0o600 if name.endswith(".key") else 0o644
                with open(os.open(fresh / name, os.O_CREAT | os.O_WRONLY, mode), "wb") as file:
                    file.write(content[name])
                    file.flush()
                    os.fsync(file.fileno())
            self._point(_DATA, fresh.name)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        for name in ENTRIES:
            if not (self.path / name).is_symlink():
                self._point(name, f"{_DATA}/{name}")
        for old in self.path.glob(f"{_PREFIX}*"):
            if old != fresh:
                shutil.rmtree(old, ignore_errors=True)

    def _point(self, name: str, target: str) -> None:
        new = self.path / f"{name}.new"
        new.unlink(missing_ok=True)
        new.symlink_to(target)
        os.replace(new, self.path / name)
