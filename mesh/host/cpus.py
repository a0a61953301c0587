"""The number of CPUs that this process may use, including the quota of its container.

In a container, `os.cpu_count()` returns the host's count. One worker for each of 64 cores, under a quota of 2, would
waste memory and context switches, and the kernel would throttle all workers together. Both cgroup versions are read.
Quotas of parent groups count too.
"""

import os
from pathlib import Path

from mesh.host import cgroups


def available(*, root: Path = cgroups.ROOT, membership: Path = cgroups.SELF) -> int:
    """Returns the number of CPUs that this process may use: the smaller of affinity and quota, rounded up, and at least
    1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = quota(root=root, membership=membership)
    return allowed if share is None else max(1, min(allowed, -int(-share // 1)))


def quota(*, root: Path = cgroups.ROOT, membership: Path = cgroups.SELF) -> float | None:
    """Returns the lowest CPU quota of this process's cgroups, or None if there is no limit."""
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
