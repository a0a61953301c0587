"""The counters that loads need, as protocols, because this room must not import the module that implements them."""

from typing import Protocol


class Counter(Protocol):
    """A count of events."""

    def inc(self) -> None:
        """Counts one more."""


class Distribution(Protocol):
    """A distribution of values."""

    def observe(self, value: float) -> None:
        """Counts one more value."""


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
