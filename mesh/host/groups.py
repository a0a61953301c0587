"""Memory of a cgroup that holds one program only, such as a systemd unit or a container that is visible from here.

The count of a cgroup is more exact than the sum over its processes: it counts shared pages once, and includes shared
memory.
"""

import os
from collections.abc import Collection
from pathlib import Path

from mesh.host import cgroups, processes


def of_program(
    pid: int, members: Collection[int], *, root: Path = cgroups.ROOT, proc: Path = processes.PROC
) -> Path | None:
    """Returns the folder of a process's memory cgroup, if the cgroup holds only `members`. Returns None if the cgroup
    holds any other process, such as this one, or is not visible."""
    for folder in cgroups.folders("memory", root=root, membership=proc / str(pid) / "cgroup"):
        if folder in (root, root / "memory"):
            return None
        try:
            inside = {int(line) for line in (folder / "cgroup.procs").read_text().split()}
        except (OSError, ValueError):
            continue
        alone = pid in inside and inside <= set(members) and os.getpid() not in inside
        return folder if alone and used_bytes(folder) is not None else None
    return None


def used_bytes(folder: Path) -> int | None:
    """Returns the bytes of a cgroup that the kernel cannot reclaim: anonymous and shared memory. Returns None if the
    number is unknown."""
    try:
        told = dict(line.split(maxsplit=1) for line in (folder / "memory.stat").read_text().splitlines())
        if "anon" in told:
            return int(told["anon"]) + int(told.get("shmem", 0))
        return int(told["total_rss"]) + int(told.get("total_shmem", 0))
    except (OSError, ValueError, KeyError):
        return None


def limit_bytes(folder: Path) -> int | None:
    """Returns the limit of a cgroup in bytes, or None if the cgroup has no limit of its own."""
    for name in ("memory.max", "memory.limit_in_bytes"):
        try:
            limit = int((folder / name).read_text())
        except (OSError, ValueError):  # "max"
            continue
        if 0 < limit < cgroups.NO_LIMIT:
            return limit
    return None
