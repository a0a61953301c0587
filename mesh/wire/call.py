"""One gRPC call as its handler sees it, whatever its transport.

The HTTP/1.1 server, the `grpc.aio` edge and REST (a call made in the process itself) each have a subclass; handlers
only use this class. Messages travel as *frames*: the 5-byte prefix (compressed flag, big-endian length) and the bytes
as received, because most messages are only forwarded.

Unary calls are the fast case: `frame` is set when the handler is called, the handler answers with `reply()` or `fail()`
from plain callbacks, and no task is created. All other calls use `read()` and `write()`, message by message.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

Header = tuple[bytes, bytes]
Headers = Sequence[Header]


class Head:
    """The parser's result for a head, shared by all calls with the same one. The handler stores its own reading of the
    head in `note`."""

    __slots__ = ("encoding", "headers", "method", "note", "sized")

    def __init__(self, method: bytes, headers: list[Header], encoding: bytes, sized: bool) -> None:
        """Makes a head without a note. `sized` is true if the head has announced the body's length."""
        self.method = method
        self.headers = headers
        self.encoding = encoding
        self.sized = sized
        self.note: object = None


class Call(ABC):
    """One call. A transport makes it, and gives it to a handler once; the handler answers it exactly once."""

    __slots__ = ("deadline", "encoding", "frame", "headers", "method", "peer")

    method: bytes
    """Full name with its leading slash: b"/inference.GRPCInferenceService/ModelInfer"."""

    headers: list[Header]
    """The metadata: lower-case names; values of `-bin` names in base64, as on the wire. The transport's own headers
    (`content-type`, `te`, `content-length`, `host`, `grpc-timeout`, `grpc-encoding`, ...) are left out."""

    frame: bytes | None
    """The whole request, if it is a single message and has ended; otherwise None, and `read()` returns the messages."""

    encoding: bytes
    """The value of `grpc-encoding`, b"" for identity: how a frame with flag 1 is compressed."""

    deadline: float | None
    """The time at which the caller gives up, on the event loop's clock, or None if it waits forever."""

    peer: str
    """The caller's address, for logs."""

    takes_pieces = False
    """True if `write` also takes pieces of a message, so that this process need not hold all of it."""

    head: Head | None = None
    """The head that this call shares with others, if the transport has one."""

    def header(self, name: bytes) -> bytes | None:
        """Returns the value of the first header of that name, or None."""
        for key, value in self.headers:
            if key == name:
                return value
        return None

    @property
    @abstractmethod
    def cancelled(self) -> bool:
        """True if the caller has disconnected or given up. Answering is then allowed and does nothing."""

    @abstractmethod
    def on_cancel(self, callback: Callable[[], None] | None) -> None:
        """Sets the one callback for a caller that disconnects or gives up before the call is answered. None removes it.

        It is called at most once, from the event loop; immediately, if the caller has already gone.
        """

    @abstractmethod
    async def read(self) -> bytes | None:
        """Returns the next frame of the request, or None at its end. If `frame` is set, returns it once. A handler that
        takes pieces (`pieces`) gets large frames piece by piece. Raises `CallCancelled`."""

    @abstractmethod
    def reply(self, frame: bytes, headers: Headers = (), trailers: Headers = ()) -> None:
        """Answers a unary call with OK and one message, in one write."""

    def reply_in_pieces(self, pieces: Sequence[bytes | memoryview], headers: Headers = ()) -> None:
        """Answers like `reply`, with a frame in pieces. The pieces must not change until they are freed."""
        self.reply(b"".join(pieces), headers)

    def forget(self) -> None:
        """Frees the request. Call this once the request has been read and nothing needs its frame any more."""
        self.frame = None

    @abstractmethod
    def fail(self, code: int, text: str, headers: Headers = (), trailers: Headers = ()) -> None:
        """Answers with a status other than OK and no message. If nothing was sent yet, the answer is trailers-only, and
        `headers` and `trailers` travel together. After `start()`, this does the same as `finish()`."""

    @abstractmethod
    def start(self, headers: Headers = ()) -> None:
        """Sends the initial metadata of a reply that is sent message by message."""

    @abstractmethod
    async def write(self, frame: bytes) -> None:
        """Sends one message once the transport has room, or, if `takes_pieces` is true, the next piece of one. Raises
        `CallCancelled`."""

    @abstractmethod
    def finish(self, code: int = 0, text: str = "", trailers: Headers = ()) -> None:
        """Ends a reply that was begun with `start()`."""


class CallCancelled(Exception):
    """The end of a call by its other side: the client cancelled, the connection broke, or the deadline passed."""


Handler = Callable[[Call], None]
"""Takes a call and returns without waiting; it may answer before or after it returns. An exception is logged and
becomes INTERNAL."""
