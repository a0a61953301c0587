"""A worker's end of the feed, which keeps the readers of its ranges up to date.

After a broken connection, each range continues where it stopped.
"""

import asyncio
import itertools
from collections.abc import Callable, Mapping

from mesh.process.tasks import turned
from mesh.telemetry import logs, metrics
from router.state.feed.messages import MAX_MESSAGE, encode, receive
from router.state.feed.ranges import Range, Reader
from router.state.feed.reading import Reading
from router.state.feed.server import ASK

log = logs.get(__name__)

_PAUSE = 0.1  # seconds before a worker connects again

_SILENCE = 15.0  # seconds; the pod sends a beat once a second


class FeedClient:
    """A worker's end of the feed. Keeps `readers` up to date with their ranges.

    `path` is the pod's unix socket, and `name` the worker's name. `ready` returns the reason why the worker is not
    ready, or None if it is. `snapshot` returns the worker's metrics. `on_drain` is called when the router begins to
    stop."""

    def __init__(
        self,
        path: str,
        name: str,
        readers: Mapping[Range, Reader],
        *,
        ready: Callable[[], str | None],
        snapshot: Callable[[], metrics.Snapshot],
        on_drain: Callable[[], None],
    ) -> None:
        self._path = path
        self._name = name
        self._ranges = {range.name: Reading(reader) for range, reader in readers.items()}
        self._ready = ready
        self._snapshot = snapshot
        self._on_drain = on_drain
        self._writer: asyncio.StreamWriter | None = None
        self._said: str | None = "?"
        self._numbers = itertools.count(1)
        self._asked: dict[int, asyncio.Future[metrics.Snapshot]] = {}
        self._seen = asyncio.Event()

    @property
    def seen(self) -> bool:
        """True once every range has been received."""
        return self._seen.is_set()

    async def first(self, timeout: float) -> bool:
        """Waits until every range has been received. Returns False if that takes more than `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self._seen.wait()
        except TimeoutError:
            return False
        return True

    def tell(self) -> None:
        """Tells the pod whether this worker is ready, if that has changed."""
        reason = self._ready()
        if reason != self._said and self._writer is not None:
            self._said = reason
            self._writer.write(encode(["ready", reason]))

    async def merged(self) -> metrics.Snapshot:
        """Returns the metrics of all workers of this router pod, or only this worker's if the pod does not answer."""
        number = next(self._numbers)
        future: asyncio.Future[metrics.Snapshot] = asyncio.get_running_loop().create_future()
        if self._writer is None:
            return self._snapshot()
        self._asked[number] = future
        self._writer.write(encode(["stats", number]))
        try:
            async with asyncio.timeout(2 * ASK):
                return await future
        except TimeoutError:
            return self._snapshot()
        finally:
            self._asked.pop(number, None)

    async def run(self) -> None:
        """Connects, and connects again whenever the connection ends, until it is cancelled."""
        while True:
            turned()
            try:
                reader, self._writer = await asyncio.open_unix_connection(self._path, limit=MAX_MESSAGE)
                self._said = "?"
                reads = {name: reading.connect() for name, reading in self._ranges.items()}
                self._writer.write(encode(["hello", self._name, reads]))
                self.tell()
                await self._follow(reader)
            except (EOFError, OSError, ValueError) as error:
                why = str(error) or f"the pod sent nothing for {_SILENCE:g} s"  # a timeout has no text
                log.warning("the feed of the router pod broke off", why=why)
            finally:
                writer, self._writer = self._writer, None
                if writer is not None:
                    writer.close()
            await asyncio.sleep(_PAUSE)

    async def _follow(self, reader: asyncio.StreamReader) -> None:
        while True:
            turned()
            async with asyncio.timeout(_SILENCE):  # a new connection helps if the pod lives, and does no harm otherwise
                message = await receive(reader)
            match message:
                case [("delta" | "items" | "begin" | "snapshot") as what, str(name), *rest]:
                    reading = self._ranges.get(name)
                    if reading is None:
                        log.warning("the router pod sent a range that this worker does not read", range=name)
                        continue
                    reading.take(what, rest)
                    if not self.seen and all(each.epoch for each in self._ranges.values()):
                        self._seen.set()
                        self.tell()
                case ["ask", int(number)]:
                    assert self._writer is not None
                    self._writer.write(encode(["metrics", number, self._snapshot()]))
                case ["merged", int(number), dict(snapshot)]:
                    future = self._asked.get(number)
                    if future is not None and not future.done():
                        future.set_result(snapshot)
                case ["beat"]:
                    pass
                case ["drain"]:
                    self._on_drain()
                    self.tell()
                case other:
                    log.warning("the router pod sent an unknown message", what=str(other[0]))
