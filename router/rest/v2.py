"""V2 REST: the Open Inference Protocol over HTTP, with the binary tensor extension.

Each call of a model becomes the gRPC call that says the same and goes through the dispatcher (`router.rest.localcall`).
What bodies look like is in `router.rest.documents`. Here: paths, headers, sizes, time-outs, and where a body is
converted: what the event loop cannot do within milliseconds is for the converter (`router.rest.conversions`).

Paths are taken apart as they came, not decoded: ids may hold `/`, which clients write as `%2F` or, some stock ones,
leave as it is.
"""

import asyncio
import contextlib
import urllib.parse
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from aiohttp import web
from google.protobuf.message import DecodeError, Message

from mesh.pb import inference_pb2 as pb
from mesh.statuses import Code, MeshError, Reason, too_large
from mesh.v2 import PREFIX
from mesh.wire import framing, inflate, metadata
from mesh.wire import headers as names
from mesh.wire.budget import Hold
from mesh.wire.call import Header
from router.calls import extensions
from router.rest import documents, errors, localcall
from router.rest.bodies import Body
from router.services import v2server

if TYPE_CHECKING:
    from router.process.context import Worker

M = TypeVar("M", bound=Message)

TIMEOUT = 300.0
"""Seconds that a caller waits who names no time itself: longer than a cold start may take."""

HEADER_LENGTH = "Inference-Header-Content-Length"

_PREFIX = "/v2/models/"
_SMALL = 64 * 1024  # bytes of JSON that are converted in the event loop: about 3 ms
_UNPACKED = 4 * 1024  # bytes that are decompressed there, into no more than 4 MiB: 10 ms
_EXPANSION = 1032  # zlib's at most
_LARGE = 1 << 20  # bytes that take a millisecond to copy: between two copies, others have their turn
_WINDOWS = {"gzip": inflate.GZIP, "x-gzip": inflate.GZIP, "deflate": inflate.ZLIB}
_PASSED = ("traceparent", "tracestate", "baggage")  # beyond x- and mm-
_NOT_PASSED = ("x-forwarded-", "x-envoy-", "x-request-timeout", "x-real-ip", "x-mesh-")
_LISTED = 1000  # models of one answer


