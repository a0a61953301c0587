"""Looks after calls that run in the event loop, which nothing else can while they do.

How long a model takes may depend on what stands in its input, not only on how much: a Loop told to go round a million
times by eight bytes. Such a call would hold up every other one. So a thread of its own looks at the loop every few
milliseconds, and ends a run that lasts too long; that call then runs again in a thread, where time does not matter.
onnxruntime releases the GIL while it runs, so the watcher gets its turn.

While nothing runs the watcher sleeps: an idle server costs nothing.
"""

import threading
import time
from typing import Any

from mesh.runtime.server.onnx import session

LIMIT_NS = 50_000_000
"""What a call in the loop may take: 50 times what is allowed to run there at all, so that a busy machine ends none."""

_LOOK = 0.02  # seconds
_ROUNDS = 50  # looks without a run after which the watcher sleeps


class Watch:
    """The watcher. The loop stores when a run began in `since_ns` and sets it to 0 when it ended."""

    __slots__ = ("_ended", "_thread", "_wake", "asleep", "options", "since_ns")

    def __init__(self) -> None:
        self.options: Any = session.run_options()
        """What runs in the loop are given."""
        self.since_ns = 0
        self.asleep = False
        self._wake = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """To be called when a run has been stored in `since_ns` and `asleep` says so."""
        self._wake.set()

    def stopped(self) -> bool:
        """Whether a run that failed did so because it was ended from here; makes the next runs possible again."""
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
                # A run that ended this moment, and another that began, may be hit instead of the long one: it is
                # repeated in a thread, which does it no harm.
                self.options.terminate = True
            quiet = quiet + 1 if since == last == 0 else 0
            last = since
            if quiet >= _ROUNDS:
                self.asleep = True
                if not self.since_ns:  # the loop stores that first and looks at `asleep` then, so one of us sees it
                    self._wake.wait()
                self._wake.clear()
                self.asleep = False
                quiet = 0
