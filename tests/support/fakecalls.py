"""Calls, pools and agents that do nothing by themselves: each test decides what happens, and when."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mesh.pb import agent_pb2
from mesh.statuses import Code
from mesh.wire.call import Call, CallCancelled, Header, Headers
from mesh.wire.client import Lost, LostKind, PoolStatistics, Reply, RequestStream, Sink
from router.loads.agents import Timeout, Unreachable
from router.state.pods import Pod


class FakeCall(Call):
    """A call that records its answer. `cancel()` simulates a caller that disconnects."""

    def __init__(
        self,
        method: bytes = b"/inference.GRPCInferenceService/ModelInfer",
        headers: list[Header] | None = None,
        frame: bytes | None = b"\0\0\0\0\x03\x0a\x01m",
        *,
        encoding: bytes = b"",
        deadline: float | None = None,
    ) -> None:
        self.method = method
        self.headers = headers or []
        self.frame = frame
        self.encoding = encoding
        self.deadline = deadline
        self.peer = "test"
        self.answers: list[tuple[int, str, bytes | None, list[Header], list[Header]]] = []
        self.answered = asyncio.Event() if _running() else None
        self._cancelled = False
        self._callback: Callable[[], None] | None = None

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def on_cancel(self, callback: Callable[[], None] | None) -> None:
        if callback is not None and self._cancelled:
            callback()
        else:
            self._callback = callback

    def cancel(self) -> None:
        self._cancelled = True
        callback, self._callback = self._callback, None
        if callback is not None:
            callback()

    async def read(self) -> bytes | None:
        if self._cancelled:
            raise CallCancelled("gone")
        return self.frame

    def reply(self, frame: bytes, headers: Headers = (), trailers: Headers = ()) -> None:
        self._answer(0, "", frame, headers, trailers)

    def fail(self, code: int, text: str, headers: Headers = (), trailers: Headers = ()) -> None:
        self._answer(code, text, None, headers, trailers)

    def start(self, headers: Headers = ()) -> None:
        raise NotImplementedError

    async def write(self, frame: bytes) -> None:
        raise NotImplementedError

    def finish(self, code: int = 0, text: str = "", trailers: Headers = ()) -> None:
        raise NotImplementedError

    def _answer(self, code: int, text: str, frame: bytes | None, headers: Headers, trailers: Headers) -> None:
        if self._cancelled:
            return
        assert not self.answers, f"answered twice: {self.answers} and {(code, text)}"
        self.answers.append((code, text, frame, list(headers), list(trailers)))
        if self.answered is not None:
            self.answered.set()

    @property
    def code(self) -> Code | None:
        """The status of the answer, or None without an answer."""
        return Code(self.answers[0][0]) if self.answers else None

    @property
    def text(self) -> str:
        return self.answers[0][1]


class StreamCall(FakeCall):
    """A call whose messages arrive later: first the given ones, then the end, unless the call stays `open`."""

    def __init__(
        self,
        method: bytes = b"/inference.GRPCInferenceService/ModelInfer",
        headers: list[Header] | None = None,
        messages: Sequence[bytes] = (b"\0\0\0\0\x03\x0a\x01m",),
        *,
        open: bool = False,
        deadline: float | None = None,
    ) -> None:
        super().__init__(method, headers, None, deadline=deadline)
        self.messages = list(messages)
        self.open = open

    async def read(self) -> bytes | None:
        if self._cancelled:
            raise CallCancelled("gone")
        if self.messages:
            return self.messages.pop(0)
        if self.open:
            await asyncio.Event().wait()
        return None


def _running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


@dataclass
class Sent:
    """A call that was sent to a `FakePool`. The test answers it."""

    pool: "FakePool"
    method: bytes
    headers: dict[bytes, bytes]
    frame: bytes
    sink: Sink
    timeout: bytes | None
    cancelled: bool = False
    over: bool = False  # answered, lost or cancelled
    messages: list[bytes] = field(default_factory=list)  # of a stream

    def cancel(self) -> None:
        self.cancelled = self.over = True

    def reply(self, frame: bytes = b"\0\0\0\0\x02ok", headers: list[Header] | None = None, **more: Any) -> None:
        self.over = True
        self.sink.on_reply(Reply(0, frame=frame, headers=headers or [], **more))

    def fail(self, code: int, text: str = "", headers: list[Header] | None = None) -> None:
        self.over = True
        self.sink.on_reply(Reply(code, text, headers=headers or []))

    def verify_first(self) -> None:
        self.fail(Code.UNAVAILABLE, "verify first", [(b"mesh-verify-first", b"1")])

    def not_here(self) -> None:
        self.fail(Code.UNAVAILABLE, "not here", [(b"mesh-not-here", b"1")])

    def lose(self, kind: LostKind) -> None:
        self.over = True
        self.sink.on_lost(Lost(kind, f"{self.pool.address} was {kind.value}"))


class FakePool:
    """A pool that records the calls sent to it."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.sent: list[Sent] = []
        self.closed = False
        self.full = False

    def send(
        self,
        method: bytes,
        headers: Headers,
        frame: bytes,
        sink: Sink,
        *,
        timeout: bytes | None = None,
        encoding: bytes = b"",
    ) -> Sent:
        assert not self.closed
        names = [name for name, _ in headers]
        assert len(set(names)) == len(names), f"a header occurs twice: {names}"
        sent = Sent(self, method, dict(headers), frame, sink, timeout)
        self.sent.append(sent)
        return sent

    def open(
        self,
        method: bytes,
        headers: Headers,
        *,
        timeout: bytes | None = None,
        encoding: bytes = b"",
        takes_pieces: bool = False,
    ) -> RequestStream:
        assert not self.closed
        stream = RequestStream(takes_pieces=takes_pieces)
        sent = Sent(self, method, dict(headers), b"", stream, timeout)
        stream.exchange = _FakeExchange(sent)  # type: ignore[assignment]
        self.sent.append(sent)
        return stream

    def close(self) -> None:
        self.closed = True

    def statistics(self) -> PoolStatistics:
        return PoolStatistics(connections=10**6 if self.full else 0, idle=0, connecting=0, waiting=0, calls=0)


