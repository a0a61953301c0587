"""The server without a socket, byte by byte: requests cut in any way, and invalid requests."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.pb import details_pb2
from mesh.statuses import Code
from mesh.wire import budget as budgets
from mesh.wire import call, framing, metadata, server, serverconnection
from tests.support.examples import examples
from tests.support.waiting import until
from tests.support.wire import ECHO, Transport, chunked, cut, deliver, frames, parse_replies, request, run

LIMIT = 1000


class Served:
    """A connection of a server, without a socket. Every call is recorded, read to its end, and answered with its own
    frames."""

    def __init__(self, handler=None, **limits):
        self.calls = []  # tuples of method, headers, encoding and frames, for calls read to their end
        self.given = []  # the calls as the handler got them
        self.errors = []
        self.handler = handler or self.echo
        self.budget = limits.pop("budget", None) or budgets.Budget(1 << 20)
        limits = {"max_message": LIMIT, "budget": self.budget, **limits}
        self.server = server.Server(self._handle, **limits)
        self.connection = serverconnection.ServerConnection(self.server, asyncio.get_running_loop())
        self.transport = Transport()
        self.connection.connection_made(self.transport)
        self.tasks = set()

    def _handle(self, one):
        self.given.append(one)
        self.handler(one)

    def echo(self, one):
        task = asyncio.ensure_future(self._echo(one))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _echo(self, one):
        taken = []
        try:
            while (frame := await one.read()) is not None:
                taken.append(frame)
        except call.CallCancelled:
            return
        self.calls.append((one.method, one.headers, one.encoding, taken))
        one.reply(frames(b"".join(frame[5:] for frame in taken)), trailers=[(b"count", b"%d" % len(taken))])

    async def feed(self, *pieces):
        for piece in pieces:
            if not self.transport.paused:
                deliver(self.connection, piece)
            else:
                await until(lambda: not self.transport.paused, interval=0, why="reading goes on")
                deliver(self.connection, piece)
            await asyncio.sleep(0)

    async def settle(self):
        while self.tasks:
            await asyncio.sleep(0)
        for _ in range(3):
            await asyncio.sleep(0)

    @property
    def replies(self):
        return parse_replies(self.transport.written)

    @property
    def ended(self):
        return self.transport.closed or self.transport.eof

    def lose(self):
        self.transport.closed = True
        self.connection.connection_lost(None)


def answer_at_once(one):
    one.reply(one.frame if one.frame is not None else frames(b"stream"))


METADATA = st.lists(
    st.tuples(
        st.sampled_from([b"mm-model-id", b"user-agent", b"a", b"key-bin"]), st.sampled_from([b"", b"x", b'a b, c="d"'])
    ),
    max_size=4,
)
REQUESTS = st.lists(
    st.tuples(
        st.sampled_from([ECHO, b"/other.Service/Method"]),
        METADATA,
        st.sampled_from([b"", b"gzip"]),
        st.lists(st.binary(max_size=30), max_size=4),
        st.none() | st.lists(st.integers(1, 20), max_size=6),
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=examples(150), deadline=None)
@given(REQUESTS, st.lists(st.integers(0, 5000), max_size=12))
def test_however_the_bytes_are_cut_the_calls_are_the_same(requests, places):
    data = b"".join(
        request(
            frames(*messages),
            method=method,
            headers=[*headers, (b"X-Request-Id", b"1"), *([(b"Grpc-Encoding", encoding)] if encoding else [])],
            chunks=chunks,
        )
        for method, headers, encoding, messages, chunks in requests
    )

    async def scenario():
        served = Served()
        await served.feed(*cut(data, places))
        await served.settle()
        assert served.calls == [
            (method, headers, encoding, [framing.pack(message) for message in messages])
            for method, headers, encoding, messages, _ in requests
        ]
        assert [(reply.code, reply.body, reply.trailers) for reply in served.replies] == [
            (0, frames(b"".join(messages)), [(b"grpc-status", b"0"), (b"count", b"%d" % len(messages))])
            for *_, messages, _ in requests
        ]
        assert not served.transport.paused
        assert not served.ended
        assert served.budget.held == 0
        served.lose()

    run(scenario())


GOOD = request(frames(b"hello"), headers=[(b"a", b"b")], chunks=[2]) + request(frames(b"x"))


@settings(max_examples=examples(200), deadline=None)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.builds(
            lambda place, noise: GOOD[:place] + noise + GOOD[place:], st.integers(0, len(GOOD)), st.binary(max_size=6)
        ),
        st.builds(
            lambda place, noise: GOOD[:place] + noise + GOOD[place + len(noise) :],
            st.integers(0, len(GOOD)),
            st.binary(max_size=3),
        ),
    ),
    st.lists(st.integers(0, 5000), max_size=5),
)
def test_no_bytes_make_it_raise_and_whatever_it_answers_is_well_formed(data, places):
    async def scenario():
        served = Served()
        await served.feed(*cut(data, places))
        served.connection.eof_received()
        await asyncio.sleep(0)
        statistics = served.server.statistics()
        if statistics.refused:
            assert served.ended
        assert statistics.errors == 0
        assert len(served.replies) <= 3
        served.lose()
        await served.settle()
        assert served.server.statistics().connections == 0
        served.given.clear()
        assert served.budget.held == 0

    run(scenario())


async def test_a_unary_request_of_known_length_is_handed_out_whole_and_only_then():
    served = Served(answer_at_once)
    data = request(frames(b"x" * 500))
    for piece in cut(data, range(0, len(data), 50)):
        assert not served.given
        await served.feed(piece)
    assert served.given[0].frame == frames(b"x" * 500)
    assert served.replies[0].body == frames(b"x" * 500)


async def test_a_chunked_request_with_its_end_in_one_read_is_handed_out_whole():
    served = Served(answer_at_once)
    await served.feed(request(frames(b"abc"), chunks=[1, 2]))
    assert served.given[0].frame == frames(b"abc")


async def test_a_chunked_request_whose_end_has_not_come_is_a_stream():
    served = Served()
    data = request(frames(b"abc"), chunks=[])
    await served.feed(data[:-5])
    assert served.given[0].frame is None
    await served.feed(data[-5:])
    await served.settle()
    assert served.calls[0][3] == [frames(b"abc")]


async def test_a_request_without_messages_yet_is_handed_out_for_its_client_may_wait_for_us():
    served = Served()
    await served.feed(request(b"", chunks=[])[:-5])
    assert served.given[0].frame is None


async def test_within_its_first_message_a_chunked_request_is_not_handed_out():
    served = Served(answer_at_once)
    data = request(frames(b"x" * 300), chunks=[100])
    await served.feed(data[:200])
    assert not served.given
    await served.feed(data[200:])
    assert served.given[0].frame == frames(b"x" * 300)


async def test_a_whole_request_can_be_read_as_a_stream_too():
    served = Served()
    await served.feed(request(frames(b"abc")))
    await served.settle()
    assert served.given[0].frame == frames(b"abc")
    assert served.calls[0][3] == [frames(b"abc")]


async def test_the_time_out_becomes_a_deadline_on_the_loops_clock_and_nonsense_none():
    served = Served(answer_at_once)
    await served.feed(request(frames(b""), headers=[(b"grpc-timeout", b"10S")]))
    await served.feed(request(frames(b""), headers=[(b"grpc-timeout", b"soon")]))
    await served.feed(request(frames(b"")))
    loop = asyncio.get_running_loop()
    assert 5 < served.given[0].deadline - loop.time() <= 10
    assert served.given[1].deadline is None
    assert served.given[2].deadline is None
    assert all(one.headers == [] for one in served.given)


async def test_requests_that_come_before_their_turn_are_answered_in_order():
    waiting = []
    served = Served(waiting.append)
    await served.feed(b"".join(request(frames(b"%d" % number)) for number in range(3)))
    assert len(waiting) == 1
    assert served.transport.paused, "nothing more is read while requests wait"
    for number in range(3):
        await until(lambda number=number: len(waiting) > number, interval=0, why="the next request is handed out")
        waiting[number].reply(waiting[number].frame)
    assert [reply.body for reply in served.replies] == [frames(b"%d" % number) for number in range(3)]
    await until(lambda: not served.transport.paused, interval=0)


async def test_a_peer_that_takes_no_answers_gets_no_more_of_them():
    served = Served(answer_at_once)
    served.connection.pause_writing()
    await served.feed(request(frames(b"a")))
    assert not served.given
    served.connection.resume_writing()
    assert len(served.replies) == 1


# --- answers ---


async def test_a_unary_answer_is_one_reply_with_trailers():
    served = Served(lambda one: one.reply(frames(b"a"), [(b"h", b"1")], [(b"t", b"2")]))
    await served.feed(request(frames(b"")))
    [reply] = served.replies
    assert reply.status == 200
    assert (b"content-type", b"application/grpc") in reply.headers
    assert (b"h", b"1") in reply.headers
    assert reply.body == frames(b"a")
    assert reply.trailers == [(b"grpc-status", b"0"), (b"t", b"2")]
    assert not served.ended


async def test_an_answer_in_pieces_is_the_same_as_one_of_the_whole_frame():
    """A reply has the same bytes whether the handler gives the frame as one object or in pieces, and whether the frame
    is small or large."""
    for size in (3, 200_000):
        frame = frames(bytes(size))
        written = []
        for answer in (
            lambda one, frame=frame: one.reply(frame, [(b"a", b"b")]),
            lambda one, frame=frame: one.reply_in_pieces([frame[:2], memoryview(frame)[2:]], [(b"a", b"b")]),
        ):
            served = Served(answer)
            await served.feed(GOOD)
            written.append(served.transport.written)
            served.lose()
        assert written[0] == written[1]
        assert parse_replies(written[0])[0].body == frame


async def test_a_request_that_is_forgotten_still_counts_until_it_is_answered():
    """A request whose memory is freed early still counts against the budget until the request is answered."""
    served = Served(lambda one: one.forget())
    await served.feed(request(frames(b"hello")))
    assert served.given[0].frame is None
    assert served.budget.held > 0
    served.given[0].reply(frames(b"x"))
    assert served.budget.held == 0
    served.lose()


async def test_a_failure_is_trailers_only_with_its_text_encoded():
    served = Served(
        lambda one: one.fail(Code.NOT_FOUND, "no such model: größe\r\nx: y", [(b"h", b"1")], [(b"t", b"2")])
    )
    await served.feed(request(frames(b"")))
    [reply] = served.replies
    assert reply.code == Code.NOT_FOUND
    assert reply.metadata(b"grpc-message") == b"no such model: gr%C3%B6%C3%9Fe%0D%0Ax: y"
    assert reply.metadata(b"content-length") == b"0"
    assert reply.metadata(b"h") == b"1"
    assert reply.metadata(b"t") == b"2"
    assert not served.ended


async def test_a_reply_can_come_message_by_message_while_the_request_still_comes():
    served = Served(lambda one: None)
    await served.feed(request(b"", chunks=[])[:-5])
    [one] = served.given
    one.start([(b"h", b"1")])
    for number in range(2):
        await served.feed(chunked(frames(b"%d" % number), [3]))
        assert await one.read() == frames(b"%d" % number)
        await one.write(frames(b"got %d" % number))
    assert served.transport.written.endswith(b"\r\n" + frames(b"got 1") + b"\r\n")
    one.fail(Code.ABORTED, "enough", trailers=[(b"t", b"2")])
    [reply] = served.replies
    assert reply.body == frames(b"got 0", b"got 1")
    assert reply.trailers == [(b"grpc-status", b"10"), (b"grpc-message", b"enough"), (b"t", b"2")]


async def test_a_stream_without_messages_and_a_start_is_answered_by_finish():
    served = Served(lambda one: one.finish(0, "", [(b"t", b"2")]))
    await served.feed(request(frames(b"")))
    assert served.replies[0].code == 0
    assert served.replies[0].metadata(b"t") == b"2"


@pytest.mark.parametrize(
    "bad",
    [
        (b"x", b"a\r\nset-cookie: b"),
        (b"x\r\ny", b"a"),
        (b"x", b"a\0"),
        (b"content-length", b"3"),
        (b"grpc-status", b"5"),
    ],
)
async def test_metadata_that_would_break_out_of_its_line_is_left_out_everywhere(bad):
    ways = [
        lambda one: one.reply(frames(b""), [bad, (b"h", b"1")], [bad, (b"t", b"2")]),
        lambda one: one.fail(Code.INTERNAL, "no", [bad, (b"h", b"1")], [bad, (b"t", b"2")]),
        lambda one: (one.start([bad, (b"h", b"1")]), one.finish(0, "", [bad, (b"t", b"2")])),
    ]
    for way in ways:
        served = Served(way)
        await served.feed(request(frames(b"")))
        [reply] = served.replies
        every = reply.headers + reply.trailers
        assert (b"h", b"1") in every
        assert (b"t", b"2") in every
        assert bad not in every
        assert len(every) <= 7


async def test_a_second_answer_is_a_mistake_that_says_so():
    served = Served(answer_at_once)
    await served.feed(request(frames(b"")))
    [one] = served.given
    for again in (lambda: one.reply(b""), lambda: one.fail(2, ""), one.start, one.finish):
        with pytest.raises(RuntimeError):
            again()
    with pytest.raises(RuntimeError):
        await one.write(b"")
    assert len(served.replies) == 1


@pytest.mark.parametrize("begun", [False, True])
async def test_a_handler_that_raises_is_answered_as_internal_and_counted(begun):
    def handler(one):
        if begun:
            one.start()
        raise ZeroDivisionError("secret")

    served = Served(handler)
    await served.feed(request(frames(b"")))
    [reply] = served.replies
    assert reply.code == Code.INTERNAL
    assert b"secret" not in served.transport.written
    assert served.server.statistics().errors == 1
    await served.feed(request(frames(b"")))
    assert len(served.replies) == 2


# --- the caller goes away ---


async def test_a_caller_that_goes_away_is_told_to_the_handler_once():
    told = []
    served = Served(lambda one: one.on_cancel(lambda: told.append(one.method)))
    await served.feed(request(frames(b"")))
    [one] = served.given
    assert not one.cancelled
    served.lose()
    assert told == [ECHO]
    assert one.cancelled
    one.reply(b"")  # does nothing
    one.fail(1, "")
    one.start()
    one.finish()
    for waiting in (one.read(), one.write(b"")):
        with pytest.raises(call.CallCancelled):
            await waiting
    one.on_cancel(lambda: told.append("at once"))
    assert told == [ECHO, "at once"]
    assert served.transport.written == b""


async def test_after_the_answer_nobody_is_told_and_a_removed_callback_is_not_called():
    told = []
    served = Served(lambda one: one.on_cancel(lambda: told.append("no")))
    await served.feed(request(frames(b"")))
    served.given[0].reply(frames(b""))
    await served.feed(request(frames(b"")))
    served.given[1].on_cancel(None)
    served.lose()
    assert told == []


async def test_a_callback_that_raises_on_a_cancel_harms_nobody_else():
    served = Served(lambda one: one.on_cancel(lambda: 1 / 0))
    await served.feed(request(frames(b"")))
    served.lose()
    assert served.server.statistics().connections == 0


async def test_reader_and_writer_that_wait_are_woken_when_the_caller_goes_away():
    served = Served(lambda one: None)
    await served.feed(request(b"", chunks=[])[:-5])
    [one] = served.given
    served.connection.pause_writing()
    waiting = [asyncio.ensure_future(one.read()), asyncio.ensure_future(one.write(frames(b"")))]
    await asyncio.sleep(0)
    served.lose()
    for each in waiting:
        with pytest.raises(call.CallCancelled):
            await each


async def test_a_write_waits_until_the_peer_has_room():
    served = Served(lambda one: None)
    await served.feed(request(b"", chunks=[])[:-5])
    [one] = served.given
    served.connection.pause_writing()
    writing = asyncio.ensure_future(one.write(frames(b"a")))
    await asyncio.sleep(0)
    assert served.transport.written == b""
    served.connection.resume_writing()
    await writing
    one.finish()
    assert served.replies[0].body == frames(b"a")


async def test_reading_stops_while_a_handler_does_not_take_what_comes():
    served = Served(lambda one: None, max_message=1 << 20)
    await served.feed(request(b"", chunks=[])[:-5])
    [one] = served.given
    big = frames(bytes(300_000))
    await served.feed(chunked(big, []))
    assert served.transport.paused
    assert await one.read() == big
    assert not served.transport.paused


# --- what is refused ---


async def refused(data, **limits):
    served = Served(**limits)
    await served.feed(data)
    await served.settle()
    assert served.ended, "the connection ends"
    assert served.server.statistics().refused == 1
    assert served.calls == []
    [reply] = served.replies
    assert (b"connection", b"close") in reply.headers
    return reply


@pytest.mark.parametrize(
    ("data", "status"),
    [
        pytest.param(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n", 405, id="not POST"),
        pytest.param(b"POST /a HTTP/1.1\r\ncontent-type: text/plain\r\ncontent-length: 1\r\n\r\na", 415, id="not gRPC"),
        pytest.param(b"POST /a HTTP/1.1\r\ncontent-length: 0\r\n\r\n", 415, id="no content type"),
        pytest.param(request(b"").replace(b"HTTP/1.1", b"HTTP/1.0"), 505, id="HTTP/1.0"),
        pytest.param(request(b"").replace(b"/grpc\r", b"/grpc-web\r"), 415, id="gRPC-web"),
        pytest.param(
            request(b"", headers=[(b"connection", b"keep-alive")]).replace(b"HTTP/1.1", b"HTTP/1.0"),
            505,
            id="HTTP/1.0 alive",
        ),
        pytest.param(request(b"", method=b"http://a/b"), 400, id="not a path"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, id="HTTP/2"),
        pytest.param(b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03", 400, id="TLS"),
        pytest.param(b"POST /a HTTP/1.1\r\na: b\0c\r\n\r\n", 400, id="NUL in a header"),
        pytest.param(
            b"POST /a HTTP/1.1\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n", 400, id="two framings"
        ),
        pytest.param(b"POST /a HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", 400, id="two lengths"),
        pytest.param(b"POST /" + b"a" * 70_000, 431, id="endless target"),
        pytest.param(b"POST /a HTTP/1.1\r\na: " + b"b" * 70_000, 431, id="endless header"),
    ],
)
async def test_what_is_not_a_grpc_request_is_answered_by_http(data, status):
    reply = await refused(data)
    assert reply.status == status
    assert reply.code is None
    assert reply.body


@pytest.mark.parametrize(
    ("data", "code"),
    [
        pytest.param(request(b"\2\0\0\0\0"), Code.INVALID_ARGUMENT, id="unknown flag"),
        pytest.param(request(frames(b"abc")[:-1]), Code.INVALID_ARGUMENT, id="less than the prefix says"),
        pytest.param(request(frames(b"abc") + b"\0"), Code.INVALID_ARGUMENT, id="more than the prefix says"),
        pytest.param(request(b"\0\0"), Code.INVALID_ARGUMENT, id="part of a prefix"),
        pytest.param(request(frames(b"abc")[:-1], chunks=[]), Code.INVALID_ARGUMENT, id="chunked, less"),
        pytest.param(request(frames(bytes(LIMIT + 1))), Code.RESOURCE_EXHAUSTED, id="too large"),
        pytest.param(request(frames(bytes(LIMIT + 1)), chunks=[]), Code.RESOURCE_EXHAUSTED, id="chunked, too large"),
        pytest.param(
            request(frames(bytes(LIMIT + 1)))[:200], Code.RESOURCE_EXHAUSTED, id="too large, at its beginning"
        ),
        pytest.param(
            request(frames(b""), headers=[(b"a", b"b" * 70_000)]), Code.RESOURCE_EXHAUSTED, id="large headers"
        ),
        pytest.param(request(frames(b""), headers=[(b"a", b"b")] * 300), Code.RESOURCE_EXHAUSTED, id="many headers"),
        pytest.param(request(frames(b"abc"), chunks=[2])[:-5] + b"zz\r\n", Code.INVALID_ARGUMENT, id="bad chunk"),
        pytest.param(
            request(b"", headers=[(b"connection", b"upgrade"), (b"upgrade", b"h2c")]),
            Code.INVALID_ARGUMENT,
            id="upgrade",
        ),
    ],
)
async def test_what_is_a_broken_grpc_request_is_answered_by_grpc(data, code):
    reply = await refused(data)
    assert reply.status == 200
    assert reply.code == code
    assert reply.metadata(b"grpc-message")


async def test_a_broken_message_in_the_middle_of_a_stream_ends_the_call_for_both_sides():
    told = []
    served = Served(lambda one: (one.on_cancel(lambda: told.append("cancelled")), one.start()))
    await served.feed(request(frames(b"a"), chunks=[])[:-5])
    [one] = served.given
    assert await one.read() == frames(b"a")
    await served.feed(chunked(b"\7\0\0\0\0", []))
    assert told == ["cancelled"]
    with pytest.raises(call.CallCancelled):
        await one.read()
    [reply] = served.replies
    assert reply.code == Code.INVALID_ARGUMENT
    assert served.ended


@settings(max_examples=examples(60), deadline=None)
@given(
    st.lists(st.integers(1, 3000), min_size=1, max_size=8),
    st.lists(st.integers(0, 5000), max_size=8),
    st.sampled_from([0, 1, 7, 255]),
)
def test_the_first_refusal_stands_whatever_comes_behind_it(chunks, places, filling):
    """A message above the limit is refused once, however its bytes are cut. None of its bytes are taken for the prefix
    of the next message."""

    async def scenario():
        served = Served(lambda one: one.on_cancel(lambda: None))
        message = bytes([filling]) * (LIMIT + 1)
        head, _, body = request(frames(message), chunks=chunks).partition(b"\r\n\r\n")
        await served.feed(head + b"\r\n\r\n")
        await served.feed(*cut(body, places))
        [reply] = served.replies
        assert reply.code == Code.RESOURCE_EXHAUSTED
        text = reply.metadata(b"grpc-message").decode()
        assert f"{LIMIT + 1} bytes" in text
        assert f"{LIMIT} bytes" in text
        assert "--max-message" in text
        status = details_pb2.Status.FromString(metadata.decode_bin(reply.metadata(b"grpc-status-details-bin")))
        info = details_pb2.ErrorInfo.FromString(status.details[0].value)
        assert (info.reason, info.metadata["limit_bytes"]) == ("TOO_LARGE", str(LIMIT))
        served.lose()

    run(scenario())


async def test_endless_chunk_extensions_and_trailers_are_cut_off():
    for rest in (b"5;" + b"a" * 70_000, b"0\r\na: " + b"b" * 70_000):
        served = Served()
        data = request(frames(b"abc"), chunks=[])[:-5]
        await served.feed(data)
        await served.feed(*cut(rest, range(0, 70_000, 10_000)))
        assert served.ended
        assert served.replies[0].code == Code.INVALID_ARGUMENT


async def test_what_came_before_malformed_bytes_is_still_answered():
    waiting = []
    served = Served(waiting.append)
    await served.feed(request(frames(b"a")) + b"\0\0\0")
    assert not served.ended
    waiting[0].reply(frames(b"b"))
    await served.settle()
    assert [reply.status for reply in served.replies] == [200, 400]
    assert served.ended


# --- the connection's life ---


async def test_a_request_that_says_close_is_answered_so_and_the_connection_closed():
    served = Served(answer_at_once)
    await served.feed(request(frames(b"a"), headers=[(b"connection", b"close")]))
    [reply] = served.replies
    assert reply.code == 0
    assert (b"connection", b"close") in reply.headers
    assert served.transport.closed


async def test_the_rest_of_a_request_that_is_answered_is_thrown_away_and_the_connection_stays():
    served = Served(answer_at_once)
    data = request(frames(b"a", b"b"), chunks=[6])
    await served.feed(data[:-16])
    assert served.replies[0].body == frames(b"stream")
    await served.feed(data[-16:])
    await served.feed(request(frames(b"next")))
    assert served.replies[1].body == frames(b"next")


async def test_a_lot_of_a_request_that_is_answered_ends_the_connection():
    served = Served(answer_at_once, max_message=1 << 20)
    await served.feed(request(frames(b"a"), chunks=[])[:-5])
    for _ in range(10):
        await served.feed(chunked(frames(bytes(10_000)), []))
    assert served.ended
    assert len(served.replies) == 1


async def test_closing_ends_idle_connections_at_once_and_busy_ones_after_their_answer():
    idle = Served()
    closing = asyncio.ensure_future(idle.server.close(10))
    await until(lambda: idle.transport.closed, interval=0)
    idle.lose()
    await closing

    busy = Served(lambda one: None)
    await busy.feed(request(frames(b"a")))
    closing = asyncio.ensure_future(busy.server.close(10))
    await asyncio.sleep(0)
    assert not busy.transport.closed
    busy.given[0].reply(frames(b"b"))
    assert (b"connection", b"close") in busy.replies[0].headers
    assert busy.transport.closed
    busy.lose()
    await closing


async def test_without_grace_calls_in_flight_are_cut():
    served = Served(lambda one: None)
    await served.feed(request(frames(b"a")))
    closing = asyncio.ensure_future(served.server.close(0))
    await until(lambda: served.transport.aborted, interval=0)
    served.lose()
    await closing
    assert served.given[0].cancelled


async def test_a_connection_stuck_within_a_request_is_cut_at_the_second_look():
    for start in (b"POST /a", request(frames(b"abc"))[:-1]):
        served = Served()
        await served.feed(start)
        loop = asyncio.get_running_loop()
        served.server._sweep(loop)
        assert not served.transport.aborted
        served.server._sweep(loop)
        assert served.transport.aborted
        served.lose()
        await served.server.close(0)


async def test_connections_that_move_idle_or_wait_for_a_handler_are_not_stuck():
    served = Served(lambda one: None)
    loop = asyncio.get_running_loop()
    data = request(frames(b"abc"))
    for piece in cut(data, range(0, len(data), 20)):
        served.server._sweep(loop)
        await served.feed(piece)
    for _ in range(3):
        served.server._sweep(loop)  # the sweep waits for the handler
    served.given[0].reply(frames(b""))
    for _ in range(3):
        served.server._sweep(loop)  # idle
    assert not served.transport.closed
    served.lose()
    await served.server.close(0)
