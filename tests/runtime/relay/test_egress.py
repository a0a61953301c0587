"""Calls through an egress to a real gRPC server: the server's answer arrives unchanged, whatever it is and whenever it
comes."""

import asyncio
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio

from mesh.envoy.egress import EgressMinder, EgressSettings
from mesh.runtime.relay.egress import Egress
from mesh.runtime.relay.envoyegress import EnvoyEgress
from mesh.runtime.relay.grpcegress import GrpcEgress
from mesh.runtime.relay.link import Link
from mesh.runtime.relay.table import Journal, Table
from mesh.runtime.sharedmemory.board import Board
from mesh.statuses import Code
from mesh.wire import framing
from mesh.wire.budget import Budget
from mesh.wire.reply import Lost, Reply
from tests.support.proxy import Proxy
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

LIMIT = 16 << 20


class Server:
    """A real gRPC server, whose methods do what their names say. All methods take streams."""

    def __init__(self) -> None:
        self.cancelled = self.hanging = 0
        self.server = grpc.aio.server(options=(("grpc.max_receive_message_length", -1),))
        self.server.add_generic_rpc_handlers((self,))  # type: ignore[arg-type]
        self.port = self.server.add_insecure_port("127.0.0.1:0")

    def service(self, details: Any) -> Any:
        handler = getattr(self, details.method.rpartition("/")[2], None)
        return None if handler is None else grpc.stream_stream_rpc_method_handler(handler)

    async def refuse(self, _: Any, context: Any) -> None:
        await context.send_initial_metadata((("initial", "1"),))
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not now", (("trailing-bin", b"\0\xff"),))

    async def answer(self, _: Any, context: Any) -> None:
        """Sends three messages without reading a request."""
        await context.send_initial_metadata((("initial", "1"),))
        for number in range(3):
            await context.write(b"%d" % number)
        context.set_trailing_metadata((("trailing-bin", b"\0\xff"),))

    async def produce(self, requests: Any, context: Any) -> AsyncIterator[bytes]:
        """Answers each request with as many bytes as the request asks for."""
        async for request in requests:
            yield bytes(int(request))

    async def echo(self, requests: Any, context: Any) -> AsyncIterator[bytes]:
        try:
            async for request in requests:
                yield request
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def busy(self, _: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode.UNAVAILABLE, "too busy")

    async def hang(self, requests: Any, context: Any) -> None:
        self.hanging += 1
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Server]:
    server = Server()
    await server.server.start()
    yield server
    await server.server.stop(None)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["envoy", "grpc"])
async def egress(request: pytest.FixtureRequest, server: Server) -> AsyncIterator[Egress]:
    address = f"127.0.0.1:{server.port}"
    if request.param == "grpc":
        link = Link(address, Table(Board.private(1), Journal(None)), hang_timeout=9, max_message=LIMIT)
        await link.connected()
        yield GrpcEgress(link, max_message=LIMIT)
        await link.close()
        return
    with tempfile.TemporaryDirectory(prefix="mesh-", dir="/tmp") as folder:
        settings = EgressSettings(listen=f"{folder}/egress", admin_socket=f"{folder}/admin", server=address)
        minder = EgressMinder(settings, run_dir=Path(folder))
        await minder.start()
        made = EnvoyEgress(minder, settings.listen, max_message=LIMIT, budget=Budget(512 << 20))
        made.envoy = minder  # type: ignore[attr-defined]
        yield made
        await made.close()


async def outcome(outgoing: Any) -> tuple[list[bytes], Reply, list[Any]]:
    """Returns the messages, the end and the initial metadata of an answer."""
    answer = await outgoing.first()
    if isinstance(answer, Reply):
        return [] if answer.frame is None else [framing.unpack(answer.frame, limit=LIMIT)], answer, answer.headers
    messages = []
    while (frame := await answer.read()) is not None:
        messages.append(framing.unpack(frame, limit=LIMIT))
    return messages, await answer.result(), answer.headers


@pytest.mark.parametrize(
    ("method", "messages", "code", "text"),
    [
        ("refuse", [], Code.FAILED_PRECONDITION, "not now"),
        ("answer", [b"0", b"1", b"2"], Code.OK, ""),
        ("unknown", [], Code.UNIMPLEMENTED, None),
    ],
)
async def test_a_status_that_comes_during_writes_arrives_unchanged(
    egress: Egress, method: str, messages: list[bytes], code: Code, text: str | None
) -> None:
    """A server may end a call while its request is still being written. At whatever moment this happens, the client
    gets all messages, the status with its text, and all metadata of the server. Only initial metadata without a message
    after it is sometimes lost in `grpc.aio`."""
    seen: Counter[Any] = Counter()
    for _ in range(60):
        outgoing = egress.open(f"/test/{method}".encode(), [], timeout=20, encoding=b"")

        async def feed(outgoing: Any) -> None:
            try:
                for _ in range(20):
                    await outgoing.write(framing.pack(b"x" * 1000))
                outgoing.end()
            except Lost:
                pass

        feeding = asyncio.ensure_future(feed(outgoing))
        got, reply, initial = await outcome(outgoing)
        await feeding
        outgoing.cancel()
        said = reply.text if text is not None else None
        seen[tuple(got), reply.code, said, tuple(initial) if got else (), tuple(reply.trailers)] += 1
    metadata = ((b"initial", b"1"),) if messages else ()
    trailers = () if method == "unknown" else ((b"trailing-bin", b"AP8"),)
    assert seen == {(tuple(messages), code, text, metadata, trailers): 60}


