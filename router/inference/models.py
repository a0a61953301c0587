"""V2's methods on models, for callers inside the process: ready, metadata, infer.

REST differs from gRPC only in the form of its messages. Each request therefore becomes the unary call that a gRPC
client would have made, and goes through the same dispatcher (`localcall`).

An inference request and its answer are passed as framed messages. A large tensor is then copied only once, and the
answer can often be passed on unchanged.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from google.protobuf.message import DecodeError, Message

from mesh.pb import inference_pb2 as pb
from mesh.statuses import Code, MeshError, Reason
from mesh.v2 import PREFIX
from mesh.wire import framing, localcall
from mesh.wire.call import Handler, Header
from mesh.wire.localcall import LocalAnswer, LocalCall

M = TypeVar("M", bound=Message)

_INFER = PREFIX + b"ModelInfer"


class Caller(NamedTuple):
    """The caller of a model, with the deadline and metadata of its call."""

    deadline: float | None = None  # on the event loop's clock; None: never
    metadata: Sequence[Header] = ()
    peer: str = "local"


class CallFailed(Exception):
    """A call that was answered with a status other than OK. The caller gets this status."""

    def __init__(self, answer: LocalAnswer) -> None:
        super().__init__(answer.text)
        self.answer = answer


class Models:
    """Access to models for callers inside the process."""

    def __init__(self, dispatch: Handler, *, max_message: int) -> None:
        """Makes a client of `dispatch`. `max_message` limits the bytes of a decompressed answer."""
        self._dispatch = dispatch
        self._max_message = max_message

    async def ready(self, request: pb.ModelReadyRequest, caller: Caller) -> pb.ModelReadyResponse:
        """Returns whether a model is ready. Loads a model that is not loaded. Raises CallFailed, MeshError."""
        return await self._ask("ModelReady", request, pb.ModelReadyResponse, caller)

    async def metadata(self, request: pb.ModelMetadataRequest, caller: Caller) -> pb.ModelMetadataResponse:
        """Returns a model's inputs and outputs. Loads a model that is not loaded. Raises CallFailed, MeshError."""
        return await self._ask("ModelMetadata", request, pb.ModelMetadataResponse, caller)

    async def infer(self, frame: bytes, caller: Caller) -> LocalAnswer:
        """Carries out a framed ModelInferRequest and returns the answer, which has a frame. Raises CallFailed."""
        return await self._make("ModelInfer", frame, caller)

    def begin(self, frame: bytes, caller: Caller, done: Callable[[LocalAnswer], None]) -> LocalCall:
        """Begins an inference. `done` gets the outcome, even a failure, unless the call is cancelled first. `done` may
        be called before this method returns. The dispatcher enforces the caller's deadline."""
        call = LocalCall(
            _INFER, frame, headers=list(caller.metadata), deadline=caller.deadline, peer=caller.peer, done=done
        )
        localcall.begin(call, self._dispatch)
        return call

    def response(self, answer: LocalAnswer) -> pb.ModelInferResponse:
        """Returns the message in the answer to an inference. Raises MeshError."""
        return self._message(answer, pb.ModelInferResponse)

    async def _ask(self, method: str, request: Message, reply: type[M], caller: Caller) -> M:
        return self._message(await self._make(method, framing.pack(request.SerializeToString()), caller), reply)

    async def _make(self, method: str, frame: bytes, caller: Caller) -> LocalAnswer:
        answer = await localcall.make(
            PREFIX + method.encode(),
            frame,
            self._dispatch,
            headers=list(caller.metadata),
            deadline=caller.deadline,
            peer=caller.peer,
        )
        if answer.code != Code.OK or answer.frame is None:
            raise CallFailed(answer)
        return answer

    def _message(self, answer: LocalAnswer, reply: type[M]) -> M:
        assert answer.frame is not None
        try:
            return reply.FromString(framing.unpack(answer.frame, answer.encoding, limit=self._max_message))
        except framing.FrameError as error:
            text = f"the model server's answer: {error.text}"
            raise MeshError(error.reason, text, details=error.details) from error
        except DecodeError as error:
            raise MeshError(
                Reason.INTERNAL, f"the model server's answer cannot be read ({error}): check the model server"
            ) from error
