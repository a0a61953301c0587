"""Answers of a server that arrive the same whichever way a call takes: through Envoy, or over the relay's own HTTP/2
connection. The test's server sends the frames itself, so its answers can be odd."""

import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from mesh.envoy.egress import EgressMinder, EgressSettings
from mesh.runtime.relay.directegress import DirectEgress
from mesh.runtime.relay.egress import Answer, Egress
from mesh.runtime.relay.envoyegress import EnvoyEgress
from mesh.statuses import Code
from mesh.wire import framing
from mesh.wire.budget import Budget
from mesh.wire.http2 import frames
from mesh.wire.http2.frames import Code as Error
from mesh.wire.reply import Lost, LostKind, Reply
from tests.support.http2peer import Sink
from tests.support.http2server import GRPC, OK, FrameServer, data, headers, reply
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")

LIMIT = 1 << 20
BODY = framing.pack(b"answer")
PAIRS = ((b"a", b"1"), (b"a", b"2"), (b"b-bin", b"AP8"), (b"x_y", b"z"), (b"empty", b""))
Sent = Callable[[int], bytes | None]


def status(code: int, *more: tuple[bytes, bytes]) -> tuple[tuple[bytes, bytes], ...]:
    return ((b"grpc-status", b"%d" % code), *more)


def failed(*fields: tuple[bytes, bytes]) -> Sent:
    """Returns an answer of one list of headers."""
    return lambda stream: headers(stream, *fields, ends=True)


def answered(
    body: bytes, *trailers: tuple[bytes, bytes], head: tuple[tuple[bytes, bytes], ...] = GRPC, early: bytes = b""
) -> Sent:
    """Returns an answer with a body."""
    return lambda stream: (
        (headers(stream, (b":status", early)) if early else b"")
        + headers(stream, *head)
        + (data(stream, body) if body else b"")
        + headers(stream, *trailers, ends=True)
    )


ANSWERS: dict[str, tuple[Sent, int, str]] = {
    "one message": (answered(BODY, *OK), 0, ""),
    "metadata": (answered(BODY, *OK, *PAIRS, head=(*GRPC, *PAIRS)), 0, ""),
    "metadata of 50 KB": (answered(BODY, *OK, head=(*GRPC, (b"a", b"x" * 50_000))), 0, ""),
    "trailers of 50 KB": (answered(BODY, *OK, (b"a", b"x" * 50_000)), 0, ""),
    "names of the transport": (answered(BODY, *OK, head=(*GRPC, (b"server", b"x"), (b"date", b"y"))), 0, ""),
    "interim heads": (answered(BODY, *OK, early=b"103"), 0, ""),
    "a content type of its own": (
        answered(BODY, *OK, head=((b":status", b"200"), (b"content-type", b"application/grpc+proto"))),
        0,
        "",
    ),
    "a compressed message": (answered(b"\1" + BODY[1:], *OK, head=(*GRPC, (b"grpc-encoding", b"gzip"))), 0, ""),
    "two messages": (answered(BODY + BODY, *OK), 0, ""),
    "no message": (answered(b"", *OK), 0, ""),
    "trailers only": (failed(*GRPC, *status(5, (b"grpc-message", b"no %C3%B1"), (b"t", b"1"))), 5, "no ñ"),
    "trailers only, OK": (failed(*GRPC, *OK), 0, ""),
    "a failure after the head": (answered(b"", *status(9, (b"t", b"1")), head=(*GRPC, *PAIRS)), 9, ""),
    "a failure after a message": (answered(BODY, *status(9, (b"grpc-message", b"x"))), 9, "x"),
    "two statuses": (answered(b"", *status(4), head=(*GRPC, *status(3))), 4, ""),
    "an unknown status": (failed(*GRPC, *status(77)), Code.UNKNOWN, ""),
    "no status": (answered(BODY, (b"t", b"1")), Code.UNKNOWN, "the reply ended without a status"),
    "no trailers": (
        lambda stream: headers(stream, *GRPC) + data(stream, BODY, ends=True),
        Code.UNKNOWN,
        "the reply ended without a status",
    ),
    "HTTP 404": (
        failed((b":status", b"404"), (b"content-type", b"text/plain")),
        Code.UNIMPLEMENTED,
        "the server answered with HTTP status 404, not with gRPC",
    ),
    "HTTP 503": (
        failed((b":status", b"503")),
        Code.UNAVAILABLE,
        "the server answered with HTTP status 503, not with gRPC",
    ),
    "HTTP 503 with a status of gRPC": (failed((b":status", b"503"), GRPC[1], *status(8)), 8, ""),
    "not gRPC": (
        answered(b"<html>", *OK, head=((b":status", b"200"), (b"content-type", b"text/html"))),
        Code.UNKNOWN,
        "the server answered with HTTP status 200, not with gRPC",
    ),
    "a part of a message": (
        answered(BODY[:-1], *OK),
        Code.INTERNAL,
        "the reply is broken: the stream ended in the middle of a message",
    ),
    "an unknown flag": (
        answered(b"\2" + BODY[1:], *OK),
        Code.INTERNAL,
        "the reply is broken: a message begins with flag 2: gRPC has only the flags 0 and 1",
    ),
    "an end before the request's reset": (
        lambda stream: headers(stream, *GRPC, *status(3), ends=True) + frames.reset(stream, Error.NO_ERROR),
        3,
        "",
    ),
}

