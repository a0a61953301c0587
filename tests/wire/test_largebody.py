"""Large messages that are read past the parser, with the same outcome as if the parser had read them.

A reader past the parser cuts some reads short. The comparison with the parser therefore uses the reads as they were
actually made: if bytes are damaged, it matters whether a message and the bytes after the message arrive in one read.
"""

import asyncio
import dataclasses
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mesh.wire import (
    client,
    clientconnection,
    connection,
    framing,
    largebody,
    plainconnection,
    plainserver,
    server,
    serverconnection,
)
from mesh.wire.budget import Budget
from tests.support.examples import examples
from tests.support.wire import ECHO, Outcome, Transport, cut, deliver, deliver_one, frames, request, run

LIMIT = 2000


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Makes messages of a few bytes count as large."""
    monkeypatch.setattr(connection, "_WITH_HEAD", 1)
    monkeypatch.setattr(clientconnection, "_WITH_HEAD", 1)
    monkeypatch.setattr(largebody, "MAPPED", 300)


def large(least):
    """Sets the size from which messages are read past the parser."""
    largebody.LEAST = least


NEVER = 1 << 40
_LEAST = largebody.LEAST


@pytest.fixture(autouse=True)
def restored():
    """Restores the size from which messages are read past the parser."""
    yield
    largebody.LEAST = _LEAST


def pieces(data, sizes, heads):
    """Returns a body in chunks, including the end of the body. `heads` are the formats of the chunks' heads."""
    written = []
    for number, size in enumerate([*sizes, len(data)]):
        piece, data = data[:size], data[size:]
        if piece:
            written.append(heads[number % len(heads)] % len(piece) + b"\r\n" + piece + b"\r\n")
    return b"".join(written)


LONG = st.integers(0, 480).map(lambda size: b"ab\r\n" * size)
MESSAGES = st.lists(st.one_of(st.binary(max_size=8), LONG), max_size=3)
SIZES = st.lists(st.integers(1, 400), max_size=12)
HEADS = st.lists(st.sampled_from([b"%x", b"%X", b"%04x", b"%x;a=b", b"%x ", b"0x%x", b"-%x"]), min_size=1, max_size=3)
PLAIN = st.just([b"%x"])
CUTS = st.lists(st.integers(0, 5000), max_size=12)
DAMAGE = st.none() | st.tuples(st.integers(0, 5000), st.integers(0, 255))


def damaged(data, damage):
    """Returns the bytes with one byte replaced."""
    if damage is None:
        return data
    place, byte = damage
    place %= len(data)
    return data[:place] + bytes([byte]) + data[place + 1 :]


def without_the_parsers_words(text):
    """Returns an error's text, or the reply that contains the error, without the parser's description of malformed
    bytes. The description differs if the parser did not see all bytes of a chunk."""
    if isinstance(text, str):
        return re.sub(r"not HTTP/1.1: .*", "not HTTP/1.1", text)
    return re.sub(rb"not valid HTTP/1.1: [^\r]*\r\ngrpc-status-details-bin: [^\r]*", b"not valid HTTP/1.1", text)


async def delivered(connected, data, made):
    """Gives bytes to a connection in reads, with one turn of the event loop after each."""
    while data and not (made and connected.transport.closed):
        data = data[deliver_one(connected, data, made) :]
        await asyncio.sleep(0)


def memory(size, begun):
    """Returns memory for a message, with the bytes that have already been read."""
    made = bytearray(b"?" * size)
    made[: len(begun)] = begun
    return memoryview(made)


