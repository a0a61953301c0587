"""Tests of the load generators: failed calls are noticed, and the times of late calls include their wait."""

import asyncio
import itertools
import random
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import numpy as np
import pytest
from rich.console import Console
from rich.progress import Progress

from mesh.process import free_port
from tests.bench import bodies, client, generators, load
from tests.bench.client import Order
from tests.bench.door import Door
from tests.bench.peers import comparison, environments
from tests.bench.peers.servers import PEERS
from tests.support import models
from tests.support.localmesh import Program
from tests.support.waiting import until

X = np.ones((1, 64), np.float32)
RATE = 2000.0


class Http:
    """An HTTP server that answers once it has received `together` requests. If `together` is 0, it never answers."""

    def __init__(self, together: int, status: int = 200) -> None:
        self.together = together
        self.status = status
        self.got = 0
        self.waiting: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
                await reader.readexactly(int(length[1]) if length else 0)
                self.got += 1
                self.waiting.append(writer)
                if self.together and len(self.waiting) >= self.together:
                    for one in self.waiting:
                        one.write(b"HTTP/1.1 %d X\r\ncontent-length: 4\r\n\r\nfour" % self.status)
                    self.waiting = []
        except asyncio.IncompleteReadError:
            writer.close()

    @asynccontextmanager
    async def door(self) -> AsyncIterator[Door]:
        """Starts the server, and yields its door."""
        listening = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        async with listening:
            yield Door("rest", f"127.0.0.1:{port}", "/v2/models/m/infer", b"{}", 4)


