"""The budget of bodies. A body for which there is no room is refused unread, and every way to end a call releases its
bytes."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.pb import details_pb2
from mesh.statuses import Code, MeshError, Reason
from mesh.wire import budget as budgets
from mesh.wire import call, metadata, server, serverconnection
from tests.support.examples import examples
from tests.support.wire import Transport, chunked, deliver, frames, parse_replies, request, run

LIMIT = 1 << 20  # bytes of one message
BIG = 200_000
ROOM = 1 << 20


class Peers:
    """Connections of one server, without sockets. Calls wait until the test answers them."""

    def __init__(self, room=ROOM, **options):
        self.budget = budgets.Budget(room)
        self.calls = []
        self.server = server.Server(self.calls.append, max_message=LIMIT, budget=self.budget, **options)
        self.connections = []

    def connect(self):
        connection = serverconnection.ServerConnection(self.server, asyncio.get_running_loop())
        connection.connection_made(Transport())
        self.connections.append(connection)
        return connection

    def send(self, data):
        """Opens a connection and sends the data on it."""
        connection = self.connect()
        deliver(connection, data)
        return connection

    def judge(self, seconds=1):
        """Checks the connections whose bodies are incomplete, once for each second."""
        for _ in range(seconds):
            self.server._judge()

    def lose(self):
        for connection in self.connections:
            connection.transport.closed = True
            connection.connection_lost(None)


@pytest.fixture
async def peers():
    peers = Peers()
    yield peers
    peers.lose()
    peers.calls.clear()
    assert peers.budget.held == 0
    await peers.server.close(0)


def head(size, **options):
    """Returns the head of a request with a length. With `chunks`, the prefix of its message is included."""
    whole = request(frames(bytes(size)), **options)
    return whole[: whole.index(b"\r\n\r\n") + (50 if "chunks" in options else 4)]


def only(connection):
    [reply] = parse_replies(connection.transport.written)
    return reply


def reason(reply):
    """Returns the reason in a failure's details, and the seconds to wait before the next attempt."""
    status = details_pb2.Status.FromString(metadata.decode_bin(reply.metadata(b"grpc-status-details-bin")))
    info = details_pb2.ErrorInfo.FromString(status.details[0].value)
    delays = [details_pb2.RetryInfo.FromString(part.value).retry_delay.seconds for part in status.details[1:]]
    return Reason[info.reason], delays


@pytest.mark.parametrize("options", [{}, {"chunks": [BIG]}], ids=["length", "prefix"])
async def test_what_finds_no_room_is_refused_before_it_comes(peers, options):
    """A body for which there is no room is refused as soon as its head or its prefix has arrived, and the caller learns
    when to try again."""
    first = [peers.send(head(BIG, **options)) for _ in range(2)]
    assert peers.budget.held == 2 * (BIG + 5)
    assert not any(connection.transport.written for connection in first)
    third = peers.send(head(BIG, **options))
    assert only(third).code == Code.RESOURCE_EXHAUSTED
    assert reason(only(third)) == (Reason.OVERLOADED, [1])
    assert b"--max-body-bytes" in only(third).metadata(b"grpc-message")
    assert peers.budget.held == 2 * (BIG + 5)
    assert peers.calls == []


async def test_large_bodies_leave_room_for_small_ones(peers):
    for _ in range(10):
        peers.send(head(BIG))
    for _ in range(3):
        peers.send(request(frames(bytes(60_000))))
    assert len(peers.calls) == 3
    for one in peers.calls:
        one.reply(frames(b"yes"))


async def test_small_bodies_are_bounded_too(peers):
    answered = [peers.send(request(frames(bytes(50_000)))) for _ in range(40)]
    refused = [connection for connection in answered if connection.transport.written]
    assert len(peers.calls) + len(refused) == 40
    assert ROOM - 60_000 < peers.budget.held <= ROOM
    assert {only(connection).code for connection in refused} == {Code.RESOURCE_EXHAUSTED}


