"""Server and client together over real sockets: every shape of call, cancellations, large messages, and the limits of
the pool."""

import asyncio
import os
import socket
import stat
import sys

import pytest

from mesh.identity import Identity
from mesh.statuses import Code
from mesh.wire import call, client, framing, server
from mesh.wire.budget import Budget
from tests.support.authority import Authority, Mounted
from tests.support.waiting import until
from tests.support.wire import ECHO, Outcome, fill, frames

MESSAGE = 8 << 20


class Service:
    """A handler with a method for each shape of call, which records its calls."""

    def __init__(self):
        self.calls = []
        self.tasks = set()
        self.cancelled = 0

    def __call__(self, one):
        self.calls.append(one)
        method = getattr(self, one.method.rpartition(b"/")[2].decode())
        made = method(one)
        if made is not None:
            task = asyncio.ensure_future(self._guard(made))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def _guard(self, made):
        try:
            await made
        except call.CallCancelled:
            self.cancelled += 1

    def Echo(self, one):
        return self._echo(one) if one.frame is None else one.reply(one.frame, one.headers, [(b"t", b"1")])

    async def _echo(self, one):
        taken = []
        while (frame := await one.read()) is not None:
            taken.append(frame[5:])
        one.reply(frames(b"".join(taken)), one.headers, [(b"t", b"1")])

    def Fail(self, one):
        one.fail(Code.NOT_FOUND, "no such thing: ü", one.headers)

    def Hang(self, one):
        one.on_cancel(self._cancel)

    def _cancel(self):
        self.cancelled += 1

    async def Count(self, one):
        """Streams the requested number of messages of the requested size."""
        frame = await one.read()
        count, size = map(int, frame[5:].split())
        for number in range(count):
            await one.write(frames(b"%d" % number * size))
        one.finish(0, "", [(b"t", b"1")])

    async def Chat(self, one):
        """Answers messages in full duplex."""
        one.start([(b"h", b"1")])
        while (frame := await one.read()) is not None:
            await one.write(frames(b"re: " + frame[5:]))
        one.finish(Code.ABORTED, "enough", [(b"t", b"1")])

    async def Early(self, one):
        """Answers before the request has ended."""
        await one.read()
        one.fail(Code.FAILED_PRECONDITION, "no more")

    def ReadNothing(self, one):
        one.start()
        one.on_cancel(self._cancel)


def method(name):
    return b"/test.Service/" + name.encode()


@pytest.fixture(params=["unix", "tcp", "tls"])
async def pair(request, tmp_path):
    service = Service()
    serving = server.Server(service, max_message=MESSAGE)
    identity = Identity(Mounted.of(tmp_path / "tls", Authority()).path) if request.param == "tls" else None
    if request.param == "unix":
        await serving.listen_unix(tmp_path / "socket")
        address = f"unix:{tmp_path / 'socket'}"
    else:
        address = f"127.0.0.1:{await serving.listen_tcp('127.0.0.1', 0, identity=identity)}"
    pool = client.Pool(address, max_connections=8, connect_timeout=5, max_message=MESSAGE, identity=identity)
    yield service, serving, pool
    pool.abort()
    await serving.close(5)
    assert serving.statistics().connections == 0


async def test_unary_calls_with_metadata_reuse_one_connection(pair):
    service, serving, pool = pair
    for number in range(3):
        message = b"hello %d" % number
        reply = await pool.call(method("Echo"), [(b"a", b"1"), (b"b-bin", b"AAA")], frames(message), timeout=10)
        assert (reply.code, reply.frame) == (0, frames(message))
        assert reply.headers == [(b"a", b"1"), (b"b-bin", b"AAA")]
        assert reply.trailers == [(b"t", b"1")]
    reply = await pool.call(method("Fail"), [(b"a", b"1")], frames(b""), timeout=10)
    assert (reply.code, reply.text, reply.headers) == (Code.NOT_FOUND, "no such thing: ü", [(b"a", b"1")])
    assert serving.statistics().connections == pool.statistics().connections == pool.statistics().idle == 1
    assert serving.statistics().calls == pool.statistics().calls == 4
    assert all(one.deadline is not None for one in service.calls)


async def test_the_sink_is_never_called_from_within_send(pair):
    _, _, pool = pair
    await pool.call(method("Echo"), [], frames(b""), timeout=10)
    outcome = Outcome()
    pool.send(method("Echo"), [], frames(b"a"), outcome)
    assert not outcome.done
    assert (await outcome.reply()).frame == frames(b"a")


