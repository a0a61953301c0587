"""The data-plane configuration's way from its file to the workers.

The pod's main process (`DataplaneFile`) reads the file and looks for changes each second. It hands the last usable
content to the workers as a file in the run directory, together with the reason why a newer content cannot be used.
The workers (`DataplaneFollower`) look at that file, so a worker that starts later has the same configuration.

A file counts as changed if its inode, time of change or size differ, after links have been followed. This also covers
Kubernetes, which replaces a mounted ConfigMap by moving a link above the file.
"""

import asyncio
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from mesh.process.tasks import turned
from mesh.telemetry import logs, metrics
from router.calls import dataplane
from router.calls.dataplane import Dataplane
from router.calls.routes import Routes

log = logs.get(__name__)

LOOK = 1.0
"""Seconds between two looks at the file."""

_Stamp = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class DataplaneState:
    """The configuration in force, and the trouble with a newer one."""

    text: str  # empty: there is no configuration
    source: str  # the file's path, or the option's name
    error: str = ""  # why the file's present content is not in force


class DataplaneFile:
    """The configuration of a router pod, from an option or from a file that is watched."""

    def __init__(self, text: str, path: str, published: Path) -> None:
        """Makes a configuration from `text`, or from the file at `path`; there is none if both are empty. `published`
        is the file for the workers."""
        self._path = Path(path) if path else None
        self._published = published
        self._stamp: _Stamp | None = None
        self._state = DataplaneState(text, "--dataplane-config" if text else "")

    @property
    def is_watched(self) -> bool:
        """True if the configuration comes from a file."""
        return self._path is not None

    def follow(self, registry: metrics.Registry) -> None:
        """Adds the metric by which an alert can notice an unusable file."""
        text = "1 if the file of the data-plane configuration cannot be used, so that its former content applies."
        registry.gauge("mesh_dataplane_config_refused", text, merge="max").follow(lambda: int(bool(self._state.error)))

    def begin(self) -> None:
        """Reads and publishes the configuration for the first time. Raises ValueError if it cannot be used."""
        text, source = self._state.text, self._state.source
        if self._path is not None:
            source = str(self._path)
            self._stamp, text = _read(self._path)
        if source:
            try:
                dataplane.parse(text)
            except ValueError as error:
                raise ValueError(f"the data-plane configuration ({source}) cannot be used: {error}") from error
        self._publish(DataplaneState(text, source))

    async def run(self) -> None:
        """Watches the file until cancelled."""
        while True:
            await asyncio.sleep(LOOK)
            await asyncio.to_thread(self.look)
            turned()

    def look(self) -> None:
        """Publishes the content of a changed file. If that content cannot be used, publishes the reason instead, and
        the former content stays in force."""
        path = self._path
        assert path is not None
        try:
            if _stamp(path) == self._stamp and not self._state.error:
                return
            self._stamp, text = _read(path)
            parsed = dataplane.parse(text)
        except ValueError as error:
            if str(error) != self._state.error:
                log.error(
                    "the data-plane configuration cannot be used; the former one stays in force",
                    path=str(path),
                    why=str(error),
                )
                self._publish(DataplaneState(self._state.text, self._state.source, str(error)))
            return
        if text != self._state.text or self._state.error:
            self._publish(DataplaneState(text, self._state.source))
            log.info("data-plane configuration read", path=str(path), methods=len(parsed.methods), others=parsed.others)

    def _publish(self, state: DataplaneState) -> None:
        self._state = state
        new = self._published.with_suffix(".new")
        new.write_text(json.dumps(asdict(state)))
        os.replace(new, self._published)


class DataplaneFollower:
    """The configuration of one worker."""

    def __init__(self, published: Path, routes: Routes) -> None:
        self._published = published
        self._routes = routes
        self._stamp: _Stamp | None = None
        self._state = DataplaneState("", "")
        self._config: Dataplane | None = None

    def look(self) -> None:
        """Applies what the pod has published since the last look."""
        try:
            stamp = _stamp(self._published)
            if stamp == self._stamp:
                return
            self._state = DataplaneState(**json.loads(self._published.read_text()))
            self._stamp = stamp
        except ValueError as error:  # only if the run directory has vanished
            log.error("the data-plane configuration cannot be read from the run directory", why=str(error))
            return
        self._config = dataplane.parse(self._state.text) if self._state.text else None
        self._routes.adopt(self._config)

    def document(self) -> dict[str, object] | None:
        """Returns the state of the configuration for `mesh doctor`, or None if there is no configuration."""
        if self._config is None:
            return None
        return {
            "source": self._state.source,
            "methods": sorted(name[1:].decode() for name in self._config.methods),
            "others": self._config.others,
            "error": self._state.error,
        }


def _stamp(path: Path) -> _Stamp:
    """Returns the state of a file. Raises ValueError."""
    try:
        status = path.stat()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def _read(path: Path) -> tuple[_Stamp, str]:
    """Returns the state and content of a file. Raises ValueError."""
    stamp = _stamp(path)
    try:
        with path.open("rb") as file:
            return stamp, file.read(dataplane.MAX_BYTES + 1).decode()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text") from error