@pytest.mark.parametrize("streamed", [False, True])
async def test_an_answer_above_the_limit_is_refused_with_the_limit_and_its_option(
    egress: Egress, streamed: bool
) -> None:
    """The relay holds each message as a whole, also those of a stream. The limit is the same for both egresses."""
    size = LIMIT + 1
    if streamed:
        outgoing = egress.open(b"/test/produce", [], timeout=60, encoding=b"")
        await outgoing.write(framing.pack(b"%d" % size))
    else:
        outgoing = egress.send(b"/test/produce", [], framing.pack(b"%d" % size), timeout=60, encoding=b"")
    messages, reply, _ = await outcome(outgoing)
    assert (messages, reply.code) == ([], Code.RESOURCE_EXHAUSTED)
    assert "--max-message" in reply.text
    assert str(LIMIT) in reply.text
    outgoing.cancel()


async def test_messages_pass_in_both_directions(egress: Egress) -> None:
    """A request of one message passes, and so does a stream whose messages are answered one by one."""
    frame = framing.pack(b"hello")
    assert (await outcome(egress.send(b"/test/echo", [], frame, timeout=20, encoding=b"")))[:1] == ([b"hello"],)
    outgoing = egress.open(b"/test/echo", [], timeout=20, encoding=b"")
    await outgoing.write(framing.pack(b"first"))
    answer = await outgoing.first()
    assert not isinstance(answer, Reply)
    assert await answer.read() == framing.pack(b"first")
    for number in range(20):
        await outgoing.write(framing.pack(b"%d" % number))
        assert await answer.read() == framing.pack(b"%d" % number)
    outgoing.end()
    assert await answer.read() is None
    assert (await answer.result()).code == Code.OK


async def test_a_call_without_messages_is_answered(egress: Egress) -> None:
    """A request without a message is passed on, and so is an answer without one."""
    outgoing = egress.open(b"/test/echo", [], timeout=20, encoding=b"")
    outgoing.end()
    messages, reply, _ = await outcome(outgoing)
    assert (messages, reply.code) == ([], Code.OK)


@pytest.mark.parametrize("one", [True, False])
async def test_a_cancellation_reaches_the_server(egress: Egress, server: Server, one: bool) -> None:
    """The task that waits for the answer of a cancelled call gets `Lost`."""
    before = server.cancelled
    if one:
        outgoing = egress.send(b"/test/hang", [], framing.pack(b""), timeout=None, encoding=b"")
    else:
        outgoing = egress.open(b"/test/hang", [], timeout=None, encoding=b"")
        await outgoing.write(framing.pack(b""))
    waiting = asyncio.ensure_future(outgoing.first())
    await asyncio.sleep(0.1)  # the server has got it
    outgoing.cancel()
    with pytest.raises(Lost):
        await waiting
    await until(lambda: server.cancelled == before + 1, why="the server notices")


@pytest.mark.parametrize("how", ["cancel", "deadline"])
async def test_the_end_of_a_call_reaches_a_server_that_reads_nothing(egress: Egress, server: Server, how: str) -> None:
    """When a call is cancelled, or its deadline passes, while its writer waits because all buffers on the way are full,
    the call ends at the server and the writer gets `Lost`."""
    before, hanging = server.cancelled, server.hanging
    outgoing = egress.open(b"/test/hang", [], timeout=None if how == "cancel" else 3, encoding=b"")
    written = 0

    async def write() -> None:
        nonlocal written
        while True:
            await outgoing.write(framing.pack(bytes(64 << 10)))
            written += 1

    writing, waiting = asyncio.ensure_future(write()), asyncio.ensure_future(outgoing.first())
    await until(lambda: server.hanging == hanging + 1, why="the server has the call")
    seen = same = 0
    while same < 10:  # looks at which nothing more was written
        await asyncio.sleep(0.02)
        seen, same = written, same + 1 if written == seen else 0
    if how == "cancel":
        assert not writing.done()
        outgoing.cancel()
        with pytest.raises(Lost):
            await waiting
    else:
        reply = await waiting
        assert isinstance(reply, Reply)
        assert reply.code == Code.DEADLINE_EXCEEDED
    with pytest.raises(Lost):
        await writing
    await until(lambda: server.cancelled == before + 1, why="the server notices")


async def test_a_deadline_reaches_the_server(egress: Egress, server: Server) -> None:
    before = server.cancelled
    outgoing = egress.send(b"/test/hang", [], framing.pack(b""), timeout=0.3, encoding=b"")
    _, reply, _ = await outcome(outgoing)
    assert reply.code == Code.DEADLINE_EXCEEDED
    await until(lambda: server.cancelled == before + 1, why="the server notices")


async def test_a_connection_for_calls_alone_may_break(server: Server) -> None:
    """If calls have an address of their own and a connection to this address breaks, the call is `Lost`, although the
    link still reaches its server. An UNAVAILABLE that the server sends itself is its answer."""
    async with Proxy(server.port) as proxy:
        calls = proxy.endpoint.removeprefix("http://")
        table = Table(Board.private(1), Journal(None))
        link = Link(f"127.0.0.1:{server.port}", table, hang_timeout=9, max_message=LIMIT, calls=calls)
        await link.connected()
        egress = GrpcEgress(link, max_message=LIMIT)
        _, reply, _ = await outcome(egress.send(b"/test/busy", [], framing.pack(b""), timeout=20))
        assert (reply.code, reply.text) == (Code.UNAVAILABLE, "too busy")
        before = server.hanging
        waiting = asyncio.ensure_future(egress.send(b"/test/hang", [], framing.pack(b""), timeout=20).first())
        await until(lambda: server.hanging == before + 1, why="the server has the call")
        proxy.cut()
        with pytest.raises(Lost):
            await waiting
        await link.connected()
        await link.close()
