"""The file format of a backup: lines of JSON, compressed with gzip, so `zcat` shows them.

The first line is the header: version, origin, time, and the number of records of each kind. Each further line is a
record, such as `["registry", "fraud/de", "{...}"]`: its kind, the rest of its key, and its value. Bytes that are not
UTF-8 are written as `{"base64": "..."}`. The last line has the SHA-256 of all lines before it. A backup can be written
to a stream, because etcd can count the records at a revision before they are read.

This module does not depend on etcd or on the meaning of records.
"""

import base64
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

VERSION = 1
"""Version of the file format. A file of a later version is refused."""

KINDS = ("registry", "vmodels", "config")
"""Kinds of records, in the order in which they are written and must be restored: models before the vmodels that name
them."""

_MARK = "mesh-backup"
_MAX_LINE = 32 * 2**20  # bytes: etcd accepts requests of 1.5 MiB, and JSON writes a byte as at most six
_LEVEL = 6  # gzip's own default: 9 takes twice the time for 2 % of a million records


class BackupError(Exception):
    """The error that a backup is damaged or cannot be used. The text is for the admin."""


def _unusable(why: str) -> BackupError:
    return BackupError(f"{why}: use another backup")


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a backup."""

    base: str  # prefix of the keys it was made from
    revision: int  # of etcd, at which all records were read
    cluster: str  # etcd's id, hexadecimal
    schema: int  # version of keys and records
    made: str  # when, UTC
    by: str  # version of the program that wrote it
    counts: Mapping[str, int]  # records of each kind
    version: int = VERSION

    @property
    def total(self) -> int:
        """Number of records of all kinds."""
        return sum(self.counts.values())


@dataclass(frozen=True, slots=True)
class BackupEntry:
    """One record: its kind, its key without the prefix of that kind, and its value."""

    kind: str
    name: bytes
    value: bytes


class Writer:
    """The writing of one backup to a stream. The backup is complete after `finish`, which leaves the stream open."""

    def __init__(self, stream: BinaryIO, header: Header) -> None:
        self._zip = gzip.GzipFile(filename="", fileobj=stream, mode="wb", compresslevel=_LEVEL, mtime=0)
        self._digest = hashlib.sha256()
        fields = {name: getattr(header, name) for name in ("made", "by", "base", "cluster", "revision", "schema")}
        self._line({_MARK: header.version, **fields, "counts": dict(header.counts)})

    def write(self, entries: Iterable[BackupEntry]) -> None:
        """Adds records."""
        for entry in entries:
            self._line([entry.kind, _to_json(entry.name), _to_json(entry.value)])

    def finish(self) -> None:
        """Writes the last line, which has the checksum."""
        self._line({"end": True, "sha256": self._digest.hexdigest()})
        self._zip.close()

    def _line(self, document: Any) -> None:
        line = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        self._digest.update(line)
        self._zip.write(line)


def verify(stream: BinaryIO) -> Header:
    """Reads the whole file, and returns its header. Raises BackupError if the file is not a complete backup of a known
    version."""
    lines = _lines(stream)
    first = next(lines, b"")
    digest = hashlib.sha256(first)
    header = _header(first)
    counts = dict.fromkeys(KINDS, 0)
    ended = False
    for number, line in enumerate(lines, 2):
        document = _parse(line, number)
        if isinstance(document, dict) and document.get("end") is True:
            if document.get("sha256") != digest.hexdigest():
                raise _unusable("its checksum does not match, so it was changed or damaged")
            ended = True
            continue
        if ended:
            raise _unusable(f"line {number} comes after its end, so it was changed or damaged")
        digest.update(line)
        counts[_entry(document, number).kind] += 1
    if not ended:
        raise _unusable("its end is missing, so it was not written to the end, or was truncated")
    if counts != dict(header.counts):
        found, stated = (", ".join(f"{those[kind]} {kind}" for kind in KINDS) for those in (counts, header.counts))
        raise _unusable(f"it has {found} records, but its header says {stated}")
    return header


def entries(stream: BinaryIO) -> Iterator[BackupEntry]:
    """Yields the records of a verified file, from its beginning."""
    for number, line in enumerate(_lines(stream), 1):
        document = _parse(line, number)
        if isinstance(document, list):
            yield _entry(document, number)


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=stream, mode="rb") as unzipped:
            while line := unzipped.readline(_MAX_LINE):
                if not line.endswith(b"\n"):
                    raise _unusable("a line has no end, so it is not a backup of this program, or was truncated")
                yield line
    except gzip.BadGzipFile as error:
        raise _unusable("it is not gzip, so it is not a backup of this program, or is damaged") from error
    except (EOFError, zlib.error) as error:
        raise _unusable(f"it is truncated or damaged ({error})") from error


def _header(line: bytes) -> Header:
    document = _parse(line, 1) if line else None
    version = document.get(_MARK) if isinstance(document, dict) else None
    if not isinstance(document, dict) or type(version) is not int:
        raise _unusable("it is not a backup of this program")
    if version != VERSION:
        raise BackupError(f"it has version {version}, but this program knows version {VERSION}: use a newer program")
    try:
        counts = {str(kind): int(count) for kind, count in document["counts"].items()}
        if counts.keys() != set(KINDS):
            raise _unusable(f"its header counts {', '.join(counts) or 'nothing'}, not {', '.join(KINDS)}")
        return Header(
            base=str(document["base"]),
            revision=int(document["revision"]),
            cluster=str(document["cluster"]),
            schema=int(document["schema"]),
            made=str(document["made"]),
            by=str(document["by"]),
            counts=counts,
            version=version,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _unusable("its header lacks a value, or has one of the wrong type") from error


def _parse(line: bytes, number: int) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _unusable(f"line {number} is not JSON, so it is not a backup of this program, or is damaged") from error


def _entry(document: Any, number: int) -> BackupEntry:
    if not isinstance(document, list) or len(document) != 3 or document[0] not in KINDS:
        raise _unusable(f"line {number} is not a record of a known kind, so it is damaged")
    kind, name, value = document
    return BackupEntry(kind, _from_json(name, number), _from_json(value, number))


def _to_json(raw: bytes) -> str | dict[str, str]:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(raw).decode()}


def _from_json(given: Any, number: int) -> bytes:
    try:
        if isinstance(given, str):
            return given.encode()
        if isinstance(given, dict) and given.keys() == {"base64"}:
            return base64.b64decode(given["base64"], validate=True)
    except (ValueError, TypeError):
        pass
    raise _unusable(f"line {number} has a value that is neither text nor base64, so it is damaged")