@pytest.mark.parametrize("size", [100_000, MESSAGE])
async def test_large_messages_travel_both_ways(pair, size):
    _, _, pool = pair
    message = os.urandom(1000) * (size // 1000) + bytes(size % 1000)
    for _ in range(2):
        reply = await pool.call(method("Echo"), [], frames(message), timeout=30)
        assert reply.frame == frames(message)
    assert pool.statistics().connections == 1


async def test_a_message_above_the_limit_is_answered_while_it_is_still_sent(pair):
    _, _, pool = pair
    reply = await pool.call(method("Echo"), [], frames(bytes(MESSAGE + 1)), timeout=30)
    assert reply.code == Code.RESOURCE_EXHAUSTED
    request = pool.open(method("Echo"), [])
    await request.write(frames(b"small"))
    try:
        await request.write(frames(bytes(MESSAGE + 1)))
    except client.Lost:
        pass  # the answer may arrive before the request is completely written
    reply = await asyncio.wait_for(request.first(), 30)
    assert reply.code == Code.RESOURCE_EXHAUSTED


async def test_many_calls_at_once_each_get_their_own_reply(pair):
    _, serving, pool = pair
    outcomes = []
    for number in range(8):
        outcomes.append(Outcome())
        pool.send(method("Echo"), [], frames(b"%d" % number), outcomes[-1])
    assert [(await each.reply()).frame for each in outcomes] == [frames(b"%d" % number) for number in range(8)]

    async def caller(name):
        for number in range(20):
            message = b"%s %d" % (name, number)
            assert (await pool.call(method("Echo"), [], frames(message), timeout=10)).frame == frames(message)

    await asyncio.gather(*(caller(b"%d" % number) for number in range(8)))
    assert serving.statistics().connections <= 8
    assert serving.statistics().errors == 0


async def test_client_streaming(pair):
    _, _, pool = pair
    request = pool.open(method("Echo"), [(b"a", b"1")], timeout=b"10S")
    for number in range(5):
        await request.write(frames(b"%d" % number))
    request.end()
    reply = await asyncio.wait_for(request.first(), 10)
    assert (reply.frame, reply.headers) == (frames(b"01234"), [(b"a", b"1")])
    with pytest.raises(RuntimeError):
        await request.write(frames(b""))
    await until(lambda: pool.statistics().idle == 1)


@pytest.mark.parametrize(("count", "size"), [(0, 1), (3, 1), (200, 50_000)])
async def test_server_streaming_with_backpressure(pair, count, size):
    _, _, pool = pair
    outcome = Outcome()
    pool.send(method("Count"), [], frames(b"%d %d" % (count, size)), outcome)
    stream = await outcome.stream()
    for number in range(count):
        assert await asyncio.wait_for(stream.read(), 10) == frames(b"%d" % number * size)
    assert await stream.read() is None
    result = await stream.result()
    assert (result.code, result.trailers) == (0, [(b"t", b"1")])
    assert pool.statistics().idle == 1


async def test_a_reader_that_stalls_and_catches_up_all_the_time_is_fast(pair, monkeypatch):
    """If a connection's buffer is full at every look, the bytes that the peer has read between two looks count too. A
    peer that reads fast is not disconnected while memory is short."""
    _, serving, pool = pair
    monkeypatch.setattr(server, "_LOOK", 1000.0)  # the test calls the check itself
    monkeypatch.setattr(serving, "budget", budget := Budget())
    budget.short = True
    outcome = Outcome()
    pool.send(method("Count"), [], frames(b"%d %d" % (200, 100_000)), outcome)
    stream = await outcome.stream()
    (connection,) = serving._connections
    looks = 0
    for _ in range(20):
        for _ in range(10):
            assert await asyncio.wait_for(stream.read(), 10) is not None
        if connection.stalled:
            looks += 1
            assert connection.fast_enough(100_000, 0), f"look {looks}"
    assert looks > 1
    assert await stream.read() is None


async def test_full_duplex_ping_pong(pair):
    _, _, pool = pair
    request = pool.open(method("Chat"), [])
    stream = await asyncio.wait_for(request.first(), 10)
    assert stream.headers == [(b"h", b"1")]
    for number in range(20):
        await request.write(frames(b"%d" % number))
        assert await asyncio.wait_for(stream.read(), 10) == frames(b"re: %d" % number)
    request.end()
    assert await stream.read() is None
    result = await stream.result()
    assert (result.code, result.text, result.trailers) == (Code.ABORTED, "enough", [(b"t", b"1")])
    await until(lambda: pool.statistics().idle == 1)


async def test_a_reply_before_the_end_of_its_request_is_heard(pair):
    _service, _, pool = pair
    request = pool.open(method("Early"), [])
    await request.write(frames(b"a"))
    reply = await asyncio.wait_for(request.first(), 10)
    assert (reply.code, reply.text) == (Code.FAILED_PRECONDITION, "no more")
    with pytest.raises(client.Lost):
        await request.write(frames(b"b"))
    assert (await pool.call(method("Echo"), [], frames(b"a"), timeout=10)).code == 0


async def test_a_writer_stops_when_its_peer_reads_nothing_and_its_cancel_arrives(pair, monkeypatch):
    monkeypatch.setattr(server, "_LOOK", 0.05)
    service, _, pool = pair
    request = pool.open(method("ReadNothing"), [])
    await request.first()
    written = 0

    async def write():
        nonlocal written
        while True:
            await request.write(frames(bytes(100_000)))
            written += 1

    writing = asyncio.ensure_future(write())
    before = -1
    while before != written:  # until nothing more is written for a while
        before = written
        await asyncio.sleep(0.05)
    assert written < 500
    assert not writing.done()
    request.cancel()
    with pytest.raises(client.Lost):
        await writing
    await until(lambda: service.cancelled == 1, why="the handler is cancelled, though its connection is not read")


async def test_a_cancel_overtakes_what_the_peer_has_not_read(pair, monkeypatch):
    """The caller cancels a call whose handler reads nothing, just after the buffers on the way have filled up and
    before a writer has to wait. The handler is cancelled although the bytes in the buffers remain unread."""
    monkeypatch.setattr(server, "_LOOK", 0.05)
    service, _, pool = pair
    request = pool.open(method("ReadNothing"), [])
    await request.first()
    await fill(request)
    assert not request.exchange.connection.stalled
    request.cancel()
    await until(lambda: service.cancelled == 1, why="the handler is cancelled, though its connection is not read")


@pytest.mark.parametrize("pair", ["unix", "tcp"], indirect=True)
async def test_a_caller_that_half_closes_and_reads_nothing_is_gone(pair):
    """A caller ends its side of the connection while the handler waits for the caller to read."""
    service, serving, pool = pair
    request = b"POST %b HTTP/1.1\r\nhost: a\r\ncontent-type: application/grpc\r\ncontent-length: 13\r\n\r\n%b"
    caller = connected(pool.address)
    try:
        caller.sendall(request % (method("Count"), frames(b"900 9999")))
        await until(lambda: any(one.stalled for one in serving._connections), why="the answer is not read")
        caller.shutdown(socket.SHUT_WR)
        await until(lambda: service.cancelled == 1, why="the handler is cancelled")
    finally:
        caller.close()


@pytest.mark.parametrize("kind", ["unix", "tcp"])
async def test_a_server_that_half_closes_and_reads_nothing_is_gone(tmp_path, kind):
    """A server ends its side of the connection without an answer, while the client waits for the server to read."""
    path = str(tmp_path / "socket")
    listening = socket.create_server(("127.0.0.1", 0)) if kind == "tcp" else socket.socket(socket.AF_UNIX)
    with listening:
        if kind == "unix":
            listening.bind(path)
            listening.listen()
        pool = client.Pool(f"unix:{path}" if kind == "unix" else f"127.0.0.1:{listening.getsockname()[1]}")
        request = pool.open(method("Count"), [])
        accepted, _ = await asyncio.to_thread(listening.accept)
        with accepted:
            writing = asyncio.ensure_future(flooded(request))
            exchange = request.exchange
            await until(
                lambda: exchange.connection is not None and exchange.connection.stalled, why="the request is not read"
            )
            accepted.shutdown(socket.SHUT_WR)
            with pytest.raises(client.Lost):
                await asyncio.wait_for(writing, 10)
    pool.abort()


@pytest.mark.parametrize("pair", ["tcp", "tls"], indirect=True)
async def test_a_silent_peer_is_asked_whether_it_still_exists(pair):
    """The kernel probes a silent connection after a minute at most, not after two hours, which is its default."""
    _, serving, pool = pair
    await pool.call(method("Echo"), [], frames(b"a"), timeout=10)
    (connection,) = serving._connections
    accepted = connection.transport.get_extra_info("socket")
    assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) <= 60


