"""From the router pod to its workers: what is where, as one watch of etcd tells it; and back: metrics and readiness.

One watch for each worker would cost etcd and every worker the same work again. So the pod follows etcd, keeps the range
as raw keys and values, and passes changes on over a unix socket: everything first, then every revision as one message,
in order. A worker that was away is told everything again; `View` finds out what differs.

Messages are a length (4 bytes, big-endian) and JSON. Keys and values are bytes, written as Latin-1 text so that any
byte comes through.
"""

import asyncio
import collections
import contextlib
import itertools
import json
import os
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any

from mesh.etcd import Change, Kind, Snapshot
from mesh.telemetry import logs, metrics
from router.state.view import View
from router.tasks import Tasks

log = logs.get(__name__)

MAX_MESSAGE = 64 << 20  # bytes

_PORTION = 500  # items in one message of a snapshot
_MAX_BEHIND = 64 << 20  # bytes of changes that a worker may leave unread before its connection is ended
_ASK = 2.0  # seconds for a worker to tell its metrics
_PAUSE = 0.1  # seconds before a worker connects again

Message = list[Any]


def encode(message: Message) -> bytes:
    """One message as it is sent."""
    body = json.dumps(message, separators=(",", ":"), ensure_ascii=True).encode()
    return len(body).to_bytes(4, "big") + body


async def receive(reader: asyncio.StreamReader) -> Message:
    """The next message. Raises EOFError at the end, ValueError for what is none."""
    length = int.from_bytes(await reader.readexactly(4), "big")
    if length > MAX_MESSAGE:
        raise ValueError(f"a message of {length} bytes")
    message = json.loads(await reader.readexactly(length))
    if not isinstance(message, list) or not message:
        raise ValueError("not a message")
    return message


def _pack(items: Iterable[tuple[bytes, bytes | None]]) -> list[list[str | None]]:
    return [[key.decode("latin-1"), None if value is None else value.decode("latin-1")] for key, value in items]


def _unpack(items: list[list[str | None]]) -> list[tuple[bytes, bytes | None]]:
    return [((key or "").encode("latin-1"), None if value is None else value.encode("latin-1")) for key, value in items]


def items_of(change: Change) -> list[tuple[bytes, bytes | None]]:
    """Keys and values of a change of the mirror, as a view takes them; None: deleted."""
    if isinstance(change, Snapshot):
        return [(kv.key, kv.value) for kv in change.kvs]
    return [(event.kv.key, event.kv.value if event.kind is Kind.PUT else None) for event in change.events]


class _Peer:
    """One connected worker, and what it is still to be sent, in order.

    A snapshot may be larger than anybody should buffer. It waits as the list of its items, which everybody shares, and
    is encoded portion by portion as the worker reads. Only single messages count as being behind.
    """

    __slots__ = ("_behind", "_queue", "_some", "asked", "name", "not_ready", "writer")

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.name = "?"
        self.not_ready: str | None = "has just connected"
        self.asked: dict[int, asyncio.Future[metrics.Snapshot]] = {}
        self._queue: collections.deque[bytes | Iterator[bytes]] = collections.deque()
        self._behind = 0  # bytes of the messages in it
        self._some = asyncio.Event()

    def send(self, data: bytes) -> None:
        """Sends a message after all others."""
        if self.writer.transport.is_closing():
            return
        self._behind += len(data)
        if self._behind > _MAX_BEHIND:
            log.warning("worker does not read its feed", worker=self.name, behind=self._behind)
            self.writer.transport.abort()
        self._put(data)

    def send_all(self, messages: Iterator[bytes]) -> None:
        """Sends many messages after all others, each made when it is its turn."""
        self._put(messages)

    def _put(self, one: bytes | Iterator[bytes]) -> None:
        self._queue.append(one)
        self._some.set()

    async def write(self) -> None:
        """Writes what is queued, as fast as the worker reads it. Raises OSError at the connection's end."""
        while True:
            await self._some.wait()
            self._some.clear()
            while self._queue:
                item = self._queue.popleft()
                if isinstance(item, bytes):
                    self._behind -= len(item)
                    item = iter((item,))
                for data in item:
                    self.writer.write(data)
                    await self.writer.drain()


