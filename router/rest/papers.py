"""Messages between a worker and its converter: a head of JSON and a body of bytes, in memory files.

Bodies of megabytes are too large for a socket. The worker writes each request to one memfd, and the converter writes
the answer to another. Both belong to the worker, which sends their descriptors in a packet with the lengths of the
request's parts. The packet with the answer contains only lengths.

Writing 1 MB takes 0.7 ms in new memory, and 0.1 ms in used memory. With new memory for each message, the reply for 10
MB of JSON cost 1.55 times the CPU of its conversion alone, and with used memory 1.24 (medians of runs in turn). So both
processes keep the files and their mappings for later messages, within the bounds of `Kept`. A file that is used again
still contains bytes of earlier messages, which belong to other callers. A reader therefore never reads beyond the
length in the packet, and a file is used again only when its contents are no longer referenced and the other process has
finished with it.
"""

import array
import fcntl
import itertools
import json
import mmap
import os
import socket
import struct
import weakref
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np

from router.rest.pieces import Piece

SLICE = 1 << 20
"""Bytes that are copied at a time, which takes 0.1 ms, or 0.7 ms if the memory is new."""

FILES = 3
"""Number of files that a process keeps: two for the next conversion, and one for a reply that is still being sent."""

BYTES = 32 << 20
"""Total bytes of the files that a process keeps."""

IDLE = 1.0
"""Seconds without a message after which the files that are kept are freed."""

_UNIT = 256 << 10  # bytes: files grow by a multiple, so that a slightly larger message needs no new mapping
_request = struct.Struct("<QQQQ")  # number of the request's file, lengths of its head and body, number of the answer's
_answer = struct.Struct("<QQ")  # lengths of the head and the body
_FDS = socket.CMSG_SPACE(2 * array.array("i").itemsize)


class Gone(Exception):
    """The error that the other process has closed its end, or has broken the rules of the exchange."""


class File:
    """A memory file. `number` identifies it in both processes."""

    __slots__ = ("_map", "descriptor", "number", "size")

    def __init__(self, number: int, descriptor: int) -> None:
        self.number = number
        self.descriptor = descriptor
        self.size = os.fstat(descriptor).st_size  # bytes
        self._map: mmap.mmap | None = None

    @classmethod
    def create(cls, number: int) -> "File":
        """Creates an empty file. Raises OSError."""
        descriptor = os.memfd_create("mesh-body", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)  # reading a mapping without a file is fatal
        return cls(number, descriptor)

    def writing(self, pieces: Sequence[Piece]) -> Generator[None, None, None]:
        """Writes pieces from the beginning of the file. Yields after every `SLICE` bytes, so that other work can be
        done. Raises OSError if there is no memory."""
        size = sum(map(len, pieces))
        yield from self._enlarging(size)
        mapping = self.mapping(size)
        at = 0
        for piece in pieces:
            view = memoryview(piece)
            for start in range(0, len(view), SLICE):
                self._write(mapping, at, view[start : start + SLICE])
                at += min(SLICE, len(view) - start)
                yield

    def _enlarging(self, size: int) -> Generator[None, None, None]:
        """Makes the file at least `size` bytes long, and yields as `writing` does. Raises OSError if there is no
        memory. (Writing to a mapping without memory would end the process.)"""
        self.size = os.fstat(self.descriptor).st_size  # the other process may have enlarged it
        size = -(-size // _UNIT) * _UNIT
        while (more := min(size - self.size, SLICE)) > 0:
            os.posix_fallocate(self.descriptor, self.size, more)
            self.size += more
            yield

    @staticmethod
    def _write(mapping: mmap.mmap, at: int, data: memoryview) -> None:
        mapping[at : at + len(data)] = data

    def mapping(self, size: int) -> mmap.mmap:
        """Returns a mapping with at least the first `size` bytes. Raises Gone if the file is shorter."""
        if self._map is None or len(self._map) < size:
            self.size = os.fstat(self.descriptor).st_size
            if size > self.size:
                raise Gone(f"it announced {size} bytes in a file of {self.size}")
            self._map = mmap.mmap(self.descriptor, self.size)
        return self._map

    def close(self) -> None:
        """Frees the file. Its memory lasts until the last view and the other process's mapping are gone."""
        os.close(self.descriptor)
        self._map = None


class Kept:
    """The files that a process keeps for later messages, at most `FILES` with at most `BYTES`. Files may be put back in
    any thread."""

    __slots__ = ("_files", "_numbers")

    def __init__(self) -> None:
        self._files: deque[File] = deque()  # its operations are atomic; the last used one comes first
        self._numbers = itertools.count()

    @property
    def sizes(self) -> list[int]:
        """The sizes of the files in bytes, the last used one first."""
        return [file.size for file in tuple(self._files)]

    def take(self, size: int | None) -> File:
        """Returns the smallest file with at least `size` bytes, or else the largest file, or else a new one. With None
        as `size`, returns the largest file. Raises OSError."""
        best: File | None = None
        for _ in range(len(self._files)):
            try:
                file = self._files.popleft()
            except IndexError:  # another thread was faster
                break
            if best is None or _better(file.size, best.size, size):
                best, file = file, best
            if file is not None:
                self._files.append(file)
        return File.create(next(self._numbers)) if best is None else best

    def get(self, number: int) -> File | None:
        """Removes and returns the file with that number. Returns None if it is not kept."""
        for file in tuple(self._files):
            if file.number == number:
                self._files.remove(file)
                return file
        return None

    def put(self, file: File) -> None:
        """Keeps a file, unless it has more than `BYTES`. Frees the files used least recently if there are too many, or
        too many bytes."""
        if file.size > BYTES:
            file.close()
            return
        self._files.appendleft(file)
        while len(self._files) > FILES or sum(self.sizes) > BYTES:
            try:
                self._files.pop().close()
            except IndexError:  # another thread was faster
                break

    def clear(self) -> None:
        """Frees all files."""
        while self._files:
            try:
                self._files.pop().close()
            except IndexError:  # another thread was faster
                break


def _better(size: int, best: int, wanted: int | None) -> bool:
    """Returns whether a file of `size` bytes suits `wanted` bytes better than one of `best` bytes."""
    if wanted is None or best < wanted:
        return size > best
    return wanted <= size < best


Freed = Callable[[File], object]
"""A function that takes back a file whose contents are no longer referenced. It may be called in any thread."""


class Paper:
    """A received message. `body` is a view of the file, which is in use until the last such view is gone."""

    __slots__ = ("body", "head")

    def __init__(self, file: File, head: int, body: int, freed: Freed) -> None:
        """Reads a message with the given lengths. Raises Gone, in which case `freed` is never called."""
        contents = np.frombuffer(file.mapping(head + body), np.uint8)
        view = memoryview(contents)[: head + body]  # type: ignore[arg-type]
        try:
            self.head: dict[str, Any] = json.loads(bytes(view[:head]))
        except ValueError as error:
            raise Gone(f"it wrote a head that is not JSON: {error}") from error
        self.body = view[head:]
        view.release()
        weakref.finalize(contents, freed, file).atexit = False  # each view of the message refers to this array

    def close(self) -> None:
        """Releases the view."""
        self.body.release()


def sending(
    connection: socket.socket, head: dict[str, Any], body: Sequence[Piece], *, request: File, answer: File
) -> Generator[None, None, None]:
    """Writes a request and sends it with a file for the answer. Yields as `File.writing` does. Raises Gone, and OSError
    if there is no memory."""
    encoded = json.dumps(head).encode()
    yield from request.writing((encoded, *body))
    packet = _request.pack(request.number, len(encoded), sum(map(len, body)), answer.number)
    passed = array.array("i", [request.descriptor, answer.descriptor])
    try:
        connection.sendmsg([packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, passed.tobytes())])
    except OSError as error:
        raise Gone(str(error)) from error


