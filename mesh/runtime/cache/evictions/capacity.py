"""How much memory is for models, by what the operator asks for and what there is, and how much for their server in all.

A full cache is the normal state, so the model server must have room beyond its capacity for itself, for calls at work
and for what malloc cannot give back; `limit` is all of that together, and the hard limit of the process.

More than the container has, or the machine without one, is refused at the start, rather than cut to what fits: a
rollout then stops at its first pod while the others serve, and whoever wrote the number learns of it, where a smaller
cache would only show as misses. A pod that planned with what is not there would be killed, with all of its models, the
day its cache is full. What fits and leaves little room besides is taken, and the model server bounded by what there is.
"""

from mesh.host.memory import Whole
from mesh.options.values import format_bytes
from mesh.runtime.cache.evictions.memory import DEVICE_EVICT, EVICT
from placement.footprint import SESSION_BYTES

AGENT = 100 << 20
SERVER = 100 << 20
"""Bytes that the processes take without any model: 84 to 90 MB and 95 MB were measured."""

HEADROOM_SHARE = 0.25
HEADROOM_LEAST = 512 << 20
"""The server itself takes about 100 MB; the data port alone may hold 256 MiB of inputs."""

AUTO_LEAST = 64 << 20
"""The least that the automatic capacity is, in bytes: a pod with less memory than that takes does not start."""

AUTO_SHARE = 0.75  # of the memory at hand, where the operator names no capacity
DEVICE_SHARE = 0.85  # of the device's free memory, for models, likewise


def limit(capacity_bytes: int) -> int:
    """What the server's process may take in all."""
    return capacity_bytes + max(int(capacity_bytes * HEADROOM_SHARE), HEADROOM_LEAST)


def auto_limit(available_bytes: int) -> int:
    """The same with the automatic capacity: in a small container less, or the container would be killed first."""
    return min(limit(auto_capacity(available_bytes)), int(available_bytes * AUTO_SHARE))


def auto_capacity(available_bytes: int) -> int:
    """The capacity whose limit is a good part of the memory at hand; at least 64 MiB."""
    whole = int(available_bytes * AUTO_SHARE)
    capacity = int(whole / (1 + HEADROOM_SHARE))
    if capacity * HEADROOM_SHARE < HEADROOM_LEAST:
        capacity = whole - HEADROOM_LEAST
    return max(AUTO_LEAST, capacity)


def device_capacity(wanted: int, used: int, total: int) -> int:
    """Bytes for models on a device of `total` bytes, of which `used` are in use before any model. `wanted` 0: a good
    part of the rest. Raises ValueError where that much is not there, or not enough for one model, below the share at
    which copies go again."""
    free = max(0, int(total * DEVICE_EVICT) - used)
    if wanted > free:
        text = f"{format_bytes(wanted)} are asked for models, of the device's {format_bytes(total)}"
        raise ValueError(f"{text} only {format_bytes(free)} are free")
    if free < SESSION_BYTES:
        text = f"{format_bytes(used)} of the device's {format_bytes(total)} are in use by others, and no model fits"
        raise ValueError(f"{text} into the rest: free it, or use --device cpu")
    return wanted or int(free * DEVICE_SHARE)


def server_limit(capacity: int, there: Whole | None) -> int:
    """Bytes for the model server in all, so that `capacity` of them can be models'. Raises ValueError where that much
    is not there."""
    wanted = limit(capacity)
    if there is None:
        return wanted
    bound = there.bytes - AGENT
    # Above this share copies are evicted (`memory`), and a cache that is merely full must stay below.
    most = int(EVICT * bound) - SERVER
    if capacity <= most:
        return min(wanted, bound)
    has = f"{format_bytes(capacity)} are asked for models, and {there.whose} has {format_bytes(there.bytes)} in all"
    lower = f", of which {format_bytes(most)} at most can be theirs" if most > 0 else ", which is too little for any"
    raise ValueError(f"{has}{lower}. Ask for less, or {_raise(there, _needed(capacity))}, or say auto")


def check_least(there: Whole | None) -> None:
    """Raises ValueError where there is not even memory for the least automatic capacity: models would fail to load for
    want of memory that the pod says it has."""
    needed = _needed(AUTO_LEAST)
    if there is not None and there.bytes < needed:
        raise ValueError(
            f"{there.whose} has {format_bytes(there.bytes)} in all, and a pod needs {format_bytes(needed)}, of which "
            f"{format_bytes(AUTO_LEAST)} are for models: {_raise(there, needed)}"
        )


def _needed(capacity: int) -> int:
    return int((capacity + SERVER) / EVICT) + AGENT


def _raise(there: Whole, needed: int) -> str:
    if there.whose == "the container":
        return f"raise the container's memory limit to {format_bytes(needed)}"
    return "take a larger one"
