"""The unpacking of archives that hold a model: zip, tar, and tar compressed by gzip, bzip2 or xz.

The archive comes from any caller who may register models, so what its headers say is not trusted. Entries are written
only below the given folder, and only files and folders are: an archive with a link, a device, an absolute path or `..`
is refused as a whole. Bytes are counted as they are written, and lists and headers are read within limits (`packed`).
If anything goes wrong, the folder is removed.
"""

import errno
import gzip
import lzma
import os
import shutil
import stat
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from mesh.modelfiles import packed

_CHUNK = 1 << 20
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError)
_NAME = 255  # bytes of one element of a path
_SHOWN = 120  # characters of an entry's name in an error
_DISK_SHARE = 0.5  # of the free space that one archive may fill


class BadArchive(ValueError):
    """An archive that is not unpacked. The text says why."""


class CannotWrite(OSError):
    """The error for an archive whose content cannot be written to the disk."""


@dataclass(frozen=True, slots=True)
class ArchiveLimits:
    """The limits of one archive."""

    bytes: int = 16 << 30  # of all its files
    files: int = 10_000  # and folders
    depth: int = 32  # folders within each other


LIMITS = ArchiveLimits()


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    folder: bool
    content: IO[bytes] | None


def is_archive(path: Path) -> bool:
    """Returns whether a file is a zip or tar archive, even one that is too large to be unpacked. Raises OSError."""
    return path.is_file() and (zipfile.is_zipfile(path) or _is_tar(path))


def _is_tar(path: Path) -> bool:
    try:
        with packed.tar(path):
            return True
    except packed.TooLong:
        return True
    except _DAMAGE:
        return False


def unpack(path: Path, into: Path, limits: ArchiveLimits | None = None, *, stop: threading.Event | None = None) -> Path:
    """Unpacks an archive into a new folder, and returns the folder of its content: the only folder in it, or `into`.

    `limits` are `LIMITS` by default. Blocks. Ends early once `stop` is set. Raises BadArchive; CannotWrite if the
    content cannot be written to the disk; OSError if the archive cannot be read.
    """
    into.mkdir(mode=0o755)
    try:
        free = shutil.disk_usage(into).free
        _Unpacking(into, limits or LIMITS, int(free * _DISK_SHARE), stop).run(_entries(path))
    except BaseException as error:
        shutil.rmtree(into, ignore_errors=True)
        if isinstance(error, _DAMAGE):
            raise BadArchive(f"the archive is damaged ({error}): make it again, or copy it again") from error
        if isinstance(error, packed.TooLong):
            raise BadArchive(str(error)) from error
        if isinstance(error, BadArchive | OSError) or not isinstance(error, Exception):
            raise
        # What the libraries raise for encrypted files, rare methods, and headers that they did not expect.
        raise BadArchive(
            f"the archive cannot be unpacked ({error}): pack it again, as a plain zip or tar archive"
        ) from error
    inside = list(into.iterdir())
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else into


def _entries(path: Path) -> Iterator[_Entry]:
    """Yields an archive's entries in order. Raises BadArchive for an entry that is neither a file nor a folder."""
    if zipfile.is_zipfile(path):
        with packed.zipped(path) as archive:
            for info in archive.infolist():
                kind = info.external_attr >> 28  # the type bits of a Unix mode; 0 if the archive's maker has none
                if info.is_dir():
                    yield _Entry(info.filename, True, None)
                elif kind not in (0, 0o10):
                    raise _special(info.filename, link=kind == stat.S_IFLNK >> 12)
                elif info.compress_type == zipfile.ZIP_LZMA:  # which may ask for gigabytes of memory
                    raise BadArchive(f"the archive uses LZMA for {_shown(info.filename)}: pack it with deflate instead")
                else:
                    with archive.open(info) as content:
                        yield _Entry(info.filename, False, content)
        return
    with packed.tar(path) as (tar, bounded):
        for member in tar:
            bounded.left = None
            if member.isdir():
                yield _Entry(member.name, True, None)
            elif not member.isreg():
                raise _special(member.name, link=member.issym() or member.islnk())
            else:
                opened = tar.extractfile(member)
                assert opened is not None  # as it is a regular file
                with closing(opened) as content:
                    yield _Entry(member.name, False, content)
            bounded.left = packed.TAR_HEADERS
        if not packed.ended_well(bounded):
            raise BadArchive(
                "the archive is damaged (the header of an entry is not valid): make it again, or copy it again"
            )
        # The checksum is after the last entry. What comes before it counts like a file.
        bounded.left = None
        yield _Entry("", False, cast(IO[bytes], bounded))