def receive(connection: socket.socket, answer: File, freed: Freed) -> Paper:
    """Receives the answer to a request, in the file that was sent for it. Raises Gone, and BlockingIOError if no answer
    has arrived and the socket does not block."""
    try:
        packet = connection.recv(_answer.size)
    except BlockingIOError:
        raise
    except OSError as error:
        raise Gone(str(error)) from error
    if len(packet) != _answer.size:
        raise Gone("it closed its end")
    head, body = _answer.unpack(packet)
    return Paper(answer, head, body, freed)


class Requests:
    """The requests that arrive in the converter."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._kept = Kept()
        self._answer: File | None = None

    def receive(self) -> Paper:
        """Receives a request. Raises Gone."""
        try:
            packet, ancillary, _, _ = self._connection.recvmsg(_request.size, _FDS, socket.MSG_CMSG_CLOEXEC)
        except OSError as error:
            raise Gone(str(error)) from error
        descriptors = array.array("i")
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
        if len(packet) != _request.size or len(descriptors) != 2:
            raise Gone("it closed its end")
        number, head, body, answer = _request.unpack(packet)
        file = self._known(number, descriptors[0])
        self._answer = self._known(answer, descriptors[1])
        return Paper(file, head, body, self._kept.put)

    def reply(self, head: dict[str, Any], body: Sequence[Piece]) -> None:
        """Answers the request. Raises Gone, and OSError if there is no memory."""
        file, self._answer = self._answer, None
        assert file is not None
        encoded = json.dumps(head).encode()
        for _ in file.writing((encoded, *body)):
            pass
        self._kept.put(file)
        try:
            self._connection.sendall(_answer.pack(len(encoded), sum(map(len, body))))
        except OSError as error:
            raise Gone(str(error)) from error

    def trim(self) -> None:
        """Frees the files that are kept."""
        self._kept.clear()

    def _known(self, number: int, descriptor: int) -> File:
        """Returns the file with that number, with its mapping if the file was used before."""
        file = self._kept.get(number)
        if file is None:
            return File(number, descriptor)
        os.close(descriptor)
        return file
