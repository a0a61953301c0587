"""Calls of one message over the relay's own HTTP/2 connection to a real gRPC server, and the calls that go through the
other egress instead."""

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from mesh.envoy.egress import EgressMinder, EgressSettings
from mesh.envoy.egress import bootstrap as of_egress
from mesh.runtime.relay import directegress
from mesh.runtime.relay.directegress import Posted
from mesh.statuses import Code
from mesh.wire import framing
from mesh.wire.http2 import frames
from mesh.wire.pieces import ABOVE
from mesh.wire.reply import Lost, LostKind, Reply
from mesh.wire.streams import ReplyStream
from tests.support.direct import LIMIT, Direct
from tests.support.http2peer import Sink
from tests.support.http2server import GRPC, FrameServer, data, headers
from tests.support.waiting import until


class Server(grpc.GenericRpcHandler):
    """A real gRPC server. Its methods do what their names say."""

    def __init__(self, target: str, **options: int) -> None:
        self.hanging = self.cancelled = 0
        self.seen: dict[str, Any] = {}
        more = [(f"grpc.{name}", value) for name, value in options.items()]
        self.server = grpc.aio.server(options=[("grpc.max_receive_message_length", -1), *more])
        self.server.add_generic_rpc_handlers((self,))
        self.port = self.server.add_insecure_port(target)

    def service(self, details: Any) -> Any:
        method = details.method.rpartition("/")[2]
        if method == "several":
            return grpc.unary_stream_rpc_method_handler(self.several)
        handler = getattr(self, method, None)
        return None if handler is None else grpc.unary_unary_rpc_method_handler(handler)

    async def echo(self, request: bytes, context: Any) -> bytes:
        self.seen = {"remaining": context.time_remaining(), **dict(context.invocation_metadata())}
        await context.send_initial_metadata((("initial", "1"),))
        context.set_trailing_metadata((("trailing-bin", b"\0\xff"),))
        return request

    async def refuse(self, _: bytes, context: Any) -> None:
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not ñow", (("trailing", "2"),))

    async def several(self, request: bytes, _: Any) -> AsyncIterator[bytes]:
        for _ in range(3):
            yield request

    async def hang(self, *_: Any) -> None:
        self.hanging += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.hanging -= 1
            self.cancelled += 1


