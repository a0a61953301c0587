"""The number of processes that the kernel has killed for lack of memory, which may explain a SIGKILL."""

from pathlib import Path

_VMSTAT = Path("/proc/vmstat")


def oom_kills(vmstat: Path = _VMSTAT) -> int:
    """Returns the number of processes that the kernel has killed for lack of memory since the machine's start,
    including those above their container's limit. Returns -1 if the kernel does not count them."""
    try:
        lines = vmstat.read_text().splitlines()
    except OSError:
        return -1
    for line in lines:
        name, _, value = line.partition(" ")
        if name == "oom_kill" and value.isdigit():
            return int(value)
    return -1