class _FakeExchange:
    def __init__(self, sent: Sent) -> None:
        self._sent = sent
        self.over: Lost | None = None

    async def write(self, frame: bytes) -> None:
        self._sent.messages.append(frame)

    def end(self) -> None:
        pass

    def cancel(self) -> None:
        if not self._sent.over:
            self._sent.cancel()
        self.over = Lost(LostKind.STARTED, "cancelled by us")


Answer = agent_pb2.LoadReply | Exception


@dataclass
class FakeAgents:
    """Agents that answer as the test says: `answers[pod]` is a reply, an error, or a function of the request."""

    answers: dict[str, Answer | Callable[[agent_pb2.LoadRequest], Answer | Awaitable[Answer]]] = field(
        default_factory=dict
    )
    loads: list[tuple[str, agent_pb2.LoadRequest]] = field(default_factory=list)
    unloads: list[tuple[str, str]] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    described: list[str] = field(default_factory=list)
    decisions: dict[str, list[str]] = field(default_factory=dict)  # by pod, lines of JSON

    async def load(self, pod: Pod, request: agent_pb2.LoadRequest, *, timeout: float) -> agent_pb2.LoadReply:
        self.loads.append((pod.name, request))
        answer: Any = self.answers[pod.name]
        if callable(answer):
            answer = answer(request)
            if isinstance(answer, Awaitable):
                answer = await answer
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def unload(self, pod: Pod, request: agent_pb2.UnloadRequest, *, timeout: float) -> agent_pb2.UnloadReply:
        self.unloads.append((pod.name, request.model_id))
        return agent_pb2.UnloadReply(had_copy=True)

    def forget(self, name: str) -> None:
        self.forgotten.append(name)

    async def questions(self, pod: Pod, *, timeout: float) -> agent_pb2.DescribeReply:
        return agent_pb2.DescribeReply(decisions=self.decisions.get(pod.name, ()))

    async def describe(self, pod: Pod, model_id: str = "", *, timeout: float) -> agent_pb2.DescribeReply:
        self.described.append(pod.name)
        answer = self.answers.get(pod.name)
        if isinstance(answer, Exception):
            raise answer
        assert pod.record is not None
        decisions = self.decisions.get(pod.name, ())
        return agent_pb2.DescribeReply(pod=pod.name, incarnation=pod.record.incarnation, decisions=decisions)


def loaded(
    incarnation: str = "i", load_ms: int = 5, host_bytes: int = 1000, *, blamed: bool = False
) -> agent_pb2.LoadReply:
    """Returns the reply of an agent whose load succeeded."""
    loaded = agent_pb2.LoadReply.Loaded(incarnation=incarnation, load_ms=load_ms, host_bytes=host_bytes, blamed=blamed)
    return agent_pb2.LoadReply(loaded=loaded)


def elsewhere(pod: str) -> agent_pb2.LoadReply:
    """Returns the reply of an agent which says that another pod already has the model."""
    return agent_pb2.LoadReply(elsewhere=agent_pb2.LoadReply.Elsewhere(pod=pod))


def refused(reason: str, text: str = "no") -> agent_pb2.LoadReply:
    """Returns the reply of a pod that cannot take the model."""
    return agent_pb2.LoadReply(refused=agent_pb2.LoadReply.Refused(reason=reason, text=text))


def failed(
    text: str = "bad file", reason: str = "LOAD_FAILED", *, kind: str = "", asked_ms: int = 0
) -> agent_pb2.LoadReply:
    """Returns the reply of an agent whose load was tried and failed."""
    failed = agent_pb2.LoadReply.Failed(reason=reason, text=text, kind=kind, asked_ms=asked_ms)
    return agent_pb2.LoadReply(failed=failed)


def stale() -> agent_pb2.LoadReply:
    """Returns the reply of an agent which says that the registration is no longer current."""
    return agent_pb2.LoadReply(stale=agent_pb2.LoadReply.Stale())


def unreachable(pod: str = "pod") -> Unreachable:
    """Returns the error of a call to an address where nothing listens."""
    return Unreachable(f"the agent of {pod} does not answer", refused=True)


def late(pod: str = "pod") -> Timeout:
    """Returns the error of a call to a pod that has not answered in time."""
    return Timeout(f"the agent of {pod} does not answer", refused=False)
