"""One pull under way.

It lists the model, takes files that are already on disk from the cache, fetches the rest, several files at a time, and
assembles the folder under a temporary name. If it fails or is cancelled, it leaves nothing but complete files in the
cache.
"""

import asyncio
import hashlib
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from puller import retry, tree
from puller.cache import Blob, Cache, DiskReservation
from puller.disk import FOLDER_MODE, Disk
from puller.errors import PullError, PullErrorKind
from puller.flights import FileFlight, Flights
from puller.progress import Progress
from puller.provider import Listing, Provider, RemoteFile, delivered
from puller.source import Location
from puller.threads import Threads

log = logging.getLogger(__name__)

DERIVED = ".derived"
"""Name, in a model's folder, of the file that was made from the model's files. No file of a model has a name that
begins with a dot (`folder_name`)."""

_CHANGES = 3  # times that a model is listed again because one of its files changed meanwhile
_FILES = 32  # concurrent fetches of one pull


@dataclass(frozen=True, slots=True)
class Tools:
    """The objects that all pulls of a pod share."""

    disk: Disk
    cache: Cache
    flights: Flights
    threads: Threads
    policy: retry.RetryPolicy
    provider: Callable[[Location], Provider]  # raises PullError
    check: Callable[[int], None]  # raises PullError if a model of so many bytes is too large
    on_retry: Callable[[PullError], None]
    on_leftover: Callable[[], None]  # a temporary folder could not be removed


