"""The pod's own directory of pulled files.

    <directory>/.lock            held while a process uses the directory
    <directory>/.blobs/<name>    complete files, safe on disk: the only files that outlive the process (`cache`)
    <directory>/.new-<n>         a file being fetched, or not yet safe on disk
    <directory>/.partial-<n>/    a model's folder that is being assembled or removed
    <directory>/<name>/<file>    a model's folder, complete from the moment it appears, by a rename

A model's `<name>` is derived from its id in such a way that no id can name another model's folder or anything outside
the directory: it is percent-encoded, has no leading dot, and is cut and given a hash if it is too long for a file
system.

At start, everything but the blobs is removed: it belongs to models that are no longer loaded, and may be incomplete. A
non-empty directory that this module did not make is refused, so a wrong option cannot empty somebody's home.
"""

import errno
import fcntl
import hashlib
import os
import shutil
import threading
from pathlib import Path
from urllib.parse import quote

from puller.errors import PullError, PullErrorKind

BLOBS = ".blobs"
FILE_MODE = 0o440
"""Mode of complete files. The model server, which runs as the same user or group, reads them, and nothing writes to
them again."""
FOLDER_MODE = 0o750
_LOCK = ".lock"
_NEW = ".new-"
_PARTIAL = ".partial-"
_MAX_NAME = 200  # file systems allow 255 bytes
_WRITE_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG})


def folder_name(text: str) -> str:
    """Returns the name of the folder for an id: safe, unique to the id, and readable for ordinary ids."""
    # quote() leaves "." and "~" alone: "." must not lead, and "~" marks a cut name.
    name = quote(text, safe="", errors="surrogatepass").replace("~", "%7E")
    if name.startswith("."):
        name = "%2E" + name[1:]
    if len(name) > _MAX_NAME or not name:
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
        name = f"{name[: _MAX_NAME - 40]}~{digest}"
    return name


def write_error(error: OSError) -> PullError | None:
    """Returns the PullError for a write that the disk refused, or None for any other error."""
    if error.errno not in _WRITE_ERRNOS:
        return None
    return PullError(PullErrorKind.DISK_FULL, f"the pod's disk cannot be written to: {error.strerror}; check it")


class Disk:
    """One directory. Its methods block for microseconds; `commit`, `remove` and `sweep` block for longer if they remove
    large folders."""

    def __init__(self, directory: Path, *, reserve_bytes: int = 64 * 2**20) -> None:
        self._directory = Path(os.path.abspath(directory))
        self._reserve_bytes = reserve_bytes  # kept free, for logs and other writers to this file system
        self._lock: int | None = None
        self._counter = 0
        self._counting = threading.Lock()

    @property
    def directory(self) -> Path:
        """The directory's absolute path."""
        return self._directory

    @property
    def blobs(self) -> Path:
        """The folder of complete files."""
        return self._directory / BLOBS

    def open(self) -> None:
        """Creates and locks the directory. Raises ValueError with a text for the operator if the directory holds
        something else, is in use or cannot be locked, and OSError if it cannot be created."""
        if self._lock is not None:
            return
        self._directory.mkdir(FOLDER_MODE, parents=True, exist_ok=True)
        lock = self._directory / _LOCK
        if not lock.exists() and any(self._directory.iterdir()):
            raise ValueError(f"{self._directory} holds other files than Mesh's: name an empty or a new folder")
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                why = "is used by another process: give each pod a folder of its own"
            else:
                why = f"cannot be locked ({error.strerror}): name a folder on a local disk"
            raise ValueError(f"{self._directory} {why}") from error
        self._lock = descriptor
        if self.blobs.is_symlink() or (self.blobs.exists() and not self.blobs.is_dir()):
            self.blobs.unlink()
        self.blobs.mkdir(FOLDER_MODE, exist_ok=True)
        self.blobs.chmod(FOLDER_MODE)  # an earlier version made it with wider permissions

    def close(self) -> None:
        """Releases the directory; the files stay."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def sweep(self) -> None:
        """Removes everything that an earlier process left, except its complete files."""
        self.open()
        for entry in os.scandir(self._directory):
            if entry.name not in (_LOCK, BLOBS):
                _remove(Path(entry.path))

    def begin(self) -> Path:
        """Makes a new empty folder in which a model can be assembled. Raises PullError if the disk refuses it."""
        path = self._next(_PARTIAL)
        try:
            path.mkdir(FOLDER_MODE)
        except OSError as error:
            raise write_error(error) or error from error
        return path

    def new(self) -> Path:
        """Returns the path for a new file, which does not exist yet."""
        return self._next(_NEW)

    def commit(self, partial: Path, into: str) -> Path:
        """Makes a finished pull visible as the folder of `into`, replacing an earlier one. Returns the folder."""
        path = self.path(into)
        try:
            partial.rename(path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise write_error(error) or error from error
            former = self._next(_PARTIAL)
            path.rename(former)
            partial.rename(path)
            _remove(former)
        return path

    def path(self, into: str) -> Path:
        """Returns the path of the folder of `into`, whether it exists or not."""
        return self._directory / folder_name(into)

    def withdraw(self, into: str) -> Path | None:
        """Moves the folder of `into` to a hidden name, so that it can be removed later. Returns the new path, or None
        if there is no folder."""
        withdrawn = self._next(_PARTIAL)
        try:
            self.path(into).rename(withdrawn)
        except FileNotFoundError:
            return None
        return withdrawn

    def remove(self, path: Path) -> None:
        """Removes a folder of this directory, if it exists. Raises ValueError for any other path."""
        if path.parent != self._directory or path.name in (_LOCK, BLOBS):
            raise ValueError(f"{path} is not a folder of {self._directory}")
        _remove(path)

    def links(self) -> bool:
        """Returns whether the file system has hard links."""
        self.open()
        probe, link = self.new(), self.new()
        try:
            probe.touch()
            os.link(probe, link)
        except OSError:
            return False
        finally:
            probe.unlink(missing_ok=True)
            link.unlink(missing_ok=True)
        return True

    def free(self) -> int:
        """Returns the bytes that may still be written without use of the reserve; negative if the reserve is in use."""
        self.open()
        found = os.statvfs(self._directory)
        return found.f_bavail * found.f_frsize - self._reserve_bytes

    def tenth(self) -> int:
        """Returns a tenth of the whole file system, in bytes."""
        self.open()
        found = os.statvfs(self._directory)
        return found.f_blocks * found.f_frsize // 10

    def _next(self, prefix: str) -> Path:
        self.open()
        with self._counting:
            self._counter += 1
            return self._directory / f"{prefix}{self._counter}"


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
