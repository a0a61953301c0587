"""The plain HTTP server without a socket, byte by byte: requests cut in any way, refused requests, and invalid ones."""

import asyncio
import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.statuses import Reason
from mesh.wire import budget as budgets
from mesh.wire import plainconnection, plainserver
from tests.support.examples import examples
from tests.support.waiting import until
from tests.support.wire import Transport, deliver, run

LIMIT = 1000
_ANSWER = re.compile(rb"HTTP/1\.1 (\d+) [^\r]*\r\n((?:[^\r]+\r\n)*)\r\n")


def answers(written):
    """Returns the status, the header lines and the body of each answer."""
    found = []
    while written:
        head = _ANSWER.match(written)
        assert head is not None, written
        lines = dict(line.split(b": ", 1) for line in head[2].splitlines())
        end = head.end() + int(lines[b"content-length"])
        found.append((int(head[1]), lines, written[head.end() : end]))
        written = written[end:]
    return found


class Served:
    """A connection of a server, without a socket. Each request is recorded, and answered with its own body."""

    def __init__(self, handler=None, **limits):
        self.requests = []  # (method, target, fields, body)
        self.heads = []
        self.handler = handler or self.echo
        self.budget = limits.pop("budget", None) or budgets.Budget(1 << 20)
        limits = {"max_message": LIMIT, "budget": self.budget, "min_rate": 0} | limits
        self.server = plainserver.PlainServer(self._handle, self._refusal, **limits)
        self.connection = plainconnection.PlainConnection(self.server, asyncio.get_running_loop())
        self.transport = Transport()
        self.connection.connection_made(self.transport)

    def _handle(self, one):
        self.requests.append((one.head.method, one.head.target, one.head.fields, b"".join(one.pieces)))
        self.heads.append(one.head)
        self.handler(one)

    def _refusal(self, error):
        return error.reason.http, ((b"x-reason", error.reason.name.encode()),), error.text.encode()

    def echo(self, one):
        one.answer(200, one.pieces)

    async def feed(self, *pieces):
        for piece in pieces:
            if self.transport.paused:
                await until(lambda: not self.transport.paused, interval=0, why="reading goes on")
            deliver(self.connection, piece)
            await asyncio.sleep(0)
        for _ in range(3):
            await asyncio.sleep(0)

    @property
    def answers(self):
        return answers(self.transport.written)

    @property
    def ended(self):
        return self.transport.closed or self.transport.eof


def post(body, *, target=b"/a", fields=b"", pieces=None):
    """Returns a request. With `pieces`, its body is chunked."""
    if pieces is None:
        return b"POST %b HTTP/1.1\r\nhost: x\r\n%bcontent-length: %d\r\n\r\n%b" % (target, fields, len(body), body)
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return b"POST %b HTTP/1.1\r\nhost: x\r\n%btransfer-encoding: chunked\r\n\r\n%b0\r\n\r\n" % (target, fields, chunks)


BODIES = st.lists(
    st.tuples(
        st.sampled_from([b"/a", b"/b?c=d"]),
        st.sampled_from([b"", b"x-a: 1\r\nX-B: 2\r\n", b"grpc-timeout: 1S\r\n"]),
        st.lists(st.binary(min_size=1, max_size=30), max_size=4),
        st.booleans(),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=examples(150), deadline=None)
@given(BODIES, st.lists(st.integers(0, 2000), max_size=12))
def test_however_the_bytes_are_cut_the_requests_are_the_same(bodies, places):
    """The server hands over the same requests in the same order, and gives the same answers, wherever the bytes are
    cut."""
    data = b"".join(
        post(b"".join(pieces), target=target, fields=fields, pieces=pieces if chunked else None)
        for target, fields, pieces, chunked in bodies
    )
    places = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})

    async def scenario():
        served = Served()
        await served.feed(*(data[a:b] for a, b in itertools.pairwise(places)))
        return served

    served = run(scenario())
    assert [(target, body) for _, target, _, body in served.requests] == [
        (target, b"".join(pieces)) for target, _, pieces, _ in bodies
    ]
    assert [(status, body) for status, _, body in served.answers] == [(200, b"".join(body[2])) for body in bodies]
    assert served.budget.held == 0
    assert not served.ended