async def served(reads):
    """Returns the reads as they were made, what the handler saw of them, its answers, and how the connection ended."""
    made, seen, tasks, budget = [], [], set(), Budget(1 << 20)

    async def echo(one):
        taken = []
        seen.append((one.method, taken))
        try:
            while (frame := await one.read()) is not None:
                taken.append(frame)
            one.reply(frames(b"".join(taken)))
        except Exception as error:
            taken.append(type(error))

    def handle(one):
        tasks.add(asyncio.ensure_future(echo(one)))

    connection = serverconnection.ServerConnection(
        server.Server(handle, max_message=LIMIT, budget=budget, memory=memory), asyncio.get_running_loop()
    )
    connection.connection_made(transport := Transport())
    for read in reads:
        await delivered(connection, read, made)
        await asyncio.sleep(0)
    before = None
    while before != (before := (len(transport.written), [len(taken) for _, taken in seen])):
        for _ in range(5):  # what does not come then does not come at all
            await asyncio.sleep(0)
    ends = transport.closed, transport.eof, transport.paused
    transport.closed = True
    connection.connection_lost(None)
    await asyncio.gather(*tasks)
    assert budget.held == 0
    return made, (seen, without_the_parsers_words(transport.written), ends)


@settings(max_examples=examples(300), deadline=None)
@given(MESSAGES, SIZES, st.one_of(PLAIN, HEADS), CUTS, DAMAGE, st.booleans(), st.integers(1, 60))
@example([b"x" * 500], [], [b"%x"], [], None, True, 8)
@example([b"x" * 500], [100, 100], [b"%x", b"%x;a=b"], [200], None, True, 8)
def test_however_a_request_comes_a_server_sees_the_same(messages, sizes, heads, cuts, damage, chunks, least):
    """A server that reads large messages past its parser behaves like a server that does not, whatever the chunks, the
    cuts between reads, and the damage. The handler gets the same messages, the answers are the same, and the connection
    ends in the same way."""
    body = frames(*messages)
    if chunks:
        one = request(b"", chunks=[])[:-5] + pieces(body, sizes, heads) + b"0\r\n\r\n"
    else:
        one = request(body)
    reads = cut(damaged(one + request(frames(b"next"), headers=[(b"a", b"b")]), damage), cuts)

    large(least)
    made, outcome = run(served(reads))
    large(NEVER)
    assert (made, outcome) == run(served(made))


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/grpc\r\ntransfer-encoding: chunked\r\n\r\n"


async def answered(reads):
    """Makes a call whose reply comes in the given reads. Returns the reads as they were made, the outcome, and the
    state of the connection."""
    budget = Budget(1 << 20)
    pool = client.Pool("unix:/nowhere", max_connections=1, max_message=LIMIT, budget=budget)
    connection = clientconnection.ClientConnection(pool, LIMIT, 60)
    connection.connection_made(Transport())
    pool._connections.add(connection)
    pool.release(connection)
    outcome = Outcome()
    pool.send(ECHO, [], frames(b"hello"), outcome)
    made, taken = [], []

    async def take(stream):
        try:
            while (frame := await stream.read()) is not None:
                taken.append(frame)
            taken.append(await stream.result())
        except client.Lost as lost:
            taken.append((lost.kind, without_the_parsers_words(lost.why)))

    task = None
    for read in reads:
        if connection._exchange is not None:
            await delivered(connection, read, made)
        if task is None and outcome.done and isinstance(got := await outcome.get(), client.ReplyStream):
            task = asyncio.ensure_future(take(got))
        for _ in range(3):
            await asyncio.sleep(0)
    idle = pool.statistics().idle, connection.transport.closed
    connection.transport.closed = True
    connection.connection_lost(None)
    got = await outcome.get()
    if isinstance(got, client.ReplyStream):
        await (task or take(got))
    elif isinstance(got, client.Reply) and got.frame is not None:  # a stream would give the same
        taken += [got.frame, dataclasses.replace(got, frame=None)]
    else:
        taken.append((got.kind, without_the_parsers_words(got.why)) if isinstance(got, client.Lost) else got)
    assert budget.held == 0 or not idle[0]  # a stream that is lost counts the last message taken until it is dropped
    return made, (taken, idle)


