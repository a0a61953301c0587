"""The decision whether a model's next call runs in the event loop, by how long calls of its size have taken.

Passing a call to a thread costs about 100 us of processor time, while the whole call takes 35 us inline (measured). But
a long call in the loop makes all others wait. Each model therefore remembers the duration of calls for each size of
input (in powers of two). Short calls run inline, long calls in threads. The first call of a new size runs in a thread,
unless a larger size is known to be short.
"""

_SIZES = 48  # classes of input size: 2^0 ... 2^47 bytes

INLINE_NS = 500_000
"""Duration below which calls of a class of sizes run in the loop from now on."""

THREAD_NS = 1_000_000
"""Duration above which calls of a class run in threads from now on. Between the two durations nothing changes, so that
a class does not switch back and forth."""

_MOST_NS = 4 * THREAD_NS
"""Longest duration with which a single call can count."""

_MOST_TIMES = 4
"""Longest duration with which a single call can count, in multiples of the mean, but at least `INLINE_NS`. On a busy
machine, or under a CPU quota, one call in a hundred is stopped for milliseconds. These outliers do not move a fast
class. A class that has become slow leaves the loop after about ten calls."""


class Pace:
    """The duration of one model's calls. `inline[size.bit_length()]` says whether a call of this size runs inline.
    `note` updates it."""

    __slots__ = ("_ns", "inline")

    def __init__(self) -> None:
        self.inline = [False] * (_SIZES + 1)
        self._ns = [-1] * (_SIZES + 1)  # the running mean of each class; -1: never seen

    def note(self, size: int, took_ns: int) -> None:
        """Records the duration of a call with this many bytes: its processor time if that was measured, or else the
        time that passed."""
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
        if took_ns > INLINE_NS:
            took_ns = min(took_ns, max(INLINE_NS, _MOST_TIMES * mean), _MOST_NS)
        mean += (took_ns - mean) >> 3
        self._ns[index] = mean
        if mean > THREAD_NS:
            self.inline[index] = False
        elif mean < INLINE_NS:
            self.inline[index] = True

    def too_long(self, size: int) -> None:
        """Records that a call in the loop had to be stopped. From now on, calls of its class run in threads."""
        index = size.bit_length()
        if index <= _SIZES:
            self._ns[index] = max(self._ns[index], _MOST_NS)
            self.inline[index] = False
