"""The sockets on which Envoy calls workers. The router pod creates and keeps them, and passes them to its workers.

The sockets thus always have a listener. While a dead worker is being replaced, its calls wait in the sockets' queues
for the next worker. Without a listener these calls would fail, and so would many more, because Envoy prefers the worker
with the fewest calls. For the same reason, a router pod with few CPUs can run a single worker.
"""

import contextlib
import os
import socket

BACKLOG = 4096  # connections not yet accepted; the kernel cuts it to its own limit

GRPC, INFERENCE, REST = KINDS = ("grpc", "infer", "rest")
MANAGED_GRPC, MANAGED_REST = MANAGED = ("mgrpc", "mrest")
"""The kinds of sockets behind a separate port for management. If there is such a port, the other sockets do not serve
management."""


class Sockets:
    """The listening sockets of one worker, by kind."""

    def __init__(self, paths: dict[str, str]) -> None:
        """Listens on the given paths, for this user only. Replaces sockets that a killed pod has left. Raises
        OSError."""
        self._paths = paths
        self._sockets: dict[str, socket.socket] = {}
        try:
            for kind, path in paths.items():
                self._sockets[kind] = _listen(path)
        except BaseException:
            self.close()
            raise

    @property
    def descriptors(self) -> tuple[int, ...]:
        """The descriptors to pass to the worker, in the order of their paths."""
        return tuple(self._sockets[kind].fileno() for kind in self._paths)

    def close(self) -> None:
        """Closes and removes the sockets."""
        for kind, listening in self._sockets.items():
            listening.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._paths[kind])
        self._sockets.clear()


def adopt(descriptor: int) -> socket.socket:
    """Returns the socket for a descriptor that the pod has passed to the worker."""
    listening = socket.socket(fileno=descriptor)
    listening.setblocking(False)
    return listening


def _listen(path: str) -> socket.socket:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        listening.bind(path)  # in a directory that only this user can enter
        os.chmod(path, 0o600)
        listening.listen(BACKLOG)
    except BaseException:
        listening.close()
        raise
    return listening
