"""One slot of the use board: its words, how they are read, and how they are written.

Whoever answers on the data port writes a slot through a `Row`, which keeps the numbers itself, so that it never reads
the map. A word is stored at once, so a reader never sees half of one, but two words may be a moment apart.
"""

import enum
import mmap
import struct
from dataclasses import dataclass

STATE, REVISION, IN_FLIGHT, RUNNING, LAST_USE, CALLS, FAILED, BUSY = range(8)
"""Words of a slot, by their place in it."""

WORDS = 8
"""As many as one cache line holds."""

_WHEN_BEGUN = struct.Struct("3Q")  # from IN_FLIGHT on
_WHEN_ENDED = struct.Struct("6Q")


class State(enum.IntEnum):
    """What a slot's copy is doing."""

    FREE = 0
    LOADING = 1  # written before the load touches the file
    LOADED = 2
    UNLOADING = 3  # answers *not here* already; calls in flight may still run


@dataclass(frozen=True, slots=True)
class Use:
    """One slot as it was read."""

    state: State
    revision: int  # create revision of the model's record
    in_flight: int  # calls that were taken and are not answered
    running: int  # those of them whose model is being run at this moment
    last_use_ns: int  # CLOCK_MONOTONIC; when the load began, as long as there was no call
    calls: int  # calls ended, whatever became of them
    failed: int  # those of them that ended with another status than OK
    busy_ns: int  # time spent in running the model, all threads added up

    @property
    def suspect(self) -> bool:
        """Whether this copy may have brought its server down: it was loading, running or being freed."""
        return self.state in (State.LOADING, State.UNLOADING) or self.running > 0


class Row:
    """One slot in its writer's hand. Use it for one copy, and drop it with the copy: what is written later is lost.

    Only the methods here write the slot's words, so the numbers are kept in this object and stored, never read back.
    """

    __slots__ = ("_at", "_busy_ns", "_calls", "_failed", "_last_use_ns", "_map", "_running", "in_flight", "slot")

    def __init__(self, mapped: mmap.mmap, at: int, slot: int) -> None:
        self._map = mapped
        self.slot = slot
        self._at = at  # offset of the slot in bytes
        self.in_flight = 0
        self._running = 0
        self._last_use_ns = 0
        self._calls = 0
        self._failed = 0
        self._busy_ns = 0

    @property
    def succeeded(self) -> bool:
        """Whether a call of it has ended without a failure."""
        return self._calls > self._failed

    def loading(self, revision: int, now_ns: int) -> None:
        """The load begins. To be written before it touches the file: it may never come back."""
        self._last_use_ns = now_ns
        struct.pack_into("8Q", self._map, self._at, State.LOADING, revision, 0, 0, now_ns, 0, 0, 0)

    def mark(self, state: State) -> None:
        """Moves the copy on: LOADED, UNLOADING, FREE."""
        struct.pack_into("Q", self._map, self._at, state)

    def begin(self, now_ns: int, *, runs: int = 0) -> None:
        """A call was taken; with `runs=1` the model begins to run for it at once. To be written before it does."""
        self.in_flight += 1
        self._running += runs
        self._last_use_ns = now_ns
        _WHEN_BEGUN.pack_into(self._map, self._at + IN_FLIGHT * 8, self.in_flight, self._running, now_ns)

    def run(self) -> None:
        """The model begins to run for a call that was taken before."""
        self._running += 1
        _WHEN_BEGUN.pack_into(self._map, self._at + IN_FLIGHT * 8, self.in_flight, self._running, self._last_use_ns)

    def ran(self, busy_ns: int) -> None:
        """The model has run for a call that is not answered yet, because it will run again."""
        self._running -= 1
        self._busy_ns += busy_ns
        _WHEN_BEGUN.pack_into(self._map, self._at + IN_FLIGHT * 8, self.in_flight, self._running, self._last_use_ns)

    def end(self, now_ns: int, *, runs: int, busy_ns: int, failed: bool) -> None:
        """A call is answered; with `runs=1` the model had run for it, `busy_ns` long."""
        self.in_flight -= 1
        self._running -= runs
        self._last_use_ns = now_ns
        self._calls += 1
        self._failed += failed
        self._busy_ns += busy_ns
        _WHEN_ENDED.pack_into(
            self._map,
            self._at + IN_FLIGHT * 8,
            self.in_flight,
            self._running,
            now_ns,
            self._calls,
            self._failed,
            self._busy_ns,
        )
