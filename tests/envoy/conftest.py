import asyncio
import contextlib
import shutil
import tempfile
from pathlib import Path

import pytest


class Workers:
    """Sockets that answer HTTP/1.1 in place of workers. The answer's body is the request's head.

    A gRPC call gets one message that contains the request's head, and its status in trailers.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.gate = asyncio.Event()  # cleared: replies wait
        self.gate.set()
        self.calls: list[tuple[str, bytes, bytes]] = []  # tuples of socket name, header and body
        self.lost = 0  # number of connections that ended while their reply waited
        self._servers: dict[str, asyncio.Server] = {}

    def path(self, name: str) -> str:
        return str(self.directory / name)

    async def listen(self, name: str) -> str:
        async def handle(reader, writer):
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                while True:
                    await self._serve(name, reader, writer)
            writer.close()

        self._servers[name] = await asyncio.start_unix_server(handle, self.path(name), backlog=4096)
        return self.path(name)

    async def _serve(self, name, reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        lines = head.lower().split(b"\r\n")
        body = b""
        for line in lines:
            if line.startswith(b"content-length:"):
                body = await reader.readexactly(int(line.split(b":")[1]))
            if line == b"transfer-encoding: chunked":
                while size := int(await reader.readline(), 16):
                    body += (await reader.readexactly(size + 2))[:-2]
                await reader.readline()
        self.calls.append((name, head, body))
        if not self.gate.is_set():
            waits = [asyncio.ensure_future(self.gate.wait()), asyncio.ensure_future(reader.read(1))]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if waits[1].done():
                self.lost += 1
                raise ConnectionResetError
            waits[1].cancel()
        if b"application/grpc" in head:
            frame = b"\0" + len(head).to_bytes(4, "big") + head
            writer.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/grpc\r\ntransfer-encoding: chunked\r\n\r\n"
                b"%x\r\n%b\r\n0\r\ngrpc-status: 0\r\nx-trailer: yes\r\n\r\n" % (len(frame), frame)
            )
        else:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nserver: worker\r\n\r\n%b" % (len(head), head))
        await writer.drain()

    async def stop(self, name: str) -> None:
        """Stops a worker as if it had died, so its socket refuses connections."""
        self._servers.pop(name).close()

    async def close(self) -> None:
        for server in self._servers.values():
            server.close()


@pytest.fixture
def run_dir():
    """A directory with a short path, because paths of sockets must be short."""
    path = Path(tempfile.mkdtemp(prefix="me", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
async def workers(run_dir):
    workers = Workers(run_dir)
    yield workers
    await workers.close()
