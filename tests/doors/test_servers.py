"""The relay's own HTTP/2 connection to gRPC servers in Go, Node and Java (netty), each with its own HTTP/2.

`make test-clients` builds the servers. Those that are not built are skipped, with the reason.
"""

import asyncio
import gzip
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from mesh.statuses import Code, MeshError, Reason
from mesh.wire import framing
from mesh.wire.reply import Lost, LostKind, Reply
from tests.doors import clients
from tests.support.direct import LIMIT, Direct, outcome_of
from tests.support.http2peer import Sink
from tests.support.waiting import until

SERVERS = {"go": clients.GO_SERVER, "node": clients.NODE_SERVER, "java": clients.JAVA_SERVER}
CALLERS = 50
MOST = 100  # calls that the limited server takes at once


class Foreign:
    """A server, and the way to it."""

    def __init__(self, process: asyncio.subprocess.Process, direct: Direct) -> None:
        self.process = process
        self.direct = direct
        self.seen: Counter[str] = Counter()  # outcomes of the traffic

    async def counts(self) -> tuple[int, int]:
        """Returns how many calls hang in the server, and how many hanging calls have been cancelled so far."""
        reply = await self.direct.answer("counts")
        hanging, cancelled = framing.unpack(reply.frame or b"", limit=100).split()
        return int(hanging), int(cancelled)

    async def traffic(self, until_done: Awaitable[Any]) -> None:
        """Makes calls until something else is done, and counts their outcomes."""

        async def caller() -> None:
            while not stopping.done():
                sink, sent = self.direct.post("wait", b"5")
                if sent is None:
                    self.seen["the other way"] += 1
                    await asyncio.sleep(0.005)
                    continue
                outcome = await outcome_of(sink)
                assert isinstance(outcome, Reply | Lost)
                self.seen[f"reply {outcome.code}" if isinstance(outcome, Reply) else outcome.kind.name] += 1

        stopping = asyncio.ensure_future(until_done)
        await asyncio.gather(*(caller() for _ in range(CALLERS)))
        await stopping


Start = Callable[[int], Awaitable[Foreign]]


@pytest.fixture(
    params=[
        pytest.param(program, id=name, marks=pytest.mark.skipif(bool(program.missing()), reason=program.missing()))
        for name, program in SERVERS.items()
    ]
)
async def start(request: pytest.FixtureRequest) -> AsyncIterator[Start]:
    """A function that starts a server, which takes at most the given number of calls at once (0: any number)."""
    program: clients.Program = request.param
    started: list[Foreign] = []

    async def begin(most: int) -> Foreign:
        process = await asyncio.create_subprocess_exec(*program.argv, str(most), stdout=asyncio.subprocess.PIPE)
        assert process.stdout is not None
        direct = Direct(f"127.0.0.1:{int(await process.stdout.readline())}")
        started.append(Foreign(process, direct))
        await direct.connected()
        return started[-1]

    yield begin
    for one in started:
        await one.direct.egress.close()
        if one.process.returncode is None:
            one.process.kill()
        await one.process.wait()
        assert one.direct.budget.held == 0


async def test_messages_of_any_size_come_back_with_their_metadata(start: Start) -> None:
    """Some messages are larger than the server's windows, which begin with 64 KiB and grow with what the server
    measures."""
    direct = (await start(0)).direct
    for size in (0, 1, 16_379, 16_380, 65_530, 65_531, 200_000, (1 << 20) - framing.PREFIX):
        message = os.urandom(size)
        reply = await direct.answer("echo", message)
        assert reply.frame == framing.pack(message)
        assert (b"initial", b"1") in reply.headers
        assert [value.rstrip(b"=") for name, value in reply.trailers if name == b"trailing-bin"] == [b"AP8"]
    messages = [os.urandom(50_000 * number) for number in range(10)]
    replies = await asyncio.gather(*(direct.answer("echo", message) for message in messages))
    assert [reply.frame for reply in replies] == [framing.pack(message) for message in messages]


async def test_failures_come_back_with_text_and_trailers(start: Start) -> None:
    direct = (await start(0)).direct
    reply = await direct.answer("refuse")
    assert (reply.code, reply.text, reply.frame) == (Code.FAILED_PRECONDITION, "not ñow", None)
    assert (b"trailing", b"2") in [*reply.headers, *reply.trailers]
    assert (await direct.answer("unknown")).code == Code.UNIMPLEMENTED


