"""The seam: what a kind of store has to do to be pulled from.

A provider lists a location, then reads files of that listing into sinks. Everything around it belongs to others: what
is fetched at all and what is there already (`cache`), names on disk (`tree`), temporary files, retries, clean-up after
failure and cancellation. So a provider may simply stop, by an error or when cancelled. A new store is one module with
one class, registered under its schemes.

An identity is what saves the download. It may be given only where equal identities mean equal bytes:

- within a scope that one store answers for, as `in_scope("s3 https://endpoint", etag, size)`: a store of somebody's own
  could otherwise name its file like one in another;
- or by a digest, `by_sha256`, `by_md5`, which is then also in the file's `sha256` or `md5`, so that the bytes are
  checked against it. An ETag that merely looks like an MD5 is none (encrypted objects of S3): scope it.

None where neither is known: the file is then fetched each time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from puller.sink import Sink
from puller.source import Location


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a store."""

    path: str  # below the location, elements separated by "/"; "" where the location is the file itself
    key: str = ""  # what the provider needs to fetch it
    size: int | None = None  # bytes, as announced
    identity: str | None = None  # equal ones mean equal bytes
    validator: str = ""  # for the provider: which version was listed, as for If-Match
    sha256: str = ""  # hex; what arrives is checked against it
    md5: str = ""  # hex; likewise
    content: bytes | None = None  # of a small one, where listing it was as cheap as reading it: not read then


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Listing:
    """What is at a location."""

    files: tuple[RemoteFile, ...]
    is_file: bool  # the location is one file, `files` holds it alone; else a tree
    folders: tuple[str, ...] = ()  # of a tree, those to be made even if they stay empty
    release: Callable[[], None] = _nothing  # gives back what the listing holds for reads that will not come


class Provider(Protocol):
    """A kind of store. Both calls may run many times at once, and raise PullError."""

    async def listing(self, location: Location) -> Listing:
        """Everything at the location, however many files: never empty (NOT_FOUND, EMPTY)."""

    async def read(self, location: Location, file: RemoteFile, sink: Sink) -> None:
        """Writes a listed file to the sink, and never another version of it (CHANGED).

        Connections are taken from `sink.limits`, bytes noted with `sink.pace`. Of a sink that holds bytes already, from
        an attempt that broke off, only what is missing may be read, if it is certainly the same version; else
        `sink.restart`. Cancelled, it stops soon."""

    async def close(self) -> None:
        """Gives back connections and threads."""


def by_sha256(digest: str) -> str:
    """The identity of a file with that digest, wherever it is."""
    return f"sha256 {digest.lower()}"


def by_md5(digest: str, size: int) -> str:
    """The identity of a file with that digest and size, wherever it is."""
    return f"md5 {digest.lower()} {size}"


def in_scope(scope: str, tag: str, size: int | None) -> str:
    """The identity of a file that a store calls `tag`: an ETag, a generation. The scope says where that holds."""
    return f"{scope} {size} {tag}"