@pytest.mark.parametrize("how", ["reply", "fail", "stream", "gone"])
async def test_an_answered_or_abandoned_call_gives_its_bytes_back(peers, how):
    for again in range(2):  # the second time the header is known
        connection = peers.connect()
        deliver(connection, request(frames(bytes(50_000)), headers=[(b"a", b"b")]))
        assert peers.budget.held == 50_005
        one = peers.calls.pop()
        if how == "reply":
            one.reply(frames(b"yes"))
        elif how == "fail":
            one.fail(Code.NOT_FOUND, "no")
        elif how == "stream":
            one.start()
            await one.write(frames(b"yes"))
            one.finish()
        else:
            connection.connection_lost(None)
        assert peers.budget.held == 0, again


async def test_a_streams_messages_count_while_they_wait_and_while_they_are_held(peers):
    connection = peers.send(request(b"", chunks=[])[:-5])
    [one] = peers.calls
    deliver(connection, chunked(frames(bytes(BIG))[: BIG // 2], []))
    assert peers.budget.held >= BIG
    deliver(connection, chunked(frames(bytes(BIG))[BIG // 2 :], []))
    deliver(connection, chunked(frames(b"next"), []))
    assert len(await one.read()) == BIG + 5
    assert peers.budget.held >= BIG
    assert await one.read() == frames(b"next")
    assert peers.budget.held < 1000
    deliver(connection, chunked(frames(bytes(BIG))[:-1], []))
    one.fail(Code.ABORTED, "enough")
    assert peers.budget.held == 0


async def test_a_stream_whose_message_finds_no_room_is_refused(peers):
    first = [peers.send(head(BIG)) for _ in range(2)]
    connection = peers.send(request(b"", chunks=[])[:-5])
    deliver(connection, chunked(frames(bytes(BIG))[:1000], []))
    assert only(connection).code == Code.RESOURCE_EXHAUSTED
    with pytest.raises(call.CallCancelled):
        await peers.calls[0].read()
    assert not any(one.transport.written for one in first)


async def test_a_stream_that_is_dropped_by_everybody_gives_its_bytes_back(peers):
    connection = peers.send(request(frames(bytes(BIG)), chunks=[])[:-5])
    assert peers.budget.held >= BIG
    connection.connection_lost(None)
    peers.calls.clear()
    assert peers.budget.held == 0


# --- slow peers ---


@pytest.mark.parametrize("options", [{}, {"chunks": [BIG]}], ids=["length", "prefix"])
async def test_a_body_that_does_not_come_is_ended_with_an_answer(peers, options):
    """A request whose body stops arriving is answered with DEADLINE_EXCEEDED within 15 seconds."""
    connection = peers.send(head(BIG, **options))
    peers.judge(10)
    assert not connection.transport.written
    peers.judge(5)
    assert only(connection).code == Code.DEADLINE_EXCEEDED
    assert reason(only(connection))[0] is Reason.TOO_SLOW
    assert peers.budget.held == 0
    assert peers.server.statistics().slow == 1


@pytest.mark.parametrize(("rate", "slow"), [(1, True), (5_000, True), (40_000, False)])
async def test_a_body_has_to_keep_up_the_least_rate(peers, rate, slow):
    connection = peers.send(head(400_000))
    rest = 400_005
    while rest and not connection.transport.written:
        piece = min(rate, rest)
        deliver(connection, bytes(piece) if rest < 400_005 else frames(bytes(400_000))[:piece])
        rest -= piece
        peers.judge()
    assert bool(connection.transport.written) is slow
    assert len(peers.calls) == (not slow)


async def test_where_others_are_refused_slow_bodies_have_less_time(peers):
    connection = peers.send(head(BIG))
    seconds = 0
    while not connection.transport.written:
        deliver(connection, bytes(100))
        peers.budget.short = True  # a refusal leaves the budget like this
        peers.judge()
        seconds += 1
    assert seconds == 1


async def test_a_message_within_a_stream_has_to_come_but_the_next_one_may_be_long_in_coming(peers):
    connection = peers.send(request(frames(b"a"), chunks=[])[:-5])
    [one] = peers.calls
    assert await one.read() == frames(b"a")
    peers.judge(100)
    assert not connection.transport.written
    deliver(connection, chunked(frames(b"abc")[:-1], []))
    peers.judge(100)
    assert only(connection).code == Code.DEADLINE_EXCEEDED
    with pytest.raises(call.CallCancelled):
        await one.read()


async def test_bytes_that_we_do_not_read_are_not_the_peers_fault(peers):
    connection = peers.send(request(frames(bytes(300_000)), chunks=[])[:-5])
    deliver(connection, chunked(frames(bytes(BIG))[:100], []))
    assert connection.transport.paused
    peers.judge(100)
    assert not connection.transport.written


async def test_a_reply_that_is_not_taken_counts_and_ends_its_connection(peers):
    connection = peers.send(request(frames(b"x")))
    connection.transport.unsent = BIG
    connection.pause_writing()
    peers.calls.pop().reply(frames(bytes(BIG)))
    assert peers.budget.held == BIG
    connection.transport.unsent = BIG // 2  # the peer has taken some bytes
    peers.judge(5)
    assert peers.budget.held == BIG // 2
    assert not connection.transport.aborted
    peers.judge(100)
    assert connection.transport.aborted
    connection.connection_lost(None)
    assert peers.budget.held == 0


@pytest.mark.parametrize(
    ("unsent", "short", "ends"), [(300_000, False, False), (600_000, False, True), (300_000, True, True)]
)
async def test_the_reader_of_a_stream_may_pause_while_little_is_held_for_it_and_nobody_lacks_room(
    peers, unsent, short, ends
):
    connection = peers.send(request(frames(b"x")))
    one = peers.calls.pop()
    one.start()
    await one.write(frames(b"first"))
    connection.transport.unsent = unsent
    connection.pause_writing()
    for _ in range(30):
        peers.budget.short = short
        peers.judge()
    assert connection.transport.aborted is ends


async def test_a_reply_that_is_taken_gives_its_bytes_back(peers):
    connection = peers.send(request(frames(b"x")))
    connection.transport.unsent = BIG
    connection.pause_writing()
    connection.transport.unsent = 0
    connection.resume_writing()
    assert peers.budget.held == 6  # the bytes of the request that is not answered
    peers.judge(100)
    assert not connection.transport.aborted


# --- the budget itself ---


@settings(max_examples=examples(100))
@given(st.lists(st.tuples(st.sampled_from(["request", "counts", "end"]), st.integers(0, 9), st.integers(0, 1 << 18))))
def test_holds_never_lose_a_byte_and_requests_never_pass_the_limit(steps):
    budget = budgets.Budget(ROOM)
    holds = {}
    for step, which, size in steps:
        hold = holds.setdefault(which, budget.hold())
        if step == "request":
            before = budget.held
            try:
                hold.request(size)
            except MeshError as error:
                assert error.reason is Reason.OVERLOADED
                assert budget.held == before
            else:
                assert budget.held <= max(ROOM, before)
        elif step == "counts":
            hold.counts(size)
        else:
            with hold:
                pass
        assert budget.held == sum(one.size for one in holds.values())


def test_much_that_was_given_back_is_worth_trimming_once():
    budget = budgets.Budget()
    budget.add(100 << 20)
    assert not budget.settle()
    budget.give(90 << 20)
    assert not budget.settle()  # it was held in this second too
    assert budget.settle()
    assert not budget.settle()
    budget.give(10 << 20)
    assert not budget.settle()


def test_it_is_short_for_a_second_or_two_after_a_refusal():
    budget = budgets.Budget(10)
    assert not budget.take(11, 10)
    seen = []
    for _ in range(3):
        seen.append(budget.short)
        budget.settle()
    assert seen == [True, True, False]


def test_replies_count_while_they_come():
    from tests.wire.test_client_bytes import Connected, reply_bytes

    async def scenario():
        budget = budgets.Budget(ROOM)
        connected = Connected(budget=budget)
        connected.connection._limit = LIMIT
        outcome = connected.send()
        whole = reply_bytes([bytes(BIG)])
        await connected.feed(whole[: BIG // 2])
        assert budget.held == BIG + 5
        await connected.feed(whole[BIG // 2 :])
        assert len((await outcome.get()).frame) == BIG + 5
        assert budget.held == 0
        # No room: the caller is told so, instead of a reply.
        budget.add(ROOM)
        outcome = connected.send()
        await connected.feed(whole[: BIG // 2])
        assert (await outcome.get()).code == Code.RESOURCE_EXHAUSTED
        assert budget.held == ROOM

    run(scenario())
