"""The last measurements of the memory that this pod had left, in a file that outlives its processes.

On most nodes, a container that runs out of memory is killed with all its processes, and its successor does not learn
why; a pod killed by hand leaves the same traces. The agent therefore records ten times a second how much memory is
left, and the next agent decides by these records whether memory was the cause (`placement.blame.exhausted`). A model
that takes all of the memory between two measurements leaves no evidence, but it may leave some at a later death.
"""

import asyncio
import os
import struct
from collections.abc import Callable
from pathlib import Path

from mesh.process.tasks import turned
from placement import blame

NAME = "last-looks"
"""The name of the file in the run directory."""

INTERVAL = 0.1
"""Seconds between two measurements, each of which takes 0.05 ms. A process touches new memory at 1 to 4 GB/s."""

_FORMAT = struct.Struct("3q")


class LastLooks:
    """A recorder of free memory. `left` returns the number of free bytes, of `whole` bytes in total. Making one raises
    OSError if its file in `folder` cannot be opened."""

    def __init__(self, folder: Path, left: Callable[[], int], whole: int) -> None:
        self._left = left
        self._whole = whole
        self._before = 0
        self._file = os.open(folder / NAME, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)

    async def run(self) -> None:
        """Records free memory every `INTERVAL` seconds until cancelled."""
        while True:
            self.look()
            turned()
            await asyncio.sleep(INTERVAL)

    def look(self) -> None:
        """Records the memory that is free now."""
        left = self._left()
        os.pwrite(self._file, _FORMAT.pack(left, self._before - left if self._before else 0, self._whole), 0)
        self._before = left

    def close(self) -> None:
        """Closes the file. Call this method once `run` has ended."""
        os.close(self._file)


def exhausted(folder: Path) -> bool:
    """Returns whether the pod that left this run directory had probably run out of memory when it was killed. Returns
    False if it left no measurement."""
    try:
        left, fallen, whole = _FORMAT.unpack((folder / NAME).read_bytes())
    except (OSError, struct.error):
        return False
    return blame.exhausted(left, fallen, whole)
