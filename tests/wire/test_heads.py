"""The shortcut past the parser for heads that were seen before. It gives the parser's results for any bytes and any
repetition."""

import asyncio
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mesh.wire import budget, client, clientconnection, heads, server, serverconnection
from tests.support.examples import examples
from tests.support.wire import ECHO, Outcome, Transport, chunked, deliver, frames, request, run

LIMIT = 1000


class Forgetful(heads.Memo):
    """A memory that keeps nothing, so every head goes to the parser."""

    def worth(self, key):
        return False


# --- requests ---


def outcomes_of_requests(reads, memo):
    """Returns what a server makes of the given reads, in order. If a connection ends, the next read arrives on a new
    one."""
    seen = []

    def handler(one):
        timed = one.deadline is not None
        seen.append((one.method, list(one.headers), one.encoding, one.frame, timed, one.keep_alive))
        one.headers.append((b"harm", b"done"))  # a handler may do so with its own list
        one.reply(one.frame or frames(b"stream"))

    async def scenario():
        serving = server.Server(handler, max_message=LIMIT)
        serving.memo = memo
        written = []
        transport = None
        for read in reads:
            if transport is None or transport.closed or transport.eof:
                transport = Transport()
                connection = serverconnection.ServerConnection(serving, asyncio.get_running_loop())
                connection.connection_made(transport)
            deliver(connection, read)
            await asyncio.sleep(0)
            written.append((transport.written, transport.closed, transport.eof))
        return seen, written

    return run(scenario())


LINES = [
    b"host: test",
    b"content-type: application/grpc",
    b"Content-Type: application/grpc+proto",
    b"te: trailers",
    b"a: b",
    b"A: b c",
    b"grpc-encoding: gzip",
    b"grpc-timeout: 5S",
    b"grpc-timeout: 7m",
    b"grpc-timeout: never!",
    b"content-length: 10",
    b"content-length: 11",
    b"content-length: 010",
    b"content-length:10",
    b"Content-Length: 10",
    b"content-length: +10",
    b"transfer-encoding: chunked",
    b"connection: close",
    b"expect: 100-continue",
    b" folded",
    b"x: content-length: 10",
]
FRAME = frames(b"hello")
BODIES = [
    FRAME,
    FRAME + b"\n",
    FRAME[:-1],
    b"",
    b"a\r\n" + FRAME + b"\r\n0\r\n\r\n",
    b"A\r\n" + FRAME + b"\r\n0\r\n\r\n",
    b"0a\r\n" + FRAME + b"\r\n0\r\n\r\n",
    b"0xa\r\n" + FRAME + b"\r\n0\r\n\r\n",
    b"+a\r\n" + FRAME + b"\r\n0\r\n\r\n",
    b"a \r\n" + FRAME + b"\r\n0\r\n\r\n",
    b"a;x=y\r\n" + FRAME + b"\r\n0\r\n\r\n",
    b"a\r\n" + FRAME + b"\r\n0\r\nt: u\r\n\r\n",
    b"a\r\n" + FRAME + b"\r\n0\r\n\r\nP",
    b"a\r\n" + FRAME + b"\r\n0\r\n",
    b"5\r\n" + FRAME[:5] + b"\r\n5\r\n" + FRAME[5:] + b"\r\n0\r\n\r\n",
    b"9\r\n" + FRAME + b"\r\n0\r\n\r\n",
    b"a\r\n\2" + FRAME[1:] + b"\r\n0\r\n\r\n",
]
READS = st.builds(
    lambda line, lines, body: b"\r\n".join([line, *lines, b"", body]),
    st.sampled_from(
        [b"POST /a/b HTTP/1.1"] * 6 + [b"POST /a/b HTTP/1.0", b"GET /a HTTP/1.1", b"\r\nPOST /a/b HTTP/1.1"]
    ),
    st.lists(st.sampled_from(LINES), max_size=5).map(lambda lines: [LINES[1], *lines])
    | st.lists(st.sampled_from(LINES), max_size=6),
    st.sampled_from(BODIES),
)


@settings(max_examples=examples(150), deadline=None)
@given(st.lists(READS, min_size=1, max_size=3), st.lists(st.integers(0, 2), min_size=4, max_size=10))
@example(
    [request(FRAME), request(frames(b"other")), request(FRAME, headers=[(b"grpc-timeout", b"1S")])], [0, 0, 0, 1, 2, 2]
)
@example(
    [request(FRAME, chunks=[]), request(FRAME, chunks=[]).replace(b"host", b"content-length: 30\r\nhost")], [0, 0, 0, 1]
)
def test_requests_are_the_same_with_and_without_a_memory(reads, order):
    reads = [reads[number % len(reads)] for number in order]
    assert outcomes_of_requests(reads, heads.Memo()) == outcomes_of_requests(reads, Forgetful())


