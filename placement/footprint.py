"""What a model takes in a pod: host memory and device memory. They are counted apart, and neither may overflow.

A pod without a device has one memory, and whatever a model keeps on a device elsewhere, its weights above all, it keeps
in host memory there. So the same model has a footprint on either kind of pod.
"""

from dataclasses import dataclass

from placement import words


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes in each memory."""

    host_bytes: int = 0
    device_bytes: int = 0

    def on(self, *, device: bool) -> "Footprint":
        """On a pod with, or without, a device."""
        if device or not self.device_bytes:
            return self
        return Footprint(self.host_bytes + self.device_bytes)

    @property
    def total_bytes(self) -> int:
        """In both memories."""
        return self.host_bytes + self.device_bytes

    def share_of(self, capacity: "Footprint") -> float:
        """How much of that capacity it fills, by the memory that it fills more of; where there is no device, by the
        host's."""
        share = self.host_bytes / max(1, capacity.host_bytes)
        return max(share, self.device_bytes / capacity.device_bytes) if capacity.device_bytes else share

    def __str__(self) -> str:
        host = words.size(self.host_bytes)
        return f"{host} and {words.size(self.device_bytes)} of device memory" if self.device_bytes else host
