"""A copy in Mesh's own server: the session, its size, and the form of its answers."""

import asyncio
from collections.abc import Sequence

from mesh.pb import inference_pb2
from mesh.runtime.server.onnx.session import Session
from mesh.runtime.server.pace import Pace
from mesh.runtime.server.v2 import tensors
from mesh.runtime.server.v2.reply import ReplyWriter
from mesh.runtime.server.v2.shortcuts import Shortcuts
from mesh.runtime.sharedmemory.slot import Row

_PLATFORM = "onnx_onnxv1"


class ServedCopy:
    """One loaded model, from its load until its unload is requested. Must be used only in the event loop's thread."""

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
        """The answer to requests that do not ask for particular outputs."""
        self.drained: asyncio.Future[None] | None = None  # set while its unload waits for calls in flight
        self._metadata: bytes | None = None  # without name and versions
        self._answers: dict[tuple[tensors.Tensor, ...], ReplyWriter] = {}

    def answered(self) -> None:
        """Lets a waiting unload continue if no call is in flight any more. Call it after each call that the row has
        counted as ended."""
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
        """Returns the encoded ModelMetadataResponse with this name and these versions. For a call by an alias, these
        are the alias's name, and the versions that the router knows."""
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