class V2:
    """The handlers of one worker."""

    def __init__(self, worker: "Worker") -> None:
        self._worker = worker
        self._max_message = worker.settings.max_message
        self._bodies = worker.bodies
        self._conversions = worker.conversions

    def add_to(self, app: web.Application) -> None:
        """Registers the paths."""
        for path in ("/v2", "/v2/"):
            app.router.add_get(path, self.server_metadata)
        app.router.add_get("/v2/health/live", self.live)
        app.router.add_get("/v2/health/ready", self.ready)
        app.router.add_get("/v2/models", self.models)
        for segment in extensions.PATHS:
            app.router.add_route("*", f"/v2/{segment}{{rest:(/.*)?}}", self.extension)
        app.router.add_get(_PREFIX + "{rest:[\\s\\S]+}", self.get_model)
        app.router.add_post(_PREFIX + "{rest:[\\s\\S]+}", self.post_model)

    # --- the server ---

    async def server_metadata(self, _: web.Request) -> web.Response:
        """Name, version, extensions."""
        extensions = list(v2server.EXTENSIONS)
        return _json({"name": v2server.NAME, "version": v2server.VERSION, "extensions": extensions})

    async def live(self, _: web.Request) -> web.Response:
        """Whether this answers."""
        return _json({"live": True})

    async def ready(self, _: web.Request) -> web.Response:
        """Says whether an inference can be served, or 503 with the reason."""
        reason = v2server.why_not_ready(self._worker)
        if reason is not None:
            status, body = errors.of_error(MeshError(Reason.UNAVAILABLE, reason))
            return errors.response(status, {"ready": False, **body})
        return _json({"ready": True})

    async def models(self, request: web.Request) -> web.Response:
        """The registered ids, a page at a time: `?limit=`, `?after=`."""
        limit = whole_number(request, "limit", _LISTED, least=1, most=_LISTED)
        page = await self._worker.management.list(limit=limit, after=request.query.get("after", ""))
        return _json({"models": [model_id for model_id, _ in page.models], "next": page.next})

    async def extension(self, request: web.Request) -> web.Response:
        """Refuses what is the business of an extension."""
        raise extensions.of_path(request.rel_url.raw_path.split("/")[2])

    # --- a model ---

    async def get_model(self, request: web.Request) -> web.Response:
        """Metadata, or `/ready`. A model that is not loaded is loaded for it."""
        model, version, operation = split_path(request.rel_url.raw_path)
        if operation == "ready":
            ready = await self._call(
                request,
                "ModelReady",
                pb.ModelReadyRequest(name=model, version=version),
                pb.ModelReadyResponse,
            )
            if not ready.ready:
                raise MeshError(Reason.UNAVAILABLE, f"model {model} is not ready")
            return _json({"name": model, "ready": True})
        if operation:
            raise MeshError(Reason.UNKNOWN_METHOD, f"nothing to get at {request.rel_url.raw_path:.200}")
        try:
            found = await self._metadata(request, model, version)
        except Failed as failed:  # ids may end like an extension's paths, so those come second
            refusal = extensions.of_operation(request.rel_url.raw_path)
            if refusal is None or failed.answer.code != Code.NOT_FOUND:
                raise
            raise refusal from failed
        return _json(documents.metadata_document(found))

    async def post_model(self, request: web.Request) -> web.StreamResponse:
        """Inference."""
        model, version, operation = split_path(request.rel_url.raw_path)
        if operation != "infer":
            if (refusal := extensions.of_operation(request.rel_url.raw_path)) is not None:
                raise refusal
            raise MeshError(Reason.UNKNOWN_METHOD, f"nothing to post to at {request.rel_url.raw_path:.200}")
        with self._bodies.hold() as hold:
            frame, form = await self._request(request, model, version, hold)
            if (size := len(frame) - framing.PREFIX) > self._max_message:
                raise too_large(f"the body as a gRPC message of {size} bytes", self._max_message)
            hold.counts(len(frame))
            answer = await self._make(request, "ModelInfer", frame)
            del frame
            assert answer.frame is not None
            hold.counts(len(answer.frame))
            return await self._response(request, answer, form, hold)

    async def _request(
        self, request: web.Request, model: str, version: str, hold: Hold
    ) -> tuple[bytes, documents.Form]:
        """The framed gRPC message for a body, and which outputs are wanted as binary."""
        header_length = _header_length(request)
        body = await self._bodies.read(request, hold)
        encoding = one_value(request, "Content-Encoding") or ""
        if encoding.strip().lower() not in ("", "identity"):
            body = await self._decompressed(body, encoding, hold)
        if header_length == 0:
            expected = await self._metadata(request, model, version)
            return await self._framed(*documents.raw_request(model, version, body.joined(), expected))
        if (body.size if header_length is None else header_length) <= _SMALL:
            whole = body.joined()
            try:
                return await self._framed(*documents.decode_parts(model, version, whole, header_length, bound=_SMALL))
            except documents.Costly:
                body.pieces = [whole]
        async with self._in_time(request):
            return await self._conversions.to_message(model, version, body.pieces, header_length)

    async def _framed(
        self, message: pb.ModelInferRequest, raws: list[documents.Raw], form: documents.Form
    ) -> tuple[bytes, documents.Form]:
        if sum(map(len, raws)) > _LARGE:
            await asyncio.sleep(0)
        return documents.framed(message, raws), form

    async def _decompressed(self, body: Body, encoding: str, hold: Hold) -> Body:
        """The body without its Content-Encoding. What it unpacks to finds room before it is unpacked."""
        hold.request(body.size + min(self._max_message, body.size * _EXPANSION))
        if body.size <= _UNPACKED:
            plain = decompress(body.joined(), encoding, self._max_message)
        else:  # zlib lets go of the interpreter
            plain = await asyncio.to_thread(decompress, body.joined(), encoding, self._max_message)
        hold.counts(len(plain))
        body.pieces, body.size = [plain], len(plain)
        return body

    async def _response(
        self, request: web.Request, answer: localcall.Answer, form: documents.Form, hold: Hold
    ) -> web.StreamResponse:
        """The REST form of a reply, sent where it is large."""
        frame, encoding = answer.frame or b"", answer.metadata(b"grpc-encoding") or b""
        if len(frame) <= _SMALL and not framing.is_compressed(frame):
            parts, json_length = documents.encode_parts(self._message(answer, pb.ModelInferResponse), form)
            return await self._send(request, parts, json_length)
        if form.binary and not framing.is_compressed(frame):
            response = self._message(answer, pb.ModelInferResponse)
            if documents.all_binary(response, form):
                parts, json_length = documents.encode_parts(response, form)
                return await self._send(request, parts, json_length)
        async with self._in_time(request):
            paper, json_length = await self._conversions.to_body(frame, encoding, form)
        with paper:
            hold.counts(len(paper.body))
            answer.frame = None
            with paper.body[:] as view:
                return await self._send(request, [view], json_length)

    async def _send(
        self, request: web.Request, parts: Sequence[bytes | memoryview], json_length: int | None
    ) -> web.StreamResponse:
        if json_length is None:
            return await self._bodies.answer(request, parts, content_type="application/json", headers={})
        headers = {HEADER_LENGTH: str(json_length)}
        return await self._bodies.answer(request, parts, content_type="application/octet-stream", headers=headers)

    @contextlib.asynccontextmanager
    async def _in_time(self, request: web.Request) -> AsyncIterator[None]:
        """Bounds the wait for a conversion by the caller's deadline. Raises MeshError."""
        try:
            async with asyncio.timeout_at(deadline_of(request)):
                yield
        except TimeoutError as error:
            raise MeshError(Reason.DEADLINE, "the deadline passed before the body was converted") from error

    async def _metadata(self, request: web.Request, model: str, version: str) -> pb.ModelMetadataResponse:
        message = pb.ModelMetadataRequest(name=model, version=version)
        return await self._call(request, "ModelMetadata", message, pb.ModelMetadataResponse)

    async def _call(self, request: web.Request, method: str, message: Message, reply: type[M]) -> M:
        """Makes the call; raises `Failed` with what it failed with, or MeshError."""
        return self._message(await self._make(request, method, framing.pack(message.SerializeToString())), reply)

    async def _make(self, request: web.Request, method: str, frame: bytes) -> localcall.Answer:
        call = localcall.LocalCall(
            PREFIX + method.encode(),
            frame,
            headers=metadata_of(request),
            deadline=deadline_of(request),
            peer=request.remote or "rest",
        )
        answer = await localcall.make(call, self._worker.dispatcher.dispatch)
        if answer.code != Code.OK or answer.frame is None:
            raise Failed(answer)
        return answer

    def _message(self, answer: localcall.Answer, reply: type[M]) -> M:
        assert answer.frame is not None
        encoding = answer.metadata(b"grpc-encoding") or b""
        try:
            return reply.FromString(framing.unpack(answer.frame, encoding, limit=self._max_message))
        except framing.FrameError as error:
            text = f"the model server's answer: {error.text}"
            raise MeshError(error.reason, text, details=error.details) from error
        except DecodeError as error:
            raise MeshError(Reason.INTERNAL, f"the model server's answer cannot be read: {error}") from error


