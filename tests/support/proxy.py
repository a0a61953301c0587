"""A TCP proxy that can become a black hole: connections stay open, new ones are accepted, nothing gets through.

It can also be slow, which delays everything that it forwards.
"""

import asyncio
import contextlib


class Proxy:
    """A proxy that forwards from its own port to `port`, both on loopback, for the length of an `async with` block."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._there, self._back = asyncio.Event(), asyncio.Event()  # whether bytes flow
        self.flow()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()  # two tasks per connection, one for each direction
        self._serving: set[asyncio.Task[None]] = set()  # one task per connection
        self._closing = False
        self.port = 0
        self.accepted = 0  # connections
        self.delay = 0.0  # seconds by which forwarded bytes are delayed

    async def __aenter__(self) -> "Proxy":
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._closing = True
        self._server.close()
        self.cut()
        if self._serving:
            await asyncio.wait(self._serving, timeout=5)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def swallow(self) -> None:
        """Lets nothing through in either direction from now on."""
        self._there.clear()
        self._back.clear()

    def swallow_answers(self) -> None:
        """Forwards requests, but no answers."""
        self._back.clear()

    def flow(self) -> None:
        """Forwards everything again, the data that was held up first."""
        self._there.set()
        self._back.set()

    def cut(self) -> None:
        """Breaks all current connections."""
        for task in list(self._tasks):
            task.cancel()

    def flow_after_cut(self) -> None:
        """Breaks all current connections, drops the data that they held up, and forwards new connections."""
        self.cut()
        self.flow()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            await self._serve(reader, writer)
        finally:
            self._serving.discard(task)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.close()
            return
        if self._closing:
            writer.close()
            far_writer.close()
            return
        both = [
            asyncio.ensure_future(self._pump(reader, far_writer, self._there)),
            asyncio.ensure_future(self._pump(far_reader, writer, self._back)),
        ]
        self._tasks.update(both)
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        for task in both:
            task.cancel()
        await asyncio.gather(*both, return_exceptions=True)
        self._tasks.difference_update(both)
        for end in (writer, far_writer):
            end.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, flowing: asyncio.Event) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                if self.delay:
                    await asyncio.sleep(self.delay)
                await flowing.wait()
                writer.write(data)
                await writer.drain()