async def test_time_counts_from_when_a_call_was_due(monkeypatch):
    """If a server holds all answers until the last call, the time of each call includes the time that it was held."""
    monkeypatch.setattr(client, "_BACKLOG", 60.0)
    seconds = 0.2
    draw = random.Random(7)
    due = [0.0]
    while (at := due[-1] + draw.expovariate(RATE)) < seconds:
        due.append(at)
    due.pop(0)
    http = Http(together=1)
    async with http.door() as door:
        warm_up = client._RestSender.warm_up

        async def then_hold(self: client._RestSender, calls: int) -> None:
            await warm_up(self, calls)
            http.together = len(due)

        monkeypatch.setattr(client._RestSender, "warm_up", then_hold)
        outcome = await client._open(Order(door, seconds, rate=RATE, seed=7))
    assert outcome.calls == len(due)
    assert not outcome.behind
    assert outcome.percentiles[0] >= due[-1] - due[len(due) // 2]
    assert outcome.percentiles[2] >= due[-1] - due[1]


async def test_a_server_that_does_not_answer_is_said_not_to_keep_up(monkeypatch):
    monkeypatch.setattr(client, "_BACKLOG", 0.05)
    http = Http(together=1)
    async with http.door() as door:
        warm_up = client._RestSender.warm_up

        async def then_nothing(self: client._RestSender, calls: int) -> None:
            await warm_up(self, calls)
            http.together = 0

        monkeypatch.setattr(client._RestSender, "warm_up", then_nothing)
        outcome = await client._open(Order(door, 30.0, rate=RATE))
    assert outcome.behind
    assert outcome.percentiles == ()


@pytest.mark.parametrize("size", [2, 1 << 17], ids=["small", "large"])
async def test_rest_errors_are_noticed(size):
    """wrk sends small requests if it is installed, and our own client sends large ones: either raises an error for a
    status other than 200."""
    async with Http(together=1).door() as good, Http(together=1, status=500).door() as bad:
        load = generators.throughput
        for door in (good, bad):
            door = Door(door.kind, door.address, door.path, bytes(size), door.answer)
            if door.address == good.address:
                outcome = await asyncio.to_thread(load, door, seconds=1.0, callers=2)
                assert outcome.calls > 0
                assert outcome.share > 0
            else:
                with pytest.raises(RuntimeError):
                    await asyncio.to_thread(load, door, seconds=1.0, callers=2)


async def test_grpc_errors_are_noticed(tmp_path):
    """The HTTP status of a gRPC error is 200 too. A load on a model that the server does not have fails
    nevertheless."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.onnx").write_bytes(models.logistic_regression(0))
    port = free_port()
    argv = [sys.executable, "-m", "tests.bench.plain", str(port), str(tmp_path / "a.onnx"), str(tmp_path / "b.onnx")]
    plain = Program("plain", argv, tmp_path)
    plain.start()
    try:

        def door(model: str) -> Door:
            return bodies.grpc(f"127.0.0.1:{port}", model, X, 20)

        async def listens() -> bool:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                return False
            writer.close()
            return True

        await until(listens, timeout=60, why=f"the plain server listens:\n{plain.tail()}")
        good = await asyncio.to_thread(generators.throughput, door("b"), seconds=1.0, callers=8)
        assert good.calls > 0
        opened = await asyncio.to_thread(client.call, Order(door("a"), 0.2, rate=50.0))
        assert opened.calls > 0
        with pytest.raises(RuntimeError):
            await asyncio.to_thread(generators.throughput, door("c"), seconds=1.0, callers=8)
        with pytest.raises(RuntimeError):
            await asyncio.to_thread(client.call, Order(door("c"), 0.2, rate=50.0))
    finally:
        plain.kill9()


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.key)
def test_peers_have_locks_without_addresses(peer):
    """A peer's lock names hashes but no URL, so the machine's pip decides which package index it uses."""
    text = environments.lock_of(peer.key).read_text()
    assert f"\n{peer.package}" in text
    assert "--hash=sha256:" in text
    assert "://" not in text
    assert environments.lock_of(peer.key).with_suffix(".in").exists()


def test_an_environment_that_cannot_be_made_leaves_nothing_behind(tmp_path, monkeypatch):
    """If an environment cannot be made, the error quotes pip's output, and no folder remains."""
    lock = tmp_path / "peer-x.txt"
    lock.write_text(f"mesh-of-no-such-name==1.0 --hash=sha256:{'0' * 64}\n")
    monkeypatch.setattr(environments, "lock_of", lambda peer: lock)
    monkeypatch.setattr(environments, "FOLDER", tmp_path / "peers")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(environments.CannotMake, match="mesh-of-no-such-name"):
        environments.environment("x", Progress(console=Console(quiet=True)))
    assert list((tmp_path / "peers").iterdir()) == []


def test_rounds_are_left_out_when_time_is_up(monkeypatch):
    """The first round is run even when the time is up, so each row has a figure."""
    progress = Progress(console=Console(quiet=True))
    assert comparison.Bar(progress, 1.0).more(1)
    monkeypatch.setattr(comparison, "LIMIT", -1.0)
    bar = comparison.Bar(progress, 1.0)
    assert bar.more(0)
    assert not bar.cut
    assert not bar.more(1)
    assert bar.cut
    assert bar.more(0)


@pytest.mark.parametrize("good", [0, 1, 1000])
async def test_failed_grpc_calls_are_noticed(good, tmp_path):
    """The server answers the first `good` calls, and fails the others. With h2load, a first call of its own shows how
    large a good answer is."""
    calls = itertools.count()

    async def answer(request, context):
        if next(calls) >= good:
            await context.abort(grpc.StatusCode.INTERNAL, "no more")
        return request

    server = grpc.aio.server()
    service, _, method = load.METHOD[1:].partition("/")
    handlers = {method: grpc.unary_unary_rpc_method_handler(answer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        measured = load.throughput(
            f"127.0.0.1:{port}", b"12345", calls=64, folder=tmp_path, connections=2, each=4, metadata=[("x", "y")]
        )
        if good == 1000:
            assert await measured > 0
        else:
            with pytest.raises(RuntimeError, match=r"no more|answers have"):
                await measured
    finally:
        await server.stop(None)
