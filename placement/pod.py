"""A pod as a decision sees it: figures that the pod published some time ago, seen from one router.

The figures lag, and routers see different ones. That is why a choice ranks them coarsely, and why `debits` adds the
loads that the observer itself has sent since.
"""

from dataclasses import dataclass


@dataclass(slots=True)
class Candidate:
    """One candidate for a load. Sizes in bytes, ages in milliseconds.

    No instance is changed after its construction. The class is not frozen, because construction would take four times
    as long, and every cold start constructs some."""

    name: str
    capacity_bytes: int  # of host memory
    used_bytes: int = 0  # may exceed the capacity: debits, or sizes estimated too small
    copies: int = 0
    oldest_idle_ms: int = 0  # since the last use of the next victim; 0: empty, or all in use
    loads_in_progress: int = 0
    loading_threads: int = 1
    rate: int = 0  # calls a minute
    labels: frozenset[str] = frozenset()
    zone: str = ""  # "": unknown, and shared with no pod
    accepts: bool = True
    why_not: str = ""  # why it accepts no loads: "it is leaving", "it is suspect"
    device_capacity_bytes: int = 0  # 0: no device
    device_used_bytes: int = 0
    outgoing: bool = False  # being replaced by a rollout (`rollout`): its copies will move soon
    on_disk: bool = False  # has the files of the model in question
    types: frozenset[str] = frozenset()  # of models that its server takes; none: any

    @property
    def free_bytes(self) -> int:
        """Host memory that a load may take without an eviction; never negative."""
        return max(0, self.capacity_bytes - self.used_bytes)

    @property
    def device_free_bytes(self) -> int:
        """Device memory that a load may take without an eviction; never negative."""
        return max(0, self.device_capacity_bytes - self.device_used_bytes)

    @property
    def has_device(self) -> bool:
        """True if the pod keeps models on a device."""
        return self.device_capacity_bytes > 0

    @property
    def weights_capacity_bytes(self) -> int:
        """Capacity of the memory that holds weights: the device's, if there is one."""
        return self.device_capacity_bytes or self.capacity_bytes

    @property
    def weights_free_bytes(self) -> int:
        """Free bytes of the memory that holds weights."""
        return self.device_free_bytes if self.device_capacity_bytes else self.free_bytes

    def with_more(self, *, used_bytes: int, device_used_bytes: int, copies: int, loads_in_progress: int) -> "Candidate":
        """Returns this pod with the given amounts added. Every cold start does this for every pod, and
        `dataclasses.replace` would take six times as long."""
        return Candidate(
            self.name,
            self.capacity_bytes,
            self.used_bytes + used_bytes,
            self.copies + copies,
            self.oldest_idle_ms,
            self.loads_in_progress + loads_in_progress,
            self.loading_threads,
            self.rate,
            self.labels,
            self.zone,
            self.accepts,
            self.why_not,
            self.device_capacity_bytes,
            self.device_used_bytes + device_used_bytes,
            self.outgoing,
            self.on_disk,
            self.types,
        )
