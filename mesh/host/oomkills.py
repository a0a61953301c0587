"""How often this machine's kernel has killed a process for memory: evidence about a SIGKILL that nobody explains."""

from pathlib import Path

_VMSTAT = Path("/proc/vmstat")


def oom_kills(vmstat: Path = _VMSTAT) -> int:
    """Kills so far, those for the limit of any container included; -1 where the kernel does not tell."""
    try:
        lines = vmstat.read_text().splitlines()
    except OSError:
        return -1
    for line in lines:
        name, _, value = line.partition(" ")
        if name == "oom_kill" and value.isdigit():
            return int(value)
    return -1
