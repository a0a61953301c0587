"""A real gRPC client that calls the server through a real Envoy, configured like a router's edge."""

import asyncio
import shutil
import struct
import tempfile
from pathlib import Path

import grpc
import grpc.aio
import pytest

from mesh.envoy import config, minder
from mesh.statuses import Code
from mesh.wire import call, server
from tests.support.waiting import until
from tests.support.wire import frames


class Service:
    """A service whose methods do what their names say."""

    def __init__(self):
        self.port = 0  # Envoy's
        self.calls = []
        self.whole = 0  # number of calls that were handed out together with their frame
        self.cancelled = []
        self.tasks = set()

    def __call__(self, one):
        self.calls.append(one)
        self.whole += one.frame is not None
        made = getattr(self, one.method.rpartition(b"/")[2].decode())(one)
        if made is not None:
            task = asyncio.ensure_future(made)
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def Echo(self, one):
        taken = []
        while (frame := await one.read()) is not None:
            taken.append(frame[5:])
        one.reply(frames(b"".join(taken)), [(b"initial", b"1")], [(b"trailing", b"2"), (b"raw-bin", b"AP8")])

    async def Fail(self, one):
        await one.read()
        one.fail(Code.NOT_FOUND, "no such model: größe 100%", [(b"initial", b"1")], [(b"trailing", b"2")])

    async def Chat(self, one):
        one.start([(b"initial", b"1")])
        try:
            while (frame := await one.read()) is not None:
                await one.write(frames(b"re: " + frame[5:]))
        except call.CallCancelled:
            self.cancelled.append(one)
            return
        one.finish(0, "", [(b"trailing", b"2")])

    def Hang(self, one):
        one.on_cancel(lambda: self.cancelled.append(one))


@pytest.fixture
async def edge():
    service = Service()
    serving = server.Server(service)
    run_dir = Path(tempfile.mkdtemp(prefix="mw", dir="/tmp"))
    socket = str(run_dir / "grpc")
    await serving.listen_unix(socket)
    settings = config.EnvoySettings(
        host="127.0.0.1",
        port=0,
        admin_socket=str(run_dir / "admin"),
        grpc_sockets=(socket,),
        inference_sockets=(socket,),
        rest_sockets=(socket,),
    )
    envoy = minder.Minder(settings, run_dir=run_dir)
    port = service.port = await envoy.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield service, channel
    await envoy.stop(0)
    await serving.close(5)
    assert serving.statistics().errors == serving.statistics().refused == 0
    shutil.rmtree(run_dir)


async def test_unary_calls_come_and_go_as_they_are(edge):
    service, channel = edge
    echo = channel.unary_unary("/test.Service/Echo")
    for message in (b"", b"hello", bytes(range(256)) * 8_000):
        one = echo(message, metadata=(("mm-model-id", "a/b"), ("key-bin", b"\0\xff")), timeout=20)
        assert await one == message
        assert dict(await one.initial_metadata())["initial"] == "1"
        trailing = dict(await one.trailing_metadata())
        assert trailing["trailing"] == "2"
        assert trailing["raw-bin"] == b"\0\xff"
        headers = dict(service.calls[-1].headers)
        assert headers.keys() == {b"mm-model-id", b"key-bin", b"user-agent"}
        assert headers[b"key-bin"].rstrip(b"=") == b"AP8"
        assert 5 < service.calls[-1].deadline - asyncio.get_running_loop().time() < 22  # the client rounds up


async def test_clients_may_send_large_frames(edge):
    """Envoy offers HTTP/2 clients the frame size from its settings, so that a large message needs fewer frames."""
    service, _ = edge
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04\x00" + bytes(4))  # no settings of ours
    head = await reader.readexactly(9)
    assert head[3] == 4  # SETTINGS
    found = await reader.readexactly(int.from_bytes(head[:3], "big"))
    offered = dict(struct.iter_unpack(">HI", found))
    assert offered[5] == 256 * 1024  # SETTINGS_MAX_FRAME_SIZE
    writer.close()


async def test_small_unary_calls_arrive_whole(edge):
    service, channel = edge
    echo = channel.unary_unary("/test.Service/Echo")
    for _ in range(20):
        await echo(b"hello", timeout=20)
    assert service.whole >= 15, "most calls arrive complete, or they would take the slow way of a stream"