LOSSES: dict[str, tuple[Sent, LostKind]] = {
    "a reset": (lambda stream: frames.reset(stream, Error.CANCEL), LostKind.SENT),
    "a reset after the head": (
        lambda stream: headers(stream, *GRPC) + frames.reset(stream, Error.INTERNAL_ERROR),
        LostKind.STARTED,
    ),
    "a reset after a message": (
        lambda stream: headers(stream, *GRPC) + data(stream, BODY) + frames.reset(stream, Error.INTERNAL_ERROR),
        LostKind.STARTED,
    ),
    "trailers without an end": (
        lambda stream: headers(stream, *GRPC) + data(stream, BODY) + headers(stream, *OK),
        LostKind.STARTED,
    ),
    "a body before its head": (lambda stream: data(stream, BODY), LostKind.SENT),
    "the end of the connection": (lambda _: None, LostKind.SENT),
}


class Ways:
    """Both ways to one server."""

    def __init__(self, server: FrameServer, envoy: EnvoyEgress, direct: DirectEgress) -> None:
        self.server = server
        self.budget = direct._budget
        self._envoy = envoy
        self._direct = direct

    async def take(self, way: str, *, answer: Sent) -> tuple[list[bytes], Reply, list[Any]]:
        """Makes a call. Returns the messages, the end and the initial metadata of the answer. Raises `Lost`."""
        self.server.answer = answer
        egress: Egress = self._envoy if way == "envoy" else self._direct
        if way == "direct":
            await until(self._connected)
        sink, metadata = Sink(), [(b"name", b"value")]
        frame = framing.pack(b"question")
        sent = egress.post(b"/a.B/C", metadata, frame, sink, timeout=30.0, encoding=b"")
        assert sent is not None
        await until(lambda: sink.outcome is not None)
        outcome = sink.outcome
        assert outcome is not None
        if not isinstance(outcome, Reply) or not egress.is_final(outcome):
            call = egress.resume(sent, outcome, b"/a.B/C", metadata, frame, timeout=30.0, encoding=b"")
            outcome = await call.first()
        if isinstance(outcome, Reply):
            return [] if outcome.frame is None else [outcome.frame], outcome, outcome.headers
        return await read(outcome)

    def _connected(self) -> bool:
        self._direct._not_before = 0.0
        self._direct._connect()
        return self._direct.connected


async def read(stream: Answer) -> tuple[list[bytes], Reply, list[Any]]:
    messages = []
    while (frame := await stream.read()) is not None:
        messages.append(frame)
    return messages, await stream.result(), stream.headers


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ways() -> AsyncIterator[Ways]:
    server = FrameServer(lambda stream: reply(stream, BODY))
    address = await server.start()
    with tempfile.TemporaryDirectory(prefix="mesh-", dir="/tmp") as folder:
        settings = EgressSettings(listen=f"{folder}/egress", admin_socket=f"{folder}/admin", server=address)
        minder = EgressMinder(settings, run_dir=Path(folder))
        await minder.start()
        envoy = EnvoyEgress(minder, settings.listen, max_message=LIMIT, budget=Budget(64 << 20))
        direct = DirectEgress(envoy, address, max_message=LIMIT, budget=Budget(64 << 20))
        yield Ways(server, envoy, direct)
        await direct.close()
    await server.stop()


async def test_a_request_has_the_same_headers_either_way(ways: Ways) -> None:
    ways.server.requests.clear()
    for way in ("envoy", "direct"):
        await ways.take(way, answer=lambda stream: reply(stream, BODY))
    one, two = (dict(request) for request in ways.server.requests)
    assert one.pop(b"content-length") == b"%d" % len(framing.pack(b"question"))
    assert one == two


@pytest.mark.parametrize(("answer", "code", "text"), ANSWERS.values(), ids=ANSWERS)
async def test_an_answer_is_the_same_either_way(ways: Ways, answer: Sent, code: int, text: str) -> None:
    one, two = [await ways.take(way, answer=answer) for way in ("envoy", "direct")]
    (messages, reply, initial), (_, other, _) = one, two
    assert (reply.code, reply.text) == (code, text)
    assert (other.code, other.text, other.trailers, other.encoding) == (
        *(reply.code, reply.text, reply.trailers, reply.encoding),
    )
    assert (messages, initial) == (two[0], two[2])
    assert ways.budget.held == 0


@pytest.mark.parametrize(("answer", "kind"), LOSSES.values(), ids=LOSSES)
async def test_a_call_without_an_answer_is_lost_either_way(ways: Ways, answer: Sent, kind: LostKind) -> None:
    """A call whose reply has begun may not be sent again, so the kind of the loss decides about another attempt."""
    for way in ("envoy", "direct"):
        with pytest.raises(Lost) as lost:
            await ways.take(way, answer=answer)
        assert lost.value.kind is kind, way
        assert "/tmp" not in lost.value.why, "callers may see this text"
    assert ways.budget.held == 0


@pytest.mark.parametrize(
    "refusal",
    [
        lambda stream: frames.reset(stream, Error.REFUSED_STREAM),
        lambda _: frames.frame(frames.GOAWAY, 0, 0, bytes(8)),
    ],
    ids=["refused", "the server leaves"],
)
async def test_a_call_that_the_server_has_not_taken_is_sent_again(ways: Ways, refusal: Sent) -> None:
    answers = iter([refusal])
    got, reply_, _ = await ways.take("direct", answer=lambda s: next(answers, lambda s: reply(s, BODY))(s))
    assert (got, reply_.code) == ([BODY], 0)
