"""The client without a socket, byte by byte: replies cut in any way, and invalid replies."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.statuses import Code
from mesh.wire import budget as budgets
from mesh.wire import client, clientconnection, framing
from tests.support.examples import examples
from tests.support.waiting import until
from tests.support.wire import ECHO, Outcome, Transport, chunked, cut, deliver, frames, run

LIMIT = 1000
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/grpc\r\n"
CHUNKED = b"transfer-encoding: chunked\r\n"


class Connected:
    """A pool with one connection without a socket."""

    def __init__(self, **options):
        self.budget = options.setdefault("budget", budgets.Budget(1 << 20))
        self.pool = client.Pool("unix:/nowhere", max_connections=1, max_message=LIMIT, **options)
        self.connection = clientconnection.ClientConnection(self.pool, LIMIT, 60)
        self.transport = Transport()
        self.connection.connection_made(self.transport)
        self.pool._connections.add(self.connection)
        self.pool.release(self.connection)

    def send(self, **options):
        outcome = Outcome()
        self.exchange = self.pool.send(ECHO, [(b"a", b"b")], frames(b"hello"), outcome, **options)
        return outcome

    async def feed(self, *pieces):
        for piece in pieces:
            if self.connection._exchange is None:
                break
            await until(lambda: not self.transport.paused, interval=0)
            deliver(self.connection, piece)
            await asyncio.sleep(0)

    def lose(self, error=None):
        self.transport.closed = True
        self.connection.connection_lost(error)

    @property
    def reusable(self):
        return self.pool.statistics().idle == 1 and not self.transport.closed


def reply_bytes(messages, *, code=0, text=b"", headers=(), trailers=(), sizes=()):
    lines = b"".join(b"%b: %b\r\n" % header for header in headers)
    status = b"grpc-status: %d\r\n" % code + (b"grpc-message: %b\r\n" % text if text else b"")
    last = b"".join(b"%b: %b\r\n" % trailer for trailer in trailers)
    return HEAD + lines + CHUNKED + b"\r\n" + chunked(frames(*messages), sizes) + b"0\r\n" + status + last + b"\r\n"


async def whole(outcome):
    """Returns the outcome of a call as code, text, frames, headers and trailers. For a lost call, returns how it was
    lost, and the frames that came before if a reply had begun."""
    got = await outcome.get()
    if isinstance(got, client.Lost):
        return got.kind
    if isinstance(got, client.Reply):
        return got.code, got.text, [] if got.frame is None else [got.frame], got.headers, got.trailers
    taken = []
    try:
        while (frame := await got.read()) is not None:
            taken.append(frame)
        reply = await got.result()
    except client.Lost as lost:
        return lost.kind, taken
    assert reply.headers == got.headers
    return reply.code, reply.text, taken, reply.headers, reply.trailers


METADATA = st.lists(
    st.tuples(st.sampled_from([b"mesh-load", b"a", b"key-bin"]), st.sampled_from([b"", b"x", b'a b, c="d"'])),
    max_size=3,
)


@settings(max_examples=examples(200), deadline=None)
@given(
    st.lists(st.binary(max_size=30), max_size=4),
    st.sampled_from(
        [(0, b"", ""), (5, b"not here", "not here"), (13, b"gr%C3%B6%C3%9Fe %zz", "größe %zz"), (99, b"", "")]
    ),
    METADATA,
    METADATA,
    st.lists(st.integers(1, 20), max_size=6),
    st.lists(st.integers(0, 5000), max_size=10),
)
def test_however_the_bytes_are_cut_the_reply_is_the_same(messages, status, headers, trailers, sizes, places):
    code, raw, text = status
    data = reply_bytes(messages, code=code, text=raw, headers=headers, trailers=trailers, sizes=sizes)

    async def scenario():
        connected = Connected()
        for pieces in ([data], cut(data, places)):
            outcome = connected.send()
            taking = asyncio.ensure_future(whole(outcome))
            await connected.feed(*pieces)
            assert await taking == (
                code if code < 17 else Code.UNKNOWN,
                text,
                [framing.pack(message) for message in messages],
                headers,
                trailers,
            )
            assert outcome.calls == 1
            assert connected.reusable

    run(scenario())


@settings(max_examples=examples(200), deadline=None)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.builds(
            lambda place, noise, skip: (
                (data := reply_bytes([b"hello"], sizes=[3]))[: place % len(data)]
                + noise
                + data[place % len(data) + skip :]
            ),
            st.integers(0, 1000),
            st.binary(max_size=6),
            st.integers(0, 3),
        ),
    ),
    st.lists(st.integers(0, 5000), max_size=5),
)
def test_no_bytes_make_it_raise_and_every_call_has_one_outcome(data, places):
    async def scenario():
        connected = Connected()
        outcome = connected.send()
        await connected.feed(*cut(data, places))
        connected.connection.eof_received()
        connected.lose()
        await asyncio.wait_for(whole(outcome), 5)
        assert outcome.calls == 1
        assert connected.pool.statistics().connections == 0

    run(scenario())


async def test_a_request_is_written_in_one_piece_with_what_http_needs():
    connected = Connected()
    connected.send(timeout=b"5S", encoding=b"gzip")
    head, _, body = connected.transport.written.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"POST %b HTTP/1.1" % ECHO
    assert set(lines[1:]) == {
        b"host: localhost",
        b"content-type: application/grpc",
        b"te: trailers",
        b"content-length: 10",
        b"grpc-timeout: 5S",
        b"grpc-encoding: gzip",
        b"a: b",
    }
    assert body == frames(b"hello")


@pytest.mark.parametrize("method", [b"", b"a", b"/a b", b"/a\r\nx: y", b"/\xff"])
async def test_a_method_that_cannot_stand_in_a_head_is_a_value_error(method):
    pool = client.Pool("127.0.0.1:1")
    with pytest.raises(ValueError):
        pool.send(method, [], b"", Outcome())
    with pytest.raises(ValueError):
        pool.open(method, [])


async def test_a_time_out_or_encoding_that_cannot_stand_in_a_head_is_a_value_error():
    pool = client.Pool("127.0.0.1:1")
    with pytest.raises(ValueError):
        pool.send(ECHO, [], b"", Outcome(), timeout=b"1S\r\nx: y")
    with pytest.raises(ValueError):
        pool.send(ECHO, [], b"", Outcome(), encoding=b"a\n")


@pytest.mark.parametrize("address", ["", "localhost", "a:b", "a\r\nx:1", "a b:1", "host:99999"])
def test_an_address_that_is_none_is_a_value_error(address):
    with pytest.raises(ValueError):
        client.Pool(address)


async def test_trailers_only_is_a_reply_with_all_metadata_in_its_headers():
    connected = Connected()
    outcome = connected.send()
    await connected.feed(
        HEAD + b"content-length: 0\r\ngrpc-status: 14\r\ngrpc-message: not%20here\r\nmesh-not-here: 1\r\n\r\n"
    )
    reply = await outcome.reply()
    assert (reply.code, reply.text, reply.raw_text) == (Code.UNAVAILABLE, "not here", b"not%20here")
    assert reply.headers == [(b"mesh-not-here", b"1")]
    assert reply.trailers == []
    assert connected.reusable


async def test_what_belongs_to_the_transport_is_no_metadata():
    connected = Connected()
    outcome = connected.send()
    await connected.feed(reply_bytes([b"a"], headers=[(b"Date", b"today"), (b"Server", b"envoy"), (b"X-Mine", b"1")]))
    assert (await outcome.reply()).headers == [(b"x-mine", b"1")]


async def test_the_encoding_of_a_compressed_reply_is_told():
    connected = Connected()
    outcome = connected.send()
    await connected.feed(reply_bytes([b"a"], headers=[(b"grpc-encoding", b"gzip")]))
    assert (await outcome.reply()).encoding == b"gzip"


@pytest.mark.parametrize(
    ("head", "code"),
    [
        (b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 3\r\n\r\nabc", Code.UNAVAILABLE),
        (b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n", Code.UNIMPLEMENTED),
        (b"HTTP/1.1 400 Bad Request\r\n\r\nuntil the end", Code.INTERNAL),
        (b"HTTP/1.1 302 Found\r\ncontent-length: 0\r\n\r\n", Code.UNKNOWN),
        (b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 0\r\n\r\n", Code.UNKNOWN),
        (b"HTTP/1.1 503 No\r\ncontent-length: 0\r\ngrpc-status: 8\r\n\r\n", Code.RESOURCE_EXHAUSTED),
    ],
)
async def test_what_is_not_grpc_gets_the_status_that_grpc_maps_it_to(head, code):
    connected = Connected()
    outcome = connected.send()
    await connected.feed(head)
    assert (await outcome.reply()).code == code
    assert connected.transport.closed


async def test_an_informational_reply_is_passed_over():
    connected = Connected()
    outcome = connected.send()
    await connected.feed(b"HTTP/1.1 100 Continue\r\nx: y\r\n\r\n" + reply_bytes([b"a"]))
    reply = await outcome.reply()
    assert (reply.frame, reply.headers) == (frames(b"a"), [])


@pytest.mark.parametrize(
    ("data", "code"),
    [
        pytest.param(HEAD + CHUNKED + b"\r\n" + chunked(b"\2\0\0\0\0", []), Code.INTERNAL, id="unknown flag"),
        pytest.param(reply_bytes([b"abc"]).replace(b"\3abc", b"\4abc"), Code.INTERNAL, id="shorter than it says"),
        pytest.param(reply_bytes([bytes(LIMIT + 1)]), Code.RESOURCE_EXHAUSTED, id="too large"),
        pytest.param(reply_bytes([bytes(LIMIT + 1)])[:120], Code.RESOURCE_EXHAUSTED, id="too large, at its beginning"),
        pytest.param(HEAD + b"a: " + b"b" * 70_000, Code.RESOURCE_EXHAUSTED, id="endless header"),
        pytest.param(HEAD + CHUNKED + b"\r\n0\r\na: " + b"b" * 70_000, Code.RESOURCE_EXHAUSTED, id="endless trailer"),
    ],
)
async def test_a_broken_reply_is_a_failure_and_ends_the_connection(data, code):
    for pieces in (cut(data, [90]), cut(data, range(len(data)))[:300], [data]):
        if pieces == [data] and len(data) > 50_000:
            continue  # the bound applies to what comes after a read, however much that read brought
        connected = Connected()
        outcome = connected.send()
        taking = asyncio.ensure_future(whole(outcome))
        await connected.feed(*pieces, *([data[300:]] if len(pieces) == 300 else []))
        assert (await taking)[0] == code
        assert connected.transport.closed
        assert connected.pool.statistics().connections == 0


async def test_a_reply_without_a_status_is_an_unknown_failure():
    connected = Connected()
    outcome = connected.send()
    await connected.feed(HEAD + CHUNKED + b"\r\n" + chunked(frames(b"a"), []) + b"0\r\n\r\n")
    assert (await whole(outcome))[0] == Code.UNKNOWN


async def test_how_far_a_lost_call_had_come_is_told():
    connected = Connected()
    outcome = connected.send()
    connected.lose(ConnectionResetError("reset"))
    lost = await outcome.lost()
    assert lost.kind is client.LostKind.SENT
    assert "reset" in str(lost)

    connected = Connected()
    outcome = connected.send()
    await connected.feed(b"H")
    connected.lose()
    assert (await outcome.lost()).kind is client.LostKind.STARTED


async def test_a_reply_whose_head_has_come_is_a_stream_and_its_loss_comes_after_what_it_brought():
    connected = Connected()
    outcome = connected.send()
    await connected.feed(HEAD + CHUNKED + b"a: b\r\n\r\n")
    stream = await outcome.stream()
    assert stream.headers == [(b"a", b"b")]
    await connected.feed(chunked(frames(b"1", b"2"), []))
    connected.lose()
    assert [await stream.read(), await stream.read()] == [frames(b"1"), frames(b"2")]
    for waiting in (stream.read(), stream.result()):
        with pytest.raises(client.Lost) as lost:
            await waiting
        assert lost.value.kind is client.LostKind.STARTED


async def test_within_its_first_message_a_reply_is_not_a_stream_yet():
    connected = Connected()
    outcome = connected.send()
    data = reply_bytes([b"x" * 500], sizes=[100])
    await connected.feed(*cut(data, [200, 400, 500]))
    assert (await outcome.reply()).frame == frames(b"x" * 500)


async def test_reading_stops_while_nobody_takes_a_streamed_reply_and_the_next_call_reads_again():
    connected = Connected()
    connected.connection._limit = 1 << 20
    outcome = connected.send()
    await connected.feed(HEAD + CHUNKED + b"\r\n")
    stream = await outcome.stream()
    big = frames(bytes(300_000))
    deliver(connected.connection, chunked(big, []))
    assert connected.transport.paused
    assert await stream.read() == big
    assert not connected.transport.paused
    deliver(connected.connection, chunked(big, []) + b"0\r\ngrpc-status: 0\r\n\r\n")
    assert not connected.transport.paused
    assert connected.reusable
    assert await stream.read() == big
    assert await stream.read() is None


async def test_a_second_reply_that_nobody_asked_for_ends_the_connection_and_harms_no_call():
    connected = Connected()
    outcome = connected.send()
    await connected.feed(reply_bytes([b"a"], trailers=[(b"t", b"1")]) + reply_bytes([b"b"], headers=[(b"t", b"2")]))
    reply = await outcome.reply()
    assert (reply.frame, reply.trailers) == (frames(b"a"), [(b"t", b"1")])
    assert connected.transport.closed

    connected = Connected()
    deliver(connected.connection, b"HTTP/1.1 200 OK\r\n")
    assert connected.transport.closed
    assert connected.pool.statistics().connections == 0


async def test_a_peer_that_says_close_is_not_used_again():
    connected = Connected()
    outcome = connected.send()
    await connected.feed(reply_bytes([b"a"], headers=[(b"connection", b"close")]))
    assert (await outcome.reply()).frame == frames(b"a")
    assert not connected.reusable


async def test_a_cancelled_call_closes_its_connection_and_its_sink_hears_nothing():
    connected = Connected()
    outcome = connected.send()
    connected.exchange.cancel()
    assert connected.transport.aborted
    connected.exchange.cancel()
    connected.lose()
    await asyncio.sleep(0)
    assert not outcome.done
    assert connected.pool.statistics().connections == 0


async def test_a_cancel_after_the_end_harms_nobody():
    connected = Connected()
    outcome = connected.send()
    await connected.feed(reply_bytes([b"a"]))
    await outcome.reply()
    exchange = connected.exchange
    other = connected.send()
    exchange.cancel()
    await connected.feed(reply_bytes([b"b"]))
    assert (await other.reply()).frame == frames(b"b")


async def test_cancelling_a_reply_stream_ends_the_waits_for_it():
    connected = Connected()
    outcome = connected.send()
    await connected.feed(HEAD + CHUNKED + b"\r\n" + chunked(frames(b"1"), []))
    stream = await outcome.stream()
    assert await stream.read() == frames(b"1")
    waiting = [asyncio.ensure_future(stream.read()), asyncio.ensure_future(stream.result())]
    await asyncio.sleep(0)
    stream.cancel()
    assert connected.transport.aborted
    for each in waiting:
        with pytest.raises(client.Lost):
            await each


async def test_a_sink_that_raises_harms_no_connection():
    class Broken(Outcome):
        def on_reply(self, reply):
            raise ZeroDivisionError

    connected = Connected()
    connected.pool.send(ECHO, [], frames(b""), Broken())
    await connected.feed(reply_bytes([b"a"]))
    assert connected.reusable


async def test_a_reply_that_ends_before_its_request_ends_the_connection():
    connected = Connected()
    request = connected.pool.open(ECHO, [])
    await request.write(frames(b"1"))
    await connected.feed(HEAD + b"content-length: 0\r\ngrpc-status: 8\r\n\r\n")
    reply = await request.first()
    assert reply.code == Code.RESOURCE_EXHAUSTED
    assert connected.transport.closed
    with pytest.raises(client.Lost):
        await request.write(frames(b"2"))
    request.end()  # ending a request twice does nothing


async def test_a_write_waits_for_room_and_is_woken_by_a_loss():
    connected = Connected()
    request = connected.pool.open(ECHO, [])
    connected.connection.pause_writing()
    written = connected.transport.written
    writing = [asyncio.ensure_future(request.write(frames(b"%d" % number))) for number in range(2)]
    await asyncio.sleep(0)
    assert connected.transport.written == written
    connected.connection.resume_writing()
    await asyncio.gather(*writing)
    assert connected.transport.written == written + chunked(frames(b"0"), []) + chunked(frames(b"1"), [])
    connected.connection.pause_writing()
    waiting = asyncio.ensure_future(request.write(frames(b"3")))
    await asyncio.sleep(0)
    connected.lose()
    with pytest.raises(client.Lost) as lost:
        await waiting
    assert lost.value.kind is client.LostKind.SENT
    with pytest.raises(client.Lost):
        await request.first()
