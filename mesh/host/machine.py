"""What the kernel says of this machine, for whoever plans with it. What a container is granted of it: `cgroups`."""

from pathlib import Path

MEMINFO = Path("/proc/meminfo")


def memory_bytes(field: str, meminfo: Path = MEMINFO) -> int | None:
    """A figure of the memory, such as MemTotal or MemAvailable; None where it is not told: not Linux as we know it."""
    try:
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        return int(fields[field].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        return None
