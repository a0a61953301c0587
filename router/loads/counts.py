"""Protocols of the counters that loads use, because this package must not import the module that implements them."""

from typing import Protocol


class Counter(Protocol):
    """A count of events."""

    def inc(self) -> None:
        """Increments the counter."""


class Distribution(Protocol):
    """A distribution of values."""

    def observe(self, value: float) -> None:
        """Adds a value."""


class Counts(Protocol):
    """The counters of loads."""

    @property
    def misses(self) -> Distribution:
        """The waits for models that were not loaded, in milliseconds."""

    @property
    def loads(self) -> Counter:
        """The loads that agents carried out."""

    @property
    def load_failures(self) -> Counter:
        """The loads that failed."""
