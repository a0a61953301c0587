"""One gRPC call as its handler sees it, whatever carried it here.

The HTTP/1.1 server, the `grpc.aio` edge and REST (a call made in the process itself) each bring a subclass; handlers
know only this. Messages travel as *frames*, the 5-byte prefix (compressed flag, big-endian length) and the bytes as
they came, because most of them are only forwarded.

The unary case is the fast one: `frame` is there when the handler is called, the handler answers with `reply()` or
`fail()` from plain callbacks, and no task is made. Everything else goes message by message through `read()` and
`write()`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

Header = tuple[bytes, bytes]
Headers = Sequence[Header]


class Call(ABC):
    """One call. Made by a transport, given to a handler once, answered exactly once."""

    __slots__ = ("deadline", "encoding", "frame", "headers", "method", "peer")

    method: bytes
    """Full name with its leading slash: b"/inference.GRPCInferenceService/ModelInfer"."""

    headers: list[Header]
    """The metadata: lower-case names; values of `-bin` names in base64, as on the wire. What belongs to the transport
    (`content-type`, `te`, `content-length`, `host`, `grpc-timeout`, `grpc-encoding`, ...) is not in it."""

    frame: bytes | None
    """The whole request, if it was one message and has ended; None: use `read()`."""

    encoding: bytes
    """What `grpc-encoding` names, b"" for identity: how a frame with flag 1 is compressed."""

    deadline: float | None
    """When the caller gives up, on the event loop's clock; None: never."""

    peer: str
    """Who called, for logs."""

    def header(self, name: bytes) -> bytes | None:
        """Returns the first value of that name."""
        for key, value in self.headers:
            if key == name:
                return value
        return None

    @property
    @abstractmethod
    def cancelled(self) -> bool:
        """True if the caller has gone. Answering then is allowed and does nothing."""

    @abstractmethod
    def on_cancel(self, callback: Callable[[], None] | None) -> None:
        """Sets the one callback for when the caller goes away before the call is answered; None removes it.

        Called at most once, from the event loop; at once, if the caller has gone already."""

    @abstractmethod
    async def read(self) -> bytes | None:
        """Returns the next frame of the request, or None at its end; also `frame`, once. Raises `CallCancelled`."""

    @abstractmethod
    def reply(self, frame: bytes, headers: Headers = (), trailers: Headers = ()) -> None:
        """Answers a unary call with OK, in one write."""

    @abstractmethod
    def fail(self, code: int, text: str, headers: Headers = (), trailers: Headers = ()) -> None:
        """Answers with a status other than OK and no message: trailers-only if nothing was sent yet, then `headers`
        and `trailers` travel together. After `start()`, the same as `finish()`."""

    @abstractmethod
    def start(self, headers: Headers = ()) -> None:
        """Sends the initial metadata of a reply that comes message by message."""

    @abstractmethod
    async def write(self, frame: bytes) -> None:
        """Sends one message, once the transport has room. Raises `CallCancelled`."""

    @abstractmethod
    def finish(self, code: int = 0, text: str = "", trailers: Headers = ()) -> None:
        """Ends a reply that was begun with `start()`."""


class CallCancelled(Exception):
    """The other side of this call has gone: its client cancelled, its connection broke, or its deadline passed."""


Handler = Callable[[Call], None]
"""Takes a call and returns at once; it answers then or later. An exception out of it becomes INTERNAL, logged."""
