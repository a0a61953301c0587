"""Bodies of REST requests and replies: read and written within the worker's budget, and at a minimum rate.

aiohttp would read every body completely, and buffer a complete reply even if the client does not read it. Here a body
is refused early if it exceeds the limit, or if the budget has no room for it. It is read in pieces, and must arrive at
a minimum rate. A large reply is also written in pieces, and given up if the client reads too slowly. Other modules
interpret bodies.

A refused body is still read to its end, up to a limit, and discarded. Simple clients (Python's urllib, Java's
HttpURLConnection) write the complete request before they read the answer, and Envoy closes an HTTP/1.1 connection once
it has passed on an answer. If the body were not read, these clients would only see that the connection was reset.
"""

import asyncio
import contextlib
from collections.abc import Iterator, Sequence

from aiohttp import web

from mesh.statuses import MeshError, Reason, too_large
from mesh.telemetry import logs
from mesh.wire import server
from mesh.wire.budget import SMALL, Budget, Hold
from router.rest.pieces import Body

log = logs.get(__name__)

_PIECE = 256 * 1024  # bytes per write: the event loop copies them in 0.1 ms
_DROPPED = 64 << 20  # bytes of a refused body that are read and discarded
_SILENCE = 1.0  # seconds without further bytes after which the answer is sent: the client is waiting for it
_DROPPING = 20.0  # seconds for reading all of it


class Bodies:
    """A reader and writer of bodies in one worker. `limit` is in bytes. `least` is the minimum rate in bytes per
    second, or 0 for none."""

    def __init__(self, budget: Budget, *, limit: int, least: int) -> None:
        self._budget = budget
        self._limit = limit
        self._least = least
        self.slow = 0  # bodies that were too slow

    @contextlib.contextmanager
    def hold(self) -> Iterator[Hold]:
        """Yields a hold on the budget for one call. The hold is empty at first, and is released at the end of the
        block."""
        with self._budget.hold() as hold:
            yield hold

    async def read(self, request: web.Request, hold: Hold) -> Body:
        """Reads a request's body. Raises MeshError: TOO_LARGE, OVERLOADED, TOO_SLOW."""
        announced = request.content_length
        if announced is not None:
            if announced > self._limit:
                raise too_large(f"the body of {announced} bytes", self._limit)
            hold.request(announced)
        body = Body()
        pace = _BodyPace(self)
        content = request.content
        while True:
            try:
                async with asyncio.timeout(pace.patience()):
                    piece = await content.readany()
            except TimeoutError as error:
                self.slow += 1
                text = (
                    f"the body arrived at less than {pace.least()} bytes a second: send it faster, or send less at once"
                )
                raise MeshError(Reason.TOO_SLOW, text) from error
            if not piece:
                return body
            body.add(piece)
            if body.size > self._limit:
                raise too_large("the body", self._limit)
            hold.request(body.size)  # a chunked body announces no size
            pace.moved(len(piece))

    async def answer(
        self, request: web.Request, pieces: Sequence[bytes | memoryview], *, content_type: str, headers: dict[str, str]
    ) -> web.StreamResponse:
        """Answers with a body. Raises ConnectionResetError if the client reads a large body too slowly."""
        size = sum(map(len, pieces))
        if size <= SMALL:
            return web.Response(body=b"".join(pieces), content_type=content_type, headers=headers)
        response = web.StreamResponse(headers=headers)
        response.content_type = content_type
        response.content_length = size
        await response.prepare(request)
        pace = _BodyPace(self)
        for whole in pieces:
            view = memoryview(whole)
            for start in range(0, len(view), _PIECE):
                piece = view[start : start + _PIECE]
                try:
                    async with asyncio.timeout(pace.patience()):
                        await response.write(piece)
                except TimeoutError as error:
                    self.slow += 1
                    if request.transport is not None:
                        request.transport.abort()  # close() would wait for unread data
                    raise ConnectionResetError(
                        f"the reply was read at less than {pace.least()} bytes a second"
                    ) from error
                pace.moved(len(piece))
        await response.write_eof()
        return response


async def drop(request: web.Request) -> None:
    """Reads and discards the rest of the body of a refused request, within limits of bytes and time."""
    dropped = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DROPPING):
            while dropped < _DROPPED:
                async with asyncio.timeout(_SILENCE):
                    piece = await request.content.readany()
                if not piece:
                    return
                dropped += len(piece)


class _BodyPace:
    """The rate of a peer, compared with the minimum rate."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self._loop = asyncio.get_running_loop()
        self._since = self._loop.time()
        self._credit = float(bodies._least * server.PATIENCE)

    def least(self) -> int:
        """Returns the minimum rate at present, in bytes per second, or 0 for none. It is higher while the budget is
        short."""
        return self._bodies._least * (server.HASTE if self._bodies._budget.short else 1)

    def patience(self) -> float | None:
        """Returns the seconds that may pass before the next piece, or None for no limit."""
        least = self.least()
        return max(self._credit / least, 0.0) if least else None

    def moved(self, size: int) -> None:
        """Notes that a piece of `size` bytes was read or written."""
        now = self._loop.time()
        self._credit = min(
            self._credit + size - self.least() * (now - self._since), float(self._bodies._least * server.PATIENCE)
        )
        self._since = now
