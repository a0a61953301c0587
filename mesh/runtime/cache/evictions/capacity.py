"""The memory for models, and for the whole model server, from the operator's setting and the available memory.

A full cache is the normal state, so the model server must have room beyond its capacity for itself, for running calls
and for memory that malloc cannot give back. `limit` is the sum of all this, and the hard limit of the process.

A capacity larger than the container's memory (or the machine's, if there is no container) is refused at the start. A
rollout then stops at its first pod while the other pods serve, and the operator learns of the error. If Mesh reduced
the capacity instead, only cache misses would reveal the error. If it accepted the capacity, the pod would be killed,
with all its models, once its cache is full. A capacity that fits but leaves little room is accepted, and the model
server is then limited to the existing memory.
"""

from mesh.host.memory import Whole
from mesh.options.values import format_bytes
from mesh.runtime.cache.evictions.memory import DEVICE_EVICT, EVICT
from placement.footprint import SESSION_BYTES

AGENT = 100 << 20
SERVER = 100 << 20
"""Bytes that the agent needs, and bytes that the ONNX server or the relay needs without any model: 84 to 90 MB and 95
MB were measured."""

HEADROOM_SHARE = 0.25
HEADROOM_LEAST = 512 << 20
"""Bytes beyond the capacity that the model server may use: the server itself needs about 100 MB, and the data port may
hold 256 MiB of inputs."""

AUTO_LEAST = 64 << 20
"""Minimum automatic capacity, in bytes. A pod without enough memory for it does not start."""

AUTO_SHARE = 0.75  # of the available memory, if the operator names no capacity
DEVICE_SHARE = 0.85  # of the device's free memory, for models, likewise


def limit(capacity_bytes: int) -> int:
    """Returns the bytes that the server's process may take in total."""
    return capacity_bytes + max(int(capacity_bytes * HEADROOM_SHARE), HEADROOM_LEAST)


def auto_limit(available_bytes: int) -> int:
    """Returns the bytes that the server's process may take in total if the capacity is automatic. In a small container
    the result is smaller, because the container would otherwise be killed before the limit is reached."""
    return min(limit(auto_capacity(available_bytes)), int(available_bytes * AUTO_SHARE))


def auto_capacity(available_bytes: int) -> int:
    """Returns a capacity, in bytes, whose `limit` is a large part of the available memory. Returns at least 64 MiB."""
    whole = int(available_bytes * AUTO_SHARE)
    capacity = int(whole / (1 + HEADROOM_SHARE))
    if capacity * HEADROOM_SHARE < HEADROOM_LEAST:
        capacity = whole - HEADROOM_LEAST
    return max(AUTO_LEAST, capacity)


def device_capacity(wanted: int, used: int, total: int) -> int:
    """Returns the number of bytes for models on a device of `total` bytes, of which `used` are in use before any model
    is loaded.

    Models can use what is left below the share at which copies are evicted. If `wanted` is 0, returns most of that.
    Raises ValueError if `wanted` is more than that, or if not even a small model fits.
    """
    free = max(0, int(total * DEVICE_EVICT) - used)
    if wanted > free:
        text = f"{format_bytes(wanted)} requested for models, but of the device's {format_bytes(total)}"
        raise ValueError(f"{text}, models can use only {format_bytes(free)}: request less")
    if free < SESSION_BYTES:
        text = f"{format_bytes(used)} of the device's {format_bytes(total)} are in use already, and no model fits"
        raise ValueError(f"{text} into the rest: free some of it, or use --device cpu with Mesh's own model server")
    return wanted or int(free * DEVICE_SHARE)


def server_limit(capacity: int, there: Whole | None) -> int:
    """Returns the number of bytes for the whole model server, of which `capacity` are for models. `there` is the
    existing memory, or None if it is unknown. Raises ValueError if it is too small."""
    wanted = limit(capacity)
    if there is None:
        return wanted
    bound = there.bytes - AGENT
    # Above this share copies are evicted (`memory`), and a cache that is merely full must stay below.
    most = int(EVICT * bound) - SERVER
    if capacity <= most:
        return min(wanted, bound)
    has = f"{format_bytes(capacity)} requested for models, but {there.whose} has {format_bytes(there.bytes)} in all"
    larger = _raise(there, _needed(capacity))
    if most <= 0:
        raise ValueError(f"{has}, too little for any model: {larger}")
    raise ValueError(f"{has}, of which models can use {format_bytes(most)}: request less, {larger}, or use auto")


def foreign_limit(there: Whole | None) -> int:
    """Returns the number of bytes that a foreign server may use beside the agent and the relay, or 0 if it is
    unknown."""
    return 0 if there is None else max(1, there.bytes - AGENT - SERVER)


def check_least(there: Whole | None) -> None:
    """Checks that the memory is enough for the smallest automatic capacity. Otherwise raises ValueError, because the
    pod would announce memory that it does not have, and loads would fail."""
    needed = _needed(AUTO_LEAST)
    if there is not None and there.bytes < needed:
        raise ValueError(
            f"{there.whose} has {format_bytes(there.bytes)} in all, and a pod needs {format_bytes(needed)}, of which "
            f"{format_bytes(AUTO_LEAST)} for models: {_raise(there, needed)}"
        )


def _needed(capacity: int) -> int:
    return int((capacity + SERVER) / EVICT) + AGENT


def _raise(there: Whole, needed: int) -> str:
    if there.whose == "the container":
        return f"raise the container's memory limit to {format_bytes(needed)}"
    return "use a larger machine"
