"""The memory of a foreign server, observed from outside by the agent.

The server is found by its address: the kernel names the process that listens on a unix socket, and /proc the process
that listens on a port on loopback. If the server's cgroup contains no other program, the memory of the cgroup counts,
and otherwise the memory of the process and its descendants. A server on another machine, or in a container whose
processes are not visible from here, cannot be observed. `why` then gives the reason, and models' sizes come from the
server's own answers.
"""

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

from mesh.host import groups, processes
from mesh.options.values import parse_address

_LOOPBACK = ("127.0.0.1", "localhost", "::1", "0.0.0.0", "::")
_FAMILY = 5.0  # seconds for which a list of descendants is used
_AGAIN = 10.0  # seconds between two searches for a server that was not found


class ServerMemory:
    """The memory of the foreign server at an address. If another server replaces it at this address, the new server is
    observed."""

    def __init__(self, address: str, child: Callable[[], int] | None = None, *, watched: bool = True) -> None:
        """Makes an observer of the server at an address in gRPC's notation. `child` returns the id of the process that
        the pod has started as the server, or 0. Unless `watched`, nothing is observed."""
        self._address = address
        self._child = child
        self._watched = watched
        self._pid = self._begun = 0
        self._group: Path | None = None
        self._family: frozenset[int] = frozenset()
        self._looked = self._searched = -1e9
        self.lives = 0  # number of servers found so far
        self.why = "this pod has not looked for the server yet" if watched else "--server-memory is none"

    @property
    def what(self) -> str:
        """The observed cgroup or processes, for operators."""
        if not self._pid:
            return ""
        return f"cgroup of process {self._pid}" if self._group is not None else f"process {self._pid} and its children"

    @property
    def limit_bytes(self) -> int | None:
        """The limit of the server's own cgroup in bytes, or None if the server has no cgroup of its own, or its limit
        is unknown."""
        return None if self._group is None else groups.limit_bytes(self._group)

    async def find(self) -> bool:
        """Looks for the server if it was not found yet, or if the one that was found has ended. Searches every 10 s at
        most while the server is not found. Returns whether the server can be observed."""
        if not self._watched:
            return False
        if self._there():
            return True
        now = time.monotonic()
        if now - self._searched < _AGAIN and not self._pid:
            return False
        self._searched, self._pid = now, 0
        pid = await asyncio.to_thread(self._server)
        if pid:
            self._pid, self._begun = pid, processes.begun(pid)
            self._look()
            self._group = groups.of_program(pid, self._family)
            self.lives += 1
            self.why = ""
        return bool(pid)

    def read(self, *, relook: bool = False) -> int | None:
        """Returns the bytes in use, or None if they cannot be observed. With `relook`, also counts processes that the
        server has started a moment ago: some servers start one for each model."""
        if not self._there():
            return None
        if self._group is not None and (used := groups.used_bytes(self._group)) is not None:
            return used
        if relook or time.monotonic() - self._looked > _FAMILY:
            self._look()
        return sum(processes.private_bytes(pid) for pid in self._family)

    def _there(self) -> bool:
        return bool(self._pid) and processes.begun(self._pid) == self._begun

    def _look(self) -> None:
        self._family, self._looked = processes.tree(self._pid), time.monotonic()

    def _server(self) -> int:
        """Returns the id of the process to observe, or 0. In that case `why` has the reason."""
        found = _listener(self._address)
        child = self._child() if self._child is not None else 0
        if child and (found in processes.tree(child) or (not found and not self._address.startswith("unix:"))):
            return child
        if not found:
            where = "on another machine or in another container"
            self.why = f"its processes are not visible from here, for example because it runs {where}"
            return 0
        if os.getpid() in processes.tree(found):
            self.why = f"the process {found}, which listens at its address, also runs this pod"
            return 0
        return found


def _listener(address: str) -> int:
    """Returns the id of the process that listens at an address, or 0 if it is not visible."""
    if address.startswith("unix:"):
        return processes.behind_socket(address.removeprefix("unix:"))
    host, port = parse_address(address)
    return processes.behind_port(port) if host in _LOOPBACK else 0
