"""Supervision of calls that run in the event loop, from a separate thread.

The duration of a run may depend on the values in its input, not only on their number: eight bytes can make a Loop run a
million rounds. Such a call would delay all others. A watcher thread therefore checks the event loop every 20 ms, and
ends a run that takes too long. The call then runs again in a thread of `runs`, where its duration does not matter. ONNX
Runtime releases the GIL while it runs, so the watcher can run too.

While no call runs, the watcher sleeps, so an idle server costs nothing.
"""

import threading
import time
from typing import Any

from mesh.runtime.server.onnx import session

LIMIT_NS = 50_000_000
"""Longest run in the loop, in nanoseconds: 50 times the mean up to which calls stay in the loop (`pace.THREAD_NS`), so
that no call is ended only because the machine is busy."""

_LOOK = 0.02  # seconds
_ROUNDS = 50  # looks without a run after which the watcher sleeps


class CallWatch:
    """The watcher. The loop stores the beginning of a run in `since_ns`, and sets it to 0 when the run ends."""

    __slots__ = ("_ended", "_thread", "_wake", "asleep", "options", "since_ns")

    def __init__(self) -> None:
        self.options: Any = session.run_options()
        """The RunOptions of runs in the loop."""
        self.since_ns = 0
        self.asleep = False
        self._wake = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Wakes the watcher. The loop calls it if `asleep` is set after it has stored a run in `since_ns`."""
        self._wake.set()

    def stopped(self) -> bool:
        """Returns whether a run failed because the watcher ended it. Resets the options for the next runs."""
        if not self.options.terminate:
            return False
        self.options = session.run_options()
        return True

    def close(self) -> None:
        """Ends the watcher."""
        self._ended = True
        self._wake.set()

    def _look(self) -> None:
        quiet = 0
        last = 0
        while not self._ended:
            time.sleep(_LOOK)
            since = self.since_ns
            if since and since == last and time.monotonic_ns() - since > LIMIT_NS:
                # If the long run has just ended, this may hit the next one instead: it is repeated in a thread,
                # which does no harm.
                self.options.terminate = True
            quiet = quiet + 1 if since == last == 0 else 0
            last = since
            if quiet >= _ROUNDS:
                self.asleep = True
                if not self.since_ns:  # the loop stores this first and then reads `asleep`, so one side sees the other
                    self._wake.wait()
                self._wake.clear()
                self.asleep = False
                quiet = 0
