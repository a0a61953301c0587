"""The ranges of etcd's keys that routers can follow, and the protocol of their readers."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from mesh.etcd.ranges import after_prefix
from mesh.schema.keys import Keys

Item = tuple[bytes, bytes | None]
"""A key and its value, which is None if the key was deleted."""


@dataclass(frozen=True, slots=True)
class Range:
    """One range, followed on its own, with a revision of its own."""

    name: str
    bounds: Callable[[Keys], tuple[bytes, bytes]]  # first key, and the one after the last


def _below(prefix: bytes) -> tuple[bytes, bytes]:
    return prefix, after_prefix(prefix)


PRESENCE = Range("presence", lambda keys: keys.presence_range)
CONFIG = Range("config", lambda keys: _below(keys.config))
VMODELS = Range("vmodels", lambda keys: _below(keys.vmodels))
AUTH = Range("auth", lambda keys: _below(keys.auth))

RANGES = {each.name: each for each in (PRESENCE, CONFIG, VMODELS, AUTH)}
"""The ranges by name. Only ranges with a reader are followed."""


class Reader(Protocol):
    """A reader that is kept up to date with a range."""

    def snapshot(self, revision: int, items: Iterable[Item]) -> None:
        """Receives the complete range at one revision. Keys that are missing from it are deleted."""

    def delta(self, revision: int, items: Iterable[Item]) -> None:
        """Receives all changes of one revision, in the order in which they were made."""