async def test_a_failure_keeps_its_code_its_text_and_its_metadata(edge):
    _, channel = edge
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await channel.unary_unary("/test.Service/Fail")(b"", timeout=20)
    assert error.value.code() is grpc.StatusCode.NOT_FOUND
    assert error.value.details() == "no such model: größe 100%"
    assert dict(error.value.trailing_metadata())["trailing"] == "2"


async def test_client_streaming_arrives_in_order(edge):
    _, channel = edge

    async def messages():
        for number in range(5):
            yield b"%d" % number

    assert await channel.stream_unary("/test.Service/Echo")(messages(), timeout=20) == b"01234"


async def test_a_bidirectional_ping_pong_is_full_duplex(edge):
    _, channel = edge
    one = channel.stream_stream("/test.Service/Chat")(timeout=20)
    assert dict(await one.initial_metadata())["initial"] == "1"  # before the first message
    for number in range(20):
        await one.write(b"%d" % number)
        assert await one.read() == b"re: %d" % number
    await one.done_writing()
    assert await one.read() is grpc.aio.EOF
    assert await one.code() is grpc.StatusCode.OK
    assert dict(await one.trailing_metadata())["trailing"] == "2"


async def test_large_messages_stream_both_ways(edge):
    _, channel = edge
    one = channel.stream_stream("/test.Service/Chat")(timeout=30)
    big = bytes(2_000_000)
    for _ in range(5):
        await one.write(big)
        assert await one.read() == b"re: " + big
    await one.done_writing()
    assert await one.code() is grpc.StatusCode.OK


@pytest.mark.parametrize("shape", ["unary", "stream"])
async def test_a_cancel_reaches_the_handler(edge, shape):
    service, channel = edge
    if shape == "unary":
        one = channel.unary_unary("/test.Service/Hang")(b"", timeout=30)
    else:
        one = channel.stream_stream("/test.Service/Chat")(timeout=30)
        await one.write(b"")
        await one.read()
    await until(lambda: service.calls)
    one.cancel()
    await until(lambda: service.cancelled == service.calls)
    assert service.calls[0].cancelled


@pytest.mark.parametrize("how", ["cancel", "deadline"])
async def test_the_end_of_a_call_reaches_a_handler_that_reads_nothing(edge, how, monkeypatch):
    """A client cancels a call, or its deadline passes, while all buffers on the way to the handler are full."""
    monkeypatch.setattr(server, "_LOOK", 0.05)
    service, channel = edge
    one = channel.stream_unary("/test.Service/Hang")(timeout=30 if how == "cancel" else 3)
    written = 0

    async def write():
        nonlocal written
        while True:
            await one.write(bytes(100_000))
            written += 1

    writing = asyncio.ensure_future(write())
    seen = same = 0
    while same < 10 and not writing.done():  # looks at which nothing more was written
        await asyncio.sleep(0.02)
        seen, same = written, same + 1 if written == seen and service.calls else 0
    if how == "cancel":
        one.cancel()
    await asyncio.gather(one, writing, return_exceptions=True)
    await until(lambda: service.cancelled == service.calls, why="the handler is cancelled")


async def test_a_deadline_that_passes_at_the_client_reaches_the_handler(edge):
    service, channel = edge
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await channel.unary_unary("/test.Service/Hang")(b"", timeout=0.2)
    assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: service.cancelled == service.calls)


async def test_a_compressed_message_arrives_as_it_was_sent(edge):
    service, channel = edge
    message = b"tensor " * 10_000
    echo = channel.unary_unary("/test.Service/Echo")
    # The echo puts the packed bytes into a frame of its own, not marked as compressed.
    packed = await echo(message, compression=grpc.Compression.Gzip, timeout=20)
    assert len(packed) < len(message) / 10
    assert service.calls[-1].encoding == b"gzip"


async def test_many_calls_at_once_find_their_way(edge):
    _, channel = edge
    echo = channel.unary_unary("/test.Service/Echo")
    messages = [b"%d" % number for number in range(200)]
    assert await asyncio.gather(*(echo(message, timeout=30) for message in messages)) == messages
