"""The work of each thread of the model server, in shared memory, so that a crash can be traced to its cause.

The use board shows which copies were loading or running. All of them are suspects. But a crash happens in one thread,
which Python's fault handler names. Before it touches a model, each thread therefore notes its own id, the copy, and the
digest of the request (`mesh.wire.requestdigest`).

For a call in the event loop a digest would cost 5 us, so the loop stores the beginning of the request itself (0.1 us),
and the reader after a death computes the digest. The loop does not note the copy. It runs one call at a time, so
its copy is the one with one more run on the board than the threads account for.

This memory is a part of the board's file: a header of 8 words, then 4 words for each of `THREADS` threads, then `KEPT`
bytes. Each entry is written by one thread at a time, and is valid as long as its slot is set.
"""

import mmap
import struct
import threading
from collections import deque
from dataclasses import dataclass

from mesh.wire import framing, requestdigest

THREADS = 128
"""Number of threads that can have an entry. A server has only a few threads. The work of further threads would not be
recorded."""

_HEADER, _ENTRY = 64, 32  # bytes
_KEPT_AT = _HEADER + THREADS * _ENTRY
LENGTH = _KEPT_AT + requestdigest.KEPT
"""Bytes of the whole part."""

_THREAD = struct.Struct("Q")  # the event loop's header, at the beginning
_WHO = struct.Struct("2Q")  # thread, slot + 1
_LOAD = bytes(requestdigest.SIZE)  # marks a load instead of a request's digest


@dataclass(frozen=True, slots=True)
class Last:
    """The last run of the event loop, which may have ended."""

    thread: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class ThreadWork:
    """The work of one thread."""

    slot: int
    thread: int  # its `threading.get_ident`
    digest: bytes  # of the request; empty: it was loading the copy


class AtWork:
    """The part of a board's map that begins at byte `at`, with the entries of the threads and the beginning of the
    event loop's last request."""

    __slots__ = ("_at", "_free", "_kept", "_map")

    def __init__(self, mapped: mmap.mmap, view: memoryview, at: int) -> None:
        self._map = mapped
        self._at = at
        self._kept = view[at + _KEPT_AT : at + LENGTH]
        self._free: deque[int] = deque(range(THREADS))

    def close(self) -> None:
        """Releases this object's view of the map, so that the map can be closed."""
        self._kept.release()

    # -- writing: the model server

    def attach(self) -> None:
        """Clears all entries, and notes the calling thread as that of the event loop."""
        self._map[self._at : self._at + _KEPT_AT] = bytes(_KEPT_AT)
        self._kept[: framing.PREFIX] = bytes(framing.PREFIX)
        _THREAD.pack_into(self._map, self._at, threading.get_ident())

    def inline(self, frame: bytes) -> None:
        """Notes that the event loop is about to run a copy for the request `frame`."""
        size = len(frame)
        if size <= requestdigest.KEPT:
            self._kept[:size] = frame
        else:
            self._kept[:] = frame[: requestdigest.KEPT]

    def begin(self, slot: int, frame: bytes | None = None) -> int:
        """Notes that this thread is about to run a copy for the request `frame`, or, without a request, to load the
        copy.

        Returns a number for `end`, which is -1 if no entry is free."""
        try:
            entry = self._free.popleft()
        except IndexError:
            return -1
        at = self._entry(entry)
        digest = _LOAD if frame is None else requestdigest.digest(frame)
        self._map[at + _WHO.size : at + _WHO.size + len(digest)] = digest
        _WHO.pack_into(self._map, at, threading.get_ident(), slot + 1)
        return entry

    def end(self, entry: int) -> None:
        """Notes that the thread has finished the work."""
        if entry >= 0:
            _WHO.pack_into(self._map, self._entry(entry), 0, 0)
            self._free.append(entry)

    # -- reading: the agent, after a death

    def threads(self) -> list[ThreadWork]:
        """Returns the work of all threads except the event loop's."""
        found = []
        for entry in range(THREADS):
            at = self._entry(entry)
            thread, slot = _WHO.unpack_from(self._map, at)
            if slot:
                digest = self._map[at + _WHO.size : at + _ENTRY]
                found.append(ThreadWork(slot - 1, thread, b"" if digest == _LOAD else digest))
        return found

    def loop(self) -> Last:
        """Returns the last run of the event loop. Before the first run, its digest is that of an empty request."""
        (thread,) = _THREAD.unpack_from(self._map, self._at)
        size = framing.PREFIX + int.from_bytes(self._kept[1 : framing.PREFIX], "big")
        return Last(thread, requestdigest.digest(bytes(self._kept[: min(size, len(self._kept))]), size))

    def _entry(self, entry: int) -> int:
        return self._at + _HEADER + entry * _ENTRY
