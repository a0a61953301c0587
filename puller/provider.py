"""The seam: the duties of a kind of store that models are pulled from.

A provider lists a location, then reads files of that listing into sinks. Everything around it belongs to others: which
files are fetched and which are on disk already (`cache`), names on disk (`tree`), temporary files, retries, clean-up
after failure and cancellation. So a provider may simply stop, by an error or when cancelled. A new store is one module
with one class, registered under its schemes.

A store's name for a version of a file (an ETag, a generation, a time, a digest) proves nothing: some stores give every
object the same ETag, and some servers name somebody else's file in a header. It is a hint, and saves a download in two
ways only:

- The same version of the same file, asked for with the same credentials: its `identity`, made by `version`. It counts
  if the file is `settled`, so that a later change changes the hint, or if what arrives has the digest in `proof`.
- The same content from the same store, for the same credentials: where a digest is named (by the store in `sha256`, or
  by the registration), bytes that this `Listing.store` was seen to deliver and whose digest was computed here are used
  (`delivered`). A store is what one owner answers for: an endpoint and a bucket, an origin, a hub.

So no caller is given bytes that the store, with these credentials, has not delivered. If neither applies the file is
fetched each time; equal files are kept once all the same (`cache`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from puller.sink import Sink
from puller.source import Location


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a store."""

    path: str  # below the location, elements separated by "/"; "" if the location is the file itself
    key: str = ""  # what the provider needs to fetch it
    size: int | None = None  # bytes, as announced
    identity: str | None = None  # of this version of this file; see `version`
    settled: bool = True  # a later change of the file would change the identity
    proof: str = ""  # "md5 <hex>" or "git <hex>": bytes of that digest are of this version for certain
    validator: str = ""  # for the provider: which version was listed, as for If-Match
    sha256: str = ""  # hex; what arrives is checked against it
    md5: str = ""  # hex; likewise
    content: bytes | None = None  # of a small file, if listing it was as cheap as reading it: `read` is skipped then


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Listing:
    """The content of a location."""

    files: tuple[RemoteFile, ...]
    is_file: bool  # the location is one file, `files` holds it alone; else a tree
    folders: tuple[str, ...] = ()  # of a tree, those to be made even if they stay empty
    skipped: tuple[str, ...] = ()  # entries that cannot be listed, each with the reason
    store: str = ""  # the deliverer and the receiver of the files; "": nothing is shared between them
    release: Callable[[], None] = _nothing  # frees resources held for reads that will not come


class Provider(Protocol):
    """A kind of store. Both calls may run many times at once, and raise PullError."""

    async def listing(self, location: Location) -> Listing:
        """Lists everything at the location, however many files: never empty (NOT_FOUND, EMPTY)."""

    async def read(self, location: Location, file: RemoteFile, sink: Sink) -> None:
        """Writes a listed file to the sink, and never another version of it (CHANGED).

        Connections are taken from `sink.limits`, bytes noted with `sink.pace`. If the sink holds bytes already, from an
        attempt that broke off, only the missing ones may be read, if it is certainly the same version; else
        `sink.restart`. If cancelled, it stops soon."""

    async def close(self) -> None:
        """Gives back connections and threads."""


def version(store: str, place: str, tag: str, size: int | None) -> str:
    """Returns the identity of a file: of the version that `store` (as `Listing.store`) calls `tag`, at that place."""
    return "\0".join(("version", store, place, str(size), tag))


def delivered(store: str, sha256: str) -> str:
    """Returns the identity of bytes with that digest, computed here, that `Listing.store` delivered."""
    return "\0".join(("delivered", store, sha256.lower()))
