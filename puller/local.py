"""`file:` paths: only under the folders that the operator named.

A path is resolved, including links, and must then lie under a root. The same holds for each link inside a folder; other
links are skipped, like everything else that cannot be read, because volumes also hold files that belong to no model. A
folder may be replaced by a link between the check and the opening, so the path of the opened file, as the kernel
reports it, is checked again. Only regular files are read: opening a pipe would wait, and a device may never end.

The files are copied, not linked: the model server maps them, and if somebody rewrites a file, that must not change a
loaded model or end the server's process. A file whose size or times differ after the copy is refused. Size, times and
inode also distinguish versions of a file.

All of this happens in threads, because a root may be a network mount, and one that hangs must block neither the agent's
event loop (its lease would lapse) nor the files of another mount: each root and each volume has its own threads. A pull
that sees no progress for a minute gives up, and abandons the thread to the kernel. A switch to a thread costs 0.35 ms
and the whole pull of a small file 1 ms (measured, 2 shared cores), so there is only one switch: the same thread that
lists a small file reads it.
"""

import asyncio
import contextlib
import errno
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit

from puller.disk import write_error
from puller.errors import PullError, PullErrorKind
from puller.provider import Listing, RemoteFile, version
from puller.sink import Sink, Stopped
from puller.source import Location
from puller.tree import MAX_FILES, stray, told

THREADS = 8  # of each root and each volume
MAX_DEPTH = 32
_SMALL = 128 * 2**10  # bytes
_CHUNK = 2 * 2**20  # between two checks whether the pull was cancelled
_CANCEL_WAIT = 1.0  # seconds
_PATIENCE = 60.0  # seconds in which no file was listed and no chunk copied
_TICK, _COARSE_TICK = 50_000_000, 2_500_000_000  # nanoseconds; the coarse one if stamps are whole seconds

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_SKIPPED = frozenset({errno.EACCES, errno.EPERM, errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG})


class _Stop(threading.Event):
    """A request to a thread to stop. It counts how often the thread has checked for the request, so that others can see
    whether the thread makes progress."""

    def __init__(self) -> None:
        super().__init__()
        self.looks = 0

    def is_set(self) -> bool:
        """Returns whether the thread should stop."""
        self.looks += 1
        return super().is_set()