def test_a_request_that_came_twice_is_recognised_with_another_message_and_another_time_out():
    memo = heads.Memo()
    reads = [
        request(frames(b"%d" % number), headers=[(b"grpc-timeout", b"%dm" % number), (b"a", b"b")])
        for number in range(5)
    ]
    for form in (reads, [read.replace(b"a: b", b"c: d") for read in reads]):
        seen, _ = outcomes_of_requests(form, memo)
        assert [frame for _, _, _, frame, _, _ in seen] == [frames(b"%d" % number) for number in range(5)]
    assert len(memo) == 2
    for key, known in memo.items():
        assert b"grpc-timeout" not in key
        assert known.method == ECHO


@pytest.mark.parametrize("chunks", [None, []], ids=["content-length", "one chunk"])
def test_a_request_that_fills_one_read_is_recognised(chunks, monkeypatch):
    """A request of some hundred KB that arrives in one read is recognised like a small one."""
    monkeypatch.setattr(sys.modules[__name__], "LIMIT", 1 << 20)
    memo = heads.Memo()
    messages = [bytes([number]) * (200_000 + number) for number in range(4)]
    monkeypatch.setattr(memo, "missed", 9)
    seen, _ = outcomes_of_requests([request(frames(message), chunks=chunks) for message in messages], memo)
    assert [frame for _, _, _, frame, _, _ in seen] == [frames(message) for message in messages]
    assert (len(memo), memo.missed) == (1, 0)


# --- replies ---


def outcomes_of_replies(reads, memo):
    """Returns what a client makes of the given reads, in order, each as the reply to a separate call."""

    async def scenario():
        pool = client.Pool("unix:/nowhere", max_message=LIMIT)
        pool.heads, pool.tails = memo(), memo()
        outcomes = []
        for read in reads:
            if not pool.statistics().idle:
                connection = clientconnection.ClientConnection(pool, LIMIT, 8)
                connection.connection_made(Transport())
                pool._connections.add(connection)
                pool.release(connection)
            outcome = Outcome()
            pool.send(ECHO, [], FRAME, outcome)
            deliver(connection, read)
            if connection._exchange is not None:
                connection.transport.closed = True
                connection.connection_lost(None)
            got = await outcome.get()
            taken = None
            if isinstance(got, client.ReplyStream):
                taken = []
                try:
                    while (frame := await got.read()) is not None:
                        taken.append(frame)
                    got = await got.result()
                except client.Lost as lost:
                    got = lost
            outcomes.append((str(got), taken, pool.statistics().idle))
            if isinstance(got, client.Reply):
                got.headers.append((b"harm", b"done"))  # a caller may do so with its own lists
                got.trailers.append((b"harm", b"done"))
        pool.close()
        return outcomes

    return run(scenario())


REPLIES = st.builds(
    lambda line, lines, body, trailers: b"\r\n".join([line, *lines, b"", body + b"0", *trailers, b"", b""]),
    st.sampled_from([b"HTTP/1.1 200 OK"] * 6 + [b"HTTP/1.1 503 No", b"HTTP/1.0 200 OK", b"HTTP/1.1 100 Go on"]),
    st.lists(
        st.sampled_from(
            [b"mesh-load: 1", b"A: b", b"date: today", b"connection: close", b"grpc-encoding: gzip", b"grpc-status: 0"]
        ),
        max_size=3,
    ).map(lambda lines: [b"content-type: application/grpc", b"transfer-encoding: chunked", *lines]),
    st.sampled_from(
        [
            chunked(FRAME, []),
            chunked(FRAME, [3]),
            chunked(FRAME + FRAME, []),
            chunked(FRAME[:-1], []),
            b"",
            b"0xa\r\n" + FRAME + b"\r\n",
            b"a\r\n" + FRAME,
            b"a;x\r\n" + FRAME + b"\r\n",
        ]
    ),
    st.lists(
        st.sampled_from([b"grpc-status: 0", b"Grpc-Status: 0", b"grpc-status: 5", b"grpc-message: no", b"t: u", b""]),
        max_size=3,
    ).map(lambda lines: [b"grpc-status: 0", *lines])
    | st.lists(st.sampled_from([b"grpc-status: 0", b"grpc-status: 7", b"t: u"]), max_size=2),
)


@settings(max_examples=examples(150), deadline=None)
@given(st.lists(REPLIES, min_size=1, max_size=3), st.lists(st.integers(0, 2), min_size=4, max_size=10))
def test_replies_are_the_same_with_and_without_a_memory(reads, order):
    reads = [reads[number % len(reads)] for number in order]
    assert outcomes_of_replies(reads, heads.Memo) == outcomes_of_replies(reads, Forgetful)


