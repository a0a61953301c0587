"""The package's entry point: it turns a registration's path and key into a folder on the pod's disk.

The store is asked each time, even if everything is on disk, so that a changed object is noticed, and a caller who may
no longer read the object gets no copy of it. `pulling` is one pull.

The caller names the folder (`into`), runs only one pull into a name at a time, and removes the folder when it is no
longer needed. `remembers` then tells whether all of the folder's files are still on disk, so that the model can be
loaded again cheaply.
"""

import asyncio
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from puller import retry
from puller import source as sources
from puller.cache import Blob, Cache, CacheStatistics, DiskReservation
from puller.credentials import Secrets
from puller.disk import Disk, folder_name, write_error
from puller.errors import PullError, PullErrorKind
from puller.flights import Flights
from puller.http import HttpProvider
from puller.http_client import HttpPolicy
from puller.huggingface import HuggingFaceProvider
from puller.limits import LimitsStatistics, PullLimits
from puller.local import LocalProvider
from puller.objects import ObjectProvider
from puller.progress import Progress
from puller.provider import Provider
from puller.pulling import DERIVED, Pulling, Tools, derived_identity
from puller.shares import Shares
from puller.source import Location, Source
from puller.threads import Threads

log = logging.getLogger(__name__)

MAX_BYTES = 64 * 2**30
"""Default limit of one pull, in bytes: larger than any model that a pod can hold, and small enough to stop an endless
body."""

_TURNS = {"total": 16, "each": 12, "least": 4, "most": 64}  # concurrent pulls, from all stores and from one
_REMOVE_WAIT = 10.0  # seconds
_SECURE_WAIT = 5.0  # seconds for the end of pulls when the puller closes
_THREADS = 4
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


@dataclass(frozen=True, slots=True)
class Pulled:
    """A finished pull."""

    path: Path  # the model's file or folder
    bytes: int  # of the model, on disk; its schema is not counted
    source: str  # its origin, for people: without credentials
    key: str  # the modelKey for the model server: local schema path and size, no store
    schema: Path | None = None
    digest: str = ""  # of model and schema, computed from the bytes, in hex (`pulling`)
    skipped: tuple[str, ...] = ()  # entries that were left out, with the reasons
    derived: Path | None = None  # the file that `keep` was given for these files under the requested tag
    number: int = 0  # of the pull, in this process
    fetched_bytes: int = 0  # fetched from the store for it, including its schema; the rest was on disk
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class PullerStatistics:
    """The current work of a puller, and counts since it was made."""

    in_progress: int
    pulls: int  # finished successfully
    failures: int
    cancelled: int
    bytes: int  # of models pulled, whether fetched or on disk already
    fetched_files: int
    fetched_bytes: int
    retries: int  # attempts after the first one
    leftovers: int  # folders and files that could not be removed
    cache: CacheStatistics
    limits: LimitsStatistics
    progress: Mapping[str, Progress]  # of pulls under way, by `into`


