"""The vmodels of the mesh, from the feed's range `vmodels`. A hit by a vmodel's name needs no other data.

The feed may be behind. A name that the feed has not delivered is therefore read from etcd before a call fails
(`registry`). The result of that read applies until the feed has passed its revision.

A record that cannot be read is logged, and counts as missing. The old value is not kept, because it may name models
that are deleted.
"""

from collections.abc import Callable, Iterable

from mesh.etcd import KeyValue
from mesh.schema import vmodels
from mesh.schema.keys import Keys
from mesh.telemetry import logs
from placement.vmodels.record import VModelRecord
from router.state.feed.ranges import Item

log = logs.get(__name__)


class Vmodels:
    """The records by name. An unchanged record stays the same object."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._records: dict[str, VModelRecord] = {}
        self._read_at: dict[str, int] = {}  # revisions of reads that the feed has not passed
        self._revision = 0  # of the feed
        self._listeners: list[Callable[[str], None]] = []
        self.get: Callable[[str], VModelRecord | None] = self._records.get
        """A function that returns the record of a vmodel, or None if this process knows no such vmodel."""

    def __len__(self) -> int:
        return len(self._records)

    def names(self) -> list[str]:
        """Returns the names of all vmodels."""
        return list(self._records)

    def listen(self, listener: Callable[[str], None]) -> None:
        """Registers a listener, which is called with the name of each vmodel that is created, changed or deleted."""
        self._listeners.append(listener)

    def snapshot(self, revision: int, items: Iterable[Item]) -> None:
        """Receives all vmodels at one revision. Vmodels that are missing have been deleted."""
        found = {self._name(key): value for key, value in items}
        for name in [*found, *(name for name in self._records if name not in found)]:
            self._take(name, found.get(name), revision)
        self._passed(revision)

    def delta(self, revision: int, items: Iterable[Item]) -> None:
        """Receives the changes of one revision."""
        for key, value in items:
            self._take(self._name(key), value, revision)
        self._passed(revision)

    def read(self, name: str, found: KeyValue | None, revision: int) -> None:
        """Receives the result of a read of one vmodel at a revision. `found` is None if the vmodel does not exist."""
        if revision <= max(self._revision, self._read_at.get(name, 0)):
            return  # the feed has passed it, or a later read has
        changed = self._set(name, None if found is None else found.value)
        if changed or name in self._records:  # names that callers have invented are not kept
            self._read_at[name] = revision

    def _take(self, name: str, value: bytes | None, revision: int) -> None:
        if revision > self._read_at.get(name, 0):
            self._set(name, value)

    def _passed(self, revision: int) -> None:
        self._revision = revision
        if self._read_at:
            self._read_at = {name: at for name, at in self._read_at.items() if at > revision}

    def _set(self, name: str, value: bytes | None) -> bool:
        """Stores or removes a record. Returns False if nothing has changed."""
        record = None if value is None else _decoded(name, value)
        if record == self._records.get(name):
            return False
        if record is None:
            del self._records[name]
        else:
            self._records[name] = record
        for listener in self._listeners:
            listener(name)
        return True

    def _name(self, key: bytes) -> str:
        return key[len(self._keys.vmodels) :].decode(errors="replace")


def _decoded(name: str, value: bytes) -> VModelRecord | None:
    try:
        return vmodels.decode(value)
    except ValueError as error:
        log.warning("a vmodel record in etcd cannot be read", vmodel=name, error=str(error))
        return None
