"""Free TCP ports, chosen so that nobody else takes them before the server that they are meant for has started."""

import collections
import random
import socket
from pathlib import Path


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nobody listens on, held for the server that it is meant for while this process lives.

    Held: bound and not listening, so that nobody else is given it before that server has started. A server may listen
    on it all the same, as servers set SO_REUSEADDR; whoever looks for a free port, as here, does not.

    Below the ephemeral range: ports inside it are taken by outgoing connections too, and a client that keeps connecting
    to a dead server's port there can be connected to itself.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for _ in range(64):
        port = random.randrange(12_000, _ephemeral_start())
        probe = socket.socket(family)
        try:
            probe.bind((host, port))
        except OSError:
            probe.close()
            continue
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _held.append(probe)
        return port
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


_held: collections.deque[socket.socket] = collections.deque(maxlen=256)


def _ephemeral_start() -> int:
    try:
        return max(int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0]), 12_100)
    except (OSError, ValueError, IndexError):
        return 32_768
