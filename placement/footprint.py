"""The memory that a model takes in a pod. Host and device memory are counted separately, and neither may overflow.

In a pod without a device, a model keeps in host memory what it would otherwise keep on the device, above all its
weights. A measurement in host memory alone therefore consists mostly of weights. So a model has a footprint on either
kind of pod: measured on one, and estimated for the other from the memory that sessions usually take besides weights.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from placement import words

OVERHEAD_BYTES = 64 << 10
"""Host memory of a session beyond its weights: 33 to 87 KB of resident memory for the smallest models."""

SESSION_BYTES = 8 << 20
"""Device memory of a session beyond its weights: 7 to 9 MiB were measured; each session counts for at least this much
(`mesh.runtime.server.onnx.device`)."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Numbers of bytes in host memory and in device memory."""

    host_bytes: int = 0
    device_bytes: int = 0

    def on(self, *, device: bool) -> "Footprint":
        """Returns the footprint on a pod with, or without, a device. A footprint of 0 bytes is unknown, and remains
        so."""
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
        """The footprint without negative parts."""
        return Footprint(max(0, self.host_bytes), max(0, self.device_bytes))

    def within(self, room: "Footprint") -> bool:
        """Returns whether the footprint fits into `room`, in host and in device memory."""
        return self.host_bytes <= room.host_bytes and self.device_bytes <= room.device_bytes

    @property
    def total_bytes(self) -> int:
        """Bytes of host and device memory together."""
        return self.host_bytes + self.device_bytes

    def share_of(self, capacity: "Footprint") -> float:
        """Returns the share of a capacity that the footprint fills: the larger of the shares in host and device memory,
        or the share in host memory if there is no device."""
        share = self.host_bytes / max(1, capacity.host_bytes)
        return max(share, self.device_bytes / capacity.device_bytes) if capacity.device_bytes else share

    def __str__(self) -> str:
        host = words.size(self.host_bytes)
        return f"{host} and {words.size(self.device_bytes)} of device memory" if self.device_bytes else host


NOTHING = Footprint()


def total(footprints: Iterable[Footprint]) -> Footprint:
    """Returns the sum of footprints."""
    return sum(footprints, NOTHING)


class Figures(Protocol):
    """The figures of a pod's memory and copies. Sizes are in bytes."""

    @property
    def capacity_bytes(self) -> int:
        """Capacity in host memory."""

    @property
    def used_bytes(self) -> int:
        """Host memory that the pod's copies take."""

    @property
    def copies(self) -> int:
        """Number of copies."""

    @property
    def device_capacity_bytes(self) -> int:
        """Capacity in device memory; 0: no device."""

    @property
    def device_used_bytes(self) -> int:
        """Device memory that the pod's copies take."""


def guess(pods: Sequence[Figures]) -> Footprint:
    """Returns the estimate for a model that was never measured: the average of all copies, or of the copies on devices
    if there are any. It is never larger than a pod, so no pod refuses a load because of it."""
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
