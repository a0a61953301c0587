"""One call on its way through the relay.

If a call is sent without a task (`Egress.post`), this object is the sink: it passes the outcome, together with itself,
to `Outcomes`.
"""

import asyncio
from typing import Protocol

from mesh.runtime.relay.egress import Outgoing
from mesh.runtime.relay.splice import append, splice
from mesh.runtime.relay.table import RelayedCopy
from mesh.v2 import PREFIX
from mesh.wire import framing, headers
from mesh.wire.call import Call, CallCancelled
from mesh.wire.client import Exchange, ReplyStream
from mesh.wire.reply import Lost, Reply

_INFER, _METADATA, _READY = (PREFIX + name for name in (b"ModelInfer", b"ModelMetadata", b"ModelReady"))

VERSIONED = frozenset((_INFER, _METADATA, _READY))
"""The methods from whose requests the relay removes the version, which is in field 2, if the server has versions of its
own."""


class Outcomes(Protocol):
    """The part of the data port that receives the outcomes of calls."""

    def replied(self, carried: "Carried", reply: Reply) -> None:
        """Receives the complete reply to a call that was sent without a task."""

    def outcome(self, carried: "Carried", outcome: ReplyStream | Lost) -> None:
        """Receives any other outcome of a call that was sent without a task."""

    def ended(self, carried: "Carried", error: BaseException) -> None:
        """Ends a call that was sent without a task, before its outcome is known."""


class Carried:
    """One call and its state."""

    __slots__ = (
        "_alias",
        "_carrier",
        "_listed",
        "_version",
        "began_ns",
        "begun",
        "call",
        "copy",
        "epoch",
        "exchange",
        "method",
        "outgoing",
        "path",
        "refused",
        "started_ns",
        "takes_pieces",
        "timer",
    )

    def __init__(
        self,
        carrier: Outcomes,
        call: Call,
        copy: RelayedCopy,
        path: tuple[int, ...],
        named_as: bytes | None,
        *,
        method: int,
        started_ns: int,
    ) -> None:
        self.call = call
        self.copy = copy
        self.path = path
        self.method = method  # its number on the use board
        self.started_ns = started_ns
        self.began_ns = 0  # when the call was sent to the server
        self.begun = False  # the reply is passed on message by message
        self.refused: Exception | None = None  # why the rest of the request cannot be sent
        self.epoch = 0  # the link's, when the call was sent
        self.exchange: Exchange | None = None  # the call at the server, if it was sent without a task
        self.outgoing: Outgoing | None = None  # the same, once a task takes it over
        self.timer: asyncio.TimerHandle | None = None  # of the deadline, if there is no task
        self._carrier = carrier
        self._alias = self._version = ""
        if named_as is not None:
            self._alias, self._version = headers.read_as(named_as)
        self._listed = bool(self._alias or self._version)
        # The server answers with its own name for the model, which clients do not know.
        self._alias = self._alias or (copy.model_id if copy.name != copy.model_id else "")
        self.takes_pieces = not self.renames

    @property
    def renames(self) -> bool:
        """True if the alias or version that the call used, or the model's id, is written into the reply."""
        return bool(self._alias or self._version) and self.call.method in (_INFER, _METADATA)

    def named(self, frame: bytes, encoding: bytes, *, limit: int) -> bytes:
        """Returns the frame of a reply. If the call `renames`, replaces the server's name for the model, and its
        version, with those that the call used. `limit` is the largest message in bytes."""
        if self.takes_pieces:
            return frame
        call = self.call
        message = framing.unpack(frame, encoding, limit=limit)
        if self._alias:
            message = splice(message, (1,), self._alias.encode("utf-8", "surrogatepass"))
        if call.method == _METADATA:
            listed = call.header(headers.VERSIONS) if self._listed else b""
            message = append(message, 2, [v.encode() for v in headers.read_listed(listed)]) if listed else message
        elif self._version:
            message = splice(message, (2,), self._version.encode())
        return framing.pack(message)

    # --- without a task ---

    def cancel(self) -> None:
        """Ends the call because its copy is being unloaded."""
        self._carrier.ended(self, asyncio.CancelledError())

    def gone(self) -> None:
        """Ends the call because its caller has gone."""
        self._carrier.ended(self, CallCancelled("the caller has gone"))

    def late(self) -> None:
        """Ends the call because its deadline has passed."""
        self._carrier.ended(self, TimeoutError())

    def on_reply(self, reply: Reply) -> None:
        """Receives the complete reply."""
        self._carrier.replied(self, reply)

    def on_stream(self, stream: ReplyStream) -> None:
        """Receives a reply that is read message by message."""
        self._carrier.outcome(self, stream)

    def on_lost(self, lost: Lost) -> None:
        """Receives the reason why no reply will come."""
        self._carrier.outcome(self, lost)

    def on_beginning(self) -> None:
        """Does nothing: the request is kept until the outcome."""