def _special(name: str, *, link: bool) -> BadArchive:
    if link:
        return BadArchive(f"the archive holds a link: {_shown(name)}; pack the file that it leads to instead")
    return BadArchive(f"the archive holds a device or a pipe: {_shown(name)}; leave it out")


class _Unpacking:
    """One archive on its way to the disk."""

    def __init__(self, into: Path, limits: ArchiveLimits, free: int, stop: threading.Event | None) -> None:
        self._into = into
        self._limits = limits
        self._free = free
        self._stop = stop
        self._files = 0
        self._bytes = 0

    def run(self, entries: Iterator[_Entry]) -> None:
        """Writes all entries. Raises BadArchive."""
        for entry in entries:
            parts = self._parts(entry.name)
            if not parts or parts[0] == "__MACOSX":
                if entry.content is not None:
                    self._copy(entry.content, None)
                continue
            target = self._into.joinpath(*parts)
            try:
                with _writing():
                    (target if entry.folder else target.parent).mkdir(parents=True, exist_ok=True)
                if entry.content is not None:
                    self._write(target, entry.content)
            except (FileExistsError, IsADirectoryError, NotADirectoryError):
                raise BadArchive(
                    f"the archive has two entries with the same path: {_shown(entry.name)}; leave one out"
                ) from None
            except CannotWrite as error:
                if error.errno == errno.ENAMETOOLONG:
                    text = f"the archive holds a path that is too long for the pod's disk: {_shown(entry.name)}"
                    raise BadArchive(f"{text}; shorten it") from None
                raise

    def _parts(self, name: str) -> list[str]:
        """Returns the elements of an entry's path, and counts the entry. Raises BadArchive."""
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if name.startswith("/") or ".." in parts:
            raise BadArchive(f"the archive holds a path that leads out of it: {_shown(name)}; use relative paths")
        if "\\" in name or "\0" in name:
            raise BadArchive(
                f"the archive holds a name with a backslash or a NUL: {_shown(name)}; use only / between folders"
            )
        if any(len(os.fsencode(part)) > _NAME for part in parts):
            raise BadArchive(f"the archive holds a name of more than {_NAME} bytes: {_shown(name)}; shorten it")
        if len(parts) > self._limits.depth:
            raise BadArchive(
                f"the archive holds folders more than {self._limits.depth} deep: {_shown(name)}; nest fewer"
            )
        self._files += 1
        if self._files > self._limits.files:
            raise BadArchive(
                f"the archive holds more than {self._limits.files:,} files: pack only what the model needs"
            )
        return parts

    def _write(self, target: Path, content: IO[bytes]) -> None:
        with _writing():
            file = target.open("xb")
        try:
            self._copy(content, file)
        finally:
            with _writing():
                file.close()

    def _copy(self, content: IO[bytes], file: IO[bytes] | None) -> None:
        """Reads an entry to its end, where damage shows, and writes it to a file if there is one."""
        while chunk := content.read(_CHUNK):
            self._bytes += len(chunk)
            if self._bytes > self._limits.bytes:
                raise BadArchive(
                    f"the archive's files have more than {self._limits.bytes:,} bytes when they are unpacked: pack "
                    "only what the model needs, or register its folder instead"
                )
            if self._bytes > self._free:
                raise BadArchive(
                    "the archive would fill more than half of the disk's free space: give the pod more disk"
                )
            if self._stop is not None and self._stop.is_set():
                raise BadArchive("the unpacking was cancelled")
            if file is not None:
                with _writing():
                    file.write(chunk)


@contextmanager
def _writing() -> Iterator[None]:
    """Converts errors of writing to CannotWrite, because they say nothing about the archive."""
    try:
        yield
    except (FileExistsError, IsADirectoryError, NotADirectoryError):
        raise
    except OSError as error:
        raise CannotWrite(*error.args) from error


def _shown(name: str) -> str:
    return repr(name[:_SHOWN])
