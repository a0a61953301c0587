"""A pod as a decision sees it: figures that the pod published some time ago, seen from one router.

The figures lag, and different routers see different ones. Nothing here pretends otherwise: the choice ranks them
coarsely, and `debits` adds what the observer itself has sent meanwhile.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pod:
    """One candidate for a load. Sizes in bytes, ages in milliseconds."""

    name: str
    capacity_bytes: int  # of host memory
    used_bytes: int = 0  # may exceed the capacity: debits, or sizes that were predicted too small
    copies: int = 0
    oldest_idle_ms: int = 0  # since the use of the copy that would go first; 0: empty, or everything in use
    loads_in_progress: int = 0
    loading_threads: int = 1
    rate: int = 0  # calls a minute
    labels: frozenset[str] = frozenset()
    zone: str = ""  # "": unknown, and shared with nobody
    accepts: bool = True
    why_not: str = ""  # where it does not accept: "it is leaving", "it is suspect"
    device_capacity_bytes: int = 0  # 0: no device
    device_used_bytes: int = 0
    outgoing: bool = False  # being replaced by a rollout (`rollout`): its copies will have to move soon
    on_disk: bool = False  # has the files of the model that is asked about

    @property
    def free_bytes(self) -> int:
        """What a load may take without an eviction; never negative."""
        return max(0, self.capacity_bytes - self.used_bytes)

    @property
    def device_free_bytes(self) -> int:
        """The same, of device memory."""
        return max(0, self.device_capacity_bytes - self.device_used_bytes)

    @property
    def has_device(self) -> bool:
        """Whether models may be kept on a device there."""
        return self.device_capacity_bytes > 0