class Pulling:
    """One pull: the files that it has, and those that it waits for."""

    def __init__(
        self, tools: Tools, names: Mapping[Location, str], *, into: str, sha256: str = "", tag: str = ""
    ) -> None:
        """Makes a pull. `names` maps its locations, the model's first, to their names in the folder. `sha256` is the
        registered digest of the model."""
        self.began = time.monotonic()
        self.sizes: dict[Location, int] = {}  # bytes
        self.fetched = 0  # bytes
        self.digest = ""  # of the files, computed here: the SHA-256 of a file, or `tree_digest`
        self.skipped: tuple[str, ...] = ()  # entries that were left out, with the reasons
        self.derived = False  # whether the file made from them under the tag is in the folder
        self._tools = tools
        self._names = names
        self._into = into
        self._sha256 = sha256
        self._tag = tag
        self._total: int | None = 0  # bytes; None: a store has not named them
        self._here = 0  # bytes
        self._blobs: list[Blob] = []  # picked
        self._flights: set[FileFlight] = set()

    def progress(self) -> Progress:
        """Returns the current progress."""
        return Progress(
            self._here + sum(min(flight.meter.bytes, flight.size or 2**63) for flight in self._flights),
            self._total,
            sum(flight.meter.rate() for flight in self._flights),
            time.monotonic() - self.began,
        )

    async def run(self) -> Path:
        """Pulls the model and returns its folder; the fields of this object then describe the content. Raises
        PullError, and OSError if the disk fails."""
        for attempt in itertools.count(1):
            try:
                return await self._once()
            except PullError as error:
                # Other files stay in the cache: only changed ones are fetched again.
                if error.kind is not PullErrorKind.CHANGED or attempt >= _CHANGES:
                    raise
                self._tools.on_retry(error)
            except FileNotFoundError:
                # Files of the cache were removed from outside; in the second round they are fetched.
                if attempt >= _CHANGES:
                    raise
            finally:
                self._tools.cache.drop(self._blobs)
                self._blobs = []
        raise AssertionError

    async def _once(self) -> Path:
        self._total, self._here = 0, 0
        self.derived = False
        self.sizes = {}
        self.skipped = ()
        placed: list[tuple[PurePosixPath, Blob]] = []
        folders: list[PurePosixPath] = []
        digests: list[str] = []
        for location, name in self._names.items():
            wanted = self._sha256 if not self.sizes else ""  # the location is the model's, the first one
            files, below = await self._fetch(location, name, wanted)
            self.sizes[location] = sum(blob.size for _, blob in files)
            digests.append(_digest(files, PurePosixPath(name)))
            placed += files
            folders += below
        sizes = list(self.sizes.values())
        schema = [("schema", sizes[-1], digests[-1])] if len(digests) > 1 else []
        self.digest = tree_digest([("model", sizes[0], digests[0]), *schema]) if schema else digests[0]
        if self._tag:
            derived = await self._pick([derived_identity(self._tag, self.digest)], None)
            if derived is not None:
                placed.append((PurePosixPath(DERIVED), derived))
                self.derived = True
        partial: Path | None = self._tools.disk.begin()
        assert partial is not None
        try:
            if len(placed) > _FILES or not self._tools.cache.links:
                await self._tools.threads.run(self._put_together, partial, placed, folders)
            else:
                self._put_together(partial, placed, folders)
            folder = self._tools.disk.commit(partial, self._into)
            partial = None
        finally:
            if partial is not None:
                try:
                    await self._tools.threads.run(self._tools.disk.remove, partial)
                except OSError:  # the error of the pull itself matters more; the next start sweeps the folder
                    self._tools.on_leftover()
        self._tools.cache.use(self._into, [blob for _, blob in placed])
        return folder

    def _put_together(
        self, partial: Path, placed: list[tuple[PurePosixPath, Blob]], folders: list[PurePosixPath]
    ) -> None:
        for folder in folders:
            (partial / folder).mkdir(FOLDER_MODE)
        for path, blob in placed:
            try:
                self._tools.cache.link(blob, partial / path)
            except FileNotFoundError:
                self._tools.cache.lost(blob)
                raise

    async def _fetch(
        self, location: Location, name: str, sha256: str
    ) -> tuple[list[tuple[PurePosixPath, Blob]], list[PurePosixPath]]:
        """Returns the files of one location, picked, with their paths in the model's folder. Also returns the folders
        that they need."""
        provider = self._tools.provider(location)
        listing = await retry.retried(
            lambda: provider.listing(location), self._tools.policy, on_retry=self._tools.on_retry
        )
        try:
            listing, paths, folders = self._laid_out(listing, location, PurePosixPath(name))
            if sha256 and not listing.is_file:
                text = (
                    f"{location.shown} is a folder of {len(paths)} files, but a sha256 is for one file: "
                    "register the file itself, or without sha256"
                )
                raise PullError(PullErrorKind.BAD_REQUEST, text)
            blobs = await self._get(provider, location, listing, sha256)
            if sha256:
                _verify(blobs[0], sha256, location)
        finally:
            listing.release()
        return list(zip(paths, blobs, strict=True)), folders

    async def _get(self, provider: Provider, location: Location, listing: Listing, sha256: str) -> list[Blob]:
        """Returns the listed files, in order, from the cache or the store."""
        files = listing.files
        blobs: list[Blob | None] = []
        for file in files:
            identities = [file.identity] if file.identity is not None else []
            if listing.store and (named := sha256 or file.sha256):
                identities.append(delivered(listing.store, named))
            blobs.append(await self._pick(identities, file.size, sha256=sha256))
        sizes = [blob.size if blob is not None else file.size for blob, file in zip(blobs, files, strict=True)]
        known = sum(size for size in sizes if size is not None)
        self._tools.check(known)
        self._total = None if None in sizes or self._total is None else self._total + known
        here = [blob for blob in blobs if blob is not None]
        self._here += sum(blob.size for blob in here)
        if here:
            self._tools.threads.begin(self._tools.cache.warm, here)
        missing = [index for index, blob in enumerate(blobs) if blob is None]
        if not missing:
            return here
        # Files that are equal, or already being fetched, need no further room.
        needed = {
            _flight_name(files[index]) or str(index): files[index].size or 0
            for index in missing
            if self._tools.flights.find(_flight_name(files[index])) is None
        }
        need = sum(needed.values())
        if self._tools.cache.crowded(need):
            room = await self._tools.threads.run(self._tools.cache.room, need, undo=DiskReservation.close)
        else:
            room = self._tools.cache.room(need)
        queue = iter(missing)

        async def work() -> None:
            for index in queue:
                # Taken one at a time and noted at once, so that a failure of another leaves no pick behind.
                blobs[index] = blob = await self._bring(provider, location, listing, files[index], room, sha256)
                self._here += blob.size

        try:
            if len(missing) == 1:
                await work()
            else:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(_FILES, len(missing))):
                        group.create_task(work())
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            room.close()
        return [blob for blob in blobs if blob is not None]

    def _laid_out(
        self, listing: Listing, location: Location, name: PurePosixPath
    ) -> tuple[Listing, list[PurePosixPath], list[PurePosixPath]]:
        """Returns the files that can be part of a model, their paths in the model's folder, and the folders that they
        need."""
        if listing.is_file:
            return listing, [name], []
        layout = tree.lay_out([file.path for file in listing.files], listing.folders, location.shown)
        skipped = (*listing.skipped, *layout.skipped)
        if skipped:
            log.warning("skipped in %r: %s", location.shown, tree.told(skipped))
            self.skipped += skipped
        kept = replace(listing, files=tuple(listing.files[number] for number, _ in layout.files))
        paths = [name / path for _, path in layout.files]
        return kept, paths, [name, *(name / folder for folder in layout.folders)]

    async def _pick(self, identities: list[str], size: int | None, *, sha256: str = "") -> Blob | None:
        """Returns the blob that the cache has under one of these names, if its bytes are unchanged, or None. `sha256`
        is the registered digest."""
        cache = self._tools.cache
        blob = cache.pick(identities, size=size)
        if blob is None:
            return None
        self._blobs.append(blob)
        # A file with a registered digest is read each time, any other only once after the start.
        if (sha256 or not blob.read) and not await self._tools.threads.run(cache.sound, blob):
            return None
        return blob if sha256 in ("", blob.sha256) else None

    async def _bring(
        self,
        provider: Provider,
        location: Location,
        listing: Listing,
        file: RemoteFile,
        room: DiskReservation,
        sha256: str,
    ) -> Blob:
        """Fetches a file, by a flight that this pull begins or that another one has begun."""
        name = _flight_name(file)
        while True:
            flight = self._tools.flights.find(name)
            own = flight is None
            if flight is None:
                known = [file.identity] if file.identity is not None else []
                blob = self._tools.cache.look_up(known, size=file.size)
                if blob is not None:  # the file has arrived since the last look
                    self._blobs.append(blob)
                    if blob.read:
                        return blob
                part = room.split(file.size or 0)
                flight = self._tools.flights.start(provider, location, file, name=name, store=listing.store, room=part)
            elif len(listing.files) == 1:
                listing.release()  # no connection needs to be kept for a file that another pull fetches
            self._flights.add(flight)
            try:
                blob = await self._tools.flights.wait(flight)
            except PullError:
                if own or _alike(flight.location, location):
                    raise
                continue
            finally:
                self._flights.discard(flight)
            self._blobs.append(blob)
            if own:
                self.fetched += blob.size
            return blob


