"""The cgroups of this process, of version 1 or 2, for modules that read its limits.

Limits of parent groups count too.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/sys/fs/cgroup")
SELF = Path("/proc/self/cgroup")
NO_LIMIT = 1 << 60  # bytes; version 1 expresses "no limit" as more than any machine has


def folders(controller: str, *, root: Path = ROOT, membership: Path = SELF) -> Iterator[Path]:
    """Yields the folders that a controller (cpu, memory) may have, from this process's group upwards. Some may not
    exist."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers:
            top = root
        elif controller in controllers.split(","):
            top = root / controller
        else:
            continue
        relative = PurePosixPath(path.lstrip("/"))
        yield top / relative
        for parent in relative.parents:
            yield top / parent
    # Inside a container the path in /proc is often the host's, and the container's own group is mounted at the top.
    yield root
    yield root / controller