@settings(max_examples=examples(300), deadline=None)
@given(MESSAGES, SIZES, st.one_of(PLAIN, HEADS), CUTS, DAMAGE, st.integers(1, 60))
@example([b"x" * 500], [], [b"%x"], [], None, 8)
@example([b"x" * 500], [100, 100], [b"%x", b"%x;a=b"], [140], None, 8)
@example([b"x" * 500], [], [b"%x"], [140], (67, ord("!")), 8)  # transfer-encoding:!chunked
def test_however_a_reply_comes_a_client_sees_the_same(messages, sizes, heads, cuts, damage, least):
    """A client that reads large messages past its parser reports the same outcome as a client that does not, and keeps
    or ends its connection in the same cases."""
    reply = HEAD + pieces(frames(*messages), sizes, heads) + b"0\r\ngrpc-status: 0\r\nt: 1\r\n\r\n"
    reads = cut(damaged(reply, damage), cuts)

    large(least)
    made, outcome = run(answered(reads))
    large(NEVER)
    assert (made, outcome) == run(answered(made))


def test_a_large_frame_is_neither_copied_nor_zeroed_but_its_bytes_are_those_that_came():
    """The frame that a handler gets is the memory into which the large message was read, without a copy."""
    large(16)

    async def scenario():
        calls = []
        connection = serverconnection.ServerConnection(
            server.Server(calls.append, max_message=LIMIT), asyncio.get_running_loop()
        )
        connection.connection_made(Transport())
        frame = framing.pack(bytes(range(256)) * 4)
        deliver(connection, request(frame)[:300])
        reader = connection.transport.protocol
        memory = reader._memory
        deliver(connection, request(frame)[300:])
        assert calls[0].frame is memory
        assert memory == frame
        assert connection.transport.protocol is connection
        assert reader._memory == b""  # uvloop's transport still refers to the reader

    run(scenario())


async def posted(reads):
    """Returns the reads as they were made, the requests that a server of plain HTTP hands to its handler, and the bytes
    that the server writes."""
    made, seen, budget = [], [], Budget(1 << 20)

    def handle(one):
        seen.append((one.head.target, b"".join(one.pieces)))
        one.answer(200, one.pieces)

    serving = plainserver.PlainServer(
        handle, lambda error: (error.reason.http, (), error.text.encode()), max_message=LIMIT, budget=budget, min_rate=0
    )
    connected = plainconnection.PlainConnection(serving, asyncio.get_running_loop())
    connected.connection_made(transport := Transport())
    for read in reads:
        await delivered(connected, read, made)
        await asyncio.sleep(0)
    ends = transport.closed, transport.eof
    transport.closed = True
    connected.connection_lost(None)
    assert budget.held == 0
    return made, (seen, transport.written, ends)


@settings(max_examples=examples(200), deadline=None)
@given(st.lists(st.one_of(LONG, st.integers(500, 600).map(lambda size: b"abcd" * size)), max_size=3), CUTS, DAMAGE)
def test_however_a_body_comes_a_server_of_plain_http_hands_out_the_same(bodies, cuts, damage):
    """A server of plain HTTP that reads large bodies past its parser hands over the same requests and gives the same
    answers as a server that does not, even for bodies above its limit."""
    data = b"".join(
        b"POST /a HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        for body in (*bodies, b"next")
    )
    reads = cut(damaged(data, damage), cuts)

    large(8)
    made, outcome = run(posted(reads))
    large(NEVER)
    assert (made, outcome) == run(posted(made))


def test_a_sink_learns_that_a_large_reply_has_begun_before_it_gets_the_reply():
    """The sink of a large reply is told once that the reply has begun, and so may free the request. The sink of a small
    reply is not told."""
    large(16)

    class Noting(Outcome):
        begun = 0

        def on_beginning(self):
            assert not self.done
            self.begun += 1

    async def scenario():
        pool = client.Pool("unix:/nowhere", max_message=LIMIT)
        connection = clientconnection.ClientConnection(pool, LIMIT, 8)
        connection.connection_made(Transport())
        pool._connections.add(connection)
        pool.release(connection)
        for message, begun in ((b"x" * 500, 1), (b"x", 0)):
            outcome = Noting()
            pool.send(ECHO, [], frames(b"request"), outcome)
            reply = HEAD + pieces(frames(message), [], [b"%x"]) + b"0\r\ngrpc-status: 0\r\n\r\n"
            deliver(connection, reply[:300])
            assert outcome.begun == begun
            if reply[300:]:
                deliver(connection, reply[300:])
            assert (await outcome.get()).frame == frames(message)
            assert outcome.begun == begun
        pool.close()

    run(scenario())
