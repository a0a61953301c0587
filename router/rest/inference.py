"""Inference over REST, independent of the HTTP server: from a body to the equivalent gRPC message and back.

`documents` defines the form of bodies. This module enforces sizes and times, and decides where to convert. Bodies that
the event loop cannot convert within milliseconds go to the converter (`conversions`).
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Protocol, TypeVar

from mesh.pb import inference_pb2 as pb
from mesh.statuses import Code, MeshError, Reason, too_large
from mesh.wire import framing, inflate
from mesh.wire.budget import Hold
from mesh.wire.localcall import LocalAnswer
from router.inference.models import Caller, Models
from router.rest import documents, jsontext, shortcuts
from router.rest.asked import HEADER_LENGTH, Asked, ModelPath
from router.rest.conversions import Conversions
from router.rest.pieces import Body, Piece

SMALL = 64 * 1024
"""Largest JSON body that is converted in the event loop, in bytes: about 3 ms."""

_UNPACKED = 4 * 1024  # bytes that are decompressed in the event loop, into no more than 4 MiB: 10 ms
_EXPANSION = 1032  # the most that zlib achieves
_WINDOWS = {"gzip": inflate.GZIP, "x-gzip": inflate.GZIP, "deflate": inflate.ZLIB}

Parts = tuple[Sequence[Piece], int | None]
"""A reply's body, and the length of its JSON part if binary data follows."""

R_co = TypeVar("R_co", covariant=True)
R = TypeVar("R")

Read = Callable[[Hold], Awaitable[Body]]
"""A function that reads the request's body within the budget. Raises MeshError."""


class Send(Protocol[R_co]):
    """A sender of a reply's body."""

    def __call__(self, pieces: Sequence[Piece], *, content_type: str, headers: dict[str, str]) -> Awaitable[R_co]:
        """Sends the body. Raises ConnectionResetError if the client does not read it."""


