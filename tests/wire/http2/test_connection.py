"""An HTTP/2 connection whose server is a test: calls and replies, flow control, and faults of servers."""

import asyncio
import gc
import itertools

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.statuses import Code as Status
from mesh.statuses import MeshError, Reason
from mesh.wire import framing
from mesh.wire.budget import Budget
from mesh.wire.http2 import frames, stream
from mesh.wire.http2.frames import Code, Setting
from mesh.wire.pieces import Pieces
from mesh.wire.reply import Lost, LostKind, Reply
from mesh.wire.streams import ReplyStream
from tests.support.http2peer import HEAD, TRAILERS, Peer, Sink
from tests.support.waiting import until

BODY = framing.pack(b"answer")
LONG = b"b" * 20_000  # more than one frame


def kinds(peer: Peer) -> list[int]:
    return [frame.kind for frame in peer.taken()]


def granted(peer: Peer) -> int:
    """Returns the bytes that the client has let the server send on streams since the last look."""
    found = [frame for frame in peer.taken() if frame.kind == frames.WINDOW_UPDATE and frame.stream]
    return sum(frames.number(frame.content) for frame in found)


async def read(sink: Sink) -> list[bytes]:
    """Reads the messages of a stream to its end."""
    assert isinstance(sink.outcome, ReplyStream)
    found = []
    while (frame := await sink.outcome.read()) is not None:
        found.append(frame)
    return found


async def test_the_client_begins_with_its_preface_and_settings() -> None:
    peer = Peer()
    assert peer.sent.startswith(frames.PREFACE)
    first, second = peer.taken()
    assert dict(frames.read_settings(first.content))[Setting.HEADER_TABLE_SIZE] == 0
    assert (second.kind, second.stream) == (frames.WINDOW_UPDATE, 0)
    assert not peer.connection.usable
    peer.send(frames.settings({}))
    assert [(one.kind, one.flags) for one in peer.taken()] == [(frames.SETTINGS, frames.ACK)]
    assert peer.connection.usable


async def test_a_call_is_one_head_and_one_message() -> None:
    peer = Peer().begin()
    peer.call(b"hello", headers=((b"name", b"value"),))
    head, data = peer.taken()
    assert (head.kind, head.flags, head.stream) == (frames.HEADERS, frames.END_HEADERS, 1)
    assert (b"name", b"value") in list(hpack.Decoder().decode(head.content, raw=True))
    assert (data.kind, data.flags, data.content) == (frames.DATA, frames.END_STREAM, framing.pack(b"hello"))
    peer.call()
    assert [one.stream for one in peer.taken()] == [3, 3]


async def test_a_reply_has_its_message_metadata_and_trailers() -> None:
    peer = Peer().begin()
    for _ in range(4):  # later replies are decoded from the cache
        sink, _ = peer.call()
        number = peer.taken()[0].stream
        peer.send(peer.reply(number, b"answer"))
        assert sink.outcome == Reply(0, "", BODY, [(b"initial", b"1")], [(b"trailing", b"2")])
        sink.outcome.headers.clear()  # a caller may change what it gets


@given(st.data())
def test_a_reply_may_arrive_in_any_pieces(data: st.DataObject) -> None:
    async def run() -> None:
        peer = Peer().begin()
        calls = [peer.call()[0] for _ in range(3)]
        refused = peer.headers(5) + peer.headers(5, [(b"grpc-status", b"7")], ends=True)
        replies = [peer.reply(1, b"a"), peer.reply(3, LONG), refused]
        whole = b"".join(replies[number] for number in data.draw(st.permutations(range(3))))
        cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=20)))
        for begin, end in itertools.pairwise([0, *cuts, len(whole)]):
            peer.send(whole[begin:end])
        one, two, three = (call.outcome for call in calls)
        assert isinstance(one, Reply)
        assert isinstance(two, Reply)
        assert isinstance(three, Reply)
        assert (one.frame, two.frame) == (framing.pack(b"a"), framing.pack(LONG))
        assert (three.code, three.frame) == (7, None)
        assert peer.connection.statistics().streams == 0

    asyncio.run(run())


