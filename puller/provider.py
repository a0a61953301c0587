"""The seam: what a kind of store has to do to be pulled from.

A provider fetches one location, a file or a whole folder, to a target that does not exist yet. Everything around it
(temporary names, renaming, clean-up after failure or cancellation) belongs to `puller` and `disk`, so a provider may
simply stop. A new store is one module with one class, registered under its schemes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from puller.disk import Disk
from puller.errors import PullError, PullErrorKind
from puller.source import Location


@dataclass(frozen=True, slots=True)
class Target:
    """Where to put what is fetched."""

    path: Path  # does not exist; its parent does. Nothing is written outside it
    disk: Disk
    limit_bytes: int

    def admit(self, size: int, written: int = 0) -> None:
        """Raises PullError unless `size` bytes in all may be written, of which `written` are there already."""
        if size > self.limit_bytes:
            text = f"it has {size} bytes or more, the limit is {self.limit_bytes}"
            raise PullError(PullErrorKind.TOO_LARGE, text)
        self.disk.admit(size - written)


class Provider(Protocol):
    """A kind of store."""

    async def fetch(self, location: Location, target: Target) -> int:
        """Writes the location to the target and returns the bytes written. Raises PullError.

        Cancelled, it stops writing soon; what it wrote is removed by the caller.
        """

    async def close(self) -> None:
        """Gives back connections and threads."""
