"""Large messages that are passed on in pieces, with any reads, any pauses, and a cancel at any point. The bytes that
leave are the bytes that arrived, little of a message is held at a time, and the budget gets everything back."""

import asyncio
import os

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from mesh.statuses import Code, Reason
from mesh.wire import client, clientconnection, framing, inbox, server, serverconnection
from mesh.wire.budget import Budget
from mesh.wire.call import CallCancelled
from mesh.wire.pieces import Pieces
from tests.support.wire import ECHO, Outcome, Transport, cut, deliver_one, frames, parse_replies, request, run

LIMIT = 2000  # bytes of a message that is held whole
ABOVE = 300
LARGEST = 6_000
READ = 900  # most bytes of one read
HIGH = 500
HELD = LIMIT + 2 * (HIGH + READ) + 1000
"""Bytes that one direction of a call may hold: a message that is held whole, or what was read and what is written."""

POLICY = Pieces(above=ABOVE, limit=LARGEST, wanted=lambda call: True)

MESSAGES = st.lists(
    st.one_of(st.integers(0, 40), st.integers(ABOVE - 20, ABOVE + 20), st.integers(0, LARGEST // 2)), max_size=3
).map(lambda sizes: [os.urandom(size) for size in sizes])
CUTS = st.lists(st.integers(0, 100_000), max_size=20)
STEPS = st.lists(
    st.one_of(st.integers(1, READ), st.sampled_from(["stall", "go", "stall back", "go back"])), max_size=30
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Lowers the sizes from which messages are divided, so that a few bytes are enough."""
    monkeypatch.setattr(inbox, "HIGH", HIGH)
    monkeypatch.setattr(inbox, "LOW", HIGH // 4)
    monkeypatch.setattr(inbox, "_PIECE", 100)


# --- the inbox


@given(MESSAGES, CUTS, st.lists(st.booleans(), min_size=1, max_size=20), st.integers(0, 400))
def test_any_reads_give_the_same_bytes_and_only_large_frames_are_divided(messages, places, takes, above):
    """Messages of at most `above` bytes leave the inbox as whole frames."""
    budget = Budget(1 << 20)
    box = inbox.Inbox(LIMIT, lambda holding: None, budget, pieces=Pieces(above=above, limit=LARGEST))
    taken = []
    for number, piece in enumerate(cut(frames(*messages), places)):
        box.feed(piece)
        if takes[number % len(takes)] and (got := box.take()) is not None:
            taken.append(got)
    box.end()
    while (got := box.take()) is not None:
        taken.append(got)
    assert b"".join(taken) == frames(*messages)
    assert box.drained
    box.close()
    assert budget.held == 0
    at = 0
    for message in messages:
        if len(message) <= above:
            assert framing.pack(message) in taken, f"the message at {at} was divided"
        at += len(message)


@given(MESSAGES, CUTS, st.integers(0, 30), st.sampled_from(["drop", "break", "close"]))
def test_an_inbox_that_ends_anywhere_gives_its_bytes_back(messages, places, last, how):
    """The budget is empty after a stream has ended in the middle of a message, however the stream ended."""
    budget = Budget(1 << 20)
    box = inbox.Inbox(LIMIT, lambda holding: None, budget, pieces=Pieces(above=ABOVE, limit=LARGEST))
    for number, piece in enumerate(cut(frames(*messages), places)):
        if number == last:
            break
        box.feed(piece)
        if number % 3 == 0:
            box.take()
    if how == "close":
        box.close()
    else:
        box.fail(CallCancelled("gone"), drop=how == "drop")
        while box.take() is not None:
            pass
        box.close()
    assert budget.held == 0


def test_a_stream_that_ends_within_a_piece_is_broken():
    """A stream that ends in the middle of a message in pieces is an error, as for any other message."""
    box = inbox.Inbox(LIMIT, lambda holding: None, pieces=POLICY)
    box.feed(frames(bytes(1000))[:-1])
    assert box.partial
    with pytest.raises(framing.FrameError, match="middle of a message"):
        box.end()


def test_a_message_above_the_limit_for_pieces_is_refused_by_its_prefix():
    """Messages in pieces have a separate limit, and the error names the option that sets this limit."""
    box = inbox.Inbox(LIMIT, lambda holding: None, pieces=POLICY)
    box.feed(frames(bytes(LIMIT + 1)))
    with pytest.raises(framing.FrameError, match="--max-forwarded-message") as refused:
        box.feed(b"\0" + (LARGEST + 1).to_bytes(4, "big"))
    assert refused.value.reason is Reason.TOO_LARGE


def test_a_bad_prefix_after_a_message_in_pieces_is_refused():
    """The bytes after a message in pieces are the prefix of the next message, and are validated as such."""
    box = inbox.Inbox(LIMIT, lambda holding: None, pieces=POLICY)
    whole = frames(bytes(1000))
    box.feed(whole[:500])
    with pytest.raises(framing.FrameError, match="flag 7"):
        box.feed(whole[500:] + b"\7\0\0\0\0")


# --- a call through a server and a pool


class Bridge:
    """A server without a socket, which passes each call on to a pool without a socket, as a router does."""

    def __init__(self):
        self.budget = Budget(1 << 20)
        self.most = 0
        self.tasks = []
        self.ends = []
        serving = server.Server(self._handle, max_message=LIMIT, budget=self.budget, min_rate=0, pieces=POLICY)
        self.near = serverconnection.ServerConnection(serving, asyncio.get_running_loop())
        self.near.connection_made(Transport())
        self.pool = client.Pool("unix:/nowhere", max_message=LIMIT, budget=self.budget, pieces=POLICY)
        self.far = clientconnection.ClientConnection(self.pool, LIMIT, 60)
        self.far.connection_made(Transport())
        self.pool._connections.add(self.far)
        self.pool.release(self.far)

    def _handle(self, call):
        self.tasks.append(asyncio.ensure_future(self._carry(call)))
        call.on_cancel(self.tasks[-1].cancel)

    async def _carry(self, call):
        request = self.pool.open(call.method, (), takes_pieces=True)
        sending = asyncio.ensure_future(self._send(call, request))
        try:
            answer = await request.first()
            if isinstance(answer, client.Reply) and answer.frame is not None:
                call.reply(answer.frame)
            elif isinstance(answer, client.Reply):
                call.fail(answer.code, answer.text)
            else:
                call.start()
                while (piece := await answer.read()) is not None:
                    await call.write(piece)
                reply = await answer.result()
                call.finish(reply.code, reply.text)
            self.ends.append("answered")
        except (CallCancelled, client.Lost, asyncio.CancelledError) as error:
            self.ends.append(type(error).__name__)
            if not call.cancelled:
                call.fail(Code.UNAVAILABLE, "lost")
        finally:
            call.on_cancel(None)
            sending.cancel()
            request.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    async def _send(self, call, request):
        while (piece := await call.read()) is not None:
            await request.write(piece)
        request.end()

    async def turn(self):
        for _ in range(6):
            await asyncio.sleep(0)
            self.most = max(self.most, self.budget.held)

    async def go(self, connection, data, steps):
        """Delivers bytes to one end as the steps say, and then the rest."""
        near, far = (self.near, self.far) if connection is self.near else (self.far, self.near)
        for step in [*steps, "go", "go back", *([READ] * (2 * len(data) // READ + 2))]:
            if isinstance(step, int):
                if not near.transport.paused and data:
                    read = data[:step]
                    data = read[deliver_one(near, read) :] + data[step:]
            elif step.startswith("stall"):
                (near if step.endswith("back") else far).pause_writing()
            else:
                (near if step.endswith("back") else far).resume_writing()
            await self.turn()
            if near.transport.closed:  # which ends neither the other connection nor its pauses
                far.resume_writing()
                return
        assert not data, "the reader never resumed"

    async def close(self, *, lose_far=True):
        self.near.transport.closed = True
        self.near.connection_lost(None)
        if lose_far and self.far.transport is not None:
            self.far.transport.closed = True
            self.far.connection_lost(None)
        await asyncio.gather(*self.tasks, return_exceptions=True)
        self.tasks.clear()
        await asyncio.sleep(0)


def reply_of(messages, sizes, *, code=0):
    """Returns a reply in chunks."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/grpc\r\ntransfer-encoding: chunked\r\n\r\n"
    body = frames(*messages)
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in cut(body, sizes) if piece)
    return head + chunks + b"0\r\ngrpc-status: %d\r\n\r\n" % code


def sent(written):
    """Returns the body of the only request in a client's output."""
    head, _, body = written.partition(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head
    [parsed] = parse_replies(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + body)
    return parsed.body


@given(MESSAGES, CUTS, MESSAGES, CUTS, STEPS, STEPS)
def test_a_call_passes_unchanged_whatever_the_reads_and_pauses(asked, chunks, answered, sizes, there, back):
    """Requests and replies leave as they arrived, in order, and little of them is held at any time."""

    async def scenario():
        bridge = Bridge()
        await bridge.go(bridge.near, request(frames(*asked), chunks=chunks), there)
        assert sent(bridge.far.transport.written) == frames(*asked)
        await bridge.go(bridge.far, reply_of(answered, sizes), back)
        await asyncio.wait_for(asyncio.gather(*bridge.tasks), 10)
        assert bridge.ends == ["answered"]
        [reply] = parse_replies(bridge.near.transport.written)
        assert (reply.code, reply.body) == (0, frames(*answered))
        assert bridge.most <= 2 * HELD
        await bridge.close(lose_far=False)
        assert bridge.budget.held == 0

    run(scenario())


@given(
    MESSAGES, CUTS, MESSAGES, CUTS, STEPS, st.integers(0, 20_000), st.sampled_from(["client", "server"]), st.booleans()
)
def test_a_cancel_at_any_point_leaves_nothing_behind(asked, chunks, answered, sizes, steps, at, who, replying):
    """If either end disconnects in the middle of a request or reply, the call ends and the budget is empty. If the
    client disconnects, the connection to the server is aborted."""

    async def scenario():
        bridge = Bridge()
        data = request(frames(*asked), chunks=chunks)
        if replying:
            await bridge.go(bridge.near, data, steps)
            data = reply_of(answered, sizes)
        await bridge.go(bridge.far if replying else bridge.near, data[: at % len(data)], steps)
        begun = bool(bridge.tasks)
        if who == "client":
            bridge.near.transport.closed = True
            bridge.near.connection_lost(None)
        else:
            bridge.far.transport.closed = True
            bridge.far.connection_lost(None)
        await bridge.turn()
        if begun:
            await asyncio.wait_for(asyncio.gather(*bridge.tasks, return_exceptions=True), 10)
            assert len(bridge.ends) == 1
            event(f"{who} {bridge.ends[0]}")
            if who == "client":
                assert bridge.far.transport.aborted, "the server does not learn that the client has gone"
        await bridge.close(lose_far=who == "client" and not begun)
        assert bridge.budget.held == 0

    run(scenario())


@given(MESSAGES, CUTS, STEPS)
def test_an_early_answer_ends_a_request_in_pieces(asked, chunks, steps):
    """A reply that comes before the end of the request is passed on."""

    async def scenario():
        bridge = Bridge()
        data = request(frames(*asked, bytes(2 * ABOVE)), chunks=chunks)
        await bridge.go(bridge.near, data[: len(data) - 50], steps)
        deliver_one(bridge.far, b"HTTP/1.1 200 OK\r\ncontent-type: application/grpc\r\ngrpc-status: 5\r\n"
                    b"content-length: 0\r\n\r\n")  # fmt: skip
        await asyncio.wait_for(asyncio.gather(*bridge.tasks), 10)
        [reply] = parse_replies(bridge.near.transport.written)
        assert reply.code == Code.NOT_FOUND
        await bridge.close(lose_far=False)
        assert bridge.budget.held == 0

    run(scenario())


# --- over sockets


async def test_a_message_far_above_the_limit_passes_a_server_that_takes_pieces(tmp_path):
    """A server and a pool with a limit of 64 KB and a budget of 2 MB pass on 32 MB in both directions. While the reply
    passes, they hold less than a megabyte. Without pieces, the same message is refused."""
    message = os.urandom(1 << 20) * 32
    budgets, most = (Budget(2 << 20), Budget(2 << 20)), 0

    async def end(call):
        """Answers with the message that arrived."""
        call.start()
        while (piece := await call.read()) is not None:
            await call.write(piece)
        call.finish()

    async def forward(call):
        nonlocal most

        async def send():
            while (piece := await call.read()) is not None:
                await onward.write(piece)
            onward.end()

        onward = outer.open(call.method, (), takes_pieces=True)
        sending = asyncio.ensure_future(send())
        answer = await onward.first()
        call.start()
        while (piece := await answer.read()) is not None:
            most = max(most, budgets[0].held)
            await call.write(piece)
        call.finish((await answer.result()).code)
        await sending

    tasks = set()

    def started(coroutine):
        def handle(call):
            tasks.add(asyncio.ensure_future(coroutine(call)))

        return handle

    policy = Pieces(above=64 << 10, wanted=lambda call: call.method == ECHO)
    last = server.Server(started(end), max_message=64 << 10, budget=budgets[1], pieces=policy)
    router = server.Server(started(forward), max_message=64 << 10, budget=budgets[0], pieces=policy)
    await last.listen_unix(tmp_path / "last")
    await router.listen_unix(tmp_path / "router")
    outer = client.Pool(f"unix:{tmp_path}/last", max_message=64 << 10, budget=budgets[0], pieces=policy)
    pool = client.Pool(f"unix:{tmp_path}/router", max_message=len(message))
    try:
        outcome = Outcome()
        pool.send(ECHO, (), framing.pack(message), outcome)
        stream = await outcome.get(60)
        frame = stream.frame if isinstance(stream, client.Reply) else await asyncio.wait_for(stream.read(), 60)
        assert frame == framing.pack(message)
        assert 0 < most < 1 << 20
        await asyncio.gather(*tasks)
        assert [budget.held for budget in budgets] == [0, 0]
        refused = await pool.call(b"/test.Service/Other", (), framing.pack(message), timeout=30)
        assert (refused.code, "--max-message" in refused.text) == (Code.RESOURCE_EXHAUSTED, True)
    finally:
        for pooled in (pool, outer):
            pooled.abort()
        await router.close(1)
        await last.close(1)
