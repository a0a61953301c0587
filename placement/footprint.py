"""What a model takes in a pod: host memory and device memory. They are counted apart, and neither may overflow.

A pod without a device has one memory, and whatever a model keeps on a device elsewhere, its weights above all, it keeps
in host memory there. The other way round, what was measured in host memory alone is weights, but for a little. So the
same model has a footprint on either kind of pod: measured on the one, and on the other an estimate, as good as what
sessions take besides weights is alike.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from placement import words

OVERHEAD_BYTES = 64 << 10
"""What a session takes of host memory beyond its weights: 33 to 87 KB of resident memory for the smallest models."""

SESSION_BYTES = 8 << 20
"""What a session takes of a device beyond its weights: 7 to 9 MiB, and each is counted with so much at least
(`mesh.runtime.server.device`)."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes in each memory."""

    host_bytes: int = 0
    device_bytes: int = 0

    def on(self, *, device: bool) -> "Footprint":
        """On a pod with, or without, a device. One of 0 bytes is unknown, and is so on either."""
        if device == bool(self.device_bytes) or not self.total_bytes:
            return self
        if device:
            host = min(OVERHEAD_BYTES, self.host_bytes)
            return Footprint(host, SESSION_BYTES + self.host_bytes - host)
        return Footprint(self.host_bytes + max(0, self.device_bytes - SESSION_BYTES))

    def __add__(self, other: "Footprint") -> "Footprint":
        return Footprint(self.host_bytes + other.host_bytes, self.device_bytes + other.device_bytes)

    def __sub__(self, other: "Footprint") -> "Footprint":
        return Footprint(self.host_bytes - other.host_bytes, self.device_bytes - other.device_bytes)

    @property
    def positive(self) -> "Footprint":
        """What is above nothing, in each memory."""
        return Footprint(max(0, self.host_bytes), max(0, self.device_bytes))

    def within(self, room: "Footprint") -> bool:
        """Whether there is room for it, in both memories."""
        return self.host_bytes <= room.host_bytes and self.device_bytes <= room.device_bytes

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


NOTHING = Footprint()


def total(footprints: Iterable[Footprint]) -> Footprint:
    """Returns their sum."""
    return sum(footprints, NOTHING)


class Figures(Protocol):
    """What a pod says of its memory and its copies. Sizes in bytes."""

    @property
    def capacity_bytes(self) -> int:
        """Of host memory."""

    @property
    def used_bytes(self) -> int:
        """Of that, by copies."""

    @property
    def copies(self) -> int:
        """How many it has."""

    @property
    def device_capacity_bytes(self) -> int:
        """Of device memory; 0: no device."""

    @property
    def device_used_bytes(self) -> int:
        """Of that, by copies."""


def guess(pods: Sequence[Figures]) -> Footprint:
    """Returns what a model is taken to need that was never measured: what copies have on the average, those on devices
    where there are any. A guess is never the reason why a model is refused, by a pod of either kind."""
    devices = [pod for pod in pods if pod.device_capacity_bytes and pod.copies]
    seen = devices or pods
    on_devices = [pod.device_capacity_bytes for pod in pods if pod.device_capacity_bytes]
    copies = sum(pod.copies for pod in seen) or 1
    host = min([sum(pod.used_bytes for pod in seen) // copies, *(pod.capacity_bytes for pod in pods)])
    average = sum(pod.device_used_bytes for pod in seen) // copies
    device = min([average, *on_devices, *(pod.capacity_bytes - host for pod in pods)])
    if not device:
        host = min([host, *(max(0, capacity - SESSION_BYTES) for capacity in on_devices)])
    return Footprint(host, device)