class Failed(Exception):
    """The call was answered with a status other than OK, which is to be passed on."""

    def __init__(self, answer: localcall.Answer) -> None:
        super().__init__(answer.text)
        self.answer = answer


def split_path(raw_path: str) -> tuple[str, str, str]:
    """Model id, version and operation ("" for none) of a path below /v2/models/, still encoded. Raises MeshError."""
    segments = raw_path.removeprefix(_PREFIX).split("/")
    operation = segments.pop() if len(segments) > 1 and segments[-1] in ("infer", "ready") else ""
    version = ""
    if len(segments) > 2 and segments[-2] == "versions":
        version = decoded(segments.pop())
        segments.pop()
    model = decoded("/".join(segments))
    if not model:
        raise MeshError(Reason.BAD_REQUEST, "the path has no model id")
    return model, version, operation


def decoded(text: str) -> str:
    """Percent-decoded. Raises MeshError where that is not UTF-8."""
    try:
        return urllib.parse.unquote(text, errors="strict")
    except UnicodeDecodeError as error:
        raise MeshError(Reason.BAD_REQUEST, "the path is not UTF-8 once it is decoded") from error


def whole_number(request: web.Request, name: str, default: int, *, least: int, most: int) -> int:
    """A number of the query, cut to `most`. Raises MeshError."""
    text = request.query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 10) or int(text) < least:
        raise MeshError(Reason.BAD_REQUEST, f"{name}={text:.60} must be a whole number from {least}")
    return min(int(text), most)


