"""The use board: the copies in a pod and their use, in shared memory, readable after its writer's death.

From the board, the agent reads when copies were last used (LRU order) and how much (rates, load), which copies may be
evicted (none with a call in flight), and after a crash which copies are suspect: those that were loading or running at
that moment. The process that answers on the data port writes the board: Mesh's model server, or the agent's relay for a
foreign one. This process sees every call, from any router.

The board is a file that both processes map, because messages would cost more: a call costs the writer two stores of a
few words, reading costs the writer nothing, and the last state outlives a `kill -9`. Measured: start, end and histogram
of a call take 1.8 us, including the clock and Python's own call overhead; `words[i] += 1` through a memoryview took 3.0
us.

The file holds unsigned 64-bit words in the machine's own byte order and alignment. A word is stored at once (CPython's
`struct` copies 8 bytes in native mode, but byte by byte in the standard ones), so a reader never sees half of one, but
two words may be a moment apart. Layout, in words: a header of 64; a histogram of calls for each method and status code;
then 8 for each slot (one cache line), and one slot that belongs to no copy; then the part of `atwork`. The agent
assigns and frees the slots; the writer fills them, through a `Row` that keeps the numbers itself and so never reads the
map. The histogram is written by `beat`, once a second.

Times are nanoseconds of CLOCK_MONOTONIC (`time.monotonic_ns()`), the same for all processes of one host. The header
also has the fence: which calls the server may answer, and until when (`placement.fence`), as one word, so that no
reader sees half of it. The word is a time in nanoseconds of CLOCK_BOOTTIME, which continues while the machine sleeps,
with the mode in the two lowest bits. The agent writes the fence. On a new board, the fence is closed.

In each process, only one thread writes the header, the histogram and the slots. The agent chooses the slot of a copy,
and draws conclusions from the board. This module makes no decisions.
"""

import contextlib
import mmap
import os
import struct
from bisect import bisect_left
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from mesh.runtime.sharedmemory import atwork
from mesh.runtime.sharedmemory.atwork import AtWork
from mesh.runtime.sharedmemory.slot import IN_FLIGHT, STATE, WORDS, Row, SlotState, Use
from placement.fence import Mode

_MAGIC = int.from_bytes(b"MESHUSE2", "little")
_HEADER = 64
# Words of the header.
_H_MAGIC, _H_SLOTS, _H_PID, _H_LIVES, _H_BEAT, _H_DEVICE, _H_FENCE = range(7)
_H_INCARNATION, _INCARNATION_WORDS = 8, 8
_H_STUCK, _H_LOST = 16, 17

MODE_BITS = 3
"""The bits of the fence's word that hold the mode."""

OPEN_ENDED = (1 << 63) - 1
"""A fence that never closes, for a server without an agent."""

METHODS = ("ModelInfer", "ModelMetadata", "ModelReady", "other")
"""The methods whose calls are counted, by the index that `observe` takes."""

_CODES = 17

BUCKETS_NS = tuple(
    int(ms * 1e6) for ms in (0.5, 1, 2, 5, 10, 20, 50, 75, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 6e4, 1.2e5, 3e5)
)
"""Upper bounds of the histogram's buckets, those of `modelmesh_invoke_model_milliseconds`; one more is for longer
calls."""

