"""Memory of other processes on this machine, and the process that listens at an address.

Everything is read from /proc and from cgroups, as far as they are visible to this process. In a container, these are
the container's own processes, and those of the pod's other containers only if they share a process namespace.
"""

import contextlib
import os
import socket
import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")

_LISTEN = "0A"  # state of a listening socket in /proc/net/tcp
_PEER = struct.Struct("3i")


def private_bytes(pid: int, *, proc: Path = PROC) -> int:
    """Returns the resident memory of a process in bytes, without mapped files and shared memory, or 0 if the process
    does not exist."""
    try:
        _, total, shared, *_ = (proc / str(pid) / "statm").read_bytes().split()
    except (OSError, ValueError):
        return 0
    return (int(total) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def begun(pid: int, *, proc: Path = PROC) -> int:
    """Returns the start time of a process, in ticks since the machine's start, or 0 if the process does not exist. The
    start time tells apart two processes that had the same id."""
    fields = _stat(pid, proc)
    return int(fields[19]) if fields else 0


def tree(root: int, *, proc: Path = PROC) -> frozenset[int]:
    """Returns the ids of a process and of all its descendants, or an empty set if the process does not exist."""
    children: dict[int, list[int]] = defaultdict(list)
    there = False
    for pid in _pids(proc):
        if (fields := _stat(pid, proc)) and fields[0] != "Z":
            children[int(fields[1])].append(pid)
            there = there or pid == root
    found: set[int] = set()
    left = [root] if there else []
    while left:
        pid = left.pop()
        if pid not in found:
            found.add(pid)
            left += children[pid]
    return frozenset(found)


def behind_port(port: int, *, proc: Path = PROC) -> int:
    """Returns the id of the process that listens on a TCP port of this machine, or 0 if none does, or it is not visible
    from here. Reads all of /proc, so call it in a thread.

    The sockets of another user's processes cannot be read. The listener is then the only program of the user who owns
    the socket, if that user has just one: the case of a container with a user of its own.
    """
    listening = dict(_listening(port, proc))
    inodes = {f"socket:[{inode}]" for inode in listening}
    if not inodes:
        return 0
    for pid in _pids(proc):
        with contextlib.suppress(OSError):
            for one in (proc / str(pid) / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if os.readlink(one) in inodes:
                        return pid
    users = set(listening.values()) - {os.geteuid()}
    return _program_of(users.pop(), proc) if len(users) == 1 else 0


def behind_socket(path: str) -> int:
    """Returns the id of the process that has called `listen` on a unix socket, or 0. For a process outside this
    process's namespace, the kernel reports 0, as if no process listened."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.setblocking(False)
        try:
            peer.connect(path)
            pid, _, _ = _PEER.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        except OSError:
            return 0
    return int(pid)


def _program_of(user: int, proc: Path) -> int:
    """Returns the process of a user from which all other processes of the user descend, or 0 if there is none, or more
    than one."""
    theirs = {pid: int(fields[1]) for pid in _pids(proc) if _user(pid, proc) == user and (fields := _stat(pid, proc))}
    first = [pid for pid, parent in theirs.items() if parent not in theirs]
    return first[0] if len(first) == 1 else 0


def _user(pid: int, proc: Path) -> int:
    """Returns the effective user of a process, or -1 if it does not exist."""
    try:
        told = (proc / str(pid) / "status").read_text()
        return int(told.partition("\nUid:")[2].split(maxsplit=2)[1])
    except (OSError, UnicodeDecodeError, ValueError, IndexError):
        return -1


def _listening(port: int, proc: Path) -> Iterator[tuple[str, int]]:
    """Yields the inode and the user of each socket that listens on a port."""
    for name in ("tcp", "tcp6"):
        try:
            lines = (proc / "net" / name).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                yield fields[9], int(fields[7])


def _pids(proc: Path) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for name in os.listdir(proc):
            if name.isdecimal():
                yield int(name)


def _stat(pid: int, proc: Path) -> list[str]:
    """Returns the fields of a process's stat, from the state on, or an empty list if the process does not exist."""
    try:
        # The name in parentheses may hold anything, spaces and parentheses included.
        return (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (OSError, UnicodeDecodeError):
        return []
