"""The outcome of a call for its caller: a reply, or the loss of the call together with its progress.

The progress decides whether a call may be retried. If no byte was written, it may always be retried. If some bytes were
written, it may be retried only if its method is known to be safe. If the reply has begun, it may not be retried. The
client only reports the progress.
"""

import enum
from dataclasses import dataclass, field

from mesh.wire import call


@dataclass(slots=True)
class Reply:
    """One complete reply. `frame` is its message, if it had exactly one and was not read as a stream."""

    code: int
    text: str = ""
    frame: bytes | None = None
    headers: list[call.Header] = field(default_factory=list)  # without the transport's own
    trailers: list[call.Header] = field(default_factory=list)  # trailers-only: empty, all is in `headers`
    encoding: bytes = b""  # the value of `grpc-encoding`: how a frame with flag 1 is compressed
    raw_text: bytes = b""  # `grpc-message`, undecoded


class LostKind(enum.Enum):
    """The progress of a call when its connection was lost."""

    UNSENT = "unsent"  # no byte of the request was written
    SENT = "sent"  # some of it was written, no byte of the reply arrived
    STARTED = "started"  # the reply had begun


class Lost(Exception):
    """A call that ended without a status because of its connection.

    `why` says what happened to the connection, in words that callers may read. `detail` is for logs only: the server's
    address, or another library's own text, which may contain the address.
    """

    def __init__(self, kind: LostKind, why: str, detail: str = "") -> None:
        super().__init__(kind, why, detail)
        self.kind = kind
        self.why = why
        self.detail = detail

    def again(self) -> "Lost":
        """Returns a copy to raise, because the tracebacks of several tasks that raised the same exception would be
        mixed up."""
        return Lost(self.kind, self.why, self.detail)

    def __str__(self) -> str:
        return f"{self.detail + ': ' if self.detail else ''}{self.why} ({self.kind.value})"