def test_a_reply_that_came_twice_is_recognised_with_another_message():
    reads = [
        b"HTTP/1.1 200 OK\r\ncontent-type: application/grpc\r\ntransfer-encoding: chunked\r\nmesh-load: 1\r\n\r\n"
        + chunked(frames(b"%d" % number), [])
        + b"0\r\ngrpc-status: 0\r\nt: u\r\n\r\n"
        for number in range(4)
    ]
    memos = []

    def memo():
        memos.append(heads.Memo())
        return memos[-1]

    outcomes = outcomes_of_replies(reads, memo)
    assert [len(each) for each in memos] == [1, 1]
    for number, (text, taken, idle) in enumerate(outcomes):
        assert repr(frames(b"%d" % number)) in text
        assert "(b'mesh-load', b'1')" in text
        assert "harm" not in text
        assert (taken, idle) == (None, 1)


def test_a_reply_that_fills_one_read_is_recognised_if_the_budget_has_room_for_it(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "LIMIT", 1 << 20)
    reads = [
        b"HTTP/1.1 200 OK\r\ncontent-type: application/grpc\r\ntransfer-encoding: chunked\r\n\r\n"
        + chunked(frames(bytes(200_000 + number)), [])
        + b"0\r\ngrpc-status: 0\r\n\r\n"
        for number in range(4)
    ]
    memos = []

    def memo():
        memos.append(heads.Memo())
        memos[-1].missed = 9
        return memos[-1]

    outcomes = outcomes_of_replies(reads, memo)
    assert [each.missed for each in memos] == [0, 9 + 2]  # of the tails, only the look-ups to learn are counted
    assert [idle for _, _, idle in outcomes] == [1] * 4
    monkeypatch.setattr(budget.UNBOUNDED, "replies", 100_000)
    assert ["RESOURCE_EXHAUSTED" in text or "code=8" in text for text, _, _ in outcomes_of_replies(reads, memo)] == [
        True
    ] * 4


# --- the memory itself ---


def test_only_what_comes_again_is_kept_and_never_too_much():
    memo = heads.Memo()
    for number in range(20_000):
        key = b"%d" % number
        assert not memo.worth(key)
        assert memo.worth(key)
        memo.keep(key, number)
        assert len(memo) <= 4096
        assert len(memo._seen) <= 8192
    assert not memo.worth(bytes(5000))
    assert not memo.worth(bytes(5000)), "the header is too long to keep"


def test_a_read_whose_body_is_shorter_or_longer_than_announced_is_left_to_the_parser():
    """A head with a length is only split if exactly that many bytes follow the head, whether the head is new or was
    split before. The number of heads that are kept is bounded."""
    whole = b"POST /s/M HTTP/1.1\r\ncontent-length: %d\r\nx: y" % len(FRAME)
    for _ in range(2):
        assert heads.split_request(whole + b"\r\n\r\n" + FRAME[:-1]) is None
        assert heads.split_request(whole + b"\r\n\r\n" + FRAME + b"P") is None
        assert heads.split_request(whole + b"\r\n\r\n" + FRAME) == (
            b"POST /s/M HTTP/1.1\r\nx: y",
            True,
            b"",
            FRAME,
        )
    for number in range(2000):
        assert heads.split_request(b"POST /s/M%d HTTP/1.1\r\ncontent-length: 1\r\n\r\nx" % number) is not None
    assert len(heads._cuts) <= 512


@pytest.mark.parametrize("digits", [b"", b"0x5", b"5;x", b"+5", b" 5", b"5 ", b"5_0", b"g", b"00000000f"])
def test_only_plain_sizes_of_chunks_are_recognised(digits):
    """A chunk whose size is not just a few hexadecimal digits is left to the parser."""
    head = b"POST /s/M HTTP/1.1\r\nhost: t\r\ntransfer-encoding: chunked\r\n\r\n"
    assert heads.split_request(head + digits + b"\r\nhello\r\n0\r\n\r\n") is None
    for good in (b"5", b"05", b"0005"):
        assert heads.split_request(head + good + b"\r\nhello\r\n0\r\n\r\n")
    assert heads.split_reply(b"HTTP/1.1 200 OK\r\n\r\n" + digits + b"\r\nhello\r\n0\r\n\r\n") is None


def test_if_every_head_is_new_the_memo_rests():
    memo = heads.Memo()
    reads = [request(FRAME, headers=[(b"trace", b"%d" % number)]) for number in range(300)]
    outcomes_of_requests(reads, memo)
    rest = memo.rest
    assert rest > 1000
    same = [request(FRAME)] * 5
    outcomes_of_requests(same, memo)
    assert memo.rest == rest - 5
    memo.rest = 0
    outcomes_of_requests(same, memo)
    assert len(memo) == 1
    assert memo.missed == 0
