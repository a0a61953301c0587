"""What is counted of loads, as loads need it: what counts it stands above them."""

from typing import Protocol


class Counter(Protocol):
    """Something that is counted."""

    def inc(self) -> None:
        """Counts one more."""


class Distribution(Protocol):
    """Something whose values are counted."""

    def observe(self, value: float) -> None:
        """Counts one more value."""


class Counts(Protocol):
    """What is counted of loads."""

    @property
    def misses(self) -> Distribution:
        """Waits for models that were not loaded, in milliseconds."""

    @property
    def loads(self) -> Counter:
        """Loads that agents carried out."""

    @property
    def load_failures(self) -> Counter:
        """Loads that failed."""
