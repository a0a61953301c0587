"""The audit trail: one line for each request that changes something, with the caller, the operation, the caller's
address and the outcome. Refused requests have a line too. A line may list further models that the request concerns: the
target of an alias, or the models of a bulk request, which `Gathering` divides into lines.

A line has no keys and no bodies. It goes to the log, or as JSON to a file to which all workers append, each line in one
write. The file may be rotated: it is opened again once its name belongs to another file. If a line cannot be written to
the file, it goes to the log, with the reason, so that no line is lost silently.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
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

MODELS = 100
"""Largest number of models listed in one line."""

REFUSED = 100
"""Largest number of refused models of one bulk request that are noted: a caller without rights could name millions of
models in a small body. Changes are noted without a limit, because each change costs etcd more than its line costs the
audit trail."""


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

    def note(
        self, operation: Operation, *, who: str, name: str, peer: str, result: str, models: Sequence[str] = ()
    ) -> None:
        """Writes the line of one request, if its operation changes something. `result` is `OK`, or the reason of the
        failure. `models` are further models that the request concerns."""
        if not self._on or not changes(operation):
            return
        line: dict[str, object] = {"who": who, "what": operation.name, "name": shortened(name, _MAX_NAME)}
        if models:
            line["models"] = [shortened(one, _MAX_NAME) for one in models[:MODELS]]
        line |= {"from": peer, "result": result}
        if self._file >= 0:
            stamp = datetime.fromtimestamp(self._wall(), UTC).isoformat(timespec="milliseconds")
            try:
                os.write(self._file, json.dumps({"time": stamp, **line}).encode() + b"\n")
                return
            except OSError as error:
                self._cannot(error)
        log.info("audit", **line)

    def look(self) -> None:
        """Opens the file again if its name belongs to another file, or if it could not be opened. Call this about once
        a second."""
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


Note = Callable[[Sequence[str], str], None]
"""A function that writes a line about some models of a request, with their common result."""


class Gathering:
    """The models of one bulk request, gathered by result into lines."""

    def __init__(self, note: Note) -> None:
        self._note = note
        self._by_result: dict[str, list[str]] = {}
        self._refused = 0

    def add(self, model_id: str, result: str) -> None:
        """Adds a model. `result` is `OK`, or the reason why it was refused."""
        if result != OK:
            self._refused += 1
            if self._refused > REFUSED:
                return
        models = self._by_result.setdefault(result, [])
        models.append(model_id)
        if len(models) >= MODELS:
            self._note(self._by_result.pop(result), result)

    def end(self) -> None:
        """Writes the lines that are left."""
        for result, models in self._by_result.items():
            self._note(models, result)
        self._by_result.clear()