async def test_a_call_with_much_metadata_leaves_the_connection_alone(start: Start) -> None:
    """Netty ends a connection if a request has twice as much metadata as Netty accepts."""
    direct = (await start(0)).direct
    connection = direct.egress._connection
    sink = Sink()
    try:
        direct.egress.post(
            *(b"/test.Test/echo", [(b"name", b"v" * 16_000)], framing.pack(b""), sink), timeout=None, encoding=b""
        )
    except MeshError as error:
        assert error.reason is Reason.TOO_LARGE
    else:
        outcome = await outcome_of(sink)
        assert isinstance(outcome, Reply)
        assert outcome.code == 0
    assert (await direct.answer("echo")).code == 0
    assert direct.egress._connection is connection


async def test_several_messages_come_back(start: Start) -> None:
    direct = (await start(0)).direct
    sink, _ = direct.post("several", b"m" * 300_000)
    assert await outcome_of(sink) == [framing.pack(b"m" * 300_000)] * 3


async def test_a_compressed_message_arrives(start: Start) -> None:
    direct = (await start(0)).direct
    reply = await direct.answer("echo", gzip.compress(b"y" * 5000), encoding=b"gzip")
    assert reply.frame is not None
    assert framing.unpack(reply.frame, reply.encoding, limit=LIMIT) == b"y" * 5000


async def test_cancellations_and_deadlines_arrive(start: Start) -> None:
    it = await start(0)
    _, sent = it.direct.post("hang")
    await until(lambda: _are(it, (1, 0)))
    sent.cancel()
    await until(lambda: _are(it, (0, 1)))
    sink, _ = it.direct.post("hang", timeout=0.2)
    outcome = await outcome_of(sink)
    if isinstance(outcome, Lost):  # Go and Java reset the call
        assert outcome.kind is LostKind.SENT
    else:
        assert isinstance(outcome, Reply)
        assert outcome.code == Code.DEADLINE_EXCEEDED
    await until(lambda: _are(it, (0, 2)))


async def _are(it: Foreign, counts: tuple[int, int]) -> bool:
    return await it.counts() == counts


async def test_pings_of_the_server_are_answered(start: Start) -> None:
    """The servers ping each second while a call runs, and end a connection that does not answer."""
    it = await start(0)
    connection = it.direct.egress._connection
    assert (await it.direct.answer("wait", b"2500")).code == 0
    assert it.direct.egress._connection is connection


async def test_calls_beyond_the_servers_limit_go_the_other_way(start: Start) -> None:
    it = await start(MOST)
    posted = [it.direct.post("wait", b"200") for _ in range(5 * MOST)]
    assert [sent is not None for _, sent in posted] == [True] * MOST + [False] * 4 * MOST
    outcomes = [await outcome_of(sink) for sink, sent in posted if sent is not None]
    assert all(isinstance(outcome, Reply) and outcome.code == 0 for outcome in outcomes)


async def test_500_calls_at_once_are_answered(start: Start) -> None:
    direct = (await start(0)).direct
    replies = await asyncio.gather(*(direct.answer("echo", b"%d" % number) for number in range(500)))
    assert [reply.frame for reply in replies] == [framing.pack(b"%d" % number) for number in range(500)]


async def test_a_server_that_stops_gracefully_loses_no_call(start: Start) -> None:
    """Go and Java announce the end twice: at first without the number of the last call that they take."""
    it = await start(0)

    async def stop() -> None:
        await until(lambda: it.seen["reply 0"] > 3 * CALLERS, timeout=30)
        it.process.send_signal(signal.SIGTERM)
        await it.process.wait()

    await it.traffic(stop())
    assert it.seen["reply 0"] > 3 * CALLERS
    assert set(it.seen) <= {"reply 0", "UNSENT", "the other way"}


async def test_each_call_to_a_server_that_dies_has_one_outcome(start: Start) -> None:
    it = await start(0)

    async def kill() -> None:
        await until(lambda: it.seen["reply 0"] > 3 * CALLERS, timeout=30)
        it.process.kill()
        await it.process.wait()
        await until(lambda: it.seen["the other way"] > CALLERS)

    await it.traffic(kill())
    assert set(it.seen) <= {"reply 0", "UNSENT", "SENT", "STARTED", "the other way"}
    assert sum(it.seen[kind.name] for kind in LostKind) <= CALLERS


async def test_calls_of_a_frozen_server_can_be_cancelled(start: Start) -> None:
    it = await start(MOST)
    it.process.send_signal(signal.SIGSTOP)
    posted = [sent for _ in range(MOST) if (sent := it.direct.post("echo", bytes(60_000))[1]) is not None]
    assert len(posted) > 15, "more than the windows allow at first"
    connection = it.direct.egress._connection
    assert connection is not None
    for sent in posted:
        sent.cancel()
    assert connection.statistics().streams == connection.statistics().unsent == 0
    it.process.send_signal(signal.SIGCONT)
    await until(lambda: it.direct.egress.connected)
    assert (await it.direct.answer("echo", b"again")).frame == framing.pack(b"again")
