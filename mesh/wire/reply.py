"""The outcome of a call for its caller: a reply, or the loss of the call, with how far it had come by then.

That decides whether a call may be retried: before any byte was written, always; after that, only if the method is
known to be safe; once the reply has begun, never. The client reports it and decides nothing.
"""

import enum
from dataclasses import dataclass, field

from mesh.wire import call


@dataclass(slots=True)
class Reply:
    """One complete reply. `frame` is its message if it had exactly one and was not taken as a stream."""

    code: int
    text: str = ""
    frame: bytes | None = None
    headers: list[call.Header] = field(default_factory=list)  # without the transport's own
    trailers: list[call.Header] = field(default_factory=list)  # empty in a trailers-only reply: all is in `headers`
    encoding: bytes = b""  # what `grpc-encoding` said: how a frame with flag 1 is compressed
    raw_text: bytes = b""  # `grpc-message` as it came


class LostKind(enum.Enum):
    """The progress of a call when its connection was lost."""

    UNSENT = "unsent"  # no byte of the request was written
    SENT = "sent"  # some of it was written, no byte of the reply came
    STARTED = "started"  # the reply had begun


class Lost(Exception):
    """A call that ended without a status, because of its connection; `why` says what happened to that."""

    def __init__(self, kind: LostKind, why: str) -> None:
        super().__init__(kind, why)
        self.kind = kind
        self.why = why

    def again(self) -> "Lost":
        """Returns a fresh one to raise: one exception raised by several tasks would mix up their tracebacks."""
        return Lost(self.kind, self.why)

    def __str__(self) -> str:
        return f"{self.why} ({self.kind.value})"
