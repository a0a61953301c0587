"""The front of the package: a registration's path and key go in, a folder on the pod's disk comes out.

A pull writes into a temporary folder and renames it when all of it is there; failed or cancelled, it leaves nothing.
Who calls decides what a folder is named (`into`), pulls into one name one at a time, and removes it when no longer
needed.
"""

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from puller import source as sources
from puller.disk import Disk, folder_name, write_error
from puller.errors import PullError, PullErrorKind
from puller.http import HttpPolicy, HttpProvider
from puller.local import LocalProvider
from puller.provider import Provider, Target
from puller.source import Location, Source

MAX_BYTES = 64 * 2**30
"""Of one pull, unless told otherwise: larger than any model that a pod holds, small enough to stop an endless body."""

_REMOVE_WAIT = 10.0  # seconds


@dataclass(frozen=True, slots=True)
class Pulled:
    """A finished pull."""

    path: Path  # the model's file or folder
    bytes: int  # of the model, on disk; its schema is not counted
    source: str  # where it came from, for people: without credentials
    key: str  # the modelKey for the model server: local schema path and size, no store
    schema: Path | None = None


@dataclass(frozen=True, slots=True)
class PullerStatistics:
    """What it has done since it was made."""

    in_progress: int
    pulls: int  # finished well
    failures: int
    cancelled: int
    bytes: int
    leftovers: int  # partial folders that could not be removed


class Puller:
    """Pulls models into one pod's directory. Use from one event loop."""

    def __init__(
        self,
        *,
        directory: Path,
        file_roots: Sequence[Path] = (),
        http: HttpPolicy | None = None,
        providers: Mapping[str, Provider] | None = None,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        """`providers` are further ones by scheme, in place of the built-in where they share one."""
        self._disk = Disk(directory)
        over_http = HttpProvider(http or HttpPolicy())
        self._providers: dict[str, Provider] = {
            "file": LocalProvider(file_roots),
            "http": over_http,
            "https": over_http,
            **(providers or {}),
        }
        self._max_bytes = max_bytes
        self._remover = ThreadPoolExecutor(1, thread_name_prefix="puller-remove")
        self._in_progress = self._pulls = self._failures = self._cancelled = self._bytes = self._leftovers = 0

    @property
    def directory(self) -> Path:
        """Where pulled models are; the model server needs to read it."""
        return self._disk.directory

    def sweep(self) -> None:
        """Removes what an earlier process left. Raises ValueError if the directory is somebody else's."""
        self._disk.sweep()

    async def pull(self, source: Source, *, into: str) -> Pulled:
        """Fetches what was registered. Raises PullError; failed or cancelled, it leaves nothing behind."""
        request = sources.resolve(source)
        names = {request.model: folder_name(request.model.name) if request.model.name else "_model"}
        if request.schema is not None:
            name = folder_name(request.schema.name) if request.schema.name else "_schema.json"
            names[request.schema] = "_schema.json" if name == names[request.model] else name
        providers = {location: self._provider(location) for location in names}
        self._in_progress += 1
        partial: Path | None = None
        try:
            partial = self._disk.begin()
            sizes = {
                location: await provider.fetch(location, Target(partial / names[location], self._disk, self._max_bytes))
                for location, provider in providers.items()
            }
            folder = self._disk.commit(partial, into)
            partial = None
        except PullError:
            self._failures += 1
            raise
        except asyncio.CancelledError:
            self._cancelled += 1
            raise
        except OSError as error:  # from the pod's own directory
            self._failures += 1
            text = f"the pod's disk cannot be used: {error}"
            raise write_error(error) or PullError(PullErrorKind.DISK_FULL, text) from error
        finally:
            self._in_progress -= 1
            if partial is not None:
                try:
                    await self._remove(partial)
                except OSError:  # the error of the pull itself matters more; the next start sweeps
                    self._leftovers += 1
        self._pulls += 1
        self._bytes += sizes[request.model]
        schema = folder / names[request.schema] if request.schema is not None else None
        return Pulled(
            path=folder / names[request.model],
            bytes=sizes[request.model],
            source=request.model.shown,
            key=sources.rewritten_key(
                request.key, disk_bytes=sizes[request.model], schema=str(schema) if schema is not None else None
            ),
            schema=schema,
        )

    async def remove(self, into: str) -> None:
        """Removes what was pulled into that name; nothing there is fine. Its files must no longer be needed."""
        await self._remove(self._disk.path(into))

    async def close(self) -> None:
        """Closes connections and lets go of the directory; pulls should have been cancelled before."""
        for provider in dict.fromkeys(self._providers.values()):
            await provider.close()
        self._remover.shutdown(wait=False)
        self._disk.close()

    def statistics(self) -> PullerStatistics:
        """Counts since it was made."""
        return PullerStatistics(
            self._in_progress, self._pulls, self._failures, self._cancelled, self._bytes, self._leftovers
        )

    def _provider(self, location: Location) -> Provider:
        provider = self._providers.get(location.scheme)
        if provider is None:
            known = ", ".join(f"{scheme}:" for scheme in self._providers)
            text = f"store not supported by this version: {location.shown} ({known} are)"
            raise PullError(PullErrorKind.BAD_REQUEST, text)
        return provider

    async def _remove(self, path: Path) -> None:
        # In a thread: unlinking gigabytes takes a file system a second. Goes on when the caller is cancelled.
        work = asyncio.get_running_loop().run_in_executor(self._remover, self._disk.remove, path)
        await asyncio.wait([work], timeout=_REMOVE_WAIT)
        if work.done() and not work.cancelled():
            work.result()
