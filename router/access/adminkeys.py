"""The admin key in a file, with which a mesh is set up before any key exists in etcd.

The file has one key in each line, so that a new one can be added before the old one is removed. It is read again when
it changes. If the file is missing or cannot be used, the last keys stay valid, because Kubernetes sometimes mounts
volumes late. An empty file revokes them.
"""

import hashlib
from pathlib import Path

from mesh.telemetry import logs

log = logs.get(__name__)

LEAST = 32
"""Smallest number of characters of a key: a shorter one could be guessed."""

_MOST = 64 * 1024  # bytes of the file


def read(path: Path) -> frozenset[str]:
    """Returns the digests of the keys in a file. Raises ValueError, whose text says what is wrong with the file."""
    try:
        with path.open("rb") as file:
            content = file.read(_MOST + 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > _MOST:
        raise ValueError(f"{path} has more than {_MOST} bytes: write one key in each line, and nothing else")
    lines = [line.strip() for line in content.splitlines()]
    keys = [line for line in lines if line]
    if any(len(key) < LEAST or not key.isascii() or b" " in key for key in keys):
        raise ValueError(f"{path} must have one key in each line, of at least {LEAST} ASCII characters without spaces")
    return frozenset(hashlib.sha256(key).hexdigest() for key in keys)


class AdminKeys:
    """The digests of the keys in a file that may change. Without a path there are none."""

    def __init__(self, path: str) -> None:
        """Reads the file. `path` is "" for no file. Raises ValueError as `read` does."""
        self._path = Path(path) if path else None
        self._seen: tuple[int, int, int] | None = None
        self._refused = ""
        self.digests: frozenset[str] = frozenset() if self._path is None else read(self._path)

    def look(self) -> bool:
        """Reads the file again if it has changed. Returns True if other keys are valid now."""
        if self._path is None:
            return False
        try:
            found = self._path.stat()
            seen = (found.st_mtime_ns, found.st_size, found.st_ino)
            if seen == self._seen:
                return False
            digests = read(self._path)
        except (OSError, ValueError) as error:
            why = f"{self._path} cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
            if why != self._refused:
                self._refused = why
                log.error("the file with the admin key cannot be used; the last keys stay in use", why=why)
            return False
        self._seen, self._refused = seen, ""
        changed, self.digests = digests != self.digests, digests
        return changed
