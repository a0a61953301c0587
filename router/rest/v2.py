"""V2 REST: the Open Inference Protocol over HTTP, with the binary tensor extension, served by aiohttp.

This module is only the aiohttp part. `asked` parses a request, `inference` carries out an inference, and
`router.inference` answers for the server and its models.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from aiohttp import web

from mesh.pb import inference_pb2 as pb
from mesh.statuses import Code, MeshError, Reason
from router.access import operations
from router.access.operations import Operation
from router.calls import extensions
from router.inference.models import CallFailed
from router.rest import documents, doors, errors, responses
from router.rest.asked import MODELS, Asked
from router.rest.doors import Handler
from router.rest.parts import Parts

_LISTED = 1000  # models in one answer


class V2:
    """The handlers of one worker."""

    def __init__(self, parts: Parts) -> None:
        self._server = parts.server
        self._models = parts.models
        self._management = parts.management
        self._bodies = parts.bodies
        self._inference = parts.inference

    def add_to(self, app: web.Application) -> None:
        """Registers the paths."""
        for method, path, operation, handler in self.routes():
            doors.add(app, method, path, operation, handler, head=True)

    def routes(self) -> Iterator[tuple[str, str, Operation, Handler]]:
        """Yields method, path, operation and handler of each route."""
        for path in ("/v2", "/v2/"):
            yield "GET", path, operations.SERVER, self.server_metadata
        yield "GET", "/v2/health/live", operations.HEALTH, self.live
        yield "GET", "/v2/health/ready", operations.HEALTH, self.ready
        yield "GET", "/v2/models", operations.LIST, self.models
        for segment in extensions.PATHS:
            yield "*", f"/v2/{segment}{{rest:(/.*)?}}", operations.SERVER, self.extension
        yield "GET", MODELS + "{rest:[\\s\\S]+}", operations.INFER, self.get_model
        yield "POST", MODELS + "{rest:[\\s\\S]+}", operations.INFER, self.post_model

    # --- the server ---

    async def server_metadata(self, _: web.Request) -> web.Response:
        """Returns the server's name, version and extensions."""
        found = self._server.metadata(pb.ServerMetadataRequest())
        return _json({"name": found.name, "version": found.version, "extensions": list(found.extensions)})

    async def live(self, _: web.Request) -> web.Response:
        """Answers that the server is live, which only means that this worker answers."""
        return _json({"live": self._server.live(pb.ServerLiveRequest()).live})

    async def ready(self, _: web.Request) -> web.Response:
        """Answers that inference can be served, or 503 with the reason."""
        reason = self._server.why_not_ready()
        if reason is not None:
            status, body = errors.of_error(MeshError(Reason.UNAVAILABLE, reason))
            return responses.response(status, {"ready": False, **body})
        return _json({"ready": True})

    async def models(self, request: web.Request) -> web.Response:
        """Returns a page of the registered ids (`?limit=`, `?after=`)."""
        limit = whole_number(request, "limit", _LISTED, least=1, most=_LISTED)
        page = await self._management.status.page(limit=limit, after=request.query.get("after", ""))
        return _json({"models": [model_id for model_id, _ in page.models], "next": page.next})

    async def extension(self, request: web.Request) -> web.Response:
        """Refuses a path of an extension that the mesh does not have."""
        raise extensions.of_path(request.rel_url.raw_path.split("/")[2])

    # --- a model ---

    async def get_model(self, request: web.Request) -> web.Response:
        """Returns a model's metadata, or answers `/ready`. Loads a model that is not loaded."""
        asked = _asked(request)
        model, version, operation = asked.target()
        if operation == "ready":
            ready = await self._models.ready(pb.ModelReadyRequest(name=model, version=version), asked.caller())
            if not ready.ready:
                raise MeshError(Reason.UNAVAILABLE, f"the model server answers that model {model} is not ready")
            return _json({"name": model, "ready": True})
        if operation:
            text = f"{asked.path:.200} does not accept GET: use /v2/models/MODEL or /v2/models/MODEL/ready"
            raise MeshError(Reason.UNKNOWN_METHOD, text)
        try:
            found = await self._models.metadata(pb.ModelMetadataRequest(name=model, version=version), asked.caller())
        except CallFailed as failed:  # ids may end like an extension's paths, so check those only now
            refusal = extensions.of_operation(asked.path)
            if refusal is None or failed.answer.code != Code.NOT_FOUND:
                raise
            raise refusal from failed
        return _json(documents.metadata_document(found))

    async def post_model(self, request: web.Request) -> web.StreamResponse:
        """Carries out an inference."""
        asked = _asked(request)
        target = asked.inference()
        read, send = partial(self._bodies.read, request), partial(self._bodies.answer, request)
        with self._bodies.hold() as hold:
            return await self._inference.infer(asked, target, hold, read, send)


def whole_number(request: web.Request, name: str, default: int, *, least: int, most: int) -> int:
    """Returns a parameter of the query as a whole number, at most `most`, or `default` if the parameter is missing.
    Raises MeshError if it has other characters than digits, or more than 9 of them, or is less than `least`."""
    text = request.query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 10) or int(text) < least:
        raise MeshError(
            Reason.BAD_REQUEST, f"the parameter {name} must be a whole number, {least} or more, not {text!r:.60}"
        )
    return min(int(text), most)


def _asked(request: web.Request) -> Asked:
    return Asked(request.rel_url.raw_path, request.headers, request.remote or "rest")


def _json(document: dict[str, Any]) -> web.Response:
    return web.json_response(document)
