"""V2 REST: the Open Inference Protocol over HTTP, with the binary tensor extension.

Each call of a model becomes the gRPC call that says the same and goes through the dispatcher (`router.rest.localcall`).
What bodies look like is in `router.rest.documents`. Here: paths, headers, sizes, time-outs.

Paths are taken apart as they came, not decoded: ids may hold `/`, which clients write as `%2F` or, some stock ones,
leave as it is.
"""

import asyncio
import urllib.parse
from typing import TYPE_CHECKING, Any, TypeVar

from aiohttp import web
from google.protobuf.message import DecodeError, Message

from mesh import headers as names
from mesh.pb import inference_pb2 as pb
from mesh.statuses import Code, MeshError, Reason, too_large
from mesh.wire import framing, inflate, metadata
from mesh.wire.call import Header
from router.rest import documents, errors, localcall
from router.services import v2server

if TYPE_CHECKING:
    from router.context import Worker

M = TypeVar("M", bound=Message)

TIMEOUT = 300.0
"""Seconds that a caller waits who names no time itself: longer than a cold start may take."""

HEADER_LENGTH = "Inference-Header-Content-Length"

_METHOD = b"/inference.GRPCInferenceService/"
_PREFIX = "/v2/models/"
_SMALL = 64 * 1024  # bytes of a body up to which it is taken apart in the event loop: about 3 ms
_AT_ONCE = 2  # larger ones, in threads: they hold the interpreter for most of their time
_WINDOWS = {"gzip": inflate.GZIP, "x-gzip": inflate.GZIP, "deflate": inflate.ZLIB}
_PASSED = ("traceparent", "tracestate", "baggage")  # beyond x- and mm-
_NOT_PASSED = ("x-forwarded-", "x-envoy-", "x-request-timeout", "x-real-ip")
_LISTED = 1000  # models of one answer


class V2:
    """The handlers of one worker."""

    def __init__(self, worker: "Worker") -> None:
        self._worker = worker
        self._max_message = worker.settings.max_message
        self._threads = asyncio.Semaphore(_AT_ONCE)

    def add_to(self, app: web.Application) -> None:
        """Registers the paths."""
        for path in ("/v2", "/v2/"):
            app.router.add_get(path, self.server_metadata)
        app.router.add_get("/v2/health/live", self.live)
        app.router.add_get("/v2/health/ready", self.ready)
        app.router.add_get("/v2/models", self.models)
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
        found = await self._metadata(request, model, version)
        return _json(documents.metadata_document(found))

    async def post_model(self, request: web.Request) -> web.Response:
        """Inference."""
        model, version, operation = split_path(request.rel_url.raw_path)
        if operation != "infer":
            raise MeshError(Reason.UNKNOWN_METHOD, f"nothing to post to at {request.rel_url.raw_path:.200}")
        body = await self._body(request)
        header_length = _header_length(request)
        if header_length == 0:
            expected = await self._metadata(request, model, version)
            message, form = documents.raw_request(model, version, body, expected)
        elif (len(body) if header_length is None else header_length) <= _SMALL:
            message, form = documents.decode_request(model, version, body, header_length)
        else:
            async with self._threads:
                message, form = await asyncio.to_thread(documents.decode_request, model, version, body, header_length)
        del body
        if (size := message.ByteSize()) > self._max_message:
            raise too_large(f"the body as a gRPC message of {size} bytes", self._max_message)
        response = await self._call(request, "ModelInfer", message, pb.ModelInferResponse)
        if response.ByteSize() <= _SMALL:
            encoded, json_length = documents.encode_response(response, form)
        else:
            async with self._threads:
                encoded, json_length = await asyncio.to_thread(documents.encode_response, response, form)
        if json_length is None:
            return web.Response(body=encoded, content_type="application/json")
        return web.Response(
            body=encoded, content_type="application/octet-stream", headers={HEADER_LENGTH: str(json_length)}
        )

    async def _metadata(self, request: web.Request, model: str, version: str) -> pb.ModelMetadataResponse:
        message = pb.ModelMetadataRequest(name=model, version=version)
        return await self._call(request, "ModelMetadata", message, pb.ModelMetadataResponse)

    async def _body(self, request: web.Request) -> bytes:
        try:
            body = await request.read()
        except web.HTTPRequestEntityTooLarge as error:
            raise _too_large(self._max_message) from error
        return decompress(body, one_value(request, "Content-Encoding") or "", self._max_message)

    async def _call(self, request: web.Request, method: str, message: Message, reply: type[M]) -> M:
        """Makes the call; raises `Failed` with what it failed with, or MeshError."""
        call = localcall.LocalCall(
            _METHOD + method.encode(),
            message.SerializeToString(),
            headers=metadata_of(request),
            deadline=deadline_of(request),
            peer=request.remote or "rest",
        )
        answer = await localcall.make(call, self._worker.dispatcher.dispatch)
        if answer.code != Code.OK or answer.frame is None:
            raise Failed(answer)
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


def _too_large(limit: int) -> MeshError:
    return too_large("the body", limit)


def _json(document: dict[str, Any]) -> web.Response:
    return web.json_response(document)