@pytest.mark.parametrize(
    ("head", "code", "text"),
    [
        ([*HEAD, (b"grpc-status", b"5"), (b"grpc-message", b"no%20model")], 5, "no model"),
        ([*HEAD, (b"grpc-status", b"99")], 2, ""),
        ([(b":status", b"404")], 12, "the server answered with HTTP status 404, not with gRPC"),
        ([(b":status", b"200"), (b"content-type", b"text/html")], 2, "the server answered with HTTP status 200"),
        ([(b":status", b"503"), (b"grpc-status", b"8")], 8, ""),
        (HEAD, 2, "the reply ended without a status"),
    ],
    ids=["trailers only", "unknown status", "HTTP status", "not gRPC", "HTTP status with a gRPC status", "no status"],
)
async def test_a_reply_without_a_message_is_a_failure(head: list[tuple[bytes, bytes]], code: int, text: str) -> None:
    peer = Peer().begin()
    sink, _ = peer.call()
    peer.send(peer.headers(1, head, ends=True))
    assert isinstance(sink.outcome, Reply)
    assert sink.outcome.code == code
    assert sink.outcome.text.startswith(text)


async def test_interim_heads_are_skipped() -> None:
    peer = Peer().begin()
    sink, _ = peer.call()
    peer.send(peer.headers(1, [(b":status", b"103"), (b"link", b"x")]), peer.reply(1, b"answer"))
    assert isinstance(sink.outcome, Reply)
    assert sink.outcome.headers == [(b"initial", b"1")]


async def test_padding_priority_and_continued_headers_are_understood() -> None:
    peer = Peer().begin()
    sink, _ = peer.call()
    block = peer.encoder.encode(HEAD)
    flags = frames.PADDED | frames.WITH_PRIORITY
    peer.send(
        frames.frame(frames.HEADERS, flags, 1, b"\x03" + b"\0\0\0\0\1" + block[:2] + bytes(3)),
        frames.frame(frames.CONTINUATION, 0, 1, block[2:5]),
        frames.frame(frames.CONTINUATION, frames.END_HEADERS, 1, block[5:]),
        frames.frame(frames.PRIORITY, 0, 1, bytes(5)),
        frames.frame(0x42, 0, 1, b"of an extension"),
        frames.frame(frames.DATA, frames.PADDED, 1, b"\x02" + BODY + bytes(2)),
        peer.headers(1, TRAILERS, ends=True),
    )
    assert sink.outcome == Reply(0, "", BODY, [(b"initial", b"1")], [(b"trailing", b"2")])


# --- replies of several messages ---


@pytest.mark.parametrize("messages", [[], [b"a", b"b"], [b"a", b"b" * 300_000, b""]])
async def test_a_reply_that_is_not_one_message_is_a_stream(messages: list[bytes]) -> None:
    peer = Peer().begin()
    sink, _ = peer.call()
    peer.send(peer.reply(1, *messages))
    assert await read(sink) == [framing.pack(one) for one in messages]
    assert isinstance(sink.outcome, ReplyStream)
    assert (await sink.outcome.result()).trailers == [(b"trailing", b"2")]


async def test_a_reply_whose_end_takes_longer_is_a_stream() -> None:
    peer = Peer().begin()
    sink, _ = peer.call()
    peer.send(peer.headers(1), peer.data(1, BODY))
    assert sink.outcome is None  # its end may be in the next read
    await until(lambda: sink.outcome is not None)
    assert isinstance(sink.outcome, ReplyStream)
    assert sink.outcome.headers == [(b"initial", b"1")]
    assert await sink.outcome.read() == BODY
    peer.send(peer.data(1, BODY), peer.headers(1, TRAILERS, ends=True))
    assert await read(sink) == [BODY]


