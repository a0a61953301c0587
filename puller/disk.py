"""The pod's own directory of pulled files.

    <directory>/.lock            held while a process uses the directory
    <directory>/.partial-<n>/    a pull in progress
    <directory>/<name>/<file>    a finished pull; it appears whole, by a rename

`<name>` is made from an id so that no id can name another's folder or anything outside: percent-encoded, no leading
dot, and cut with a hash where it is too long for a file system.

The directory is a cache of this process's life: at start everything in it is swept. Hence no fsync: after a crash of
the machine, whatever the disk holds is removed unread. A directory that was not made by this module and is not empty
is refused rather than swept, so that a wrong option cannot empty somebody's home.
"""

import errno
import fcntl
import hashlib
import os
import shutil
from pathlib import Path
from urllib.parse import quote

from puller.errors import PullError, PullErrorKind

_LOCK = ".lock"
_PARTIAL = ".partial-"
_MAX_NAME = 200  # file systems allow 255 bytes
_WRITE_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG})


def folder_name(text: str) -> str:
    """A name for files that is safe, one to one, and readable for ordinary ids."""
    # quote() leaves "." and "~" alone; the former must not lead, the latter marks what was cut.
    name = quote(text, safe="", errors="surrogatepass").replace("~", "%7E")
    if name.startswith("."):
        name = "%2E" + name[1:]
    if len(name) > _MAX_NAME or not name:
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        name = f"{name[: _MAX_NAME - 40]}~{digest}"
    return name


def write_error(error: OSError) -> PullError | None:
    """The error of a write that the disk refused; None if it was something else."""
    if error.errno not in _WRITE_ERRNOS:
        return None
    return PullError(PullErrorKind.DISK_FULL, f"the pod's disk cannot be written: {error.strerror}")


class Disk:
    """One directory. Its methods block, for microseconds except `remove` and `sweep` of large folders."""

    def __init__(self, directory: Path, *, reserve_bytes: int = 64 * 2**20) -> None:
        self._directory = Path(os.path.abspath(directory))
        self._reserve_bytes = reserve_bytes  # kept free, for logs and whoever else writes to this file system
        self._lock: int | None = None
        self._counter = 0

    @property
    def directory(self) -> Path:
        """Its absolute path."""
        return self._directory

    def open(self) -> None:
        """Makes and locks the directory. Raises ValueError with a text for the operator if it cannot be used."""
        if self._lock is not None:
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        lock = self._directory / _LOCK
        if not lock.exists() and any(self._directory.iterdir()):
            raise ValueError(f"{self._directory} is not empty and not a model directory: name an empty or a new one")
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            raise ValueError(f"{self._directory} is used by another process: every pod needs its own") from error
        self._lock = descriptor

    def close(self) -> None:
        """Lets go of the directory; the files stay."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def sweep(self) -> None:
        """Removes everything that an earlier process left."""
        self.open()
        for entry in os.scandir(self._directory):
            if entry.name != _LOCK:
                _remove(Path(entry.path))

    def begin(self) -> Path:
        """A new empty folder for a pull in progress."""
        self.open()
        self._counter += 1
        path = self._directory / f"{_PARTIAL}{self._counter}"
        try:
            path.mkdir()
        except OSError as error:
            raise write_error(error) or error from error
        return path

    def commit(self, partial: Path, into: str) -> Path:
        """Makes a finished pull visible as the folder of `into`, in place of what was there. Returns the folder."""
        path = self.path(into)
        try:
            partial.rename(path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise write_error(error) or error from error
            self._counter += 1
            former = self._directory / f"{_PARTIAL}{self._counter}"
            path.rename(former)
            partial.rename(path)
            _remove(former)
        return path

    def path(self, into: str) -> Path:
        """The folder of `into`, whether it exists or not."""
        return self._directory / folder_name(into)

    def remove(self, path: Path) -> None:
        """Removes a folder of this directory, if it is there."""
        if path.parent != self._directory or path.name == _LOCK:
            raise ValueError(f"{path} is not a folder of {self._directory}")
        _remove(path)

    def admit(self, size: int) -> None:
        """Raises PullError(DISK_FULL) unless `size` more bytes fit. Other pulls in progress are not counted."""
        stat = os.statvfs(self._directory)
        free = stat.f_bavail * stat.f_frsize
        if size > free - self._reserve_bytes:
            text = (
                f"{size} bytes are needed and {free} are free on the pod's disk, {self._reserve_bytes} of them reserved"
            )
            raise PullError(PullErrorKind.DISK_FULL, text)


def _remove(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        pass
    except NotADirectoryError:
        path.unlink(missing_ok=True)
    except OSError:
        if not path.is_symlink():  # rmtree refuses links
            raise
        path.unlink()