def connected(address):
    """Returns a socket that is connected to a server."""
    if address.startswith("unix:"):
        made = socket.socket(socket.AF_UNIX)
        made.connect(address.removeprefix("unix:"))
        return made
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)))


async def flooded(request):
    """Writes messages until the call is lost."""
    while True:
        await request.write(frames(bytes(100_000)))


_FLOOD = """
import asyncio, sys
from mesh.wire import client
from tests.support.wire import fill

async def main():
    request = client.Pool(sys.argv[1]).open(b"/test.Service/ReadNothing", [])
    await request.first()
    await fill(request)
    print("full", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("pair", ["unix", "tcp"], indirect=True)
async def test_the_death_of_a_client_overtakes_what_the_peer_has_not_read(pair, monkeypatch):
    """A client's process is killed when the buffers on the way to a handler that reads nothing are full."""
    monkeypatch.setattr(server, "_LOOK", 0.05)
    service, _, pool = pair
    argv = sys.executable, "-P", "-c", _FLOOD, pool.address
    child = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE)
    try:
        assert await asyncio.wait_for(child.stdout.readline(), 60) == b"full\n"
        assert not service.cancelled
    finally:
        child.kill()
        await child.wait()
    await until(lambda: service.cancelled == 1, why="the handler is cancelled, though its connection is not read")


