"""TCP ports: checks whether one is free, and reserves free ones for servers that have not started yet.

The errors say why a port cannot be used. Callers add what to do, because this depends on the option that named the
port.
"""

import collections
import errno
import os
import random
import socket
from pathlib import Path


class Unusable(Exception):
    """An address that a server cannot listen on. The text says why."""


class Taken(Unusable):
    """An address that another process already listens on."""


class Forbidden(Unusable):
    """An address that this user may not listen on."""


def check_free(host: str, port: int) -> None:
    """Checks that a server can listen on the address now. Otherwise raises Unusable. Port 0 is always accepted.

    Call it before a server is started: the server's own error would come later, and name neither the option nor what to
    do.
    """
    if port == 0:
        return
    shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # As servers do, so that a former process's connections in TIME_WAIT do not matter.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)  # with SO_REUSEADDR, bind succeeds even if another socket is bound but does not listen
        except PermissionError as error:
            raise Forbidden(f"{shown} may not be used by this user") from error
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise Taken(f"{shown} is taken by another process") from error
            raise Unusable(f"a server cannot listen on {shown}: {error.strerror}") from error


def reason(error: Exception) -> str:
    """Returns the reason why a server cannot listen. Leaves out the address, which asyncio and `socket` add."""
    if not isinstance(error, OSError):
        return str(error)
    number = error.errno or 0  # below 0 if the host's name is unknown
    return os.strerror(number) if number > 0 else error.strerror or str(error)


def free_port(host: str = "127.0.0.1") -> int:
    """Returns a TCP port without a listener, and reserves it for a server until this process ends, or has reserved 256
    others.

    The port is bound but not listened on, so no other process gets it before that server has started. The server can
    still listen on it, because servers set SO_REUSEADDR; searches for a free port, such as this one, do not.

    The port is below the ephemeral range, because outgoing connections use ports of that range too: a client that keeps
    connecting to a dead server's port could then be connected to itself.
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
