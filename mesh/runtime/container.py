"""Whether the memory that an operator names for models is there at all: the container's, or the machine's without one.

More than that is refused at the start, rather than cut to what fits: a rollout then stops at its first pod while the
others serve, and whoever wrote the number learns of it, where a smaller cache would only show as misses. A pod that
planned with what is not there would be killed, with all of its models, the day its cache is full.

What fits and leaves little room besides is taken, and the model server bounded by what there is.
"""

from dataclasses import dataclass
from pathlib import Path

from mesh.host import cgroups, machine
from mesh.runtime.cache import memory
from mesh.settings import format_bytes

AGENT = 100 << 20
SERVER = 100 << 20
"""Bytes that the processes take without any model: 84 to 90 MB and 95 MB were measured."""


@dataclass(frozen=True, slots=True)
class Memory:
    """The most that this process and its children may have."""

    bytes: int
    whose: str  # in words


def whole(
    *, meminfo: Path = machine.MEMINFO, root: Path = cgroups.ROOT, membership: Path = cgroups.SELF
) -> Memory | None:
    """What there is when nothing is in use yet. None: it cannot be told."""
    found = [Memory(limit, "the container") for limit in _limits(root, membership)]
    if (total := machine.memory_bytes("MemTotal", meminfo)) is not None:
        found.append(Memory(total, "the machine"))
    return min(found, key=lambda one: one.bytes, default=None)


def server_limit(capacity: int, there: Memory | None) -> int:
    """Bytes for the model server in all, so that `capacity` of them can be models'. Raises ValueError where that much
    is not there."""
    wanted = memory.limit(capacity)
    if there is None:
        return wanted
    bound = there.bytes - AGENT
    # As in `memory`: above this share copies are evicted, and a cache that is merely full must stay below.
    most = int(memory.EVICT * bound) - SERVER
    if capacity <= most:
        return min(wanted, bound)
    has = f"{format_bytes(capacity)} are asked for models, and {there.whose} has {format_bytes(there.bytes)} in all"
    lower = f", of which {format_bytes(most)} at most can be theirs" if most > 0 else ", which is too little for any"
    raise ValueError(f"{has}{lower}. Ask for less, or {_raise(there, _needed(capacity))}, or say auto")


def check_least(there: Memory | None) -> None:
    """Raises ValueError where there is not even memory for the least automatic capacity: models would fail to load for
    want of memory that the pod says it has."""
    needed = _needed(memory.AUTO_LEAST)
    if there is not None and there.bytes < needed:
        raise ValueError(
            f"{there.whose} has {format_bytes(there.bytes)} in all, and a pod needs {format_bytes(needed)}, of which "
            f"{format_bytes(memory.AUTO_LEAST)} are for models: {_raise(there, needed)}"
        )


def _needed(capacity: int) -> int:
    return int((capacity + SERVER) / memory.EVICT) + AGENT


def _raise(there: Memory, needed: int) -> str:
    if there.whose == "the container":
        return f"raise the container's memory limit to {format_bytes(needed)}"
    return "take a larger one"


def _limits(root: Path, membership: Path) -> list[int]:
    found = []
    for folder in cgroups.folders("memory", root=root, membership=membership):
        for name in ("memory.max", "memory.limit_in_bytes"):
            try:
                limit = int((folder / name).read_text())
            except (OSError, ValueError):  # "max"
                continue
            if 0 < limit < cgroups.NO_LIMIT:
                found.append(limit)
    return found
