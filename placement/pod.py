"""A pod as a decision sees it: figures that the pod published some time ago, seen from one router.

The figures lag, and different routers see different ones. Nothing here pretends otherwise: the choice ranks them
coarsely, and `debits` adds what the observer itself has sent meanwhile.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pod:
    """One candidate for a load. Sizes in bytes, ages in milliseconds."""

    name: str
    capacity_bytes: int
    used_bytes: int = 0  # may exceed the capacity: debits, or sizes that were predicted too small
    copies: int = 0
    oldest_idle_ms: int = 0  # since the use of the copy that would go first; 0: empty, or everything in use
    loads_in_progress: int = 0
    loading_threads: int = 1
    rate: int = 0  # calls a minute
    labels: frozenset[str] = frozenset()
    zone: str = ""
    accepts: bool = True
    why_not: str = ""  # where it does not accept: "it is leaving", "it is suspect"

    @property
    def free_bytes(self) -> int:
        """What a load may take without an eviction; never negative."""
        return max(0, self.capacity_bytes - self.used_bytes)
