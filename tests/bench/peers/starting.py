"""The start of the compared servers. All run side by side, and must answer for every model before measurements
begin."""

import asyncio
import contextlib
import http.client
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
from rich.progress import Progress

from tests.bench.door import METHOD, Door
from tests.bench.peers import environments, servers
from tests.bench.peers.servers import PAYLOADS, Server
from tests.bench.results import Results
from tests.support import models
from tests.support.localmesh import LocalMesh

START = 90.0  # seconds for a server to answer its first call


@contextlib.asynccontextmanager
async def running(mesh: LocalMesh, folder: Path, results: Results, progress: Progress) -> AsyncIterator[list[Server]]:
    """Starts all servers that can be started, yields those that answer, and stops them."""
    contents = {
        servers.SMALL: models.logistic_regression(0, features=64),
        servers.LARGE: models.identity(shape=(None,)),
    }
    files = folder / "peer-models"
    servers.write_models(files, contents)
    for name, content in contents.items():
        await mesh.register(name, content, load=True)
    found = [servers.of_mesh(mesh)]
    results.described["Mesh"] = (
        "the complete chain: Envoy, a router with one worker for each core, one runtime pod with the ONNX server, etcd"
    )
    results.described["plain grpc.aio"] = (
        "`tests/bench/plain.py`, a `grpc.aio` server on uvloop with onnxruntime: no router, no registry, gRPC only"
    )
    starts: list[tuple[str, Callable[[], Server]]] = [("plain grpc.aio", lambda: servers.plain(folder, files))]
    for peer in servers.PEERS:
        try:
            environment = await asyncio.to_thread(environments.environment, peer.key, progress)
        except (environments.CannotMake, OSError) as error:
            results.lacks(peer.name, str(error))
            continue
        results.described[peer.name] = servers.described(peer, environment)
        starts.append((peer.name, lambda peer=peer, environment=environment: peer.start(environment, folder, files)))
    task = progress.add_task("", total=None)
    try:
        for name, start in starts:
            progress.update(task, description=f"{name} starts")
            server = start()
            try:
                await _answers(server)
            except AssertionError as error:
                assert server.program is not None
                results.lacks(name, f"it does not answer: {error}\n{server.program.tail(15)}")
                await _stop(server)
            else:
                found.append(server)
        progress.remove_task(task)
        yield found
    finally:
        for server in found[1:]:
            await _stop(server)


async def _stop(server: Server) -> None:
    assert server.program is not None
    with contextlib.suppress(AssertionError):  # processes that did not end were killed
        await server.program.stop(10)


async def _answers(server: Server) -> None:
    """Waits until each door answers for each model. Raises AssertionError if one does not."""
    for kind in server.doors:
        for payload in PAYLOADS.values():
            door = server.door(kind, payload)
            said = await _answer(server, door)
            assert not said, f"{kind}: {said}"


async def _answer(server: Server, door: Door) -> str:
    """Waits until a door answers. Returns the error of the last attempt if it does not answer, otherwise ""."""
    assert server.program is not None
    assert server.program.process is not None
    said = ""
    for _ in range(int(START / 0.5)):
        if (status := server.program.process.poll()) is not None:
            return f"its process ended with {status}"
        try:
            size = await asyncio.to_thread(_once, door)
        except (OSError, http.client.HTTPException, grpc.RpcError) as error:
            said = str(error)
            await asyncio.sleep(0.5)
        else:
            return "" if size >= door.answer else f"an answer has {size} bytes instead of {door.answer}"
    return said


def _once(door: Door) -> int:
    """Calls once, and returns the answer's size."""
    if door.kind == "rest":
        request = urllib.request.Request(door.url, door.body, dict(door.headers), method="POST")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return len(answer.read())
    with grpc.insecure_channel(door.address, options=[("grpc.max_receive_message_length", -1)]) as channel:
        return len(channel.unary_unary(METHOD)(door.body, timeout=30, metadata=list(door.headers.items())))
