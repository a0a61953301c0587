"""The loaded copies, and the match between a call and the copy that it is meant for.

Another pod may get the same address, and an id may be registered again for another model. So a call names the copy that
it is meant for (`mesh-copy`: the agent's incarnation and the create revision of the model's record), and no other copy
of the same id answers it. A copy that was loaded without a token, by an agent that does not send them, is matched by
its id alone.

While a registration's content is reloaded it has two copies, told apart by their tokens (`mesh.schema.copytoken`).
Until the older one is unloaded, the newer one answers only the calls that name it.
"""

import asyncio
from collections.abc import Iterator, Sequence

from mesh.pb import inference_pb2
from mesh.runtime.server.onnx.session import Session
from mesh.runtime.server.pace import Pace
from mesh.runtime.server.v2 import tensors
from mesh.runtime.server.v2.reply import ReplyWriter
from mesh.runtime.server.v2.shortcuts import Shortcuts
from mesh.runtime.sharedmemory.slot import Row
from mesh.schema import copytoken

_PLATFORM = "onnx_onnxv1"


class ServedCopy:
    """One loaded model, from its load until its unload is requested. Belongs to the event loop's thread."""

    __slots__ = (
        "_answers",
        "_metadata",
        "answer",
        "device_bytes",
        "drained",
        "host_bytes",
        "model_id",
        "note",
        "pace",
        "path",
        "row",
        "session",
        "shortcuts",
        "token",
        "warm",
    )

    def __init__(
        self, model_id: str, *, token: bytes, path: str, row: Row, session: Session, host_bytes: int, device_bytes: int
    ) -> None:
        self.model_id = model_id
        self.token = token  # b"": it answers any call with its id
        self.path = path  # the path that the agent asked for
        self.row = row
        self.session = session
        self.host_bytes = host_bytes
        self.device_bytes = device_bytes
        self.note = ""  # a note about the load, for people
        self.warm = False  # its warm-up call succeeded
        self.pace = Pace()
        self.shortcuts = Shortcuts()
        self.answer = ReplyWriter(model_id, tuple(session.outputs.values()))
        """The answer to requests that do not ask for certain outputs."""
        self.drained: asyncio.Future[None] | None = None  # set while its unload waits for calls in flight
        self._metadata: bytes | None = None  # without name and versions
        self._answers: dict[tuple[tensors.Tensor, ...], ReplyWriter] = {}

    def answered(self) -> None:
        """Counts a call in flight as done; after the last one, a waiting unload continues."""
        if self.drained is not None and not self.row.in_flight and not self.drained.done():
            self.drained.set_result(None)

    @property
    def proven(self) -> bool:
        """True if the model has run without an error, at its load or since."""
        return self.warm or self.row.succeeded

    def answer_of(self, outputs: tuple[tensors.Tensor, ...]) -> ReplyWriter:
        """Returns the answer with these outputs, in this order."""
        found = self._answers.get(outputs)
        if found is None:
            found = ReplyWriter(self.model_id, outputs)
            if len(self._answers) < tensors.MAX_SHAPES:
                self._answers[outputs] = found
        return found

    def metadata(self, name: str = "", versions: Sequence[str] = ()) -> bytes:
        """Returns the encoded ModelMetadataResponse, under the `name` of an alias if the call is by one, with the
        `versions` that its router knows of."""
        if self._metadata is None:
            kind = inference_pb2.ModelMetadataResponse.TensorMetadata
            # V2 cannot mark an input as optional: if it were listed, clients would send something and overwrite
            # weights.
            inputs = [tensor for tensor in self.session.inputs.values() if not tensor.optional]
            outputs = self.session.outputs.values()
            self._metadata = inference_pb2.ModelMetadataResponse(
                platform=_PLATFORM,
                inputs=[kind(name=t.name, datatype=t.datatype, shape=t.shape) for t in inputs],
                outputs=[kind(name=t.name, datatype=t.datatype, shape=t.shape) for t in outputs],
            ).SerializeToString()
        named = inference_pb2.ModelMetadataResponse(name=name or self.model_id, versions=versions)
        return named.SerializeToString() + self._metadata  # protobuf reads two messages in a row as one


class Copies:
    """All copies, by id as encoded on the wire."""

    __slots__ = ("_by_id", "_newer")

    def __init__(self) -> None:
        self._by_id: dict[bytes, ServedCopy] = {}
        self._newer: dict[bytes, ServedCopy] = {}  # next generations of registrations in `_by_id`

    def __iter__(self) -> Iterator[ServedCopy]:
        yield from self._by_id.values()
        yield from self._newer.values()

    def add(self, copy: ServedCopy) -> None:
        """Adds a copy, in addition to one with the same id if there is one."""
        (self._newer if copy.model_id.encode() in self._by_id else self._by_id)[copy.model_id.encode()] = copy

    def get(self, model_id: str) -> ServedCopy | None:
        """Returns the copy of that id with any token; the older of two."""
        return self._by_id.get(model_id.encode())

    def all_of(self, model_id: str) -> list[ServedCopy]:
        """Returns the copies of that id, at most two."""
        name = model_id.encode()
        return [copies[name] for copies in (self._by_id, self._newer) if name in copies]

    def find(self, model_id: bytes, token: bytes | None) -> ServedCopy | None:
        """Returns the copy that a call is meant for; None if it is not here."""
        copy = self._by_id.get(model_id)
        if copy is None or not copy.token or copy.token == token:
            return copy
        newer = self._newer.get(model_id)
        if newer is not None and newer.token == token:
            return newer
        return copy if token is not None and copytoken.supersedes(copy.token, token) else None

    def remove(self, copy: ServedCopy) -> None:
        """Removes a copy; a newer one of the same id takes its place."""
        name = copy.model_id.encode()
        if self._newer.get(name) is copy:
            del self._newer[name]
        elif self._by_id.get(name) is copy:
            newer = self._newer.pop(name, None)
            if newer is not None:
                self._by_id[name] = newer
            else:
                del self._by_id[name]
