"""The complete files on a pod's disk. Each is kept once for all models that use it, and afterwards while there is room.

A file is called a *blob*. It is identified by its SHA-256, computed here from its bytes, so files with equal digests
are kept as one. A blob is *found* by names that providers compose (`provider`), which say what version of which file
this is, and for whom. A name leads to one blob, and a blob may have many names. Models' folders contain hard links to
blobs, so two models, or two revisions, with an equal file share it, and a model that is loaded again finds its files
here. The model server sees plain files.

Other programs may damage files on a disk. So a blob is checked whenever it is found, and is no longer found once its
size or time of change differs from what this module left. Blobs of an earlier process must be read and digested before
they are used (`sound`), and callers who want more certainty may ask for that at any time.

Only blobs that no model's folder uses and no pull has picked may be removed, least recently used first. All blobs count
against the budget, used or not; used ones are never removed to meet it, so a pull that does not fit next to them is
refused. Files that others have made of a model, such as the content of its archive, count like used ones (`made`).

A blob can be used immediately and is written to disk afterwards, so that no model waits for the disk (an fsync takes 2
ms here, a pull of a small model less than one). Until then it has a temporary name, and the next start of the process
removes it; its name in `.blobs` appears once its bytes are on disk. So the files in `.blobs` are complete after any
crash. The order of use roughly survives in the files' times.

    .blobs/s-<SHA-256>   a complete file
    .blobs/i-<hash>      one of its names: a hard link to it, or, without links, a file that holds its `s-` name

All methods may be called from any thread. Those whose docstrings say so block for as long as the disk takes.
"""

import contextlib
import errno
import hashlib
import logging
import os
import re
import stat
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from puller.disk import FILE_MODE, Disk
from puller.errors import PullError, PullErrorKind

log = logging.getLogger(__name__)

_CONTENT = re.compile(r"s-[0-9a-f]{64}")
_NAME = re.compile(r"i-[0-9a-f]{64}")
_MAX_NAMES = 64  # of one blob; a file that is written again and again with equal bytes gets a new one each time
_NO_LINKS = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOSYS, errno.EOPNOTSUPP})
_IDLE_MOST = 10 * 2**30  # maximum bytes kept free of unused blobs if no budget is set


class Blob:
    """A complete file. All its fields belong to the cache."""

    __slots__ = ("memories", "names", "path", "pins", "read", "safe", "sha256", "size", "stamp", "users")

    def __init__(self, path: Path, size: int, sha256: str, *, stamp: int, safe: bool, read: bool) -> None:
        self.path: Path | None = path  # None: removed
        self.size = size  # bytes
        self.sha256 = sha256  # hex
        self.stamp = stamp  # time of change as this module left it, in nanoseconds
        self.names: dict[str, None] = {}  # names in `.blobs`, existing or to be written, the oldest first
        self.safe = safe  # its names are on disk
        self.read = read  # this process has digested its bytes
        self.users: set[str] = set()  # models whose folders hold it
        self.pins = 0  # pulls that are about to use it
        self.memories: set[str] = set()  # models that last used it, perhaps with others


class DiskReservation:
    """Bytes reserved for expected files. The caller must close it."""

    __slots__ = ("_cache", "_left", "_size")

    def __init__(self, cache: "Cache", size: int) -> None:
        self._cache = cache
        self._size = size  # of the budget
        self._left = size  # the part of the reservation that is not yet on disk

    def grow(self, size: int) -> None:
        """Reserves more bytes, for a file whose size was unknown. Blocks. Raises PullError(DISK_FULL)."""
        self._cache._set_aside(size, had=self._size)
        self._size += size
        self._left += size

    def split(self, size: int) -> "DiskReservation":
        """Splits off a reservation of at most the bytes that are left. The caller must close it separately."""
        part = DiskReservation(self._cache, min(size, self._left))
        self._size -= part._size
        self._left -= part._left
        return part

    def arrived(self, count: int) -> None:
        """Notes that `count` bytes are now on disk, and no longer free there. They still count against the budget."""
        count = min(count, self._left)
        self._left -= count
        self._cache._give_back(count, 0)

    def close(self) -> None:
        """Ends the reservation. The blobs that were made from it must have been added before."""
        self._cache._give_back(self._left, self._size)
        self._size = self._left = 0


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """The current number and bytes of files on disk, and counts of events."""

    blobs: int
    bytes: int  # including files that others have made of models
    used_bytes: int  # of models' folders and pulls, and of the files that others have made: these cannot be removed
    hits: int
    misses: int
    evictions: int
    damaged: int  # blobs that another program had changed, which are fetched again
    unsafe: int  # blobs that might not yet survive a crash
    leftovers: int  # files that could not be removed


