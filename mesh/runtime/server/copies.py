"""The models that are loaded, and whether a call is meant for the copy that is here.

An address is reused by another pod, and an id is registered again for another model. So a call names the copy that it
is meant for (`mesh-copy`: the agent's incarnation and the create revision of the model's record), and whatever is here
under the same id but is not that copy does not answer it. A copy that was loaded without a token, by an agent that does
not know of them, answers to its id alone.

While a registration's content is reloaded there are two copies of it, told apart by their tokens
(`mesh.schema.copytoken`).
The newer one answers only the calls that name it until the older one has gone.
"""

import asyncio
from collections.abc import Iterator

from mesh.pb import inference_pb2
from mesh.runtime.server.onnx.session import Session
from mesh.runtime.server.pace import Pace
from mesh.runtime.server.v2 import tensors
from mesh.runtime.server.v2.reply import Answer
from mesh.runtime.server.v2.shortcuts import Shortcuts
from mesh.runtime.sharedmemory.slot import Row
from mesh.schema import copytoken

_PLATFORM = "onnx_onnxv1"


class Copy:
    """One loaded model, from its load until its unload was asked for. Belongs to the event loop's thread."""

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
        self.token = token  # b"": any call with its id is meant for it
        self.path = path  # what was asked to be loaded
        self.row = row
        self.session = session
        self.host_bytes = host_bytes
        self.device_bytes = device_bytes
        self.note = ""  # what is to be known of it, for people
        self.warm = False  # its warm-up call went well
        self.pace = Pace()
        self.shortcuts = Shortcuts()
        self.answer = Answer(model_id, tuple(session.outputs.values()))
        """What is answered unless the request asks for certain outputs."""
        self.drained: asyncio.Future[None] | None = None  # set while its unload waits for calls in flight
        self._metadata: bytes | None = None
        self._answers: dict[tuple[tensors.Tensor, ...], Answer] = {}

    def answered(self) -> None:
        """To be called after each call that was in flight: lets an unload go on after the last one."""
        if self.drained is not None and not self.row.in_flight and not self.drained.done():
            self.drained.set_result(None)

    @property
    def proven(self) -> bool:
        """Whether the model has run without an error, at its load or since."""
        return self.warm or self.row.succeeded

    def answer_of(self, outputs: tuple[tensors.Tensor, ...]) -> Answer:
        """The answer that has these outputs, in this order."""
        found = self._answers.get(outputs)
        if found is None:
            found = Answer(self.model_id, outputs)
            if len(self._answers) < tensors.MAX_SHAPES:
                self._answers[outputs] = found
        return found

    def metadata(self) -> bytes:
        """The encoded ModelMetadataResponse."""
        if self._metadata is None:
            kind = inference_pb2.ModelMetadataResponse.TensorMetadata
            # V2 has no word for what may be left out: listed, clients would make it up, and overwrite weights with it.
            inputs = [tensor for tensor in self.session.inputs.values() if not tensor.optional]
            outputs = self.session.outputs.values()
            self._metadata = inference_pb2.ModelMetadataResponse(
                name=self.model_id,
                platform=_PLATFORM,
                inputs=[kind(name=t.name, datatype=t.datatype, shape=t.shape) for t in inputs],
                outputs=[kind(name=t.name, datatype=t.datatype, shape=t.shape) for t in outputs],
            ).SerializeToString()
        return self._metadata


class Copies:
    """All copies, by id as it stands on the wire."""

    __slots__ = ("_by_id", "_newer")

    def __init__(self) -> None:
        self._by_id: dict[bytes, Copy] = {}
        self._newer: dict[bytes, Copy] = {}  # beside one of `_by_id`: the next generation of the same registration

    def __iter__(self) -> Iterator[Copy]:
        yield from self._by_id.values()
        yield from self._newer.values()

    def add(self, copy: Copy) -> None:
        """From now on calls find it: beside the copy of its id that is there, if any."""
        (self._newer if copy.model_id.encode() in self._by_id else self._by_id)[copy.model_id.encode()] = copy

    def get(self, model_id: str) -> Copy | None:
        """The copy of that id, whatever its token; the older of two."""
        return self._by_id.get(model_id.encode())

    def all_of(self, model_id: str) -> list[Copy]:
        """Returns the copies of that id, at most two."""
        name = model_id.encode()
        return [copies[name] for copies in (self._by_id, self._newer) if name in copies]

    def find(self, model_id: bytes, token: bytes | None) -> Copy | None:
        """The copy that a call is meant for; None: not here."""
        copy = self._by_id.get(model_id)
        if copy is None or not copy.token or copy.token == token:
            return copy
        newer = self._newer.get(model_id)
        if newer is not None and newer.token == token:
            return newer
        return copy if token is not None and copytoken.supersedes(copy.token, token) else None

    def remove(self, copy: Copy) -> None:
        """From now on calls do not find it; a newer one takes its place."""
        name = copy.model_id.encode()
        if self._newer.get(name) is copy:
            del self._newer[name]
        elif self._by_id.get(name) is copy:
            newer = self._newer.pop(name, None)
            if newer is not None:
                self._by_id[name] = newer
            else:
                del self._by_id[name]
