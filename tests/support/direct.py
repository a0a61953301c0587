"""The egress for calls of one message, with an egress for the others that only counts them."""

from typing import Any

from mesh.runtime.relay.directegress import DirectEgress
from mesh.runtime.relay.egress import WithoutPost
from mesh.wire import framing
from mesh.wire.budget import Budget
from mesh.wire.call import Header
from mesh.wire.reply import Lost, Reply
from mesh.wire.streams import ReplyStream
from tests.support.http2peer import Sink
from tests.support.waiting import until

LIMIT = 16 << 20
METADATA: list[Header] = [(b"name", b"value"), (b"name-bin", b"AP8")]


class Other(WithoutPost):
    """An egress that counts the calls that it is asked to carry."""

    takes_pieces = True

    def __init__(self) -> None:
        self.posted = self.sent = self.opened = 0

    async def up(self) -> None:
        """Returns at once."""

    def post(self, *_: object, **__: object) -> None:
        self.posted += 1

    def send(self, *_: object, **__: object) -> Any:
        self.sent += 1

    def open(self, *_: object, **__: object) -> Any:
        self.opened += 1

    async def close(self) -> None:
        """Ends nothing."""


class Direct:
    """A direct egress to the server at an address, with a counting one for all other calls."""

    def __init__(self, address: str, *, pieces: bool = True) -> None:
        self.other = Other()
        self.other.takes_pieces = pieces
        other: Any = self.other
        self.budget = Budget(512 << 20)
        self.egress = DirectEgress(other, address, max_message=LIMIT, budget=self.budget)

    async def connected(self) -> None:
        await self.egress.up()
        await until(lambda: self.egress.connected)

    def post(
        self,
        method: str,
        message: bytes = b"",
        *,
        timeout: float | None = None,
        encoding: bytes = b"",
        sink: Sink | None = None,
    ) -> tuple[Sink, Any]:
        """Posts a call. With an `encoding`, the message is compressed already."""
        sink = sink or Sink()
        frame = framing.pack(message)
        sent = self.egress.post(
            *(f"/test.Test/{method}".encode(), METADATA, b"\1" + frame[1:] if encoding else frame, sink),
            timeout=timeout,
            encoding=encoding,
        )
        return sink, sent

    async def answer(self, method: str, message: bytes = b"", *, encoding: bytes = b"") -> Reply:
        """Makes a call that goes directly, and returns the reply, whose end may arrive later than its message."""
        sink, sent = self.post(method, message, encoding=encoding)
        assert sent is not None
        outcome = await outcome_of(sink)
        assert isinstance(outcome, Reply)
        return outcome


async def outcome_of(sink: Sink) -> Reply | Lost | list[bytes]:
    """Waits for the outcome of a call. Returns the messages of a reply that has several."""
    await until(lambda: sink.outcome is not None, timeout=30)
    outcome = sink.outcome
    assert outcome is not None
    if not isinstance(outcome, ReplyStream):
        return outcome
    messages = []
    try:
        while (frame := await outcome.read()) is not None:
            messages.append(frame)
        reply = await outcome.result()
    except Lost as lost:
        return lost
    if len(messages) > 1:
        return messages
    if messages and not reply.code:
        reply.frame, reply.headers, reply.encoding = messages[0], outcome.headers, outcome.encoding
    return reply