@contextlib.asynccontextmanager
async def proxy(server: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    """Runs an Envoy that speaks HTTP/2 in front of a server. Yields its address."""

    def bootstrap(settings: EgressSettings) -> dict[str, Any]:
        made = of_egress(settings)
        manager = made["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
        manager["codec_type"] = "HTTP2"
        del manager["http_protocol_options"]
        return made

    with tempfile.TemporaryDirectory(prefix="mesh-", dir="/tmp") as folder:
        settings = EgressSettings(listen=f"{folder}/s", admin_socket=f"{folder}/admin", server=server)
        minder = EgressMinder(settings, run_dir=Path(folder))
        with monkeypatch.context() as patched:
            patched.setattr("mesh.envoy.egress.bootstrap", bootstrap)
            await minder.start()
        yield f"unix:{settings.listen}"
        await minder.stop()


@pytest.fixture(params=["tcp", "unix", "behind Envoy"])
async def server(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Server, str]]:
    path = f"unix:{tmp_path}/s"
    server = Server(path if request.param == "unix" else "127.0.0.1:0")
    await server.server.start()
    address = path if request.param == "unix" else f"127.0.0.1:{server.port}"
    if request.param == "behind Envoy":
        async with proxy(address, monkeypatch) as before:
            yield server, before
    else:
        yield server, address
    await server.server.stop(None)


@pytest.fixture
async def direct(server: tuple[Server, str]) -> AsyncIterator[Direct]:
    direct = Direct(server[1])
    await direct.connected()
    yield direct
    await direct.egress.close()


@pytest.mark.parametrize("size", [0, 1, 60_000, 100_000, ABOVE - framing.PREFIX])
async def test_a_call_and_its_reply_pass_unchanged(direct: Direct, server: tuple[Server, str], size: int) -> None:
    message = bytes(index & 0xFF for index in range(size))
    reply = await direct.answer("echo", message)
    assert reply == Reply(0, "", framing.pack(message), [(b"initial", b"1")], [(b"trailing-bin", b"AP8")])
    assert server[0].seen["name"] == "value"
    assert server[0].seen["name-bin"] == b"\0\xff"
    assert direct.other.posted == 0


async def test_many_calls_share_the_connection(direct: Direct) -> None:
    messages = [b"%d" % number * 1000 for number in range(200)]
    replies = await asyncio.gather(*(direct.answer("echo", message) for message in messages))
    assert [reply.frame for reply in replies] == [framing.pack(message) for message in messages]
    assert direct.other.posted == 0


async def test_a_failure_passes_with_its_text_and_metadata(direct: Direct) -> None:
    reply = await direct.answer("refuse")
    assert (reply.code, reply.text, reply.frame) == (Code.FAILED_PRECONDITION, "not ñow", None)
    assert (b"trailing", b"2") in [*reply.headers, *reply.trailers]
    assert (await direct.answer("missing")).code == Code.UNIMPLEMENTED


async def test_a_reply_of_several_messages_is_resumed_as_a_stream(direct: Direct) -> None:
    sink, sent = direct.post("several", b"m" * 100_000)
    await until(lambda: sink.outcome is not None)
    assert isinstance(sink.outcome, ReplyStream)
    outgoing = direct.egress.resume(sent, sink.outcome, b"/m", (), b"", timeout=None, encoding=b"")
    answer: Any = await outgoing.first()
    frames = [await answer.read() for _ in range(4)]
    assert frames == [framing.pack(b"m" * 100_000)] * 3 + [None]
    assert (await answer.result()).code == 0


async def test_a_cancellation_reaches_the_server(direct: Direct, server: tuple[Server, str]) -> None:
    sink, sent = direct.post("hang")
    await until(lambda: server[0].hanging == 1)
    sent.cancel()
    await until(lambda: server[0].cancelled == 1)
    assert sink.outcome is None


async def test_a_deadline_reaches_the_server(direct: Direct, server: tuple[Server, str]) -> None:
    await direct.answer("echo")
    assert server[0].seen["remaining"] is None
    sink, _ = direct.post("echo", timeout=30)
    await until(lambda: sink.outcome is not None)
    assert 0 < server[0].seen["remaining"] <= 30


async def test_other_calls_go_through_the_other_egress(direct: Direct) -> None:
    _, sent = direct.post("echo", bytes(ABOVE))
    assert (sent, direct.other.posted) == (None, 1)
    direct.egress.open(b"/m", (), timeout=None, encoding=b"")
    direct.egress.send(b"/m", (), b"", timeout=None, encoding=b"")
    assert (direct.other.opened, direct.other.sent) == (1, 1)


async def test_an_invalid_method_is_refused(direct: Direct) -> None:
    with pytest.raises(ValueError, match="not the name of a method"):
        direct.post("a b")


async def test_calls_beyond_those_that_the_server_takes_at_once_go_the_other_way() -> None:
    server = Server("127.0.0.1:0", max_concurrent_streams=3)
    await server.server.start()
    direct = Direct(f"127.0.0.1:{server.port}")
    await direct.connected()
    sent = [direct.post("hang")[1] for _ in range(5)]
    assert [one is None for one in sent] == [False, False, False, True, True]
    sent[0].cancel()
    assert direct.post("hang")[1] is not None
    await direct.egress.close()
    await server.server.stop(None)


async def test_calls_without_a_connection_go_the_other_way_until_there_is_one(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/s"
    direct = Direct(address)
    await direct.egress.up()
    assert direct.post("echo")[1] is None
    server = Server(address)
    await server.server.start()
    await until(lambda: direct.post("echo")[1] is not None)
    await direct.egress.close()
    await server.server.stop(None)


async def test_after_a_restart_of_the_server_calls_are_direct_again(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/s"
    server = Server(address)
    await server.server.start()
    direct = Direct(address)
    await direct.connected()
    sink, sent = direct.post("hang")
    await until(lambda: server.hanging == 1)
    connection = direct.egress._connection
    assert connection is not None
    connection.transport.abort()
    await server.server.stop(None)
    await until(lambda: sink.outcome is not None)
    assert isinstance(sink.outcome, Lost)
    assert sink.outcome.kind is LostKind.SENT
    outgoing = direct.egress.resume(sent, sink.outcome, b"/m", (), b"", timeout=None, encoding=b"")
    with pytest.raises(Lost):
        await outgoing.first()
    assert direct.other.sent == 0  # the server may have seen the call
    server = Server(address)
    await server.server.start()
    await until(lambda: direct.post("echo")[1] is not None)
    await direct.egress.close()
    await server.server.stop(None)


async def test_a_call_that_was_not_sent_is_sent_the_other_way() -> None:
    direct = Direct("127.0.0.1:1")
    lost: Any = Lost(LostKind.UNSENT, "refused")
    exchange: Any = None
    direct.egress.resume(exchange, lost, b"/m", (), b"", timeout=None, encoding=b"")
    assert direct.other.sent == 1


async def test_a_server_that_does_not_speak_http2_gets_all_calls_the_other_way() -> None:
    connected = 0

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connected
        connected += 1
        writer.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")
        await writer.drain()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    direct = Direct(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    await direct.egress.up()
    await until(lambda: not direct.egress.connecting)
    for _ in range(10):
        assert direct.post("echo")[1] is None
        await asyncio.sleep(0)
    assert connected == 1  # and no attempt for each call
    await direct.egress.close()
    server.close()


async def test_a_server_that_breaks_the_protocol_gets_its_next_calls_the_other_way() -> None:
    """Such a server would break the protocol again, and each direct call would be lost."""
    server = FrameServer(lambda stream: frames.frame(frames.PUSH_PROMISE, frames.END_HEADERS, stream, bytes(4)))
    direct = Direct(await server.start())
    await direct.connected()
    sink, sent = direct.post("echo")
    assert sent is not None
    await until(lambda: sink.outcome is not None)
    assert isinstance(sink.outcome, Lost)
    for _ in range(10):
        assert direct.post("echo")[1] is None
        assert not direct.egress.connecting
    assert server.connections == 1
    await direct.egress.close()
    await server.stop()


async def test_a_server_that_hangs_up_after_its_settings_is_not_called_again_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(directegress, "_PAUSES", (60.0, 60.0))
    server = FrameServer(lambda _: None)
    direct = Direct(await server.start())
    await direct.connected()
    sink, _ = direct.post("echo")
    await until(lambda: sink.outcome is not None)
    for _ in range(10):
        assert direct.post("echo")[1] is None
        assert not direct.egress.connecting
    assert server.connections == 1
    await direct.egress.close()
    await server.stop()


async def test_the_close_ends_calls_of_a_connection_that_takes_no_new_ones() -> None:
    goaway = frames.frame(frames.GOAWAY, 0, 0, frames.MAX_STREAM.to_bytes(4, "big") + bytes(4))
    server = FrameServer(lambda stream: goaway if stream == 1 else b"")
    direct = Direct(await server.start())
    await direct.connected()
    sink, _ = direct.post("echo")
    await until(lambda: not direct.egress.connected)
    await until(lambda: direct.post("echo")[1] is not None)
    assert sink.outcome is None
    await direct.egress.close()
    await until(lambda: isinstance(sink.outcome, Lost))
    await server.stop()


async def test_a_server_that_accepts_and_says_nothing_gets_its_calls_the_other_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(directegress, "_CONNECTING", 0.05)
    server = FrameServer(lambda _: b"", greeting=b"")
    direct = Direct(await server.start())
    await direct.egress.up()
    await until(lambda: server.connections == 1)
    assert direct.post("echo")[1] is None
    await until(lambda: not server.open)
    assert direct.post("echo")[1] is None
    await direct.egress.close()
    await server.stop()


async def test_the_close_ends_a_connection_that_has_not_begun() -> None:
    server = FrameServer(lambda _: b"", greeting=b"")
    direct = Direct(await server.start())
    await direct.egress.up()
    await until(lambda: server.connections == 1)
    await direct.egress.close()
    await until(lambda: not server.open)
    await server.stop()


async def test_a_reply_in_one_piece_has_the_limit_of_messages() -> None:
    """If the other egress takes no pieces, its limit of messages also holds for direct calls, although the caller takes
    pieces."""
    server = FrameServer(lambda stream: headers(stream, *GRPC) + data(stream, framing.prefix(LIMIT + 1)))
    direct = Direct(await server.start(), pieces=False)
    await direct.connected()
    sink = Sink(takes_pieces=True)
    direct.post("echo", sink=sink)
    await until(lambda: sink.outcome is not None)
    assert isinstance(sink.outcome, Reply)
    assert sink.outcome.code == Code.RESOURCE_EXHAUSTED
    assert "--max-message" in sink.outcome.text
    await direct.egress.close()
    await server.stop()


async def test_a_posted_call_writes_nothing_more() -> None:
    posted = Posted(Lost(LostKind.SENT, "gone"))
    posted.end()
    posted.cancel()
    with pytest.raises(RuntimeError):
        await posted.write(b"")