async def test_a_server_may_send_only_as_far_as_the_reader_has_read() -> None:
    peer = Peer().begin()
    sink, _ = peer.call()
    message = framing.pack(bytes(100_000))
    peer.send(peer.headers(1), peer.data(1, message))
    await until(lambda: sink.outcome is not None)
    sent, allowed = len(message), stream.WINDOW
    for _ in range(100):
        if sent + len(message) > allowed:
            break
        peer.send(peer.data(1, message))
        sent += len(message)
        allowed += sum(
            frames.number(one.content) for one in peer.taken() if one.kind == frames.WINDOW_UPDATE and one.stream
        )
    else:
        pytest.fail("the server is never stopped")
    assert isinstance(sink.outcome, ReplyStream)
    for _ in range(sent // len(message)):
        assert await sink.outcome.read() == message
    assert allowed + granted(peer) >= sent + stream.WINDOW // 2


async def test_a_large_message_is_taken_in_pieces_if_the_call_takes_them() -> None:
    peer = Peer(limit=1 << 20, pieces=Pieces(above=100_000)).begin()
    sink, _ = peer.call(sink=Sink(takes_pieces=True))
    whole = framing.pack(bytes(5 << 20))
    peer.send(peer.headers(1))
    got = bytearray()

    async def take() -> None:
        await until(lambda: sink.outcome is not None)
        for piece in await read(sink):
            got.extend(piece)

    reader = asyncio.ensure_future(take())
    for at in range(0, len(whole), 50_000):
        peer.send(peer.data(1, whole[at : at + 50_000]))
        await asyncio.sleep(0)
    peer.send(peer.headers(1, TRAILERS, ends=True))
    await reader
    assert bytes(got) == whole


# --- sizes ---


async def test_a_message_above_the_limit_is_refused_before_it_has_arrived() -> None:
    peer = Peer(limit=1000).begin()
    sink, _ = peer.call()
    peer.taken()
    peer.send(peer.headers(1), peer.data(1, framing.prefix(1001)))
    assert isinstance(sink.outcome, Reply)
    assert sink.outcome.code == Status.RESOURCE_EXHAUSTED
    assert [(one.kind, frames.number(one.content)) for one in peer.taken()] == [(frames.RST_STREAM, Code.CANCEL)]


async def test_a_reply_without_room_in_the_budget_is_refused_and_nothing_stays_counted() -> None:
    budget = Budget(400_000)
    peer = Peer(budget=budget).begin()
    one, _ = peer.call()
    two, _ = peer.call()
    peer.send(peer.headers(1), peer.data(1, framing.prefix(200_000)))
    assert budget.held >= 200_000
    peer.send(peer.headers(3), peer.data(3, framing.prefix(200_000)))
    assert isinstance(two.outcome, Reply)
    assert two.outcome.code == Status.RESOURCE_EXHAUSTED
    peer.send(peer.data(1, bytes(200_000)), peer.headers(1, TRAILERS, ends=True))
    assert isinstance(one.outcome, Reply)
    assert one.outcome.code == 0
    assert budget.held == 0


@pytest.mark.parametrize("where", ["head", "trailers", "trailers of a stream"])
@pytest.mark.parametrize("size", [70_000, 300_000], ids=["one block", "many frames"])
async def test_a_reply_with_too_many_headers_ends_its_call_only(where: str, size: int) -> None:
    """The other calls of the connection may be calls of other models, which must go on."""
    peer = Peer().begin()
    (sink, _), (other, _) = peer.call(), peer.call()
    large = [(b"a", b"0" * size)]  # five bits for each byte: the smaller one fits into a block of 64 KiB
    if where == "head":
        peer.send(peer.headers(1, [*HEAD, *large]))
    else:
        peer.send(peer.headers(1), peer.data(1, BODY))
        if where == "trailers of a stream":
            await until(lambda: sink.outcome is not None)
        peer.send(peer.headers(1, [*TRAILERS, *large], ends=True))
    reply = await sink.outcome.result() if isinstance(sink.outcome, ReplyStream) else sink.outcome
    assert isinstance(reply, Reply)
    assert (reply.code, reply.text) == (Status.RESOURCE_EXHAUSTED, "the reply has more than 65536 bytes of headers")
    peer.send(peer.reply(3, b"answer"))
    assert isinstance(other.outcome, Reply)
    assert other.outcome.code == 0


async def test_broken_framing_is_a_failure_of_the_server() -> None:
    peer = Peer().begin()
    sink, _ = peer.call()
    peer.send(peer.headers(1), peer.data(1, b"\x07\0\0\0\1x"))
    assert isinstance(sink.outcome, Reply)
    assert sink.outcome.code == Status.INTERNAL
    other, _ = peer.call()
    peer.send(peer.headers(3), peer.data(3, BODY[:-1]), peer.headers(3, TRAILERS, ends=True))
    await until(lambda: other.outcome is not None)
    assert isinstance(other.outcome, Reply)
    assert other.outcome.code == Status.INTERNAL


# --- what the server takes ---


async def test_a_request_waits_for_the_windows_of_the_server() -> None:
    peer = Peer().begin({Setting.INITIAL_WINDOW_SIZE: 100})
    frame = framing.pack(bytes(range(250)))
    peer.call(frame[5:])
    got = b""

    def take() -> int:
        nonlocal got
        parts = [one for one in peer.taken() if one.kind == frames.DATA]
        got += b"".join(one.content for one in parts)
        return parts[-1].flags if parts else 0

    assert take() == 0
    assert got == frame[:100]
    peer.send(frames.window_update(1, 50))
    take()
    assert got == frame[:150]
    peer.send(frames.settings({Setting.INITIAL_WINDOW_SIZE: 20}))  # takes back 80 of a window of 0
    peer.send(frames.window_update(1, 80))
    take()
    assert got == frame[:150]
    peer.send(frames.settings({Setting.INITIAL_WINDOW_SIZE: 1000}))
    assert take() == frames.END_STREAM
    assert got == frame
    assert peer.connection.statistics().unsent == 0


async def test_requests_wait_for_the_window_of_the_connection() -> None:
    peer = Peer().begin({Setting.INITIAL_WINDOW_SIZE: 1 << 20})
    peer.call(bytes(60_000))
    peer.call(bytes(60_000))
    peer.call(bytes(10))
    sent = sum(len(one.content) for one in peer.taken() if one.kind == frames.DATA)
    assert sent == frames.WINDOW
    peer.send(frames.window_update(0, 1 << 20))
    sent += sum(len(one.content) for one in peer.taken() if one.kind == frames.DATA)
    assert sent == 2 * 60_005 + 15


async def test_a_call_whose_request_waits_holds_up_no_other() -> None:
    peer = Peer().begin({Setting.INITIAL_WINDOW_SIZE: 10})
    peer.call(bytes(100))
    peer.taken()
    sink, _ = peer.call(b"abc")
    assert [(one.stream, one.flags) for one in peer.taken() if one.kind == frames.DATA] == [(3, frames.END_STREAM)]
    peer.send(peer.reply(3, b"answer"))
    assert isinstance(sink.outcome, Reply)


async def test_a_frame_is_no_longer_than_the_server_takes() -> None:
    peer = Peer().begin()
    peer.send(frames.window_update(0, 1 << 20), frames.settings({Setting.INITIAL_WINDOW_SIZE: 1 << 20}))
    peer.call(bytes(100_000))
    parts = [one for one in peer.taken() if one.kind == frames.DATA]
    assert max(len(one.content) for one in parts) == frames.SIZE
    assert [one.flags for one in parts] == [0] * (len(parts) - 1) + [frames.END_STREAM]


async def test_a_server_may_open_its_window_for_a_request_that_has_been_sent() -> None:
    """Together with a large initial window, such an update would exceed the largest window if the request, which was
    sent at once, did not count."""
    peer = Peer().begin({Setting.INITIAL_WINDOW_SIZE: frames.MAX_WINDOW})
    sink, _ = peer.call(bytes(100))
    peer.send(frames.window_update(1, 105), peer.reply(1, b"answer"))
    assert isinstance(sink.outcome, Reply)
    assert not peer.connection.ended


async def test_windows_that_open_bit_by_bit_cost_no_more_than_the_reads_that_bring_them() -> None:
    """A server could otherwise stop the relay for seconds by a small window for each of a thousand requests."""
    peer = Peer().begin({Setting.INITIAL_WINDOW_SIZE: 1})
    for _ in range(20):
        peer.call(bytes(5000))
    peer.taken()
    peer.send(*(frames.window_update(number, 1) for number in range(1, 41, 2) for _ in range(40)))
    taken = peer.taken()
    assert [len(one.content) for one in taken] == [40] * 20
    peer.send(*(frames.settings({Setting.INITIAL_WINDOW_SIZE: size}) for size in range(2, 102)))
    assert [len(one.content) for one in peer.taken() if one.kind == frames.DATA] == [100] * 20


@pytest.mark.parametrize("unit", [frames.frame(0x42, 0, 1), frames.frame(0x42, 0, 1, bytes(frames.SIZE))])
async def test_a_flood_of_frames_leaves_turns_for_other_work(unit: bytes) -> None:
    peer = Peer().begin()
    sink, _ = peer.call()
    peer.connection.data_received(unit * (300_000 // len(unit)) + peer.reply(1, b"answer"))
    assert peer.paused, "the event loop would read on, and do nothing else"
    turns = 0
    while sink.outcome is None:
        await asyncio.sleep(0)
        turns += 1
    assert turns >= 2
    assert not peer.paused
    peer.connection.data_received(unit * 2000)
    peer.connection.connection_lost(None)
    await asyncio.sleep(0)


async def test_a_fault_of_the_client_in_a_later_turn_ends_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the connection stayed open, nothing would read the rest of its bytes, and calls would wait for their replies
    forever."""
    peer = Peer().begin()
    peer.call()
    monkeypatch.setattr(peer.connection, "_on_data", lambda *_: 1 / 0)
    faults = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context["exception"]))
    peer.connection.data_received(frames.frame(0x42, 0, 1) * 1500 + peer.data(1, BODY))
    await until(lambda: bool(peer.ended))
    assert peer.ended == "aborted"
    assert isinstance(faults[0], ZeroDivisionError)


async def test_no_more_calls_are_sent_than_the_server_takes_at_once() -> None:
    peer = Peer().begin({Setting.MAX_CONCURRENT_STREAMS: 2})
    peer.call()
    peer.call()
    post = peer.connection.post
    assert post(b"/m", (), BODY, Sink(), timeout=None, encoding=b"") is None
    peer.send(peer.reply(1, b"answer"))
    assert post(b"/m", (), BODY, Sink(), timeout=None, encoding=b"") is not None


@given(st.integers(0, 600) | st.just(20_000), st.integers(0, 5))
def test_a_call_with_more_headers_than_the_server_takes_is_refused(size: int, count: int) -> None:
    """Netty ends the connection, and so all calls, if a request has many more headers than Netty accepts."""
    limit = 800
    headers = ((b"name", b"v" * size), *((b"x%d" % number, b"") for number in range(count)))

    async def run() -> None:
        peer = Peer().begin({Setting.MAX_HEADER_LIST_SIZE: limit})
        try:
            peer.call(headers=headers)
        except MeshError as error:
            assert error.reason is Reason.TOO_LARGE
            assert f"peer takes at most {limit}" in error.text
            refused = True
        else:
            refused = False
        other = Peer().begin()
        if size < 20_000:  # a longer block goes the other way, where the server takes it
            other.call(headers=headers)
            pairs = hpack.Decoder().decode(other.taken()[0].content, raw=True)
            assert refused == (sum(len(name) + len(value) + 32 for name, value in pairs) > limit)
        else:
            assert refused
        peer.call()

    asyncio.run(run())


async def test_a_server_that_does_not_read_gets_no_more_calls() -> None:
    peer = Peer().begin()
    peer.connection.pause_writing()
    assert peer.connection.post(b"/m", (), BODY, Sink(), timeout=None, encoding=b"") is None
    assert not peer.connection.ended
    peer.connection.resume_writing()
    peer.call()


# --- ends ---


async def test_a_cancelled_call_is_reset_and_what_still_comes_is_ignored() -> None:
    peer = Peer().begin({Setting.INITIAL_WINDOW_SIZE: 3})
    sink, exchange = peer.call()
    peer.taken()
    exchange.cancel()
    assert [(one.kind, one.stream, frames.number(one.content)) for one in peer.taken()] == [
        (frames.RST_STREAM, 1, Code.CANCEL)
    ]
    peer.send(frames.window_update(1, 100), peer.reply(1, b"answer"))
    assert sink.outcome is None
    assert peer.taken() == []
    assert peer.connection.statistics().unsent == 0
    peer.call()


async def test_a_cancelled_stream_is_reset() -> None:
    peer = Peer().begin()
    sink, _ = peer.call()
    peer.send(peer.headers(1), peer.data(1, BODY + BODY))
    await until(lambda: sink.outcome is not None)
    peer.taken()
    assert isinstance(sink.outcome, ReplyStream)
    sink.outcome.cancel()
    assert kinds(peer) == [frames.RST_STREAM]
    with pytest.raises(Lost):
        await sink.outcome.read()


@pytest.mark.parametrize(
    ("code", "begun", "kind"),
    [
        (Code.REFUSED_STREAM, False, LostKind.UNSENT),
        (Code.REFUSED_STREAM, True, LostKind.STARTED),
        (Code.CANCEL, False, LostKind.SENT),
        (Code.INTERNAL_ERROR, True, LostKind.STARTED),
        (77, False, LostKind.SENT),
    ],
)
async def test_a_call_that_the_server_resets_is_lost(code: int, begun: bool, kind: LostKind) -> None:
    peer = Peer().begin()
    sink, _ = peer.call()
    if begun:
        peer.send(peer.headers(1))
    peer.send(frames.frame(frames.RST_STREAM, 0, 1, code.to_bytes(4, "big")))
    assert isinstance(sink.outcome, Lost)
    assert sink.outcome.kind is kind
    assert "peer has reset the call" in sink.outcome.why
    peer.call()  # the connection remains


async def test_a_server_that_leaves_finishes_the_calls_that_it_has_taken() -> None:
    peer = Peer().begin()
    (one, _), (two, _) = peer.call(), peer.call()
    peer.send(frames.frame(frames.GOAWAY, 0, 0, (1).to_bytes(4, "big") + bytes(4)))
    assert peer.connection.ended
    assert isinstance(two.outcome, Lost)
    assert two.outcome.kind is LostKind.UNSENT
    assert one.outcome is None
    assert not peer.ended
    peer.send(peer.reply(1, b"answer"))
    assert isinstance(one.outcome, Reply)
    assert peer.ended == "closed"


async def test_a_server_that_has_taken_no_call_loses_the_connection_at_once() -> None:
    peer = Peer().begin()
    sink, _ = peer.call()
    peer.taken()
    peer.send(frames.frame(frames.GOAWAY, 0, 0, bytes(8)))
    assert isinstance(sink.outcome, Lost)
    assert sink.outcome.kind is LostKind.UNSENT
    assert kinds(peer) == [frames.GOAWAY]
    assert peer.ended == "closed"


@pytest.mark.parametrize("end", ["by the server", "by the client"])
async def test_an_ending_connection_takes_no_call(end: str) -> None:
    """Bytes written to an ending connection are lost, but the call would count as sent."""
    peer = Peer().begin()
    if end == "by the server":
        peer.connection.eof_received()
    else:
        peer.connection.close()
        peer.connection.close()
    assert peer.ended
    assert peer.connection.post(b"/m", (), BODY, Sink(), timeout=None, encoding=b"") is None


async def test_a_connection_that_the_server_does_not_read_is_not_left_open() -> None:
    peer = Peer().begin()
    peer.call()
    peer.connection.pause_writing()
    peer.connection.close()
    assert peer.ended == "aborted"


async def test_the_last_number_of_a_stream_is_the_end_of_its_connection() -> None:
    peer = Peer().begin()
    peer.connection._next = frames.MAX_STREAM - 2
    sink, _ = peer.call()
    assert peer.connection.post(b"/m", (), BODY, Sink(), timeout=None, encoding=b"") is None
    assert peer.connection.ended
    assert not peer.ended
    peer.send(peer.reply(frames.MAX_STREAM - 2, b"answer"))
    assert isinstance(sink.outcome, Reply)
    assert peer.ended == "closed"


async def test_calls_are_lost_with_their_connection() -> None:
    peer = Peer().begin()
    (one, _), (two, _) = peer.call(), peer.call()
    peer.send(peer.headers(3))
    peer.connection.connection_lost(ConnectionResetError("reset"))
    assert isinstance(one.outcome, Lost)
    assert isinstance(two.outcome, Lost)
    assert (one.outcome.kind, two.outcome.kind) == (LostKind.SENT, LostKind.STARTED)
    assert "reset" in one.outcome.why
    assert peer.connection.ended


async def test_a_stream_is_lost_after_what_has_arrived() -> None:
    peer = Peer().begin()
    sink, _ = peer.call()
    peer.send(peer.headers(1), peer.data(1, BODY + BODY))
    await until(lambda: sink.outcome is not None)
    peer.connection.connection_lost(None)
    assert isinstance(sink.outcome, ReplyStream)
    assert [await sink.outcome.read(), await sink.outcome.read()] == [BODY, BODY]
    with pytest.raises(Lost, match="closed the connection"):
        await sink.outcome.read()


@pytest.mark.parametrize("end", ["whole", "lost", "cancelled"])
async def test_nothing_keeps_a_stream_that_has_ended(end: str) -> None:
    """The messages of a stream count in the budget as long as the stream exists, and the collector of cycles may run
    much later."""
    budget = Budget(1 << 20)
    peer = Peer(budget=budget).begin()
    sink, exchange = peer.call()
    peer.send(peer.headers(1), peer.data(1, BODY + BODY))
    await until(lambda: sink.outcome is not None)
    assert budget.held > 0
    if end == "whole":
        peer.send(peer.headers(1, TRAILERS, ends=True))
    elif end == "lost":
        peer.send(frames.reset(1, Code.INTERNAL_ERROR))
    else:
        exchange.cancel()
    gc.disable()
    try:
        sink.outcome = None
        del exchange
        assert budget.held == 0
    finally:
        gc.enable()


async def test_pings_are_answered() -> None:
    peer = Peer().begin()
    peer.send(frames.frame(frames.PING, 0, 0, b"12345678"), frames.frame(frames.PING, frames.ACK, 0, b"87654321"))
    assert [(one.kind, one.flags, one.content) for one in peer.taken()] == [(frames.PING, frames.ACK, b"12345678")]


# --- faults of servers ---

FAULTS = {
    "push": frames.frame(frames.PUSH_PROMISE, frames.END_HEADERS, 1, bytes(4)),
    "frame too long": (65 * 1024).to_bytes(3, "big") + b"\0\0\0\0\0\1",
    "never opened": frames.frame(frames.DATA, 0, 99, b"x"),
    "even stream": frames.frame(frames.HEADERS, frames.END_HEADERS, 2, b""),
    "dynamic table": frames.frame(frames.HEADERS, frames.END_HEADERS, 1, b"\xbe"),
    "padding": frames.frame(frames.DATA, frames.PADDED, 1, b"\x09x"),
    "not continued": frames.frame(frames.HEADERS, 0, 1, b"") + frames.frame(frames.PING, 0, 0, bytes(8)),
    "continued by another": frames.frame(frames.HEADERS, 0, 1, b"") + frames.frame(frames.CONTINUATION, 0, 3, b"x"),
    "continuation of nothing": frames.frame(frames.CONTINUATION, 0, 1, b"x"),
    "size of the table, again and again": frames.frame(frames.HEADERS, frames.END_HEADERS, 1, b"\x20" * 3),
    "empty continuation": frames.frame(frames.HEADERS, 0, 1, b"") + frames.frame(frames.CONTINUATION, 0, 1, b""),
    "endless headers": frames.frame(frames.HEADERS, 0, 1, b"")
    + 80 * frames.frame(frames.CONTINUATION, 0, 1, b"\x82" * 15_000),
    "stream window": frames.window_update(1, 0),
    "window": frames.window_update(0, 0),
    "stream window out of bounds": 2 * frames.window_update(1, frames.MAX_WINDOW),
    "window out of bounds": 2 * frames.window_update(0, frames.MAX_WINDOW),
    "ping": frames.frame(frames.PING, 0, 0, b"1"),
    "settings": frames.frame(frames.SETTINGS, 0, 0, b"1"),
    "reset": frames.frame(frames.RST_STREAM, 0, 1, b"1"),
    "goaway": frames.frame(frames.GOAWAY, 0, 0, b"1"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
async def test_a_server_that_breaks_the_protocol_loses_the_connection(fault: bytes) -> None:
    peer = Peer().begin({Setting.INITIAL_WINDOW_SIZE: 3})  # the request waits
    sink, _ = peer.call()
    peer.taken()
    peer.send(fault)
    assert isinstance(sink.outcome, Lost)
    assert sink.outcome.why == f"peer violates HTTP/2: {peer.faults[0]}"
    assert peer.connection.ended
    assert peer.ended
    assert kinds(peer)[-1] == frames.GOAWAY
    peer.send(peer.reply(1, b"answer"))  # is ignored


@pytest.mark.parametrize("stream_only", [False, True])
async def test_a_server_that_sends_more_than_it_may_loses_the_connection(stream_only: bool) -> None:
    peer = Peer(limit=64 << 20).begin()
    sinks = [peer.call()[0] for _ in range(1 if stream_only else 40)]
    for number in range(1, 2 * len(sinks), 2):
        peer.send(peer.headers(number))
    await asyncio.sleep(0)
    for _ in range(20):  # headers first: the streams are never read
        for number in range(1, 2 * len(sinks), 2):
            if not peer.connection.ended:
                peer.send(peer.data(number, framing.pack(bytes(200_000))))
        await asyncio.sleep(0.01)
    assert peer.connection.ended


async def test_a_server_that_asks_and_does_not_read_the_answers_loses_the_connection() -> None:
    peer = Peer().begin()
    peer.connection.pause_writing()
    for _ in range(1100):
        if not peer.connection.ended:
            peer.send(frames.frame(frames.PING, 0, 0, bytes(8)))
    assert peer.ended == "aborted"


@pytest.mark.parametrize("first", [b"HTTP/1.1 400 Bad Request\r\n\r\n", frames.frame(frames.PING, 0, 0, bytes(8))])
async def test_a_server_that_does_not_begin_with_settings_is_never_used(first: bytes) -> None:
    peer = Peer()
    peer.send(first)
    with pytest.raises(frames.ProtocolError):
        await peer.connection.ready
    assert peer.connection.ended


@pytest.mark.parametrize("answer", ["headers twice", "body first"])
async def test_a_reply_out_of_order_ends_its_call_only(answer: str) -> None:
    peer = Peer().begin()
    sink, _ = peer.call()
    peer.taken()
    peer.send(peer.data(1, BODY) if answer == "body first" else peer.headers(1) + peer.headers(1))
    assert isinstance(sink.outcome, Lost)
    assert kinds(peer) == [frames.RST_STREAM]
    peer.call()


@given(st.data())
def test_whatever_a_server_sends_each_call_has_at_most_one_outcome(data: st.DataObject) -> None:
    """Frames of all types with random contents, streams and flags never raise an error from the connection."""

    async def run() -> None:
        peer = Peer(budget=Budget(1 << 20)).begin()
        sinks = [peer.call()[0] for _ in range(3)]
        good = [peer.headers(1), peer.data(1, BODY), peer.headers(3), peer.headers(1, TRAILERS, ends=True)]
        random = st.builds(
            frames.frame,
            st.integers(0, 11),
            st.integers(0, 255),
            st.sampled_from([0, 1, 2, 3, 5, 7]),
            st.binary(max_size=40),
        )
        for frame in data.draw(st.lists(random | st.sampled_from(good), max_size=12)):
            if not peer.ended:
                peer.send(frame)
        peer.connection.connection_lost(None)
        await asyncio.sleep(0)
        assert all(isinstance(sink.outcome, Reply | Lost | ReplyStream) for sink in sinks)
        for sink in sinks:
            if isinstance(sink.outcome, ReplyStream):
                sink.outcome.cancel()
        assert peer.connection.statistics().streams == 0

    asyncio.run(run())
