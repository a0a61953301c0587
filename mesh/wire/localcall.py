"""A call made inside the process, which takes the same path as a gRPC call: routing, cold starts, retries, metrics."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from mesh.statuses import Code
from mesh.telemetry import logs
from mesh.wire import call as wire

log = logs.get(__name__)


@dataclass(slots=True)
class LocalAnswer:
    """The outcome of a call made inside the process."""

    code: int
    text: str = ""
    frame: bytes | None = None
    headers: list[wire.Header] = field(default_factory=list)
    trailers: list[wire.Header] = field(default_factory=list)

    def metadata(self, name: bytes) -> bytes | None:
        """Returns the first value with that name in the trailers or headers, or None. A failed call may have all its
        metadata in either place."""
        return next((value for part in (self.trailers, self.headers) for key, value in part if key == name), None)

    @property
    def encoding(self) -> bytes:
        """The compression of frames, as `grpc-encoding` names it, or b"" if it is not stated."""
        return self.metadata(b"grpc-encoding") or b""


class LocalCall(wire.Call):
    """One unary call. `deadline` is on the event loop's clock."""

    __slots__ = ("_cancelled", "_done", "_first", "_on_cancel", "_read", "_start")

    def __init__(
        self,
        method: bytes,
        frame: bytes,
        *,
        headers: list[wire.Header],
        deadline: float | None,
        peer: str,
        done: Callable[[LocalAnswer], None],
    ) -> None:
        """Makes a call. `done` is called once with the answer, unless the call is cancelled first."""
        self.method = method
        self.headers = headers
        self.frame = frame
        self.encoding = b""
        self.deadline = deadline
        self.peer = peer
        self._done: Callable[[LocalAnswer], None] | None = done
        self._cancelled = False
        self._on_cancel: Callable[[], None] | None = None
        self._read = False
        self._start: list[wire.Header] | None = None
        self._first: bytes | None = None

    @property
    def cancelled(self) -> bool:
        """True if `cancel()` came before the answer."""
        return self._cancelled

    def on_cancel(self, callback: Callable[[], None] | None) -> None:
        """Sets the function to call when the caller goes away before the answer."""
        if callback is not None and self._cancelled:
            callback()
        else:
            self._on_cancel = callback

    def cancel(self) -> None:
        """Cancels the call, because its client has gone or its deadline has passed. Does nothing if the call is
        answered."""
        if self._cancelled or self._done is None:
            return
        self._cancelled = True
        self._done = None
        callback, self._on_cancel = self._on_cancel, None
        if callback is not None:
            try:
                callback()
            except Exception:
                log.exception("handler failed to handle a cancelled call", method=self.method)

    async def read(self) -> bytes | None:
        """Returns the call's only message, then None. Raises `CallCancelled`."""
        if self._cancelled:
            raise wire.CallCancelled("the caller has gone")
        if self._read:
            return None
        self._read = True
        return self.frame

    def reply(self, frame: bytes, headers: wire.Headers = (), trailers: wire.Headers = ()) -> None:
        """Answers with OK and one message."""
        self._settle(LocalAnswer(Code.OK, "", frame, list(headers), list(trailers)))

    def fail(self, code: int, text: str, headers: wire.Headers = (), trailers: wire.Headers = ()) -> None:
        """Answers with a status other than OK."""
        self._settle(LocalAnswer(code, text, None, [*(self._start or ()), *headers], list(trailers)))

    def start(self, headers: wire.Headers = ()) -> None:
        """Keeps the initial metadata of a reply that `write` and `finish` complete."""
        self._start = list(headers)

    async def write(self, frame: bytes) -> None:
        """Takes the reply's only message. A second message ends the call with INTERNAL. Raises `CallCancelled`."""
        if self._cancelled:
            raise wire.CallCancelled("the caller has gone")
        if self._first is not None:
            self._settle(LocalAnswer(Code.INTERNAL, "the model server answered with more than one message"))
            raise wire.CallCancelled("more than one message")
        self._first = frame

    def finish(self, code: int = 0, text: str = "", trailers: wire.Headers = ()) -> None:
        """Ends the reply. OK without a message becomes INTERNAL."""
        if code == Code.OK and self._first is None:
            code, text = Code.INTERNAL, "the model server answered with no message"
        frame = self._first if code == Code.OK else None
        self._settle(LocalAnswer(code, text, frame, self._start or [], list(trailers)))

    def _settle(self, answer: LocalAnswer) -> None:
        self._on_cancel = None
        done, self._done = self._done, None
        if done is not None:
            done(answer)


def begin(call: LocalCall, dispatch: wire.Handler) -> None:
    """Passes the call to the handler, which enforces its deadline. If the handler raises, the call fails with
    INTERNAL."""
    try:
        dispatch(call)
    except Exception:
        log.exception("handler failed", method=call.method)
        call.fail(Code.INTERNAL, "internal error; the router's log has the cause")


async def make(
    method: bytes,
    frame: bytes,
    dispatch: wire.Handler,
    *,
    headers: list[wire.Header],
    deadline: float | None,
    peer: str,
    encoding: bytes = b"",
) -> LocalAnswer:
    """Makes a call and waits for its answer, which is DEADLINE_EXCEEDED once the deadline has passed. If the wait is
    cancelled, so is the call."""
    answer: asyncio.Future[LocalAnswer] = asyncio.get_running_loop().create_future()

    def done(came: LocalAnswer) -> None:
        if not answer.done():  # the wait for it may have been cancelled in this turn of the loop
            answer.set_result(came)

    call = LocalCall(method, frame, headers=headers, deadline=deadline, peer=peer, done=done)
    call.encoding = encoding
    begin(call, dispatch)
    try:
        async with asyncio.timeout_at(deadline):
            return await answer
    except TimeoutError:
        return LocalAnswer(Code.DEADLINE_EXCEEDED, "the deadline passed")
    finally:
        call.cancel()
