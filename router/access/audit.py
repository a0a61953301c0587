"""The audit trail: one line for each request that changes something, with the caller, the operation, the caller's
address and the outcome. Refused requests have a line too.

A line has no keys and no bodies. It goes to the log, or as JSON to a file that all workers append to, each line in one
write. The file may be rotated: it is opened again once its name belongs to another file. If a line cannot be written to
the file, it goes to the log, with the reason, so none is lost in silence.
"""

import json
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime

from mesh.access.verbs import Verb
from mesh.statuses import shortened
from mesh.telemetry import logs
from router.access import operations
from router.access.operations import Operation

log = logs.get("audit")

OFF, LOG, AUTO = "off", "log", "auto"
"""The values of `--audit` besides the path of a file. `auto` is `log` if some requests need a key, otherwise `off`."""

OK = "OK"
CANCELLED = "CANCELLED"

NOBODY = "-"
"""The caller in the line of a request that was refused because its sender is unknown."""

_READING = frozenset({operations.KEYS, operations.GRANTS})
_MAX_NAME = 300  # bytes


def changes(operation: Operation) -> bool:
    """Returns whether an operation changes something."""
    return operation.verb in (Verb.REGISTER, Verb.ADMIN) and operation not in _READING


class Audit:
    """The audit trail of one worker."""

    def __init__(self, target: str, *, wall: Callable[[], float] = time.time) -> None:
        """Makes an audit trail. `target` is `OFF`, `LOG`, or the path of a file. `wall` returns seconds since the
        epoch. Raises OSError if the file cannot be opened."""
        self._path = "" if target in (OFF, LOG) else target
        self._on = target != OFF
        self._wall = wall
        self._file = -1
        self._failed = ""
        if self._path:
            self._open()

    def note(self, operation: Operation, *, who: str, name: str, peer: str, result: str) -> None:
        """Writes the line of one request, if its operation changes something. `result` is `OK`, or the reason of the
        failure."""
        if not self._on or not changes(operation):
            return
        line = {"who": who, "what": operation.name, "name": shortened(name, _MAX_NAME), "from": peer, "result": result}
        if self._file >= 0:
            stamp = datetime.fromtimestamp(self._wall(), UTC).isoformat(timespec="milliseconds")
            try:
                os.write(self._file, json.dumps({"time": stamp, **line}).encode() + b"\n")
                return
            except OSError as error:
                self._cannot(error)
        log.info("audit", **line)

    def look(self) -> None:
        """Opens the file again if its name belongs to another file, or if it could not be opened. Called once a
        second."""
        if not self._path:
            return
        try:
            if self._file >= 0 and os.path.samestat(os.fstat(self._file), os.stat(self._path)):
                return
        except FileNotFoundError:
            pass  # rotated away: it is created again
        except OSError as error:
            self._cannot(error)
            return
        self.close()
        try:
            self._open()
        except OSError as error:
            self._cannot(error)

    def close(self) -> None:
        """Closes the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _open(self) -> None:
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._failed = ""

    def _cannot(self, error: OSError) -> None:
        why = f"{self._path}: {error.strerror}"
        if why != self._failed:
            self._failed = why
            log.error("the audit file cannot be written; its lines go to the log", why=why)