class Puller:
    """Pulls of models into one pod's directory. Must be used from one event loop."""

    def __init__(
        self,
        *,
        directory: Path,
        file_roots: Sequence[Path] = (),
        volumes: Path | None = None,
        secrets: Path | None = None,
        http: HttpPolicy | None = None,
        providers: Mapping[str, Provider] | None = None,
        budget_bytes: int | None = None,
        limits: PullLimits | None = None,
        retries: retry.RetryPolicy | None = None,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        """Makes a puller. `file_roots` are the folders that `file:` paths may lie in, `volumes` a folder with a
        subfolder for each `pvc:` name, and `secrets` the mounted storage secret. `providers` are further ones by
        scheme, which take precedence over the built-in ones.

        `budget_bytes` bounds all files on disk. Without it, unused files stay while the disk has room (`cache`).
        """
        self._disk = Disk(directory)
        self._limits = limits or PullLimits()
        retries = retries or retry.RetryPolicy()
        self._secrets = Secrets(secrets)
        self._volumes = volumes
        policy = http or HttpPolicy()
        over_http, objects = HttpProvider(policy, self._limits), ObjectProvider(policy, self._limits)
        self._providers: dict[str, Provider] = {
            "file": LocalProvider(file_roots, volumes=volumes),
            "http": over_http,
            "https": over_http,
            "s3": objects,
            "gs": objects,
            "azure": objects,
            "hf": HuggingFaceProvider(policy, self._limits),
            **(providers or {}),
        }
        self._max_bytes = max_bytes
        self._cache = Cache(self._disk, budget_bytes=budget_bytes, on_change=self._changed)
        self._threads = Threads(_THREADS, "puller-disk")
        # Only one thread: each fsync of many small files is quick after the first, and loads need the disk too.
        self._securer = Threads(1, "puller-secure")
        self._flights = Flights(
            disk=self._disk,
            cache=self._cache,
            limits=self._limits,
            policy=retries,
            threads=self._threads,
            secure=self._secure,
            check=self._check_size,
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listener: Callable[[str, bool], None] | None = None
        self._tools = Tools(
            disk=self._disk,
            cache=self._cache,
            flights=self._flights,
            threads=self._threads,
            policy=retries,
            provider=self._provider,
            check=self._check_size,
            on_retry=self._retrying,
            on_leftover=self._left,
        )
        self._turns = Shares(**_TURNS)
        self._pulls_now: dict[str, Pulling] = {}
        self._latest: dict[str, int] = {}  # the pull that made each folder
        self._number = 0
        self._securing: set[asyncio.Future[None]] = set()
        self._pulls = self._failures = self._cancelled = self._bytes = self._leftovers = self._retries = 0

    @property
    def directory(self) -> Path:
        """The directory of pulled models; the model server needs to read it."""
        return self._disk.directory

    @property
    def secrets(self) -> str:
        """The current version of the storage secret; see `Secrets.version`."""
        return self._secrets.version

    def sweep(self) -> None:
        """Removes what an earlier process left, except complete files, which are used again.

        Blocks. Raises ValueError if the directory holds something else, is in use or cannot be locked, and OSError if
        it cannot be read or written.
        """
        self._disk.sweep()
        self._cache.load()

    def listen(self, listener: Callable[[str, bool], None]) -> None:
        """Registers a listener, which is called on the event loop with each `into` that becomes remembered or
        forgotten."""
        self._loop = asyncio.get_running_loop()
        self._listener = listener

    def remembered(self) -> list[str]:
        """Returns the names that are remembered, least recently used first."""
        return self._cache.remembered()

    def remembers(self, into: str) -> bool:
        """Returns whether all files of the model last pulled into that name are on disk, whether its folder exists or
        not."""
        return self._cache.remembers(into)

    def short(self, needs: int) -> int:
        """Returns how many bytes of models in use must be evicted from the disk to make room for `needs` bytes. Bytes
        that other pulls have reserved at this moment are not free."""
        return self._cache.short(needs)

    def progress(self, into: str) -> Progress | None:
        """Returns the progress of the pull into that name, or None if there is no pull."""
        pull = self._pulls_now.get(into)
        return pull.progress() if pull is not None else None

    async def pull(self, source: Source, *, into: str, tag: str = "") -> Pulled:
        """Fetches a registered model into the folder `into`. Raises PullError. If the pull fails or is cancelled, it
        leaves no folder behind; complete files stay in the cache.

        `tag` asks for the file that was made of the same files and kept under that tag (`keep`)."""
        request = sources.resolve(source, secrets=self._secrets, claims=self._volumes)
        if source.sha256 and not _SHA256.fullmatch(source.sha256):
            text = f"sha256 is 64 hexadecimal digits, not {source.sha256[:100]!r}; see what `sha256sum` prints"
            raise PullError(PullErrorKind.BAD_REQUEST, text)
        names = {request.model: folder_name(request.model.name) if request.model.name else "_model"}
        if request.schema is not None:
            name = folder_name(request.schema.name) if request.schema.name else "_schema.json"
            if name == names[request.model]:
                # With a leading dot if need be: no other name begins with one (`folder_name`).
                name = "_schema.json" if name != "_schema.json" else ".schema.json"
            names[request.schema] = name
        for location in names:
            self._provider(location)
        pull = self._pulls_now[into] = Pulling(self._tools, names, into=into, sha256=source.sha256.lower(), tag=tag)
        # Local files never wait for remote ones; `local` decides which local files wait for others.
        turn = self._turns.turn(request.model.store) if request.model.scheme != "file" else nullcontext()
        try:
            async with turn:
                folder = await pull.run()
        except PullError:
            self._failures += 1
            raise
        except asyncio.CancelledError:
            self._cancelled += 1
            raise
        except OSError as error:  # from the pod's own directory
            self._failures += 1
            log.warning("the pod's disk cannot be used: %s", error)
            text = f"the pod's disk cannot be used: {error.strerror or 'unknown error'}; check the disk"
            raise write_error(error) or PullError(PullErrorKind.DISK_FULL, text) from error
        finally:
            if self._pulls_now.get(into) is pull:
                del self._pulls_now[into]
        self._number += 1
        number = self._latest[into] = self._number
        if self._cache.crowded():
            await self._threads.run(self._cache.trim)
        self._pulls += 1
        self._bytes += pull.sizes[request.model]
        schema = folder / names[request.schema] if request.schema is not None else None
        return Pulled(
            path=folder / names[request.model],
            bytes=pull.sizes[request.model],
            source=request.model.shown,
            key=sources.rewritten_key(
                request.key, disk_bytes=pull.sizes[request.model], schema=str(schema) if schema is not None else None
            ),
            schema=schema,
            digest=pull.digest,
            skipped=pull.skipped,
            derived=folder / DERIVED if pull.derived else None,
            number=number,
            fetched_bytes=pull.fetched,
            seconds=time.monotonic() - pull.began,
        )

    def current(self, into: str, pulled: Pulled) -> bool:
        """Returns whether the folder of that name is still the result of this pull."""
        return self._latest.get(into) == pulled.number

    async def keep(self, into: str, pulled: Pulled, tag: str, path: Path) -> bool:
        """Takes over a file that was made of a pull's files. Pulls of equal files with that tag get it, for as long as
        the cache has room. Returns False if those files were removed or changed meanwhile, or if the disk has no room;
        the file then still belongs to the caller.

        The file must lie on the same file system as the cache.
        """
        if not self.current(into, pulled):
            return False
        identity = derived_identity(tag, pulled.digest)
        try:
            size = os.stat(path).st_size
            room = await self._threads.run(self._cache.room, size, undo=DiskReservation.close)
        except (PullError, OSError):
            return False
        try:
            if (blob := self._cache.look_up([identity])) is None:
                target = self._disk.new()
                os.rename(path, target)
                try:
                    blob = await self._threads.run(
                        self._adopt, target, identity, undo=lambda blob: self._cache.drop([blob])
                    )
                except OSError:
                    os.rename(target, path)
                    raise
                room.close()  # its bytes are now counted as a blob
                self._secure(blob)
            self._cache.drop([blob])
        except OSError:
            return False
        finally:
            room.close()
        return True

    def _adopt(self, path: Path, identity: str) -> Blob:
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return self._cache.add(path, sha256=sha256, identities=[identity])

    async def made(self, into: str, size: int) -> None:
        """Counts files of `size` bytes that another program has made of the files in that folder against the budget,
        until the folder is removed. Removes unused files if the budget is then exceeded."""
        self._cache.made(into, size)
        if self._cache.crowded():
            await self._threads.run(self._cache.trim)

    async def remove(self, into: str) -> None:
        """Removes the folder of that name, if it exists. The model server must no longer need the files there.

        The files stay in the cache for as long as there is room. Waits for up to ten seconds; the removal then
        continues by itself. Raises OSError if the folder cannot be removed.
        """
        # Done at once, so that a late removal does not hit a later pull into the same name.
        self._latest.pop(into, None)
        withdrawn = self._disk.withdraw(into)
        self._cache.leave(into)
        # In a thread, because unlinking may take a second. Continues if the caller is cancelled.
        work = self._threads.begin(self._remove_folder, withdrawn)
        await asyncio.wait([work], timeout=_REMOVE_WAIT)
        if work.done() and not work.cancelled():
            work.result()

    async def close(self) -> None:
        """Closes connections and releases the directory. No pull may be in progress."""
        for provider in dict.fromkeys(self._providers.values()):
            await provider.close()
        if self._securing:
            await asyncio.wait(self._securing, timeout=_SECURE_WAIT)
        self._threads.close()
        self._securer.close(drop=True)
        self._disk.close()

    def statistics(self) -> PullerStatistics:
        """Returns the current statistics."""
        cache = self._cache.statistics()
        return PullerStatistics(
            in_progress=len(self._pulls_now),
            pulls=self._pulls,
            failures=self._failures,
            cancelled=self._cancelled,
            bytes=self._bytes,
            fetched_files=self._flights.finished,
            fetched_bytes=self._flights.bytes,
            retries=self._retries + self._flights.retries,
            leftovers=self._leftovers + cache.leftovers,
            cache=cache,
            limits=self._limits.statistics(),
            progress={into: pull.progress() for into, pull in self._pulls_now.items()},
        )

    def _check_size(self, size: int) -> None:
        if size > self._max_bytes:
            text = f"the model has at least {size} bytes, but the limit is {self._max_bytes}; register a smaller model"
            raise PullError(PullErrorKind.TOO_LARGE, text)

    def _provider(self, location: Location) -> Provider:
        provider = self._providers.get(location.scheme)
        if provider is None:
            known = ", ".join(f"{scheme}:" for scheme in self._providers)
            text = f"this version does not support the store of {location.shown}; it supports {known}"
            raise PullError(PullErrorKind.BAD_REQUEST, text)
        return provider

    def _retrying(self, error: PullError) -> None:
        self._retries += 1

    def _left(self) -> None:
        self._leftovers += 1

    def _secure(self, blob: Blob) -> None:
        work = self._securer.begin(self._cache.secure, blob)
        self._securing.add(work)
        work.add_done_callback(self._secured)

    def _secured(self, work: "asyncio.Future[None]") -> None:
        self._securing.discard(work)
        if not work.cancelled() and work.exception() is not None:
            self._leftovers += 1  # it stays usable, and is fetched again after a restart

    def _remove_folder(self, withdrawn: Path | None) -> None:
        try:
            if withdrawn is not None:
                self._disk.remove(withdrawn)
        finally:
            self._cache.trim()

    def _changed(self, into: str, remembered: bool) -> None:
        if self._listener is not None and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._listener, into, remembered)
