"""The interface between the puller and a kind of store.

A provider lists a location, then reads files of that listing into sinks. Other modules do everything else: they decide
which files are fetched and which are already on disk (`cache`), choose names on disk (`tree`), and handle temporary
files, retries, and clean-up after failure and cancellation. So a provider may simply stop, by an error or when
cancelled. A new kind of store is one module with one class, registered under its schemes.

A store's name for a version of a file (an ETag, a generation, a time, a digest) proves nothing: some stores give every
object the same ETag, and some servers name another file's digest in a header. It is only a hint, and can save a
download in two ways:

- The same version of the same file was requested before, with the same credentials. `version` makes this `identity`. It
  is relied on if the file is `settled`, which means that a later change would change the hint, or if the bytes that
  arrive have the digest in `proof`.
- The same content came from the same store before, for the same credentials. If a digest is named (by the store in
  `sha256`, or by the registration), bytes with that digest are used that this `Listing.store` has delivered and whose
  digest was computed here (`delivered`). A store is everything under one owner: an endpoint and a bucket, an origin, a
  hub.

So no caller gets bytes that the store has not delivered for these credentials. If neither applies, the file is fetched
each time; equal files are still kept only once (`cache`).
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
    proof: str = ""  # "md5 <hex>" or "git <hex>": bytes with that digest are certainly of this version
    validator: str = ""  # for the provider: which version was listed, as for If-Match
    sha256: str = ""  # hex; the bytes that arrive are checked against it
    md5: str = ""  # hex; likewise
    content: bytes | None = None  # of a small file, if listing it was as cheap as reading it; `read` is then skipped


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Listing:
    """The files and folders at a location."""

    files: tuple[RemoteFile, ...]
    is_file: bool  # the location is one file, the only one in `files`; otherwise it is a tree
    folders: tuple[str, ...] = ()  # of a tree, those to be made even if they stay empty
    skipped: tuple[str, ...] = ()  # entries that cannot be listed, each with the reason
    store: str = ""  # the store and the caller, which may share files; "": nothing is shared
    release: Callable[[], None] = _nothing  # frees resources held for reads that will not happen


class Provider(Protocol):
    """A kind of store. `listing` and `read` may run many times concurrently, and raise PullError."""

    async def listing(self, location: Location) -> Listing:
        """Lists all files at the location. Raises PullError, for example NOT_FOUND or EMPTY if there are none, or
        TOO_LARGE if there are more than a model can have."""

    async def read(self, location: Location, file: RemoteFile, sink: Sink) -> None:
        """Writes a listed file to the sink. Raises PullError(CHANGED) rather than write another version of the file.

        Connections and received bytes count against the pod's `PullLimits`. If the sink already holds bytes from an
        attempt that broke off, only the missing ones may be read, provided that the version is certainly the same;
        otherwise `sink.restart` is called. A cancelled read stops soon.
        """

    async def close(self) -> None:
        """Releases connections and threads."""


def version(store: str, place: str, tag: str, size: int | None) -> str:
    """Returns the identity of a version of the file at that place. `tag` is the version's name in `store`
    (`Listing.store`)."""
    return "\0".join(("version", store, place, str(size), tag))


def delivered(store: str, sha256: str) -> str:
    """Returns the identity of bytes that `Listing.store` has delivered and whose digest, computed here, is `sha256`."""
    return "\0".join(("delivered", store, sha256.lower()))
