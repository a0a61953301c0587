"""Whether the next call of a model may run in the event loop, decided by how long calls of its size took.

A hand-over to a thread costs some 100 us of processor time where the whole call takes 35 us inline (measured),
but a long call in the loop makes all others wait. So each model remembers what inputs of about that size (by powers of
two) cost it: short ones run inline, long ones in threads, and a size never seen runs in a thread the first time, unless
a larger one is known to be short.
"""

_SIZES = 48  # classes of input size: 2^0 ... 2^47 bytes

INLINE_NS = 500_000
"""A class of sizes that takes less than this runs in the loop from now on."""

THREAD_NS = 1_000_000
"""One that takes more, in threads. Between the two nothing changes, so that a class does not go to and fro."""

_MOST_NS = 4 * THREAD_NS
"""What one call counts at most: a single outlier (a busy machine, a page fault storm) must not move a fast class."""


class Pace:
    """What one model's calls cost. `inline[size.bit_length()]` answers the question; `note` keeps it true."""

    __slots__ = ("_ns", "inline")

    def __init__(self) -> None:
        self.inline = [False] * (_SIZES + 1)
        self._ns = [-1] * (_SIZES + 1)  # the running mean of each class; -1: never seen

    def note(self, size: int, took_ns: int) -> None:
        """A call of that many bytes took so long, of processor time where that can be told from waiting."""
        index = size.bit_length()
        if index > _SIZES:
            return
        mean = self._ns[index]
        if mean < 0:
            mean = took_ns
            self._ns[index] = mean
            if mean < INLINE_NS:
                for smaller in range(index + 1):
                    if self._ns[smaller] < 0:
                        self.inline[smaller] = True
                self.inline[index] = True
            return
        mean += ((took_ns if took_ns < _MOST_NS else _MOST_NS) - mean) >> 3
        self._ns[index] = mean
        if mean > THREAD_NS:
            self.inline[index] = False
        elif mean < INLINE_NS:
            self.inline[index] = True

    def too_long(self, size: int) -> None:
        """A call that ran in the loop had to be stopped: its class is not short, whatever was known of it."""
        index = size.bit_length()
        if index <= _SIZES:
            self._ns[index] = max(self._ns[index], _MOST_NS)
            self.inline[index] = False