class FeedServer:
    """The pod's end. `merged` gives the whole router pod's metrics, for workers that are asked for them."""

    def __init__(self, merged: Callable[[], Awaitable[metrics.Snapshot]]) -> None:
        self._merged = merged
        self._items: dict[bytes, bytes] = {}
        self._revision = 0
        self._peers: set[_Peer] = set()
        self._numbers = itertools.count(1)
        self._tasks = Tasks()
        self._server: asyncio.Server | None = None
        self._draining = False

    @property
    def revision(self) -> int:
        """Of what is known; 0: nothing yet."""
        return self._revision

    async def start(self, path: str) -> None:
        """Listens on a unix socket, for this user only."""
        before = os.umask(0o177)
        try:
            self._server = await asyncio.start_unix_server(self._serve, path, limit=MAX_MESSAGE)
        finally:
            os.umask(before)

    def apply(self, change: Change) -> None:
        """Passes a change on."""
        self._revision = change.revision
        if isinstance(change, Snapshot):
            self._items = {kv.key: kv.value for kv in change.kvs}
            for peer in self._peers:
                self._send_all(peer)
            return
        items = items_of(change)
        for key, value in items:
            if value is None:
                self._items.pop(key, None)
            else:
                self._items[key] = value
        data = encode(["delta", change.revision, _pack(items)])
        for peer in self._peers:
            peer.send(data)

    def ready(self) -> dict[str, str | None]:
        """Each connected worker, and why it is not ready."""
        return {peer.name: peer.not_ready for peer in self._peers}

    def drain(self) -> None:
        """Tells the workers that this router stops, so that they say so to whoever asks."""
        self._draining = True
        for peer in self._peers:
            peer.send(encode(["drain"]))

    async def snapshots(self) -> list[metrics.Snapshot]:
        """The metrics of the workers that answer in time."""
        number = next(self._numbers)
        loop = asyncio.get_running_loop()
        for peer in self._peers:
            peer.asked[number] = loop.create_future()
            peer.send(encode(["ask", number]))
        waiting = [peer.asked[number] for peer in self._peers]
        try:
            done, late = await asyncio.wait(waiting, timeout=_ASK) if waiting else (set(), set())
            if late:
                log.warning("workers did not tell their metrics in time", workers=len(late))
            return [future.result() for future in done if not future.cancelled()]
        finally:
            for peer in self._peers:
                peer.asked.pop(number, None)

    def _send_all(self, peer: _Peer) -> None:
        if not self._revision:
            return
        peer.send_all(_everything(list(self._items.items()), self._revision))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = _Peer(writer)
        writing = self._tasks.spawn(_written(peer), "write the feed")
        self._peers.add(peer)
        self._send_all(peer)
        if self._draining:
            peer.send(encode(["drain"]))
        try:
            while True:
                match await receive(reader):
                    case ["hello", str(name)]:
                        peer.name = name
                    case ["ready", reason]:
                        peer.not_ready = reason
                    case ["metrics", int(number), dict(snapshot)]:
                        future = peer.asked.pop(number, None)
                        if future is not None and not future.done():
                            future.set_result(snapshot)
                    case ["stats", int(number)]:
                        self._tasks.spawn(self._answer(peer, number), "merged metrics")
                    case other:
                        log.warning("a worker said something unknown", worker=peer.name, what=str(other[0]))
        except (EOFError, OSError):
            pass  # it has ended; its process is somebody else's business
        except ValueError as error:
            log.warning("a worker said nonsense", worker=peer.name, error=str(error))
        finally:
            self._peers.discard(peer)
            writing.cancel()
            for future in peer.asked.values():
                future.cancel()
            writer.close()

    async def _answer(self, peer: _Peer, number: int) -> None:
        peer.send(encode(["merged", number, await self._merged()]))

    async def close(self) -> None:
        """Ends every connection."""
        if self._server is not None:
            self._server.close()
        for peer in tuple(self._peers):
            peer.writer.close()
        await self._tasks.close()


def _everything(items: list[tuple[bytes, bytes]], revision: int) -> Iterator[bytes]:
    for start in range(0, len(items), _PORTION):
        yield encode(["items", _pack(items[start : start + _PORTION])])
    yield encode(["snapshot", revision])


async def _written(peer: _Peer) -> None:
    with contextlib.suppress(OSError):  # the reading end sees the connection's end too, and acts on it
        await peer.write()


class FeedClient:
    """A worker's end: keeps the view up to date, for as long as the pod lives."""

    def __init__(
        self,
        path: str,
        name: str,
        view: View,
        *,
        ready: Callable[[], str | None],
        snapshot: Callable[[], metrics.Snapshot],
        on_drain: Callable[[], None],
    ) -> None:
        self._path = path
        self._name = name
        self._view = view
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
        """Whether everything was received once."""
        return self._seen.is_set()

    async def first(self, timeout: float) -> bool:
        """Waits until everything was received once, so many seconds at most; whether it was."""
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
        """The metrics of all workers of this router pod; this one's own where the pod does not answer."""
        number = next(self._numbers)
        future: asyncio.Future[metrics.Snapshot] = asyncio.get_running_loop().create_future()
        if self._writer is None:
            return self._snapshot()
        self._asked[number] = future
        self._writer.write(encode(["stats", number]))
        try:
            async with asyncio.timeout(2 * _ASK):
                return await future
        except TimeoutError:
            return self._snapshot()
        finally:
            self._asked.pop(number, None)

    async def run(self) -> None:
        """Connects, and stays connected until it is cancelled."""
        while True:
            try:
                reader, self._writer = await asyncio.open_unix_connection(self._path, limit=MAX_MESSAGE)
                self._said = "?"
                self._writer.write(encode(["hello", self._name]))
                self.tell()
                await self._follow(reader)
            except (EOFError, OSError, ValueError) as error:
                log.warning("the feed of the router pod broke off", why=str(error))
            finally:
                writer, self._writer = self._writer, None
                if writer is not None:
                    writer.close()
            await asyncio.sleep(_PAUSE)

    async def _follow(self, reader: asyncio.StreamReader) -> None:
        items: list[tuple[bytes, bytes | None]] = []
        while True:
            match await receive(reader):
                case ["delta", int(revision), list(changes)]:
                    self._view.delta(revision, _unpack(changes))
                case ["items", list(portion)]:
                    items += _unpack(portion)
                case ["snapshot", int(revision)]:
                    self._view.snapshot(revision, items)
                    items = []
                    self._seen.set()
                    self.tell()
                case ["ask", int(number)]:
                    assert self._writer is not None
                    self._writer.write(encode(["metrics", number, self._snapshot()]))
                case ["merged", int(number), dict(snapshot)]:
                    future = self._asked.get(number)
                    if future is not None and not future.done():
                        future.set_result(snapshot)
                case ["drain"]:
                    self._on_drain()
                    self.tell()
                case other:
                    log.warning("the router pod said something unknown", what=str(other[0]))
