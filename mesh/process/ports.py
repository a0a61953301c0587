"""TCP ports: checking that one is free, and reserving free ones for servers that have not started yet.

The remedy for one that is not free depends on the option that named it: callers say so.
"""

import collections
import errno
import random
import socket
from pathlib import Path


class Unusable(Exception):
    """An address that cannot be listened on; the text says why."""


class Taken(Unusable):
    """Another process listens on it."""


class Forbidden(Unusable):
    """This user may not listen on it."""


def check_free(host: str, port: int) -> None:
    """Raises Unusable if a server could not listen on it now. Port 0 passes.

    It is asked before a server is started: the server's own complaint comes late, and names neither option nor remedy.
    """
    if port == 0:
        return
    shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # As servers do, so connections of a former life in TIME_WAIT are no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)  # with SO_REUSEADDR, binding alone succeeds beside another that has bound and not listened
        except PermissionError as error:
            raise Forbidden(f"{shown} may not be used by this user") from error
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise Taken(f"{shown} is taken by another process") from error
            raise Unusable(f"{shown} cannot be listened on: {error.strerror}") from error


def free_port(host: str = "127.0.0.1") -> int:
    """Returns a TCP port without a listener, held for the server that it is meant for while this process lives.

    Held: bound and not listening, so no other process gets it before that server has started. The server can still
    listen on it, as servers set SO_REUSEADDR; a search for a free port, such as this one, does not.

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
