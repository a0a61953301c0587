"""Downloads of files. All pulls that want the same file share one download.

A flight begins with the first pull that does not find a file in the cache, and other pulls that need the same file join
it. It retries passing failures (`retry`), and continues where it broke off. It is cancelled with the last pull that
waits for it. When it fails, pulls that joined from another location must try their own location, because the first
pull's credentials may have caused the failure.
"""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from puller import retry
from puller.cache import Blob, Cache, DiskReservation
from puller.disk import Disk, write_error
from puller.errors import PullError, PullErrorKind
from puller.limits import PullLimits
from puller.progress import PullMeter
from puller.provider import Provider, RemoteFile, delivered
from puller.sink import Sink, Stopped
from puller.source import Location
from puller.threads import Threads

log = logging.getLogger(__name__)

_SMALL = 2**20  # maximum bytes that are digested on the event loop, in a millisecond
_LARGE = 64 * 2**20  # bytes; unlinking larger files takes longer than the event loop should wait


class FileFlight:
    """A file that is being fetched."""

    __slots__ = ("left", "location", "meter", "name", "size", "task", "waiting")

    def __init__(self, name: str | None, location: Location, size: int | None) -> None:
        self.name = name  # None: no other pull can join
        self.location = location
        self.size = size  # bytes, as announced
        self.meter = PullMeter()
        self.waiting = 0
        self.left = False
        self.task: asyncio.Task[Blob] | None = None


class Flights:
    """All downloads of a pod."""

    def __init__(
        self,
        *,
        disk: Disk,
        cache: Cache,
        limits: PullLimits,
        policy: retry.RetryPolicy,
        threads: Threads,
        secure: Callable[[Blob], None],
        check: Callable[[int], None],
    ) -> None:
        """Makes a pod's downloads. Each new blob is passed to `secure`. `check` raises PullError for a file with too
        many bytes."""
        self._disk = disk
        self._cache = cache
        self._limits = limits
        self._policy = policy
        self._threads = threads
        self._secure = secure
        self._check = check
        self._flights: dict[str, FileFlight] = {}
        self.retries = 0  # attempts after the first
        self.finished = 0
        self.bytes = 0  # of finished downloads

    @property
    def count(self) -> int:
        """The number of downloads under way that can be joined."""
        return len(self._flights)

    def find(self, name: str | None) -> FileFlight | None:
        """Returns a flight under way for that file, or None."""
        return self._flights.get(name) if name is not None else None

    def start(
        self,
        provider: Provider,
        location: Location,
        file: RemoteFile,
        *,
        name: str | None,
        store: str,
        room: DiskReservation,
    ) -> FileFlight:
        """Begins a flight. From now on `room` belongs to the flight. `store` is the store of the listing. If `name` is
        None, other pulls cannot join the flight."""
        flight = FileFlight(name, location, file.size)
        if name is not None:
            self._flights[name] = flight
        work = self._fly(flight, provider, file, store, room)
        flight.task = asyncio.get_running_loop().create_task(work, name=f"fetch {location.shown}")
        flight.task.add_done_callback(lambda task: self._landed(flight, room))
        return flight

    async def wait(self, flight: FileFlight) -> Blob:
        """Waits for the file and returns its blob, picked for the caller. Raises PullError.

        If the wait is cancelled and no other pull waits, the flight ends too, and this returns once the flight is
        cleaned up.
        """
        task = flight.task
        assert task is not None
        flight.waiting += 1
        try:
            await asyncio.wait({task})
            if task.cancelled():
                text = f"the pod stopped the pull of {flight.location.shown} before it was complete; try again"
                raise PullError(PullErrorKind.UNREACHABLE, text)
            blob = task.result()
            self._cache.pin(blob)
            return blob
        finally:
            flight.waiting -= 1
            if not flight.waiting and not task.done():
                self._forget(flight)
                task.cancel()
                await asyncio.wait({task})
            self._release(flight)

    def _landed(self, flight: FileFlight, room: DiskReservation) -> None:
        room.close()
        self._forget(flight)
        self._release(flight)

    def _release(self, flight: FileFlight) -> None:
        """Releases the flight's pin on its blob once the last pull has left the flight."""
        task = flight.task
        if task is None or not task.done() or task.cancelled() or task.exception() is not None:
            return
        if not flight.waiting and not flight.left:
            flight.left = True
            self._cache.drop([task.result()])

    def _forget(self, flight: FileFlight) -> None:
        if flight.name is not None and self._flights.get(flight.name) is flight:
            del self._flights[flight.name]

    async def _read(self, provider: Provider, location: Location, file: RemoteFile, sink: Sink) -> int:
        await provider.read(location, file, sink)
        return await self._threads.begin(sink.finish) if sink.behind > _SMALL else sink.finish()

    async def _fly(
        self, flight: FileFlight, provider: Provider, file: RemoteFile, store: str, room: DiskReservation
    ) -> Blob:
        path = self._disk.new()
        seen = 0

        def admit(size: int) -> None:
            nonlocal seen
            self._check(size)
            if file.size is None and size > seen:
                room.grow(size - seen)
            seen = size

        def retrying(error: PullError) -> None:
            self.retries += 1

        shown = flight.location.shown.rstrip("/") + (f"/{file.path}" if file.path else "")
        sink: Sink | None = None
        kept = False
        try:
            sink = Sink(
                path,
                shown=shown,
                limits=self._limits,
                admit=admit,
                arrived=room.arrived,
                meter=flight.meter,
                size=file.size,
                sha256=file.sha256,
                md5=file.md5,
            )
            # Computed for every file: the store's name for it proves nothing, and a second reading would cost more.
            sink.compute("sha256")
            proof, _, expected = file.proof.partition(" ")
            if proof and not file.settled:
                sink.compute(proof)
            if file.content is not None:
                sink.write(file.content, 0)
                await asyncio.sleep(self._limits.take(len(file.content)))
                size = sink.finish()
            else:
                size = await retry.retried(
                    lambda: self._read(provider, flight.location, file, sink),
                    self._policy,
                    progress=lambda: sink.written,
                    on_retry=retrying,
                )
            sha256 = sink.digest("sha256")
            identities = [delivered(store, sha256)] if store else []
            if file.identity is not None and (file.settled or (proof and sink.digest(proof) == expected)):
                identities.append(file.identity)
            blob = self._cache.add(path, sha256=sha256, identities=identities)
            kept = True
            room.close()  # it counts as a blob from now on
            self.finished += 1
            self.bytes += size
            self._secure(blob)
            return blob
        except Stopped:
            text = f"the pod stopped the pull of {shown} before it was complete; try again"
            raise PullError(PullErrorKind.UNREACHABLE, text) from None
        except OSError as error:  # of the pod's own disk
            log.warning("the pod's disk cannot be used: %s", error)
            text = f"the pod's disk cannot be used: {error.strerror or 'unknown error'}; check the disk"
            raise write_error(error) or PullError(PullErrorKind.DISK_FULL, text) from error
        finally:
            if sink is not None:
                sink.close()
                if not kept and sink.written > _LARGE:
                    await self._threads.begin(_unlink, path)
                elif not kept:
                    _unlink(path)


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)
