"""Failed loads as a model's record tells of them, and as they count for one observer (`failures`)."""

from collections.abc import Iterable, Mapping
from typing import Protocol

from placement.failures import Failure, Kind


class Entry(Protocol):
    """A failed load as it is written in a model's record. Times are of the clock of the host that wrote it."""

    @property
    def pod(self) -> str:
        """Where it failed."""

    @property
    def at_ms(self) -> int:
        """When it failed."""

    @property
    def text(self) -> str:
        """The loader's own words."""

    @property
    def kind(self) -> Kind:
        """What went wrong."""

    @property
    def since_ms(self) -> int:
        """When the unbroken series of failures that it belongs to began; 0: with this one."""

    @property
    def asked_ms(self) -> int:
        """How long the store asks to be left alone."""

    @property
    def secrets(self) -> str:
        """The version of the storage secret that the pod pulled with."""


def on_clock(entries: Iterable[Entry], *, secrets: Mapping[str, str], now_ms: int, wall_ms: int) -> tuple[Failure, ...]:
    """Returns the failures that a record tells of, on the caller's clock.

    `secrets` are the versions of the storage secret that pods have now, where they are known: what failed with another
    one is void. `wall_ms` is `now_ms` as time since the epoch. Clocks of hosts differ: an age is never negative, and
    from the first look on it is the caller's clock that counts."""
    found = []
    for entry in entries:
        if secrets.get(entry.pod, entry.secrets) != entry.secrets:
            continue
        at_ms = now_ms - max(0, wall_ms - entry.at_ms)
        since_ms = at_ms - max(0, entry.at_ms - (entry.since_ms or entry.at_ms))
        found.append(Failure(entry.pod, at_ms, entry.text, entry.kind, since_ms, entry.asked_ms, entry.at_ms))
    return tuple(found)