class Inference:
    """Inference over REST, in one worker."""

    def __init__(self, models: Models, conversions: Conversions, *, max_message: int) -> None:
        """Makes a worker's inference over REST. `max_message` limits the bytes of a message in either direction."""
        self._models = models
        self._conversions = conversions
        self._max_message = max_message
        self._requests = shortcuts.Requests()
        self._heads = shortcuts.Heads()
        self._replies = shortcuts.Replies()

    async def infer(self, asked: Asked, target: ModelPath, hold: Hold, read: Read, send: Send[R]) -> R:
        """Reads the request, carries it out and sends the reply. Returns the result of `send`. Raises CallFailed,
        MeshError."""
        header_length = asked.header_length()
        body = await read(hold)
        encoding = asked.encoding()
        caller = asked.caller()
        if encoding:
            body = await self._decompressed(body, encoding, hold)
        quick = self.quick(target, body, header_length)
        frame, form = quick or await self._message(target, body, header_length, caller)
        hold.counts(len(frame))
        answer = await self._models.infer(frame, caller)
        del frame
        assert answer.frame is not None
        hold.counts(len(answer.frame))
        return await self.conclude(target.model, answer, form, caller, hold, send)

    def quick(self, target: ModelPath, body: Body, header_length: int | None) -> tuple[bytes, documents.Form] | None:
        """Returns the framed gRPC message for a body, and the form of the reply. Returns None if the conversion would
        block the event loop for too long, or needs more than the body. Raises MeshError."""
        if header_length == 0 or (body.size if header_length is None else header_length) > SMALL:
            return None
        model, version = target.model, target.version
        loaded = None
        if header_length is None:
            loaded = jsontext.load(body.joined())
            frame = None if loaded.careful else self._requests.encode(model, version, loaded.members)
            form: documents.Form | None = documents.ALL_JSON
        else:
            frame, form = self._heads.encode(model, version, body, header_length)
        if frame is None or form is None:
            try:
                message, raws, form = documents.decode_parts(
                    model, version, body, header_length, bound=SMALL, loaded=loaded
                )
            except documents.Costly:
                return None
            encoded = message.SerializeToString()
            frame = documents.framed(encoded, raws)
            if header_length is not None:
                self._heads.learn(model, version, body, header_length, message, encoded, raws, form)
        self._check(frame)
        return frame, form

    def opening(
        self, target: ModelPath, begun: bytes, header_length: int | None, size: int
    ) -> tuple[bytes, documents.Form] | None:
        """Returns the beginning of the framed gRPC message for a body, and the form of the reply, if the rest of the
        body can be read behind that beginning. `begun` is the beginning of the body, which has `size` bytes. A large
        binary tensor is then never copied."""
        if not header_length:
            return None
        found = self._heads.opening(target.model, target.version, begun, header_length, size)
        if found is None or framing.frame_end(found[0], 0, framing.MAX_LENGTH) > self._max_message + framing.PREFIX:
            return None  # `quick` refuses a message above the limit
        return found

    def quick_answer(self, model: str, answer: LocalAnswer, form: documents.Form) -> Parts | None:
        """Returns the body for a reply, and the length of its JSON part if binary data follows. Returns None if the
        conversion would block the event loop for too long. Raises MeshError."""
        frame = answer.frame or b""
        if framing.is_compressed(frame):
            return None
        if len(frame) <= SMALL:
            if form is not documents.ALL_JSON:
                return documents.encode_parts(self._models.response(answer), form)
            text = self._replies.write(model, frame)
            if text is not None:
                return (text,), None
            response = self._models.response(answer)
            parts = documents.encode_parts(response, form)
            self._replies.learn(model, frame, response)
            return parts
        if form.binary:
            try:
                rest, raws = documents.split(frame)
            except ValueError:  # the long way says that the message cannot be read
                return None
            if len(rest) <= SMALL:
                response = self._models.response(LocalAnswer(Code.OK, frame=framing.pack(rest)))
                if documents.all_binary(response, raws, form):
                    return documents.encode_parts(response, form, raws)
        return None

    def _check(self, frame: bytes) -> None:
        if (size := len(frame) - framing.PREFIX) > self._max_message:
            raise too_large(f"the body as a gRPC message of {size} bytes", self._max_message)

    async def _message(
        self, target: ModelPath, body: Body, header_length: int | None, caller: Caller
    ) -> tuple[bytes, documents.Form]:
        """Returns the same as `quick`, for bodies that `quick` cannot convert."""
        model, version = target.model, target.version
        if header_length == 0:
            expected = await self._models.metadata(pb.ModelMetadataRequest(name=model, version=version), caller)
            message, raws, form = documents.raw_request(model, version, body, expected)
            frame = documents.framed(message.SerializeToString(), raws)
        else:
            async with _in_time(caller):
                frame, form = await self._conversions.to_message(model, version, body.pieces, header_length)
        self._check(frame)
        return frame, form

    async def _decompressed(self, body: Body, encoding: str, hold: Hold) -> Body:
        hold.request(body.size + min(self._max_message, body.size * _EXPANSION))
        if body.size <= _UNPACKED:
            plain = decompress(body.joined(), encoding, self._max_message)
        else:  # zlib releases the interpreter lock
            plain = await asyncio.to_thread(decompress, body.joined(), encoding, self._max_message)
        hold.counts(len(plain))
        return Body([plain])

    async def conclude(
        self, model: str, answer: LocalAnswer, form: documents.Form, caller: Caller, hold: Hold, send: Send[R]
    ) -> R:
        """Sends the REST form of a reply, and returns the result of `send`. Raises MeshError."""
        if (quick := self.quick_answer(model, answer, form)) is not None:
            return await _sent(send, *quick)
        frame = answer.frame or b""
        async with _in_time(caller):
            paper, json_length = await self._conversions.to_body(frame, answer.encoding, form)
        hold.counts(len(paper.body))
        answer.frame = None
        return await _sent(send, [paper.body], json_length)


async def _sent(send: Send[R], pieces: Sequence[Piece], json_length: int | None) -> R:
    if json_length is None:
        return await send(pieces, content_type="application/json", headers={})
    return await send(pieces, content_type="application/octet-stream", headers={HEADER_LENGTH: str(json_length)})


@contextlib.asynccontextmanager
async def _in_time(caller: Caller) -> AsyncIterator[None]:
    """Limits the wait for a conversion to the caller's deadline. Raises MeshError."""
    try:
        async with asyncio.timeout_at(caller.deadline):
            yield
    except TimeoutError as error:
        text = (
            "the deadline passed before a large JSON body was converted: send large tensors as binary data, or call "
            "with a later deadline"
        )
        raise MeshError(Reason.DEADLINE, text) from error


def decompress(body: bytes, encoding: str, limit: int) -> bytes:
    """Returns the decompressed body, of at most `limit` bytes. Raises MeshError."""
    window = _WINDOWS.get(encoding)
    if window is None:
        raise MeshError(Reason.BAD_REQUEST, f"Content-Encoding {encoding:.60} is not supported: use gzip or deflate")
    try:
        return inflate.whole(body, window, limit)
    except inflate.TooLong as error:
        raise too_large("the body, once decompressed,", limit) from error
    except inflate.InflateError as error:
        raise MeshError(Reason.BAD_REQUEST, f"the body is not valid {encoding}: {error}") from error
