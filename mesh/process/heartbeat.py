"""Signs of life of a child's event loop, in a page of memory that it shares with its parent.

The child stores the time twice a second; the parent may read it at any time. A sign of life therefore costs neither a
message nor a wake-up, a busy parent misses none, and the child never blocks. The page is a memfd. The child finds the
descriptor in an environment variable, which it removes so that its own children do not write to the page.

`hang` decides whether a silence is too long.
"""

import asyncio
import contextlib
import mmap
import os
import struct
import time

from mesh.telemetry import logs

log = logs.get(__name__)

PERIOD = 0.5
"""Seconds between two beats."""

VARIABLE = "MESH_HEARTBEAT_FD"

_NAME = "mesh-heartbeat"
_WORD = struct.Struct("Q")


class Heartbeat:
    """The parent's side of the page. Pass `descriptor` to the child, then call `release`."""

    __slots__ = ("_map", "descriptor")

    def __init__(self) -> None:
        """Creates the page. Raises OSError if no descriptor or memory is free."""
        self.descriptor = os.memfd_create(_NAME)
        try:
            os.ftruncate(self.descriptor, _WORD.size)
            self._map = mmap.mmap(self.descriptor, _WORD.size)
        except BaseException:
            os.close(self.descriptor)
            raise

    def last(self) -> float:
        """Returns the time of the last beat, in seconds of the monotonic clock, or 0 if the child has not begun to
        beat."""
        return float(_WORD.unpack_from(self._map, 0)[0] / 1e9)

    def release(self) -> None:
        """Closes the descriptor; the page stays."""
        os.close(self.descriptor)


def begin() -> None:
    """Makes the running event loop beat, if the parent process asks for it. Call this function before any other
    work."""
    descriptor = os.environ.pop(VARIABLE, "")
    if not descriptor:
        return
    try:
        number = int(descriptor)
        # Never write into another file, whatever the variable says.
        if not os.readlink(f"/proc/self/fd/{number}").startswith(f"/memfd:{_NAME}"):
            raise ValueError("the descriptor is not the parent's page")
        page = mmap.mmap(number, _WORD.size)
    except (OSError, ValueError) as error:
        log.warning(
            "this process sends no heartbeats: their page cannot be mapped", descriptor=descriptor, error=str(error)
        )
        return
    with contextlib.suppress(OSError):
        os.close(number)
    loop = asyncio.get_running_loop()

    def beat() -> None:
        _WORD.pack_into(page, 0, time.monotonic_ns())
        loop.call_later(PERIOD, beat)

    beat()