async def test_a_head_that_came_before_is_shared_and_is_the_same_as_parsed():
    """From the third request with the same head on, the parsed head of the second one is reused. A head with another
    field is parsed separately."""
    served = Served()
    for _ in range(3):
        await served.feed(post(b"body", fields=b"x-a: 1\r\n"))
    await served.feed(post(b"another", fields=b"x-a: 2\r\n"), post(b"another", fields=b"x-a: 1\r\n"))
    first, second, third, other, last = served.heads
    assert second is third is last
    assert first is not second
    assert (first.method, first.target, first.fields) == (second.method, second.target, second.fields)
    assert other.fields == [(b"host", b"x"), (b"x-a", b"2")]
    assert [body for _, _, body in served.answers] == [b"body"] * 3 + [b"another"] * 2


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_refused_body_is_read_and_dropped_and_the_connection_stays(chunked):
    """A body above the limit is answered once all of the body has arrived. None of the body is kept, and the next
    request on the connection is served."""
    served = Served()
    body = bytes(5 * LIMIT)
    data = post(body, pieces=[body] if chunked else None)
    await served.feed(data[:-100])
    assert (served.answers, served.budget.held) == ([], 0)
    await served.feed(data[-100:], post(b"small"))
    (status, lines, _), (next_status, _, next_body) = served.answers
    assert (status, lines[b"x-reason"]) == (413, b"TOO_LARGE")
    assert (next_status, next_body) == (200, b"small")
    assert [body for *_, body in served.requests] == [b"small"]


async def test_a_body_without_room_is_refused_and_the_rest_is_not_waited_for_long(monkeypatch):
    """If a client stops sending after its body was refused, the client gets the answer after a moment, and the
    connection ends."""
    monkeypatch.setattr(plainconnection, "_SILENCE", 0.01)
    served = Served(budget=budgets.Budget(100))
    await served.feed(post(bytes(500))[:-1])
    await until(lambda: served.ended, interval=0.002, why="the connection ends")
    ((status, lines, _),) = served.answers
    assert (status, lines[b"x-reason"], lines[b"connection"]) == (429, b"OVERLOADED", b"close")
    assert served.budget.held == 0


async def test_a_client_that_asks_before_it_sends_is_told_at_once():
    """`Expect: 100-continue` is answered with 100 if the body will be accepted, and with the refusal otherwise."""
    served = Served()
    await served.feed(b"POST /a HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n")
    assert served.transport.written == b"HTTP/1.1 100 Continue\r\n\r\n"
    served = Served()
    await served.feed(b"POST /a HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 5000\r\n\r\n")
    assert [status for status, *_ in served.answers] == [413]
    assert served.ended


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"POST /a HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
        b"POST /a HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"GET /a HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
    ],
)
async def test_bytes_that_are_no_request_are_answered_and_end_the_connection(data):
    """Bytes that are not a request are answered with 400 after the requests before them, and the connection ends."""
    served = Served()
    await served.feed(post(b"good"), data)
    statuses = [status for status, *_ in served.answers]
    assert statuses == [200, 400]
    assert served.ended
    assert served.budget.held == 0


async def test_a_handler_that_raises_is_an_internal_error_and_others_go_on():
    """If a handler raises, the request is answered with 500, and the error is counted. The next request is served."""

    def fails(one):
        if one.head.target == b"/bad":
            raise RuntimeError
        one.answer(200, [b"ok"])

    served = Served(fails)
    await served.feed(post(b"", target=b"/bad"), post(b""))
    assert [status for status, *_ in served.answers] == [Reason.INTERNAL.http, 200]
    assert served.server.errors == 1


async def test_a_client_that_goes_away_is_told_to_the_handler_and_answers_do_nothing():
    """When a connection is lost, its request is cancelled once, its bytes return to the budget, and a late answer does
    nothing."""
    gone = []
    waiting = []

    def waits(one):
        waiting.append(one)
        one.on_cancel(lambda: gone.append(one))

    served = Served(waits)
    await served.feed(post(b"body"))
    assert served.budget.held == 4
    served.connection.connection_lost(None)
    assert gone == waiting
    assert served.budget.held == 0
    waiting[0].answer(200, [b"late"])
    assert served.transport.written == b""


async def test_a_connection_that_its_client_closes_says_so():
    """After a request of HTTP/1.0, or with `Connection: close`, the answer announces the end of the connection, and the
    server closes it."""
    for data in (b"POST /a HTTP/1.0\r\ncontent-length: 0\r\n\r\n", post(b"", fields=b"connection: close\r\n")):
        served = Served()
        await served.feed(data)
        ((status, lines, _),) = served.answers
        assert (status, lines[b"connection"]) == (200, b"close")
        assert served.ended