class _Tree:
    """The content of a folder, filled in while the folder is listed."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.files: list[RemoteFile] = []
        self.folders: list[str] = []
        self.skipped: list[str] = []
        self.forbidden = False  # an entry was skipped that others may be allowed to read

    def skip(self, name: str, why: str, *, forbidden: bool = False) -> None:
        self.skipped.append(f"{name[:200]!r} {why}")
        self.forbidden |= forbidden


class LocalProvider:
    """The provider for `file:`, which copies files and folders from under the roots."""

    def __init__(self, roots: Sequence[Path], *, volumes: Path | None = None, patience: float = _PATIENCE) -> None:
        """Makes a provider. `volumes` is another root, whose folders are mounts. `patience` is the time without
        progress after which a pull gives up, in seconds."""
        every = [*roots, *([volumes] if volumes is not None else [])]
        self._roots = tuple(os.path.realpath(root) for root in every)
        self._named = {
            **{os.path.abspath(root): os.path.realpath(root) for root in every},
            **{r: r for r in self._roots},
        }
        self._volumes = os.path.realpath(volumes) if volumes is not None else ""
        self._patience = patience
        self._executors: dict[str, ThreadPoolExecutor] = {}

    async def listing(self, location: Location) -> Listing:
        """Lists the file, or all files below the folder, following links that stay inside the roots. A single small
        file is read too."""
        path = path_of(location)
        return await self._in_thread(path, _shown(location), self._list, path, _shown(location))

    async def read(self, location: Location, file: RemoteFile, sink: Sink) -> None:
        """Copies a file. If cancelled, it waits up to a second for its thread to stop writing."""
        path = path_of(location)
        shown = _shown(location).rstrip("/") + (f"/{file.path}" if file.path else "")
        await self._in_thread(path, shown, self._copy, shown, file, sink)

    async def close(self) -> None:
        """Ends the threads. A thread that hangs in a mount is abandoned."""
        for executor in self._executors.values():
            executor.shutdown(wait=False, cancel_futures=True)
        self._executors.clear()

    def _mount(self, path: str) -> str:
        """Returns the root or volume whose threads serve a path. Touches no mount, only the folder that contains the
        volumes' mounts."""
        path = os.path.normpath(path)
        named = max(
            (name for name in self._named if f"{path}/".startswith(f"{name.rstrip('/')}/")), key=len, default=""
        )
        root = self._named.get(named, "")
        if root and root == self._volumes:
            claim = path[len(named) :].lstrip("/").partition("/")[0]
            with contextlib.suppress(OSError):
                if claim in os.listdir(root):
                    return f"{root}/{claim}"
        return root

    async def _in_thread(self, path: str, shown: str, function: Callable[..., _T], *arguments: object) -> _T:
        mount = self._mount(path)
        executor = self._executors.get(mount)
        if executor is None:
            executor = self._executors[mount] = ThreadPoolExecutor(THREADS, thread_name_prefix="puller")
        stop = _Stop()
        work = asyncio.get_running_loop().run_in_executor(executor, function, stop, *arguments)
        try:
            seen = -1
            while not (await asyncio.wait([work], timeout=self._patience))[0]:
                if stop.looks == seen:
                    stop.set()
                    work.cancel()  # for one that has not begun
                    text = f"{shown} has not answered for {self._patience:g} s; check the volume"
                    raise PullError(PullErrorKind.TIMEOUT, text)
                seen = stop.looks
            return work.result()
        except asyncio.CancelledError:
            stop.set()
            await asyncio.wait([work], timeout=_CANCEL_WAIT)
            if work.done() and not work.cancelled():
                work.exception()  # the caller has gone, so nothing else will retrieve the result
            raise

    def _list(self, stop: threading.Event, path: str, shown: str) -> Listing:
        try:
            real = os.path.realpath(path)
            # Checked first: outside the roots, a caller must not learn whether a path exists.
            self._check(real, path, shown)
            found = os.stat(real)
            if stat.S_ISREG(found.st_mode):
                file = _remote("", real, found)
                if found.st_size <= _SMALL:
                    file = replace(file, content=self._content(shown, file))
                return Listing((file,), is_file=True)
            if not stat.S_ISDIR(found.st_mode):
                raise PullError(
                    PullErrorKind.BAD_REQUEST,
                    f"{shown} is neither a file nor a folder; register the path of a file or a folder",
                )
            tree = _Tree(shown)
            self._list_folder(real, "", [(found.st_dev, found.st_ino)], tree, stop)
            if not tree.files and tree.skipped:
                text = f"the folder {shown} contains no files that can be read: {told(tree.skipped)}"
                kind = PullErrorKind.FORBIDDEN if tree.forbidden else PullErrorKind.EMPTY
                raise PullError(kind, text)
            if not tree.files:
                text = f"the folder {shown} contains no files; name the folder that contains the model"
                raise PullError(PullErrorKind.EMPTY, text)
            return Listing(tuple(tree.files), is_file=False, folders=tuple(tree.folders), skipped=tuple(tree.skipped))
        except OSError as error:
            raise _read_error(error, shown) from error
        except ValueError as error:  # a NUL in the name
            raise PullError(
                PullErrorKind.BAD_REQUEST, f"{shown!r} contains a character that no path can contain; correct the path"
            ) from error

    def _check(self, real: str, path: str, shown: str) -> None:
        """Raises PullError for a path outside the roots. The text does not list the roots, because they only concern
        the operator."""
        for root in self._roots:
            if real == root or real.startswith(root.rstrip("/") + "/"):
                return
        log.warning("%r is not under a folder that models may be read from: %s", path, ", ".join(self._roots) or "none")
        what = "is not under a folder" if real == path else "leads out of the folders"
        text = f"{shown} {what} that models may be read from (--file-root)"
        raise PullError(PullErrorKind.FORBIDDEN, text)

    def _list_folder(
        self, folder: str, prefix: str, above: list[tuple[int, int]], tree: "_Tree", stop: threading.Event
    ) -> None:
        """Adds the content of a folder to the tree. Raises OSError if the folder itself cannot be listed.

        Entries that cannot be part of a model, or that cannot be read, are skipped: they may belong to something else.
        """
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries)
        for name in names:
            if stop.is_set():
                raise Stopped
            if stray(name):
                tree.skip(prefix + name, stray(name))
                continue
            if len(tree.files) + len(tree.folders) >= MAX_FILES:
                raise PullError(
                    PullErrorKind.TOO_LARGE,
                    f"{tree.path} holds more than {MAX_FILES} files and folders; name a folder below it",
                )
            try:
                real = os.path.realpath(os.path.join(folder, name))
                self._check(real, os.path.join(folder, name), f"{tree.path.rstrip('/')}/{prefix}{name}")
                found = os.stat(real)
                if stat.S_ISREG(found.st_mode):
                    if not os.access(real, os.R_OK, effective_ids=True):
                        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
                    tree.files.append(_remote(prefix + name, real, found))
                elif stat.S_ISDIR(found.st_mode):
                    identity = (found.st_dev, found.st_ino)
                    if identity in above or len(above) >= MAX_DEPTH:
                        tree.skip(prefix + name, "is a loop of links, or nested too deeply")
                        continue
                    self._list_folder(real, f"{prefix}{name}/", [*above, identity], tree, stop)
                    tree.folders.append(prefix + name)
                else:
                    tree.skip(prefix + name, "is neither a file nor a folder")
            except PullError as error:
                if error.kind is not PullErrorKind.FORBIDDEN:
                    raise
                tree.skip(prefix + name, "leads out of the folders that models may be read from", forbidden=True)
            except OSError as error:
                # A failure of the mount itself may pass; until then, the tree would lack a file.
                if error.errno not in _SKIPPED:
                    raise
                why = "leads nowhere" if error.errno == errno.ENOENT else f"cannot be read: {error.strerror}"
                tree.skip(prefix + name, why, forbidden=error.errno in (errno.EACCES, errno.EPERM))

    @contextmanager
    def _opened(self, shown: str, file: RemoteFile) -> Iterator[int]:
        """Opens the listed file for the block. Raises PullError, at the beginning or at the end of the block, if it is
        not the file that was listed."""
        # O_NONBLOCK: if the path has become a pipe since the listing, opening it must not wait for a writer.
        source = os.open(file.key, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            before = os.fstat(source)
            if not stat.S_ISREG(before.st_mode):  # it was a file when it was listed
                raise _changed(shown)
            self._check(os.readlink(f"/proc/self/fd/{source}").removesuffix(" (deleted)"), file.key, shown)
            if _version(before) != file.validator:
                raise _changed(shown)
            yield source
            if _version(os.fstat(source)) != file.validator:
                raise _changed(shown)
        finally:
            os.close(source)

    def _content(self, shown: str, file: RemoteFile) -> bytes:
        assert file.size is not None
        with self._opened(shown, file) as source:
            content = os.read(source, file.size + 1)
        if len(content) != file.size:
            raise _changed(shown)
        return content

    def _copy(self, stop: threading.Event, shown: str, file: RemoteFile, sink: Sink) -> None:
        assert file.size is not None
        try:
            with self._opened(shown, file) as source:
                if sink.written:
                    sink.restart()
                with sink.hold() as target:
                    copied = _copy_bytes(source, target, file.size, sink, stop.is_set)
                if stop.is_set():
                    raise Stopped
            if copied != file.size:
                raise _changed(shown)
        except OSError as error:
            # An input/output error may come from either side; the mount is likelier, and it may pass.
            ours = write_error(error) if error.errno != errno.EIO else None
            raise ours or _read_error(error, shown) from error


def _version(found: os.stat_result) -> str:
    return f"{found.st_dev}:{found.st_ino}:{found.st_size}:{found.st_mtime_ns}:{found.st_ctime_ns}"


def _remote(path: str, real: str, found: os.stat_result) -> RemoteFile:
    tag = _version(found)
    # Two writes within one tick of a file system's clock look alike, so a file just written is not settled.
    tick = _TICK if found.st_ctime_ns % 10**9 else _COARSE_TICK
    return RemoteFile(
        path,
        key=real,
        size=found.st_size,
        # Includes the path, as another volume may later have the same device numbers.
        identity=version("file", real, tag, found.st_size),
        settled=time.time_ns() - found.st_ctime_ns > tick,
        validator=tag,
    )


def _shown(location: Location) -> str:
    return location.told or path_of(location)


def path_of(location: Location) -> str:
    """Returns the absolute path of a `file:` location. Raises PullError(BAD_REQUEST) if the location names none."""
    if location.uri.startswith("/"):
        return location.uri
    parts = urlsplit(location.uri)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        text = f"{location.uri!r} names no absolute path: write file:///models/a.onnx"
        raise PullError(PullErrorKind.BAD_REQUEST, text)
    if parts.query or parts.fragment:
        text = f"{location.uri!r} has a query or fragment: write ? and # in file names as %3F and %23"
        raise PullError(PullErrorKind.BAD_REQUEST, text)
    return unquote(parts.path, errors="surrogateescape")


def _copy_bytes(source: int, target: int, size: int, sink: Sink, stopped: Callable[[], bool]) -> int:
    copied = 0
    # One byte more is requested, to notice a file that grew.
    while not stopped() and copied <= size:
        try:
            count = os.copy_file_range(source, target, min(_CHUNK, size + 1 - copied), copied, copied)
        except OSError as error:
            if copied or error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
                raise
            return _copy_by_hand(source, size, sink, stopped)
        if not count:
            # Some network and FUSE mounts return 0 if they do not support this call.
            return copied if copied or not size else _copy_by_hand(source, size, sink, stopped)
        sink.wrote(copied, min(count, size - copied))
        sink.pace(count)
        copied += count
    return copied


def _copy_by_hand(source: int, size: int, sink: Sink, stopped: Callable[[], bool]) -> int:
    copied = 0
    while not stopped() and copied <= size:
        chunk = os.read(source, min(2**20, size + 1 - copied))
        if not chunk:
            break
        sink.write(chunk[: size - copied], copied)
        sink.pace(len(chunk))
        copied += len(chunk)
    return copied


def _changed(shown: str) -> PullError:
    text = f"{shown} changed while it was copied; write models under a new name, and rename them"
    return PullError(PullErrorKind.CHANGED, text)


def _read_error(error: OSError, shown: str) -> PullError:
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return PullError(PullErrorKind.NOT_FOUND, f"{shown} does not exist; check the path of the registration")
        case errno.EACCES | errno.EPERM:
            return PullError(
                PullErrorKind.FORBIDDEN,
                f"{shown} cannot be read: {error.strerror}; give the pod's user the right to read it",
            )
        case errno.ELOOP | errno.ENAMETOOLONG:
            return PullError(
                PullErrorKind.BAD_REQUEST, f"{shown} cannot be opened: {error.strerror}; register another path"
            )
    return PullError(PullErrorKind.UNREACHABLE, f"{shown} cannot be read: {error.strerror}; check the volume")
