"""The sockets on which Envoy calls workers: the router pod creates and keeps them, and passes them to its workers.

This way there is always a listener. While a dead worker is being replaced, its calls wait in its sockets' queues for
the next worker; without a listener they would fail, and many would, since Envoy prefers the worker with the fewest
calls. This also allows a router pod with few CPUs to have only one worker.
"""

import contextlib
import os
import socket

BACKLOG = 4096  # connections not yet accepted; the kernel cuts it to its own limit

GRPC, INFERENCE, REST = KINDS = ("grpc", "infer", "rest")


class Sockets:
    """The listening sockets of one worker, by kind."""

    def __init__(self, paths: dict[str, str]) -> None:
        """Listens on those paths, for this user only; replaces sockets left by a killed pod. Raises OSError."""
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
        """Returns the descriptors for the worker, in the order of `KINDS`."""
        return tuple(self._sockets[kind].fileno() for kind in KINDS)

    def close(self) -> None:
        """Closes and removes the sockets."""
        for kind, listening in self._sockets.items():
            listening.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._paths[kind])
        self._sockets.clear()


def adopt(descriptor: int) -> socket.socket:
    """Returns the socket of a descriptor that the worker was given."""
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
