"""A TCP proxy that damages replies: it ends or stalls them after some number of bytes, or closes for good.

It forwards between a client and a real server, so everything before the fault is what the server sent.
"""

import asyncio
import contextlib

from tests.support.waiting import until


class FaultyProxy:
    """A proxy that forwards from `port` to `target`, both on loopback, for the length of an `async with` block."""

    def __init__(self, target: int, *, by_name: bool = False) -> None:
        """Makes a proxy. With `by_name`, requests get the server's name in place of the proxy's, for a server that only
        answers requests to its own name."""
        self._target = target
        self._by_name = by_name
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._limit: int | None = None
        self._stall = False
        self._once = False
        self.port = 0
        self.passed = 0  # bytes that came back since the fault was set
        self.connections = 0  # open now
        self.faults = 0

    def cut_after(self, count: int, *, once: bool = False) -> None:
        """Closes connections once that many bytes have come back in total. With `once`, closes only the connection that
        reaches the limit."""
        self._limit, self._stall, self._once = count, False, once
        self.passed = self.faults = 0

    def stall_after(self, count: int) -> None:
        """Keeps connections open, but lets nothing back beyond that many bytes in total."""
        self._limit, self._stall, self._once = count, True, False
        self.passed = self.faults = 0

    def heal(self) -> None:
        """Injects no more faults."""
        self._limit = None

    async def die(self) -> None:
        """Closes everything. New connections are refused."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=5)

    async def idle(self) -> None:
        """Waits until no connection is open."""
        await until(lambda: not self.connections, why="no connection is open")

    async def __aenter__(self) -> "FaultyProxy":
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.die()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            await self._serve(reader, writer)
        finally:
            self.connections -= 1
            self._tasks.discard(task)
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        both = [
            asyncio.ensure_future(self._forward(reader, far_writer)),
            asyncio.ensure_future(self._back(far_reader, writer)),
        ]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in both:
                task.cancel()
            far_writer.transport.abort()
            await asyncio.gather(*both, return_exceptions=True)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                if self._by_name:
                    data = data.replace(b"127.0.0.1:%d" % self.port, b"127.0.0.1:%d" % self._target)
                writer.write(data)
                await writer.drain()

    async def _back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                limit = self._limit
                if limit is not None and self.passed + len(data) > limit and not (self._once and self.faults):
                    self.faults += 1
                    part = data[: max(limit - self.passed, 0)]
                    self.passed += len(part)
                    writer.write(part)
                    await writer.drain()
                    if self._stall:
                        await asyncio.get_running_loop().create_future()
                    writer.close()  # after what was written, orderly: the body is short, the connection did not break
                    await writer.wait_closed()
                    return
                self.passed += len(data)
                writer.write(data)
                await writer.drain()