_SUM = len(BUCKETS_NS) + 1
_SERIES = _SUM + 1  # words of one series: the buckets, the one for longer calls, the sum in ns
_CALLS_AT = _HEADER
_SLOTS_AT = -(-(_CALLS_AT + len(METHODS) * _CODES * _SERIES) // WORDS) * WORDS


@dataclass(frozen=True, slots=True)
class Series:
    """The calls of one method that ended with one status code."""

    method: str
    code: int
    buckets: tuple[int, ...]  # calls up to each of BUCKETS_NS (not cumulative), and longer ones
    sum_ns: int


class Board:
    """A mapped use board. Make one with `create`, `open` or `private`; `close` unmaps it and leaves the file."""

    __slots__ = ("_bytes", "_map", "_series", "_words", "at_work", "nobody", "path", "slots")

    def __init__(self, mapped: mmap.mmap, path: Path | None) -> None:
        self._map = mapped
        self._bytes = memoryview(mapped)
        self._words = self._bytes.cast("Q")
        self._series: dict[int, list[int]] = {}
        self.path = path
        self.slots: int = self._words[_H_SLOTS]
        self.nobody: int = self.slots
        """A slot that belongs to no copy: writers count calls there for which they have no slot."""
        self.at_work = AtWork(mapped, self._bytes, _slots_end(self.slots) * 8)
        """The work of each thread of the server."""

    @classmethod
    def create(cls, path: Path | str, slots: int, *, incarnation: str = "") -> "Board":
        """Creates a board of `slots` slots, in place of an existing file. Called by the agent.

        `incarnation` is the agent's. A server that finds another incarnation on the board refuses to start. Raises
        OSError, and ValueError if `incarnation` has more than 64 bytes.
        """
        path = Path(path)
        with contextlib.suppress(FileNotFoundError):
            path.unlink()  # an earlier server may still have the old file mapped, so that file must not be written
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, _length(slots))
            mapped = mmap.mmap(descriptor, _length(slots))
        finally:
            os.close(descriptor)
        return cls._fill(mapped, path, slots, incarnation)

    @classmethod
    def private(cls, slots: int) -> "Board":
        """Creates a board in this process's memory, for a server without an agent. Its fence is open."""
        board = cls._fill(mmap.mmap(-1, _length(slots)), None, slots, "")
        board.permit(OPEN_ENDED, Mode.PROVEN)
        return board

    @classmethod
    def open(cls, path: Path | str) -> "Board":
        """Maps the board at `path`. Raises OSError if the file cannot be opened, and ValueError if it is not a board of
        this version."""
        path = Path(path)
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            size = os.fstat(descriptor).st_size
            if size < _SLOTS_AT * 8:
                raise ValueError(f"{path} is not a use board: it has only {size} bytes")
            mapped = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
        words = memoryview(mapped)[:16].cast("Q")
        magic, slots = words[_H_MAGIC], words[_H_SLOTS]
        words.release()
        if magic != _MAGIC or size != _length(slots):
            mapped.close()
            raise ValueError(f"{path} is not a use board of this version")
        return cls(mapped, path)

    @classmethod
    def _fill(cls, mapped: mmap.mmap, path: Path | None, slots: int, incarnation: str) -> "Board":
        raw = incarnation.encode()
        if len(raw) > _INCARNATION_WORDS * 8:
            raise ValueError(f"the incarnation {incarnation!r} has more than {_INCARNATION_WORDS * 8} bytes")
        mapped[_H_INCARNATION * 8 : _H_INCARNATION * 8 + len(raw)] = raw
        words = memoryview(mapped)[: _HEADER * 8].cast("Q")
        words[_H_SLOTS] = slots
        words[_H_MAGIC] = _MAGIC
        words.release()
        return cls(mapped, path)

    def close(self) -> None:
        """Unmaps the board. The file stays. Reading or writing the board afterwards raises ValueError."""
        self.at_work.close()
        self._words.release()
        self._bytes.release()
        self._map.close()

    # -- reading: the agent

    @property
    def incarnation(self) -> str:
        """The agent's incarnation, from `create`."""
        begin = _H_INCARNATION * 8
        return self._map[begin : begin + _INCARNATION_WORDS * 8].rstrip(b"\0").decode(errors="replace")

    @property
    def pid(self) -> int:
        """The process id of the writer, or 0 if there is none."""
        return self._words[_H_PID]

    @property
    def beat_ns(self) -> int:
        """The time of the writer's last heartbeat, one a second, or 0 if it has sent none."""
        return self._words[_H_BEAT]

    @property
    def device_bytes(self) -> int:
        """The bytes in use on the writer's device, by all processes, at the last beat, or 0 if it has no device or the
        number is unknown."""
        return self._words[_H_DEVICE]

    @property
    def stuck(self) -> int:
        """The number of loads and calls that the writer cannot end, at the last beat. Each has lost a thread."""
        return self._words[_H_STUCK]

    @property
    def lost(self) -> int:
        """The number of copies that writers of this board have found lost so far (`SlotState.LOST`)."""
        return self._words[_H_LOST]

    @property
    def fence(self) -> int:
        """The fence as one word: `fence & ~MODE_BITS` is its end in ns of CLOCK_BOOTTIME, `fence & MODE_BITS` the
        mode."""
        return self._words[_H_FENCE]

    @property
    def in_flight(self) -> int:
        """The number of calls in flight in the pod."""
        return sum(self._words[_SLOTS_AT + IN_FLIGHT : _slots_end(self.slots) : WORDS].tolist())

    def read(self, slot: int) -> Use:
        """Returns the present use of a slot."""
        at = self._at(slot)
        state, *rest = self._words[at : at + WORDS].tolist()
        return Use(SlotState(state), *rest)

    def uses(self) -> Iterator[tuple[int, Use]]:
        """Yields the number and the use of every slot that is not free."""
        for slot in range(self.slots):
            if self._words[_SLOTS_AT + slot * WORDS + STATE]:
                yield slot, self.read(slot)

    def suspects(self) -> list[tuple[int, Use]]:
        """Returns the slots whose copies were loading, running or being freed when the server died. Call it before
        `reset`."""
        return [(slot, use) for slot, use in self.uses() if use.suspect]

    def calls(self) -> list[Series]:
        """Returns the calls so far by method and code, without empty series. `reset` does not clear them, because
        counters must only grow."""
        found = []
        for method, name in enumerate(METHODS):
            for code in range(_CODES):
                at = _CALLS_AT + (method * _CODES + code) * _SERIES
                words = self._words[at : at + _SERIES].tolist()
                if any(words[:_SUM]):
                    found.append(Series(name, code, tuple(words[:_SUM]), words[_SUM]))
        return found

    # -- writing: the agent

    def permit(self, until_ns: int, mode: Mode) -> None:
        """Allows the server to answer the calls that `mode` names until `until_ns`, in ns of CLOCK_BOOTTIME."""
        self._words[_H_FENCE] = until_ns & ~MODE_BITS | mode

    # -- writing, between two servers' lives: the agent

    def clear(self, slot: int) -> None:
        """Frees a slot whose copy is no longer loaded."""
        at = self._at(slot)
        for word in range(at, at + WORDS):
            self._words[word] = 0

    def reset(self, *, keep: Collection[int] = ()) -> None:
        """Frees all slots except those in `keep`, and clears what the former server wrote about itself. Counters of
        calls stay."""
        for slot in range(self.slots + 1):
            if slot not in keep:
                self.clear(slot)
        self._words[_H_PID] = self._words[_H_BEAT] = self._words[_H_DEVICE] = self._words[_H_STUCK] = 0

    # -- writing: the process that answers on the data port

    def attach(self, pid: int, *, keep: Collection[int] = ()) -> None:
        """Makes a process the writer, and frees the slots that a former writer left, except those in `keep`, whose
        copies have outlived that writer."""
        self.reset(keep=keep)
        self.at_work.attach()
        self._words[_H_PID] = pid
        self._words[_H_LIVES] += 1

    def row(self, slot: int) -> Row:
        """Returns the writer's access to a free slot, for one copy. Raises IndexError if the slot does not exist."""
        return Row(self._map, self._at(slot) * 8, slot)

    def observe(self, method: int, code: int, elapsed_ns: int) -> None:
        """Counts a call in the histogram. `method` is an index into METHODS, `code` the gRPC code of the answer.
        Readers see the call after the next `beat`."""
        key = method * _CODES + (code if 0 <= code < _CODES else 2)
        series = self._series.get(key)
        if series is None:  # counters only grow, even across a restart of the server
            at = _CALLS_AT + key * _SERIES
            series = self._series[key] = self._words[at : at + _SERIES].tolist()
        series[bisect_left(BUCKETS_NS, elapsed_ns)] += 1
        series[_SUM] += elapsed_ns

    def lose(self) -> None:
        """Counts a copy whose slot has become LOST."""
        self._words[_H_LOST] += 1

    def beat(self, now_ns: int, *, device_bytes: int = 0, stuck: int = 0) -> None:
        """Writes the event loop's heartbeat and the histogram. Call it every second, and at the end."""
        for key, series in self._series.items():
            at = _CALLS_AT + key * _SERIES
            struct.pack_into(f"{_SERIES}Q", self._map, at * 8, *series)
        self._words[_H_DEVICE] = device_bytes
        self._words[_H_STUCK] = stuck
        self._words[_H_BEAT] = now_ns

    def _at(self, slot: int) -> int:
        if not 0 <= slot <= self.slots:
            raise IndexError(f"the use board has no slot {slot}: it has {self.slots} slots")
        return _SLOTS_AT + slot * WORDS


def _length(slots: int) -> int:
    """Returns the bytes of a board with that many slots, and one slot more that belongs to no copy."""
    return _slots_end(slots) * 8 + atwork.LENGTH


def _slots_end(slots: int) -> int:
    """Returns the index of the word after the last slot."""
    return _SLOTS_AT + (slots + 1) * WORDS
