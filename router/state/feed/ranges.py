"""The ranges of etcd's keys that routers can follow, and what reads them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from mesh.etcd.ranges import after_prefix
from mesh.schema.keys import Keys

Item = tuple[bytes, bytes | None]
"""A key and its value; None: deleted."""


@dataclass(frozen=True, slots=True)
class Range:
    """One range. It is followed by itself, with a revision of its own."""

    name: str
    bounds: Callable[[Keys], tuple[bytes, bytes]]  # first key, and the one after the last


def _below(prefix: bytes) -> tuple[bytes, bytes]:
    return prefix, after_prefix(prefix)


PRESENCE = Range("presence", lambda keys: keys.presence_range)
CONFIG = Range("config", lambda keys: _below(keys.config))
VMODELS = Range("vmodels", lambda keys: _below(keys.vmodels))
AUTH = Range("auth", lambda keys: _below(keys.auth))

RANGES = {each.name: each for each in (PRESENCE, CONFIG, VMODELS, AUTH)}
"""By name. What is here can be followed; what has a reader is."""


class Reader(Protocol):
    """What is kept up to date with a range."""

    def snapshot(self, revision: int, items: Iterable[Item]) -> None:
        """Takes the whole range as it is at one revision: what is missing is gone."""

    def delta(self, revision: int, items: Iterable[Item]) -> None:
        """Takes all changes of one revision, in the order in which they were made."""