def decompress(body: bytes, encoding: str, limit: int) -> bytes:
    """A body without its Content-Encoding; no more than `limit` bytes are ever made of it. Raises MeshError."""
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return body
    window = _WINDOWS.get(encoding)
    if window is None:
        raise MeshError(Reason.BAD_REQUEST, f"Content-Encoding {encoding:.60} is not known: use gzip or deflate")
    try:
        return inflate.whole(body, window, limit)
    except inflate.TooLong as error:
        raise too_large("the body, once decompressed,", limit) from error
    except inflate.InflateError as error:
        raise MeshError(Reason.BAD_REQUEST, f"the body is not valid {encoding}: {error}") from error


def deadline_of(request: web.Request) -> float:
    """When the caller gives up, on the event loop's clock: `grpc-timeout` as in gRPC, or `x-request-timeout` in
    seconds. Raises MeshError."""
    seconds: float | None = TIMEOUT
    if (grpc := one_value(request, "grpc-timeout")) is not None:
        seconds = metadata.parse_timeout(grpc.encode("ascii", "replace"))
    elif (plain := one_value(request, "x-request-timeout")) is not None:
        try:
            seconds = float(plain)
        except ValueError:
            seconds = None
    if seconds is None or not 0 < seconds < 1e9:
        raise MeshError(Reason.BAD_REQUEST, "the time-out cannot be read: write x-request-timeout in seconds")
    return asyncio.get_running_loop().time() + seconds


def metadata_of(request: web.Request) -> list[Header]:
    """The headers that become metadata of the call: the client's own (x-), ours (mm-), and those of tracing."""
    passed: list[Header] = []
    for name, value in request.headers.items():
        lower = name.lower()
        if not lower.startswith(("x-", "mm-")) and lower not in _PASSED:
            continue
        if lower.startswith(_NOT_PASSED) or not (value.isascii() and value.isprintable()):
            continue
        encoded = lower.encode("ascii", "replace")
        if not encoded.startswith(names.INTERNAL):
            passed.append((encoded, value.encode()))
    return passed


def one_value(request: web.Request, name: str) -> str | None:
    """Returns a header's value, None where it is missing. Raises MeshError where it has two that differ."""
    values = set(request.headers.getall(name, ()))
    if len(values) > 1:
        raise MeshError(Reason.BAD_REQUEST, f"the header {name} is there {len(values)} times with different values")
    return values.pop() if values else None


def _header_length(request: web.Request) -> int | None:
    text = one_value(request, HEADER_LENGTH)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise MeshError(Reason.BAD_REQUEST, f"{HEADER_LENGTH} is {text!r:.60}, not a whole number")
    return int(text)


def _json(document: dict[str, Any]) -> web.Response:
    return web.json_response(document)
