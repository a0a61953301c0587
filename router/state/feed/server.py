"""The pod's end of the feed: a connection to each worker, on which ranges are sent as fast as the worker reads.

The ranges take turns, one message each, so that a large range does not delay the others; all other messages are sent
first. A worker is not disconnected for leaving ranges unread: heartbeats show whether it lives (`mesh.process`), and
`rangelog` bounds the data that wait for it. It is disconnected only once too many bytes of other messages wait.
"""

import asyncio
import collections
import contextlib
import itertools
import os
from collections.abc import Awaitable, Callable

from mesh.etcd import Change
from mesh.process.tasks import Tasks
from mesh.telemetry import logs, metrics
from router.state.feed.messages import MAX_MESSAGE, encode, receive
from router.state.feed.rangelog import Cursor, RangeLog
from router.state.feed.ranges import RANGES, Range

log = logs.get(__name__)

ASK = 2.0
"""Seconds within which a worker must send its metrics."""

_MAX_WORDS = 64 << 20  # bytes of messages besides ranges that a worker may leave unread before its connection is closed


class _Peer:
    """One connected worker, and the messages still to be sent to it."""

    __slots__ = ("_cursors", "_some", "_unread", "_words", "asked", "name", "not_ready", "writer")

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.name = "?"
        self.not_ready: str | None = "has just connected"
        self.asked: dict[int, asyncio.Future[metrics.Snapshot]] = {}
        self._words: collections.deque[bytes] = collections.deque()
        self._unread = 0  # bytes of these messages
        self._cursors: collections.deque[Cursor] = collections.deque()
        self._some = asyncio.Event()

    def say(self, data: bytes) -> None:
        """Sends a message ahead of the ranges. Closes the connection if the worker leaves too many bytes unread."""
        if self.writer.transport.is_closing():
            return
        self._unread += len(data)
        if self._unread > _MAX_WORDS:
            log.warning("a worker does not read its feed; it is disconnected", worker=self.name, unread=self._unread)
            self.writer.transport.abort()
        self._words.append(data)
        self.wake()

    def read(self, cursor: Cursor) -> None:
        """Sends a range from the cursor's position on."""
        self._cursors.append(cursor)
        self.wake()

    def wake(self) -> None:
        """Wakes the writer, because there may be something to send."""
        self._some.set()

    async def write(self) -> None:
        """Writes as fast as the worker reads. Raises OSError when the connection ends."""
        while True:
            await self._some.wait()
            self._some.clear()
            while (data := self._take()) is not None:
                self.writer.write(data)
                await self.writer.drain()

    def _take(self) -> bytes | None:
        if self._words:
            data = self._words.popleft()
            self._unread -= len(data)
            return data
        for _ in range(len(self._cursors)):
            cursor = self._cursors[0]
            self._cursors.rotate(-1)
            if (message := cursor.take()) is not None:
                return message
        return None

    def close(self) -> None:
        """Ends the connection."""
        for cursor in self._cursors:
            cursor.close()
        for future in self.asked.values():
            future.cancel()
        self.writer.close()


class FeedServer:
    """The pod's end of the feed. `merged` returns the metrics of the whole router pod, for a worker whose metrics are
    scraped."""

    def __init__(
        self,
        merged: Callable[[], Awaitable[metrics.Snapshot]],
        *,
        wanted: Callable[[Range], None] = lambda _: None,
    ) -> None:
        """Makes a server. When a worker connects, `wanted` is called with each range that it reads."""
        self._merged = merged
        self._wanted = wanted
        self._logs = {name: RangeLog(name) for name in RANGES}
        self._peers: set[_Peer] = set()
        self._numbers = itertools.count(1)
        self._tasks = Tasks()
        self._server: asyncio.Server | None = None
        self._draining = False

    async def start(self, path: str) -> None:
        """Listens on a unix socket, for this user only."""
        before = os.umask(0o177)
        try:
            self._server = await asyncio.start_unix_server(self._serve, path, limit=MAX_MESSAGE)
        finally:
            os.umask(before)

    def apply(self, range: Range, change: Change) -> None:
        """Passes on a change of a range."""
        self._logs[range.name].apply(change)
        for peer in self._peers:
            peer.wake()

    def ready(self) -> dict[str, str | None]:
        """Returns each connected worker, with the reason why it is not ready, or None if it is."""
        return {peer.name: peer.not_ready for peer in self._peers}

    def beat(self) -> None:
        """Sends a sign of life to every worker, because there may be no changes to send."""
        for peer in self._peers:
            peer.say(encode(["beat"]))

    def drain(self) -> None:
        """Tells the workers that this router is stopping, so that they report it."""
        self._draining = True
        for peer in self._peers:
            peer.say(encode(["drain"]))

    async def snapshots(self) -> list[metrics.Snapshot]:
        """Returns the metrics of the workers that answer within ASK seconds."""
        number = next(self._numbers)
        loop = asyncio.get_running_loop()
        for peer in self._peers:
            peer.asked[number] = loop.create_future()
            peer.say(encode(["ask", number]))
        waiting = [peer.asked[number] for peer in self._peers]
        try:
            done, late = await asyncio.wait(waiting, timeout=ASK) if waiting else (set(), set())
            if late:
                log.warning("workers did not send their metrics in time", workers=len(late))
            return [future.result() for future in done if not future.cancelled()]
        finally:
            for peer in self._peers:
                peer.asked.pop(number, None)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = _Peer(writer)
        writing = self._tasks.start(_written(peer), "write the feed")
        writing.add_done_callback(lambda _: peer.close())  # a worker that gets no more messages has to reconnect
        self._peers.add(peer)
        if self._draining:
            peer.say(encode(["drain"]))
        try:
            while True:
                match await receive(reader):
                    case ["hello", str(name), dict(reads)]:
                        peer.name = name
                        self._begin(peer, reads)
                    case ["ready", reason]:
                        peer.not_ready = reason
                    case ["metrics", int(number), dict(snapshot)]:
                        future = peer.asked.pop(number, None)
                        if future is not None and not future.done():
                            future.set_result(snapshot)
                    case ["stats", int(number)]:
                        self._tasks.start(self._answer(peer, number), "merged metrics")
                    case other:
                        log.warning("a worker sent an unknown message", worker=peer.name, what=str(other[0]))
        except (EOFError, OSError):
            pass  # the worker has ended; another task watches its process
        except ValueError as error:
            log.warning("a worker sent a malformed message", worker=peer.name, error=str(error))
        finally:
            self._peers.discard(peer)
            writing.cancel()
            peer.close()

    def _begin(self, peer: _Peer, reads: dict[str, object]) -> None:
        for name, far in reads.items():
            match far:
                case [str(epoch), int(revision)] if name in self._logs:
                    peer.read(self._logs[name].cursor(epoch, revision))
                    self._wanted(RANGES[name])
                case _:
                    log.error("a worker reads a range that this router pod does not know", worker=peer.name, range=name)

    async def _answer(self, peer: _Peer, number: int) -> None:
        peer.say(encode(["merged", number, await self._merged()]))

    async def close(self) -> None:
        """Ends every connection."""
        if self._server is not None:
            self._server.close()
        for peer in tuple(self._peers):
            peer.writer.close()
        await self._tasks.close()


async def _written(peer: _Peer) -> None:
    with contextlib.suppress(OSError):  # the reading task sees the end of the connection too, and handles it
        await peer.write()