def _verify(blob: Blob, sha256: str, location: Location) -> None:
    if blob.sha256 != sha256:
        text = (
            f"{location.shown} is not the file that was registered: its sha256 is {blob.sha256}, "
            f"but {sha256} is registered; upload the right file, or register the digest that it has"
        )
        raise PullError(PullErrorKind.CHECKSUM, text)


def _digest(files: list[tuple[PurePosixPath, Blob]], name: PurePosixPath) -> str:
    """Returns the digest of a location's files, which lie at or below `name`."""
    if [path for path, _ in files] == [name]:
        return files[0][1].sha256
    return tree_digest((str(path.relative_to(name)), blob.size, blob.sha256) for path, blob in files)


def tree_digest(files: Iterable[tuple[str, int, str]]) -> str:
    """Returns the digest of a folder, in hex: the SHA-256 of sorted lines, one for each file, with its path below the
    folder, its size and its SHA-256, separated by NUL.

    `files` are (path, bytes, SHA-256 in hex)."""
    lines = sorted(os.fsencode(f"{path}\0{size}\0{sha256}\n") for path, size, sha256 in files)
    return hashlib.sha256(b"".join(lines)).hexdigest()


def derived_identity(tag: str, digest: str) -> str:
    """Returns the cache's name for a derived file: `tag` says how it was made, `digest` from which files."""
    return f"derived {tag} {digest}"


def _alike(one: Location, other: Location) -> bool:
    """Returns whether both locations are the same place with the same credentials, so that a failure of one is also a
    failure of the other."""
    return one == other and one.settings.fingerprint() == other.settings.fingerprint()


def _flight_name(file: RemoteFile) -> str | None:
    # A file that may have changed since another pull listed it is not taken from that pull's download.
    return file.identity if file.settled or file.proof else None
