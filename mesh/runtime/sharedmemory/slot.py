"""One slot of the use board: its words, and how they are read and written.

The process that answers on the data port writes a slot through a `Row`, which keeps the numbers itself, so that it
never reads the map. A word is stored at once, so a reader never sees half of one, but two words may be a moment apart.
"""

import enum
import mmap
import struct
from dataclasses import dataclass

STATE, REVISION, IN_FLIGHT, RUNNING, LAST_USE, CALLS, FAILED, BUSY = range(8)
"""The words of a slot, by their index."""

WORDS = 8
"""The number of words in a slot, which fill one cache line."""

_WHEN_BEGUN = struct.Struct("3Q")  # from IN_FLIGHT on
_WHEN_ENDED = struct.Struct("6Q")


class SlotState(enum.IntEnum):
    """The state of a slot's copy."""

    FREE = 0
    LOADING = 1  # written before the load touches the file
    LOADED = 2
    UNLOADING = 3  # answers *not here* already; calls in flight may still run
    LOST = 4  # answers *not here*: its server no longer has it


@dataclass(frozen=True, slots=True)
class Use:
    """The contents of a slot, as read."""

    state: SlotState
    revision: int  # create revision of the model's record
    in_flight: int  # calls taken and not yet answered
    running: int  # those of them whose model is running now
    last_use_ns: int  # CLOCK_MONOTONIC; before the first call: when the load began
    calls: int  # calls ended, with any status
    failed: int  # those of them that ended with another status than OK
    busy_ns: int  # time spent running the model, over all threads

    @property
    def suspect(self) -> bool:
        """True if this copy may have killed its server: it was loading, running or being freed."""
        return self.state in (SlotState.LOADING, SlotState.UNLOADING) or self.running > 0


class Row:
    """The writer's access to one slot. Use it for one copy, and drop it with the copy: later writes could hit the next
    copy in the slot.

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
        """True if a call of the copy has succeeded."""
        return self._calls > self._failed

    def loading(self, revision: int, now_ns: int) -> None:
        """Notes the start of the load. Must be called before the load touches the file, because the load may never
        return."""
        self._last_use_ns = now_ns
        struct.pack_into("8Q", self._map, self._at, SlotState.LOADING, revision, 0, 0, now_ns, 0, 0, 0)

    def resume(self, use: Use) -> None:
        """Continues with the numbers of a copy that has outlived its former writer, except for that writer's calls in
        flight."""
        self._last_use_ns, self._calls, self._failed, self._busy_ns = (
            use.last_use_ns,
            use.calls,
            use.failed,
            use.busy_ns,
        )
        numbers = (SlotState.LOADED, use.revision, 0, 0, use.last_use_ns, use.calls, use.failed, use.busy_ns)
        struct.pack_into("8Q", self._map, self._at, *numbers)

    def mark(self, state: SlotState) -> None:
        """Sets the copy's state to LOADED, UNLOADING, LOST or FREE."""
        struct.pack_into("Q", self._map, self._at, state)

    def begin(self, now_ns: int, *, runs: int = 0) -> None:
        """Counts a call that was accepted. With `runs=1`, the model is about to run for the call. Must be called before
        the model runs."""
        self.in_flight += 1
        self._running += runs
        self._last_use_ns = now_ns
        _WHEN_BEGUN.pack_into(self._map, self._at + IN_FLIGHT * 8, self.in_flight, self._running, now_ns)

    def run(self) -> None:
        """Notes that the model begins to run for a call that was accepted earlier."""
        self._running += 1
        _WHEN_BEGUN.pack_into(self._map, self._at + IN_FLIGHT * 8, self.in_flight, self._running, self._last_use_ns)

    def ran(self, busy_ns: int) -> None:
        """Notes that the model has run for a call that is not answered yet, because it will run again."""
        self._running -= 1
        self._busy_ns += busy_ns
        _WHEN_BEGUN.pack_into(self._map, self._at + IN_FLIGHT * 8, self.in_flight, self._running, self._last_use_ns)

    def accuse(self, running: bool) -> None:
        """Shows on the board whether the model may still be running in a server that is given up, even if its calls say
        otherwise. The writer must end afterwards."""
        self._running = int(running)
        _WHEN_BEGUN.pack_into(self._map, self._at + IN_FLIGHT * 8, self.in_flight, self._running, self._last_use_ns)

    def end(self, now_ns: int, *, runs: int, busy_ns: int, failed: bool) -> None:
        """Counts an answered call. With `runs=1`, the model ran for the call, for `busy_ns`."""
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
