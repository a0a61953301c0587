"""Files that a router follows while it runs, and their way to the workers.

The pod's main process (`FollowedFile`) reads a file, and looks for changes every second. It publishes the last usable
content for the workers as a file in the run directory, together with the reason why a newer content cannot be used. The
workers (`Follower`) read that file, so that a worker which starts later has the same content.

A file counts as changed if its inode, time of change or size differ, after links have been followed. This includes
changes by Kubernetes, which replaces the content of a mounted ConfigMap by moving a link above the file.
"""

import asyncio
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mesh.process.tasks import turned
from mesh.telemetry import logs

log = logs.get(__name__)

LOOK = 1.0
"""Seconds between two checks of a file."""

_Stamp = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class FileState:
    """The content in use, and the reason why a newer content is not used."""

    text: str  # empty: there is none
    source: str  # the file's path, or the name of an option that has the content
    read: float = 0.0  # seconds since the epoch: when this content was last seen in the file
    error: str = ""  # why the file's present content is not in force


class FollowedFile:
    """A file of one kind that is followed, or a string that an option gives instead."""

    def __init__(
        self,
        what: str,
        path: str,
        published: Path,
        check: Callable[[str], object],
        *,
        limit: int,
        text: str = "",
        option: str = "",
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Follows the file at `path`, or uses `text`. If both are empty, there is no content. `what` names the kind of
        file in messages. `published` is the file for the workers. `check` raises ValueError for a content that cannot
        be used. A file of more than `limit` bytes cannot be used either."""
        self._what = what
        self._path = Path(path) if path else None
        self._published = published
        self._check = check
        self._limit = limit
        self._wall = wall
        self._stamp: _Stamp | None = None
        self.state = FileState(text, option if text else "")

    @property
    def is_watched(self) -> bool:
        """True if the content comes from a file."""
        return self._path is not None

    def begin(self) -> None:
        """Reads and publishes the content for the first time. Raises ValueError if it cannot be used."""
        text, source = self.state.text, self.state.source
        if self._path is not None:
            source = str(self._path)
            self._stamp, text = self._read(self._path)
        if source:
            try:
                self._check(text)
            except ValueError as error:
                raise ValueError(f"{self._what} ({source}) cannot be used: {error}") from error
        self._publish(FileState(text, source, self._wall()))

    async def run(self) -> None:
        """Calls `look` every LOOK seconds, until cancelled. Requires that the content comes from a file."""
        while True:
            await asyncio.sleep(LOOK)
            await asyncio.to_thread(self.look)
            turned()

    def look(self) -> None:
        """Publishes the content of a changed file. If that content cannot be used, publishes the reason instead, and
        the old content stays in use."""
        path = self._path
        assert path is not None
        try:
            if _stamp(path) == self._stamp and not self.state.error:
                return
            self._stamp, text = self._read(path)
            self._check(text)
        except ValueError as error:
            if str(error) != self.state.error:
                log.error(
                    f"{self._what} cannot be used; the previous content stays in use",
                    path=str(path),
                    why=str(error),
                    age_s=round(self._wall() - self.state.read),
                )
                self._publish(replace(self.state, error=str(error)))
            return
        if text != self.state.text or self.state.error:
            self._publish(FileState(text, self.state.source, self._wall()))
            log.info(f"{self._what} is read", path=str(path))

    def _read(self, path: Path) -> tuple[_Stamp, str]:
        """Returns the stamp and the content of a file. Raises ValueError if the file cannot be used."""
        stamp = _stamp(path)
        try:
            with path.open("rb") as file:
                content = file.read(self._limit + 1)
            if len(content) > self._limit:
                raise ValueError(f"{path} is longer than the limit of {self._limit} bytes")
            return stamp, content.decode()
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text") from error

    def _publish(self, state: FileState) -> None:
        self.state = state
        new = self._published.with_suffix(".new")
        new.write_text(json.dumps(asdict(state)))
        os.replace(new, self._published)


class Follower:
    """One worker's view of a followed file."""

    def __init__(self, published: Path, adopt: Callable[[str], None]) -> None:
        """Makes a follower. `adopt` is called with each usable content."""
        self._published = published
        self._adopt = adopt
        self._stamp: _Stamp | None = None
        self.state = FileState("", "")

    def look(self) -> None:
        """Adopts a content that the pod has published since the last call."""
        try:
            stamp = _stamp(self._published)
            if stamp == self._stamp:
                return
            state = FileState(**json.loads(self._published.read_text()))
        except (OSError, ValueError) as error:  # only if the run directory has vanished
            log.error("a followed file cannot be read from the run directory", why=str(error))
            return
        changed = state.text != self.state.text
        self._stamp, self.state = stamp, state
        if changed:
            self._adopt(state.text)


def _stamp(path: Path) -> _Stamp:
    """Returns numbers by which a change of the file is noticed. Raises ValueError if the file cannot be found."""
    try:
        status = path.stat()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size
