"""The number of CPUs this process may use: the cgroup's grant, not the host's count.

In a container `os.cpu_count()` is the host's count. With one worker for each of 64 cores under a quota of 2, memory and
context switches would be wasted, and the kernel would throttle them together. Both cgroup versions are read; a quota of
a parent group counts too.
"""

import os
from pathlib import Path

from mesh.host import cgroups


def available(*, root: Path = cgroups.ROOT, membership: Path = cgroups.SELF) -> int:
    """Returns the CPUs to plan for, at least 1: the lesser of affinity and quota; part of a CPU is rounded up."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = quota(root=root, membership=membership)
    return allowed if share is None else max(1, min(allowed, -int(-share // 1)))


def quota(*, root: Path = cgroups.ROOT, membership: Path = cgroups.SELF) -> float | None:
    """Returns the CPUs that the tightest cgroup above this process grants, None if there is no limit."""
    shares = [
        share
        for folder in cgroups.folders("cpu", root=root, membership=membership)
        if (share := _share(folder)) is not None
    ]
    return min(shares, default=None)


def _share(folder: Path) -> float | None:
    try:
        limit, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            limit = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    try:
        return int(limit) / int(period) if int(limit) > 0 and int(period) > 0 else None
    except ValueError:  # "max"
        return None
