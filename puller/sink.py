"""The destination of one file's bytes: a temporary file, filled from one stream or from several concurrent ones.

A sink knows which bytes have arrived, so that a broken transfer continues where it ended. It digests them as they
arrive, so that a checksum needs no second reading. Parts that arrive ahead of the digest are read back from the page
cache by a later writer, a few megabytes at a time.

Writes block for as long as the page cache takes, and may be made from any thread. A stopped sink refuses further
writes; its file is closed once the last writer has left, so that no late thread writes to a descriptor that by then
belongs to another file.
"""

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from puller.disk import FILE_MODE
from puller.errors import PullError, PullErrorKind
from puller.limits import PullLimits
from puller.progress import PullMeter

_READ_BACK = 4 * 2**20  # bytes

Buffer = bytes | bytearray | memoryview


class Stopped(Exception):
    """The error that a sink raises once its file is no longer wanted: the writing thread should end."""


class Sink:
    """One file being fetched."""

    def __init__(
        self,
        path: Path,
        *,
        shown: str,
        limits: PullLimits,
        admit: Callable[[int], None],
        arrived: Callable[[int], None] = lambda count: None,
        meter: PullMeter | None = None,
        size: int | None = None,
        sha256: str = "",
        md5: str = "",
    ) -> None:
        """Makes a sink. `admit` raises PullError if a file has too many bytes; `arrived` is called with the number of
        bytes written.

        `shown` names the file in errors.
        """
        self.limits = limits
        self.meter = meter or PullMeter()
        self.size: int | None = None
        self._shown = shown
        self._admit = admit
        self._arrived = arrived
        self._admitted = 0
        self._lock = threading.Lock()
        self._digesting = threading.Lock()
        self._expected: dict[str, str] = {}
        self._digests: dict[str, hashlib._Hash] = {}
        self._frontier = 0  # bytes digested
        self._there: list[tuple[int, int]] = []  # written ranges: sorted, not adjacent
        self._stop = threading.Event()
        self._writers = 0
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
        try:
            self.expect(size=size, sha256=sha256, md5=md5)
        except BaseException:
            self.close()
            raise

    def expect(self, *, size: int | None = None, sha256: str = "", md5: str = "") -> None:
        """Takes the store's description of the file (digests in hex), before its first byte. Raises PullError if it
        contradicts an earlier one, or if the file is too large.

        Earlier expectations, from the registration or the listing, still apply: if the store now announces something
        else, the file has changed, or is the wrong one.
        """
        if size is not None:
            if self.size is not None and size != self.size:
                text = f"{self._shown} changed: {self.size} bytes were announced at first, then {size}; try again"
                raise PullError(PullErrorKind.CHANGED, text)
            self._grow(size)
            self.size = size
        for name, value in (("sha256", sha256.lower()), ("md5", md5.lower())):
            if not value:
                continue
            if self._expected.get(name, value) != value:
                raise PullError(PullErrorKind.CHECKSUM, self._mismatch(name, value, "the store announces"))
            self._expected[name] = value
            self.compute(name)

    def compute(self, name: str) -> None:
        """Prepares the computation of a digest that `digest` will return: `sha256`, `md5`, or `git` (git's digest of a
        file, which needs its size)."""
        if name not in self._digests:
            with self._digesting:
                # All digests start over together; usually nothing has arrived yet.
                self._digests = {known: self._new(known) for known in (*self._digests, name)}
                self._frontier = 0

    def digest(self, name: str) -> str:
        """Returns a digest of the finished file, in hex; "" if it was not computed."""
        return self._digests[name].hexdigest() if name in self._digests else ""

    @property
    def behind(self) -> int:
        """The number of bytes that `finish` has yet to digest."""
        return self.written - self._frontier if self._digests else 0

    @property
    def written(self) -> int:
        """The number of bytes written."""
        return sum(end - start for start, end in self._there)

    @property
    def stopped(self) -> bool:
        """True if the file is no longer wanted."""
        return self._stop.is_set()

    def missing(self) -> list[tuple[int, int]]:
        """Returns the ranges (first byte, one after the last) that have not arrived. Raises ValueError if the size is
        unknown."""
        if self.size is None:
            raise ValueError("the size is not known")
        gaps: list[tuple[int, int]] = []
        at = 0
        with self._lock:
            for start, end in [*self._there, (self.size, self.size)]:
                if start > at:
                    gaps.append((at, start))
                at = end
        return gaps

    def restart(self) -> None:
        """Discards what has arrived, because the file is sent from the beginning again."""
        with self.hold() as descriptor, self._digesting, self._lock:
            os.ftruncate(descriptor, 0)
            self._there = []
            self._digests = {name: self._new(name) for name in self._digests}
            self._frontier = 0

    @contextmanager
    def hold(self) -> Iterator[int]:
        """Yields the file's descriptor for the duration of the block. Raises Stopped once the sink is closed.

        It is meant for copies inside the kernel; the bytes written must be reported to `wrote`.
        """
        with self._lock:
            if self._stop.is_set() or self._descriptor < 0:
                raise Stopped
            self._writers += 1
        try:
            yield self._descriptor
        finally:
            with self._lock:
                self._writers -= 1
                self._close_if_left()

    def write(self, data: Buffer, offset: int) -> None:
        """Writes all bytes at the offset. Blocks; may be called from any thread. Raises Stopped, PullError, and OSError
        of the disk."""
        view = memoryview(data)
        if not len(view):
            return
        with self.hold() as descriptor:
            self._check(offset + len(view))
            at = offset
            while at - offset < len(view):
                at += os.pwrite(descriptor, view[at - offset :], at)
            self.wrote(offset, len(view), view)

    def wrote(self, offset: int, count: int, data: memoryview | None = None) -> None:
        """Notes bytes that were written through the descriptor of `hold`. Raises PullError if the file becomes too
        large."""
        self._check(offset + count)
        self.meter.add(count)
        self._arrived(count)
        with self._lock:
            self._there = _joined(self._there, (offset, offset + count))
        if self._digests and self._digesting.acquire(blocking=False):
            try:
                if data is not None and offset == self._frontier:
                    self._digest(data)
                self._read_back(2 * _READ_BACK)
            finally:
                self._digesting.release()

    def pace(self, count: int) -> None:
        """Notes that `count` bytes have arrived, and waits, in a thread, if the bandwidth limit requires it. Raises
        Stopped."""
        delay = self.limits.take(count)
        if delay and self._stop.wait(delay):
            raise Stopped

    def finish(self) -> int:
        """Checks that the file is complete and the expected one, and returns its size. Blocks while it digests the
        rest.

        Raises PullError (INTEGRITY, CHECKSUM).
        """
        there = list(self._there)
        size = self.size if self.size is not None else (there[-1][1] if there else 0)
        if there != ([(0, size)] if size else []):
            text = (
                f"{self._shown} ended before all of it had arrived: {self.written} of {size} bytes; "
                "check the store, or a proxy in front of it"
            )
            raise PullError(PullErrorKind.INTEGRITY, text)
        with self.hold() as descriptor:
            if (there_are := os.fstat(descriptor).st_size) != size:
                text = f"{self._shown} has {size} bytes, but the file on the pod's disk has {there_are}; check the disk"
                raise PullError(PullErrorKind.INTEGRITY, text)
        if self._digests:
            with self.hold(), self._digesting:
                self._read_back(size)
        for name, expected in self._expected.items():
            found = self._digests[name].hexdigest()
            if found != expected:
                raise PullError(PullErrorKind.CHECKSUM, self._mismatch(name, found, "what arrived has"))
        return size

    def close(self) -> None:
        """Refuses further writes, and closes the file once no thread writes. The file itself stays."""
        self._stop.set()
        with self._lock:
            self._close_if_left()

    def _close_if_left(self) -> None:
        if self._stop.is_set() and not self._writers and self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _check(self, end: int) -> None:
        if self.size is None:
            self._grow(end)
        elif end > self.size:
            text = f"{self._shown} announced {self.size} bytes but sent more; check the store"
            raise PullError(PullErrorKind.INTEGRITY, text)

    def _grow(self, size: int) -> None:
        with self._lock:
            if size <= self._admitted:
                return
            self._admitted = size
        self._admit(size)

    def _new(self, name: str) -> "hashlib._Hash":
        if name == "git":
            return hashlib.sha1(b"blob %d\0" % (self.size or 0), usedforsecurity=False)
        return hashlib.new(name, usedforsecurity=False)

    def _digest(self, data: memoryview) -> None:
        for digest in self._digests.values():
            digest.update(data)
        self._frontier += len(data)

    def _read_back(self, most: int) -> None:
        """Digests at most `most` bytes that follow those digested so far, up to the first gap."""
        while most > 0:
            with self._lock:
                end = next((end for start, end in self._there if start <= self._frontier < end), 0)
            count = min(end - self._frontier, _READ_BACK, most)
            if count <= 0:
                return
            data = os.pread(self._descriptor, count, self._frontier)
            if not data:
                return
            self._digest(memoryview(data))
            most -= len(data)

    def _mismatch(self, name: str, found: str, who: str) -> str:
        return (
            f"{self._shown} is not the expected file: its {name} should be {self._expected[name]}, "
            f"{who} {found}; upload the right file, or register it with the digest that it has"
        )


def _joined(ranges: list[tuple[int, int]], new: tuple[int, int]) -> list[tuple[int, int]]:
    start, end = new
    kept = []
    for one in ranges:
        if one[1] < start or one[0] > end:
            kept.append(one)
        else:
            start, end = min(start, one[0]), max(end, one[1])
    return sorted([*kept, (start, end)])
