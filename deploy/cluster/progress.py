"""Progress messages of `make cluster`: the step, its number and the time so far, without long silences.

Messages are written to standard error. Standard output has only the result, such as an image's name.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TextIO

SILENCE = 10.0
"""Seconds after which a step reports that it still works; on a terminal its line is updated each second."""


class Steps:
    """The steps of one run. Each is a context manager that prints its number, the time since the start, and the current
    work."""

    def __init__(
        self,
        total: int,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        silence: float = SILENCE,
    ) -> None:
        self.total = total
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._silence = silence
        self._started = clock()
        self._number = 0

    @contextlib.contextmanager
    def step(self, text: str) -> Iterator[Callable[[str], None]]:
        """Runs one step. Yields a function that reports the step's progress."""
        self._number += 1
        number, began = self._number, self._clock()
        detail, over = "", threading.Event()
        lively = self._stream.isatty()

        def show(end: str) -> None:
            spent = f", {minutes(self._clock() - began)}" if self._clock() - began >= 1.0 else ""
            about = f": {detail}" if detail else ""
            width = len(str(self.total))
            line = f"[{number:{width}}/{self.total}] {minutes(self._clock() - self._started)}  {text}{about}{spent}"
            print(f"\r\x1b[K{line}" if lively else line, end=end, flush=True, file=self._stream)

        def beat() -> None:
            while not over.wait(min(1.0, self._silence) if lively else self._silence):
                show("" if lively else "\n")

        def tell(how_far: str) -> None:
            nonlocal detail
            detail = how_far

        show("" if lively else "\n")
        beating = threading.Thread(target=beat, name=f"progress of {text}", daemon=True)
        beating.start()
        try:
            yield tell
        finally:
            over.set()
            beating.join()
            if lively:
                show("\n")


def minutes(seconds: float) -> str:
    """Formats a duration as `12:05`."""
    return f"{int(seconds) // 60:02}:{int(seconds) % 60:02}"