@pytest.mark.parametrize("way", ["unary", "stream", "call"])
async def test_a_cancel_reaches_the_handler(pair, way):
    service, serving, pool = pair
    outcome = Outcome()
    if way == "unary":
        exchange = pool.send(method("Hang"), [], frames(b""), outcome)
    elif way == "stream":
        exchange = pool.open(method("Hang"), [])
    else:
        task = asyncio.ensure_future(pool.call(method("Hang"), [], frames(b""), timeout=60))
    await until(lambda: serving.statistics().calls_in_flight == 1)
    if way == "call":
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        exchange.cancel()
    await until(lambda: service.cancelled == 1, why="the handler is cancelled")
    assert service.calls[-1].cancelled
    assert not outcome.done
    assert pool.statistics().connections == 0


async def test_a_call_that_takes_too_long_is_cancelled(pair):
    service, _, pool = pair
    await pool.call(method("Echo"), [], frames(b""), timeout=10)  # opens the connection first, which takes its own time
    with pytest.raises(TimeoutError):
        await pool.call(method("Hang"), [], frames(b""), timeout=0.05)
    await until(lambda: service.cancelled == 1)


async def test_closing_the_server_answers_what_is_in_flight_and_cuts_the_rest(pair):
    service, serving, pool = pair
    hanging, held = Outcome(), Outcome()
    pool.send(method("Hang"), [], frames(b""), hanging)
    pool.send(method("Hang"), [], frames(b""), held)
    await until(lambda: serving.statistics().calls_in_flight == 2)
    closing = asyncio.ensure_future(serving.close(0.3))
    await asyncio.sleep(0)
    service.calls[1].reply(frames(b"late"))
    assert (await held.reply()).frame == frames(b"late")
    await closing
    assert (await hanging.lost()).kind is client.LostKind.SENT
    assert service.cancelled == 1
    refused = Outcome()
    pool.send(method("Echo"), [], frames(b""), refused)
    assert (await refused.lost()).kind is client.LostKind.UNSENT


# --- the pool's bounds ---


async def test_beyond_its_connections_a_call_is_lost_unsent(pair):
    _service, serving, pool = pair
    for _ in range(8):
        pool.send(method("Hang"), [], frames(b""), Outcome())
    outcome = Outcome()
    pool.send(method("Echo"), [], frames(b""), outcome)
    assert not outcome.done
    lost = await outcome.lost()
    assert lost.kind is client.LostKind.UNSENT
    assert "8 connections" in lost.why
    await until(lambda: serving.statistics().calls_in_flight == 8)


async def test_the_connection_used_last_is_used_first(pair):
    service, _serving, pool = pair
    await asyncio.gather(*(pool.call(method("Echo"), [], frames(b""), timeout=10) for _ in range(4)))
    used = set()
    for _ in range(5):
        await pool.call(method("Echo"), [], frames(b""), timeout=10)
        used.add(service.calls[-1]._connection)
    assert len(used) == 1


async def test_a_connection_known_to_be_closed_is_not_used(pair):
    service, _serving, pool = pair
    await pool.call(method("Echo"), [], frames(b""), timeout=10)
    service.calls[-1]._connection.transport.abort()
    await until(lambda: pool.statistics().connections == 0)
    assert (await pool.call(method("Echo"), [], frames(b"a"), timeout=10)).frame == frames(b"a")


