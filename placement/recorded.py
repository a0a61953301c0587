"""Failed loads in a model's record, converted for one observer (`failures`)."""

from collections.abc import Iterable, Mapping
from typing import Protocol

from placement.failures import Failure, FailureKind


class RecordedFailure(Protocol):
    """A failed load in a model's record. Times are milliseconds since the epoch, by the clock of the host that wrote
    the record."""

    @property
    def pod(self) -> str:
        """The pod in which it failed."""

    @property
    def at_ms(self) -> int:
        """The time at which the load failed."""

    @property
    def text(self) -> str:
        """The error text of the load."""

    @property
    def kind(self) -> FailureKind:
        """The kind of the failure."""

    @property
    def since_ms(self) -> int:
        """Start of the unbroken series of failures, or 0 if it starts with this one."""

    @property
    def asked_ms(self) -> int:
        """Pause that the store asked for, in milliseconds, or 0."""

    @property
    def secrets(self) -> str:
        """The versions of the storage secrets that the pod pulled with."""


def on_clock(
    entries: Iterable[RecordedFailure], *, secrets: Mapping[str, str], now_ms: int, wall_ms: int
) -> tuple[Failure, ...]:
    """Converts the failures in a record to the caller's clock.

    `secrets` has the current version of the storage secret in each pod, if known: failures with another version are
    dropped. `wall_ms` is the time `now_ms` as milliseconds since the epoch. Hosts' clocks differ, so an age that would
    be negative counts as 0, and from the first look on, ages grow by the caller's clock.
    """
    found = []
    for entry in entries:
        if secrets.get(entry.pod, entry.secrets) != entry.secrets:
            continue
        at_ms = now_ms - max(0, wall_ms - entry.at_ms)
        since_ms = at_ms - max(0, entry.at_ms - (entry.since_ms or entry.at_ms))
        found.append(Failure(entry.pod, at_ms, entry.text, entry.kind, since_ms, entry.asked_ms, entry.at_ms))
    return tuple(found)
