"""The bytes of archives, read with bounded memory.

The libraries that read zip and tar archives hold whole lists and headers in memory, however long an archive's own
numbers say they are: a few megabytes may stand for many gigabytes. So they read through `Bounded` here, which ends the
reading of a list or a header that is too long. The decompression of xz allocates as much as the archive asks for, and
is limited too.
"""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

ZIP_LIST = 4 << 20
"""Bytes of the list at the end of a zip archive: about four hundred for each file that an archive may hold."""

TAR_HEADERS = 1 << 20
"""Bytes between two entries of a tar archive. Only extended headers are longer than a kilobyte."""

_XZ_MEMORY = 128 << 20  # bytes: `xz -9` needs 65 MiB
_CHUNK = 1 << 16
_BLOCK = 512  # bytes of a tar archive's blocks
_XZ, _BZIP2, _GZIP = b"\xfd7zXZ\0", b"BZh", b"\x1f\x8b"


class TooLong(ValueError):
    """An archive that cannot be read within the limits of memory. The text says why."""


class Bounded:
    """A file of which at most `left` bytes may be read, until another limit is set; None means no limit. With
    `forward`, the file is read from its beginning to its end without `seek`."""

    def __init__(self, file: IO[bytes], left: int | None, what: str, *, forward: bool = False) -> None:
        """Limits the reading of a file. `what` names in errors what is read within the limit."""
        self.left = left
        self.last = b""  # what was read last within a limit
        self._file = file
        self._what = what
        self._most = left
        self._forward = forward
        self._at = 0

    def read(self, size: int | None = -1) -> bytes:
        """Reads bytes. Raises TooLong if there are more than may be read."""
        if self.left is None:
            data = self._file.read(-1 if size is None else size)
            self._at += len(data)
            return data
        # Never more than the limit, whatever the archive says about the length.
        data = self._file.read(self.left + 1 if size is None or size < 0 else min(size, self.left + 1))
        self._at += len(data)
        self.last = data
        self.left -= len(data)
        if self.left < 0:
            raise TooLong(f"{self._what} of the archive has more than {self._most:,} bytes")
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        """Goes to a place in the file; with `forward`, only to one that lies ahead. Raises OSError and TarError."""
        if not self._forward:
            return self._file.seek(offset, whence)
        if whence or offset < self._at:
            raise tarfile.ReadError("its parts overlap")
        while self._at < offset and self.read(min(_CHUNK, offset - self._at)):
            pass
        return self._at

    def tell(self) -> int:
        """Returns the place in the file."""
        return self._at if self._forward else self._file.tell()

    def seekable(self) -> bool:
        """Returns True, as both kinds of archives need."""
        return True

    def close(self) -> None:
        """Does nothing: the code that opened the file closes it."""


class _XzReader(io.RawIOBase):
    """The content of an xz file."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file
        self._stream = self._new()
        self._whole = False  # one stream has been read to its end, so what follows may be anything
        self._ended = False

    @staticmethod
    def _new() -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ended:
            data = b""
            if self._stream.eof:
                data = self._behind(self._stream.unused_data)
                self._ended = not data
                self._stream, self._whole = self._new(), True
            elif self._stream.needs_input:
                data = self._file.read(_CHUNK)
                if not data:
                    raise EOFError("it ends too early")
            if found := self._decompressed(data, len(buffer)):
                buffer[: len(found)] = found
                return len(found)
        return 0

    def _behind(self, data: bytes) -> bytes:
        """Returns what follows a stream and its padding, or b"" at the end. `data` has been read already."""
        while not (rest := data.lstrip(b"\0")):
            data = self._file.read(_CHUNK)
            if not data:
                return b""
        return rest

    def _decompressed(self, data: bytes, most: int) -> bytes:
        """Returns at most `most` bytes. If something other than a stream follows a complete stream, the content ends
        there."""
        try:
            return self._stream.decompress(data, most)
        except lzma.LZMAError as error:
            if "Memory usage limit" in str(error):
                text = f"the archive needs more than {_XZ_MEMORY >> 20} MiB of memory to be unpacked"
                raise TooLong(f"{text}: compress it with a smaller dictionary, such as that of xz -9") from error
            if not self._whole:
                raise
            self._ended = True
            return b""


@contextmanager
def tar(path: Path) -> Iterator[tuple[tarfile.TarFile, Bounded]]:
    """Opens a tar archive, which may be compressed by gzip, bzip2 or xz, and reads its first header. At most
    `TAR_HEADERS` bytes may be read: set `left` to None for the content of an entry, and to `TAR_HEADERS` again after
    it. Raises TarError if it is no tar archive, TooLong, OSError, and what the libraries raise for damaged archives."""
    with path.open("rb") as file, _plain(file) as plain:
        bounded = Bounded(plain, TAR_HEADERS, "a header", forward=True)
        with tarfile.open(fileobj=cast(IO[bytes], bounded), mode="r:") as archive:
            yield archive, bounded


def ended_well(bounded: Bounded) -> bool:
    """Returns whether the entries of a tar archive have ended as they should after the last one was read: with a block
    of zeros, or with the file. Otherwise a header is damaged."""
    return not any(bounded.last)


@contextmanager
def zipped(path: Path) -> Iterator[zipfile.ZipFile]:
    """Opens a zip archive, and reads its list of files. Raises TooLong, OSError and BadZipFile."""
    with path.open("rb") as file:
        bounded = Bounded(file, ZIP_LIST, "the list of files")
        with zipfile.ZipFile(cast(IO[bytes], bounded)) as archive:
            bounded.left = None
            yield archive


def _plain(file: io.BufferedReader) -> IO[bytes]:
    """Returns the content of a file that may be compressed."""
    magic = file.read(len(_XZ))
    file.seek(0)
    if magic.startswith(_GZIP):
        return cast(IO[bytes], gzip.GzipFile(fileobj=file))
    if magic.startswith(_BZIP2):
        return cast(IO[bytes], bz2.BZ2File(file))
    if magic.startswith(_XZ):
        return cast(IO[bytes], io.BufferedReader(_XzReader(file)))
    return file