class Cache:
    """The blobs of one directory. `on_change` is called, from any thread, for models that become remembered or
    forgotten."""

    def __init__(
        self,
        disk: Disk,
        *,
        budget_bytes: int | None = None,
        on_change: Callable[[str, bool], None] = lambda into, remembered: None,
    ) -> None:
        """Creates an empty cache; `load` adds the blobs on disk. Without a budget, unused blobs stay while a tenth of
        the file system (at most 10 GiB) is free."""
        self._disk = disk
        self._budget = budget_bytes
        self._on_change = on_change
        self._lock = threading.RLock()
        self._named: dict[str, Blob] = {}
        self._contents: dict[str, Blob] = {}  # by SHA-256
        self._idle: OrderedDict[Blob, None] = OrderedDict()  # removable ones, least recently used first
        self._made_of: dict[str, tuple[Blob, ...]] = {}  # model -> the blobs that it uses, or used last
        self._made: dict[str, int] = {}  # model -> bytes of the files that others have made of it
        self._bytes = self._used_bytes = 0
        self._coming = 0  # reserved bytes that are not yet on disk
        self._reserved = 0  # reserved bytes that are not yet blobs, on disk or not
        self.links = True  # whether the file system has hard links: without them, each use of a file is a copy
        self._doomed: deque[Path] = deque()  # names of removed blobs, to be unlinked outside the lock: it may take time
        self._blobs = self._unsafe = self._hits = self._misses = 0
        self._evictions = self._damaged = self._leftovers = 0

    def load(self) -> None:
        """Finds the blobs that an earlier process left. Blocks, for about a second if there are a hundred thousand
        blobs."""
        self.links = self._disk.links()
        found: dict[tuple[int, int], Blob] = {}
        names: list[tuple[os.DirEntry[str], os.stat_result]] = []
        with self._lock:
            for entry in os.scandir(self._disk.blobs):
                info = entry.stat(follow_symlinks=False)
                inode = (info.st_dev, info.st_ino)
                regular = stat.S_ISREG(info.st_mode)
                if regular and _CONTENT.fullmatch(entry.name) and inode not in found:
                    path, stamp = Path(entry.path), info.st_mtime_ns
                    found[inode] = Blob(path, info.st_size, entry.name[2:], stamp=stamp, safe=True, read=False)
                elif regular and _NAME.fullmatch(entry.name):
                    names.append((entry, info))
                else:
                    self._doom(Path(entry.path))
            for blob in sorted(found.values(), key=lambda blob: blob.stamp):
                self._enter(blob)
                self._idle[blob] = None
            for entry, info in names:
                named = found.get((info.st_dev, info.st_ino)) or self._pointed(Path(entry.path), info.st_size)
                if named is None or len(named.names) >= _MAX_NAMES:
                    self._doom(Path(entry.path))
                    continue
                named.names[entry.name] = None
                self._named[entry.name] = named
        self._unlink()

    def pick(self, identities: Iterable[str], *, size: int | None = None) -> Blob | None:
        """Picks a blob that has one of these names, and `size` bytes if that is given, so that it stays until `drop`.
        Returns the blob, or None if the file must be fetched."""
        blob = self.look_up(identities, size=size)
        if blob is None:
            self._misses += 1
        else:
            self._hits += 1
        return blob

    def look_up(self, identities: Iterable[str], *, size: int | None = None) -> Blob | None:
        """Picks a blob as `pick` does, but counts no hit or miss."""
        picked = None
        with self._lock:
            for identity in identities:
                blob = self._named.get(_file_name(identity))
                if blob is None or not self._untouched(blob) or size not in (None, blob.size):
                    continue
                self._pin(blob)
                picked = blob
                break
        self._unlink()
        return picked

    def add(self, path: Path, *, sha256: str, identities: Iterable[str] = ()) -> Blob:
        """Takes over a complete file under these names; `sha256` is its digest in hex. Returns its blob, already
        picked. If a blob with equal bytes exists, the file is removed and that blob returned. Call `secure`
        afterwards."""
        os.chmod(path, FILE_MODE)
        info = os.stat(path)
        with self._lock:
            blob = self._contents.get(sha256)
            # A blob that was not read since the start may be damaged; the new file is not.
            if blob is not None and (not blob.read or not self._untouched(blob)):
                self._disown(blob)
                blob = None
            if blob is not None:
                self._pin(blob)
                self._doom(path)
            else:
                blob = Blob(path, info.st_size, sha256, stamp=info.st_mtime_ns, safe=False, read=True)
                self._enter(blob)
                self._unsafe += 1
                blob.pins = 1
                self._used_bytes += blob.size
            self._name(blob, identities)
        self._unlink()
        return blob

    def pin(self, blob: Blob) -> None:
        """Picks the blob for another pull."""
        with self._lock:
            self._pin(blob)

    def secure(self, blob: Blob) -> None:
        """Writes the blob to disk, so that it survives a crash. Blocks for as long as the disk takes."""
        with self._lock:
            if blob.safe or blob.path is None:
                return
            descriptor = os.open(blob.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        with self._lock:
            if blob.path is None or blob.safe:  # the blob was removed meanwhile, or needs no more names
                return
            target = self._disk.blobs / f"s-{blob.sha256}"
            os.rename(blob.path, target)
            blob.path = target
            for name in blob.names:
                self._link_name(blob, name)
            blob.safe = True
            self._unsafe -= 1
        directory = os.open(self._disk.blobs, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def sound(self, blob: Blob) -> bool:
        """Returns whether the blob's bytes are unchanged. Blocks while the whole file is read.

        A changed blob will no longer be found.
        """
        with self._lock:
            try:
                file = open(self._there(blob), "rb")  # noqa: SIM115 - opened under the lock, read outside it
            except OSError:
                file = None
        found = ""
        if file is not None:
            with file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        with self._lock:
            blob.read = found == blob.sha256
            if not blob.read:
                self._damage(blob)
        self._unlink()
        return blob.read

    def link(self, blob: Blob, target: Path) -> None:
        """Makes the file appear at the target too: by a link, or by a copy, which blocks, if the file system has no
        links. Raises OSError, for example if the blob was removed."""
        with self._lock:
            path = self._there(blob)
            try:
                os.link(path, target, follow_symlinks=False)
                return
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
            source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        with open(source, "rb", buffering=0) as reader, open(target, "xb", buffering=0, opener=_private) as writer:
            offset = 0
            while count := os.sendfile(writer.fileno(), reader.fileno(), offset, 8 * 2**20):
                offset += count

    def warm(self, blobs: Iterable[Blob]) -> None:
        """Asks the kernel to read blobs into memory before a load. May block on the disk's queue."""
        for blob in blobs:
            try:
                with self._lock:
                    if blob.path is None:
                        continue
                    descriptor = os.open(blob.path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:  # the file was removed, which its user will notice
                continue
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)

    def drop(self, blobs: Iterable[Blob]) -> None:
        """Undoes one `pick`, `pin` or `add` for each of these blobs."""
        with self._lock:
            for blob in blobs:
                blob.pins -= 1
                self._let_go(blob)
        self._unlink()

    def lost(self, blob: Blob) -> None:
        """Stops a blob from being found, because its file no longer exists."""
        with self._lock:
            self._damage(blob)
        self._unlink()

    def use(self, into: str, blobs: Iterable[Blob]) -> None:
        """Notes that a model's folder now uses these blobs, and no longer the ones that it used before."""
        with self._lock:
            made_of = tuple(dict.fromkeys(blobs))
            former = self._made_of.pop(into, ())
            for blob in former:
                blob.memories.discard(into)
            for blob in made_of:
                if not blob.users and not blob.pins:
                    self._idle.pop(blob, None)
                    self._used_bytes += blob.size
                blob.users.add(into)
                blob.memories.add(into)
            self._made_of[into] = made_of
            for blob in former:
                if blob not in made_of and into in blob.users:
                    blob.users.discard(into)
                    self._let_go(blob)
        self._unlink()
        self._on_change(into, True)

    def leave(self, into: str) -> None:
        """Notes that the model's folder was removed, and with it the files that others have made of the model. Its
        blobs are kept while there is room. Call `trim` afterwards."""
        with self._lock:
            self._count_made(into, 0)
            for blob in self._made_of.get(into, ()):
                if into in blob.users:
                    blob.users.discard(into)
                    self._let_go(blob)

    def made(self, into: str, size: int) -> None:
        """Notes that another program has made further files from the model's files, `size` bytes in all. They count
        against the budget until `leave`, even if they exceed it. Call `trim` afterwards."""
        with self._lock:
            self._count_made(into, size)

    def _count_made(self, into: str, size: int) -> None:
        more = size - self._made.pop(into, 0)
        if size:
            self._made[into] = size
        self._bytes += more
        self._used_bytes += more

    def remembers(self, into: str) -> bool:
        """Returns whether all blobs that the model last used are still in the cache."""
        return into in self._made_of

    def remembered(self) -> list[str]:
        """Returns the models whose last used blobs are all still in the cache, least recently used first."""
        with self._lock:
            return list(self._made_of)

    def room(self, size: int) -> DiskReservation:
        """Reserves bytes for files that are about to arrive. Blocks if unused blobs must be evicted. Raises
        PullError(DISK_FULL)."""
        self._set_aside(size)
        return DiskReservation(self, size)

    def crowded(self, size: int = 0) -> bool:
        """Returns whether blobs must be evicted to make room for `size` more bytes. If so, `room` and `trim` will
        block."""
        with self._lock:
            return bool(self._idle) and self._excess(size) > 0

    def trim(self) -> None:
        """Evicts unused blobs until the budget is met. Blocks."""
        with self._lock:
            self._evict(self._excess(0))
        self._unlink()

    def statistics(self) -> CacheStatistics:
        """Returns the current statistics."""
        with self._lock:
            return CacheStatistics(
                self._blobs,
                self._bytes,
                self._used_bytes,
                self._hits,
                self._misses,
                self._evictions,
                self._damaged,
                self._unsafe,
                self._leftovers,
            )

    def short(self, needs: int) -> int:
        """Returns how many bytes of blobs in use, or of reservations, are in the way of `needs` more bytes at this
        moment."""
        with self._lock:
            over_budget = 0 if self._budget is None else self._used_bytes + self._reserved + needs - self._budget
            return max(0, over_budget, needs - self._most())

    def _set_aside(self, size: int, *, had: int = 0) -> None:
        """Reserves bytes. `had` is the number of bytes that the same pull has already reserved, and would give back if
        this fails."""
        while True:
            with self._lock:
                try:
                    self._refuse(size)
                except PullError as error:
                    error.needs = had + size
                    raise
                if not self._evict(self._excess(size, hard=True)):
                    if size and size > (free := self._disk.free()) - self._coming:
                        text = (
                            f"{size} bytes are needed, but only {max(free - self._coming, 0)} are free on the "
                            "pod's disk; give the pod a larger one"
                        )
                        short = self._short(size - free + self._coming)
                        raise PullError(PullErrorKind.DISK_FULL, text, short=short, needs=had + size)
                    self._coming += size
                    self._reserved += size
                    return
            self._unlink()

    def _refuse(self, size: int) -> None:
        """Raises PullError if there would not be enough room even without unused blobs, so that nothing is evicted for
        a pull that must fail anyway."""
        if self._budget is not None and self._used_bytes + self._reserved + size > self._budget:
            text = (
                f"{size} bytes are needed on the pod's disk; of its budget of {self._budget} bytes, "
                f"{self._used_bytes + self._reserved} are in use by models and other pulls; raise --disk-budget"
            )
            never = size > self._budget
            short = 0 if never else self._used_bytes + self._reserved + size - self._budget
            raise PullError(PullErrorKind.DISK_FULL, text, short=short, never=never)
        most = self._most()
        if size and size > most:
            text = (
                f"{size} bytes are needed, but only {max(most, 0)} can be freed on the pod's disk; give the pod a "
                "larger one"
            )
            raise PullError(PullErrorKind.DISK_FULL, text, short=self._short(size - most))

    def _most(self) -> int:
        """Returns the bytes that the disk could hold if all unused blobs were removed; negative if even then the
        reserve is in use."""
        return self._disk.free() - self._coming + self._bytes - self._used_bytes

    def _short(self, size: int) -> int:
        """Returns how many bytes of blobs in use are in the way of `size` bytes, or 0 if even all of them would not be
        enough."""
        return size if size <= self._used_bytes else 0

    def _give_back(self, coming: int, reserved: int) -> None:
        with self._lock:
            self._coming -= coming
            self._reserved -= reserved

    def _excess(self, size: int, *, hard: bool = False) -> int:
        """Returns the bytes to evict to make room for `size` more, by the budget and by the disk. Without a budget, a
        part of the disk is to stay free too, unless `hard`."""
        if self._budget is not None:
            over = self._bytes + self._reserved + size - self._budget
            if over > 0:
                return over
            return self._coming + size - self._disk.free() if size else 0
        wish = 0 if hard else min(self._disk.tenth(), _IDLE_MOST)
        return self._coming + size + wish - self._disk.free()

    def _evict(self, excess: int) -> bool:
        """Evicts the least recently used blobs, until they have freed `excess` bytes or no unused one is left. Returns
        whether any was evicted."""
        freed = 0
        while self._idle and freed < excess:
            blob = next(iter(self._idle))
            freed += blob.size
            self._remove(blob)
            self._evictions += 1
        return freed > 0

    def _enter(self, blob: Blob) -> None:
        self._contents[blob.sha256] = blob
        self._blobs += 1
        self._bytes += blob.size

    def _name(self, blob: Blob, identities: Iterable[str]) -> None:
        """Makes these names lead to the blob, even if they led to other blobs before."""
        for name in map(_file_name, identities):
            former = self._named.get(name)
            if former is blob:
                continue
            if former is not None:
                self._unname(former, name)
            while len(blob.names) >= _MAX_NAMES:
                self._unname(blob, next(iter(blob.names)))
            blob.names[name] = None
            self._named[name] = blob
            if blob.safe and blob.path is not None:
                try:
                    self._link_name(blob, name)
                except OSError:  # the blob is findable by this name until the next start
                    self._leftovers += 1

    def _unname(self, blob: Blob, name: str) -> None:
        del blob.names[name]
        if self._named.get(name) is blob:
            del self._named[name]
        if blob.safe:
            self._doom(self._disk.blobs / name)

    def _untouched(self, blob: Blob) -> bool:
        """Returns whether the blob's file still looks as this module left it. If it does not, the blob will no longer
        be found."""
        try:
            info = os.stat(self._there(blob), follow_symlinks=False)
        except OSError:
            info = None
        if info is not None and (info.st_size, info.st_mtime_ns) == (blob.size, blob.stamp):
            return True
        self._damage(blob)
        return False

    def _damage(self, blob: Blob) -> None:
        if self._contents.get(blob.sha256) is blob:
            self._damaged += 1
            log.warning(
                "a file on the pod's disk was damaged or removed; it is fetched again when it is needed: %s",
                blob.path,
            )
        self._disown(blob)

    def _pin(self, blob: Blob) -> None:
        if not blob.pins and not blob.users:
            self._idle.pop(blob, None)
            self._used_bytes += blob.size
        blob.pins += 1

    def _let_go(self, blob: Blob) -> None:
        if blob.pins or blob.users or blob.path is None:
            return
        self._used_bytes -= blob.size
        if self._contents.get(blob.sha256) is not blob:
            self._remove(blob)
            return
        self._idle[blob] = None
        with contextlib.suppress(OSError):
            if os.stat(blob.path).st_mtime_ns == blob.stamp:  # if not, it was changed, which must be noticed later
                os.utime(blob.path)
                blob.stamp = os.stat(blob.path).st_mtime_ns

    def _disown(self, blob: Blob) -> None:
        """Stops the blob from being found. It is removed once it is unused."""
        if self._contents.get(blob.sha256) is not blob:
            return
        del self._contents[blob.sha256]
        for name in list(blob.names):
            self._unname(blob, name)
        if not blob.safe:
            self._unsafe -= 1
            blob.safe = True
        elif blob.path is not None:
            self._withdraw(blob)
        if blob in self._idle:
            self._remove(blob)

    def _withdraw(self, blob: Blob) -> None:
        """Frees the blob's name in `.blobs`, because an equal file may arrive."""
        former, blob.path = self._there(blob), self._disk.new()
        try:
            os.rename(former, blob.path)
        except FileNotFoundError:
            pass
        except OSError:
            self._leftovers += 1

    def _remove(self, blob: Blob) -> None:
        """Removes a blob that is not in use. `_unlink` then removes its file."""
        self._idle.pop(blob, None)
        self._disown(blob)
        self._blobs -= 1
        self._bytes -= blob.size
        if blob.path is not None:
            self._doomed.append(blob.path)
        blob.path = None
        for into in blob.memories:
            for other in self._made_of.pop(into, ()):
                if other is not blob:
                    other.memories.discard(into)
            self._on_change(into, False)
        blob.memories.clear()

    def _link_name(self, blob: Blob, name: str) -> None:
        path = self._there(blob)
        target = self._disk.blobs / name
        try:
            os.link(path, target, follow_symlinks=False)
        except FileExistsError:
            target.unlink(missing_ok=True)
            os.link(path, target, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            with open(target, "x", opener=_private) as file:
                file.write(path.name)

    def _pointed(self, path: Path, size: int) -> Blob | None:
        """Returns the blob that a name without a link belongs to."""
        if size != len("s-") + 64:
            return None
        with open(path, encoding="ascii", errors="replace") as file:
            content = file.read()
        return self._contents.get(content[2:]) if _CONTENT.fullmatch(content) else None

    def _there(self, blob: Blob) -> Path:
        if blob.path is None:
            raise FileNotFoundError(errno.ENOENT, "a file of the cache was removed")
        return blob.path

    def _doom(self, path: Path) -> None:
        """Marks a file to be unlinked soon. Its name in `.blobs` is free immediately, because an equal file may
        arrive."""
        if path.parent == self._disk.blobs:
            target = self._disk.new()
            try:
                os.rename(path, target)
            except FileNotFoundError:
                return
            except OSError:
                self._leftovers += 1
                return
            path = target
        self._doomed.append(path)

    def _unlink(self) -> None:
        while True:
            try:
                path = self._doomed.popleft()
            except IndexError:
                return
            try:
                path.unlink(missing_ok=True)
            except OSError:
                self._leftovers += 1


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, FILE_MODE)


def _file_name(identity: str) -> str:
    return f"i-{hashlib.blake2b(identity.encode('utf-8', 'surrogatepass'), digest_size=32).hexdigest()}"