async def test_connections_idle_for_long_are_closed(pair):
    _, serving, pool = pair
    await asyncio.gather(*(pool.call(method("Echo"), [], frames(b""), timeout=10) for _ in range(3)))
    assert pool.statistics().idle == 3
    for connection in pool._idle[:2]:
        connection.idle_since -= 10
    pool._sweep(asyncio.get_running_loop())
    assert pool.statistics().connections == 1
    await until(lambda: serving.statistics().connections == 1)


async def test_closing_the_pool_lets_calls_in_flight_end_and_takes_no_more(pair):
    service, serving, pool = pair
    held, late = Outcome(), Outcome()
    await pool.call(method("Echo"), [], frames(b""), timeout=10)
    pool.send(method("Hang"), [], frames(b""), held)
    await until(lambda: serving.statistics().calls_in_flight == 1)
    waiting = Outcome()
    pool.send(method("Echo"), [], frames(b""), waiting)  # the connection is still being opened
    pool.close()
    pool.send(method("Echo"), [], frames(b""), late)
    assert (await late.lost()).kind is (await waiting.lost()).kind is client.LostKind.UNSENT
    service.calls[-1].reply(frames(b"a"))
    assert (await held.reply()).frame == frames(b"a")
    await until(lambda: pool.statistics().connections == 0)


async def test_aborting_the_pool_loses_what_is_in_flight(pair):
    _, serving, pool = pair
    outcome = Outcome()
    pool.send(method("Hang"), [], frames(b""), outcome)
    await until(lambda: serving.statistics().calls_in_flight == 1)
    pool.abort()
    assert (await outcome.lost()).kind is client.LostKind.SENT


async def test_an_address_where_nobody_listens_loses_calls_unsent(tmp_path):
    for address in (f"unix:{tmp_path}/nobody", "127.0.0.1:1"):
        pool = client.Pool(address, max_connections=2)
        outcomes = [Outcome(), Outcome()]
        for outcome in outcomes:
            pool.send(ECHO, [], frames(b""), outcome)
        for outcome in outcomes:
            lost = await outcome.lost()
            assert lost.kind is client.LostKind.UNSENT
            assert lost.why.startswith("cannot connect: ")
            assert address.removeprefix("unix:") not in lost.why, "callers may read this"
            assert f"{address}: cannot connect" in str(lost), "logs have the address"
        request = pool.open(ECHO, [])
        with pytest.raises(client.Lost):
            await request.write(frames(b""))
        with pytest.raises(client.Lost):
            await pool.call(ECHO, [], frames(b""), timeout=5)
        assert pool.statistics() == client.PoolStatistics(connections=0, idle=0, connecting=0, waiting=0, calls=4)


async def test_a_call_cancelled_before_it_has_a_connection_leaves_it_to_the_next(pair):
    _, _, pool = pair
    outcome, other = Outcome(), Outcome()
    first = pool.send(method("Echo"), [], frames(b"a"), outcome)
    first.cancel()
    pool.send(method("Echo"), [], frames(b"b"), other)
    assert pool.statistics().connecting == 1
    assert (await other.reply()).frame == frames(b"b")
    assert not outcome.done


async def test_connecting_is_bounded(monkeypatch):
    pool = client.Pool("127.0.0.1:1", connect_timeout=0.02)
    monkeypatch.setattr(
        type(asyncio.get_running_loop()), "create_connection", lambda *arguments, **options: asyncio.sleep(60)
    )
    outcome = Outcome()
    pool.send(ECHO, [], frames(b""), outcome)
    lost = await outcome.lost()
    assert lost.kind is client.LostKind.UNSENT
    assert "within 0.02 s" in lost.why


async def test_the_socket_is_private_and_a_successor_takes_it_over(tmp_path):
    path = tmp_path / "socket"
    old = server.Server(lambda one: one.reply(frames(b"old")))
    await old.listen_unix(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    pool = client.Pool(f"unix:{path}")
    assert (await pool.call(ECHO, [], frames(b""), timeout=5)).frame == frames(b"old")
    new = server.Server(lambda one: one.reply(frames(b"new")))
    await new.listen_unix(path)
    await old.close(0)
    await until(lambda: pool.statistics().connections == 0)
    assert (await pool.call(ECHO, [], frames(b""), timeout=5)).frame == frames(b"new")
    await new.close(0)
    assert list(tmp_path.iterdir()) == []


async def test_a_file_that_is_no_socket_is_left_alone(tmp_path):
    path = tmp_path / "socket"
    path.write_text("not a socket")
    with pytest.raises(OSError):
        await server.Server(lambda one: None).listen_unix(path)
    assert path.read_text() == "not a socket"


def test_a_frame_is_made_of_its_message():
    assert framing.pack(b"abc") == b"\0\0\0\0\3abc"
