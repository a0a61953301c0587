"""The memory of this machine and the limits of this container: the total, and the available part.

The smaller of the machine's and the container's memory counts. Limits of parent cgroups count too.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from mesh.host import cgroups, groups

MEMINFO = Path("/proc/meminfo")

_GUESS = 4 << 30  # bytes assumed free if the kernel does not say


@dataclass(frozen=True, slots=True)
class Whole:
    """The limit of the memory that this process and its children may use together."""

    bytes: int
    whose: str  # "the container" or "the machine", for texts


def whole(*, meminfo: Path = MEMINFO, root: Path = cgroups.ROOT, membership: Path = cgroups.SELF) -> Whole | None:
    """Returns the total memory of the machine or of the container, whichever is smaller, or None if both are
    unknown."""
    found = [Whole(limit, "the container") for limit in _limits(root, membership)]
    if (total := _told("MemTotal", meminfo)) is not None:
        found.append(Whole(total, "the machine"))
    return min(found, key=lambda one: one.bytes, default=None)


def available_bytes(*, meminfo: Path = MEMINFO, cgroup: Path = cgroups.ROOT) -> int:
    """Returns the number of bytes that this process and its children may still allocate, within the machine and the
    container. Assumes that the machine has 4 GiB free if the kernel does not say."""
    known = _told("MemAvailable", meminfo)
    free = _GUESS if known is None else known
    container = container_bytes(cgroup=cgroup)
    return max(0, free if container is None else min(free, container))


def container_bytes(*, cgroup: Path = cgroups.ROOT) -> int | None:
    """Returns the number of bytes that the container may still allocate, or None if it has no limit."""
    for folder, most, now, files in (
        (cgroup, "memory.max", "memory.current", ("active_file", "inactive_file")),
        (
            cgroup / "memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            ("total_active_file", "total_inactive_file"),
        ),
    ):
        try:
            maximum, used = int((folder / most).read_text()), int((folder / now).read_text())
        except (OSError, ValueError):
            continue  # "max", or the other version of cgroups
        if maximum >= cgroups.NO_LIMIT:
            continue
        with contextlib.suppress(OSError, ValueError):  # the page cache counts as used, but is freed on demand
            told = dict(line.split(maxsplit=1) for line in (folder / "memory.stat").read_text().splitlines())
            used -= sum(int(told.get(name, 0)) for name in files)
        return max(0, maximum - used)
    return None


def _told(field: str, meminfo: Path) -> int | None:
    """Reads a field of /proc/meminfo, such as MemTotal, in bytes. Returns None if the field is missing, as on systems
    other than Linux."""
    try:
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        return int(fields[field].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return None


def _limits(root: Path, membership: Path) -> list[int]:
    folders = cgroups.folders("memory", root=root, membership=membership)
    return [limit for folder in folders if (limit := groups.limit_bytes(folder)) is not None]
