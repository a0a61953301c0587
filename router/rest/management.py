"""The management API over REST, `/mesh/v1/`: its routes, and the conversion of documents.

`router.management` does the work, as for gRPC. Imports of many models are in `router.rest.bulk`.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from aiohttp import web

from mesh.access.verbs import Verb
from mesh.schema import records
from mesh.schema.modelstatus import ModelStatus
from mesh.statuses import MeshError, Reason, too_large
from mesh.telemetry import logs
from router.access import operations
from router.access.operations import Operation
from router.management import statistics, tuning
from router.management.requests import Load, MoveVModel, Register, named
from router.management.vmodels import VModelInfo
from router.rest import aliasdocuments, bulk, doors, jsontext, modeldocuments, v2
from router.rest.asked import decoded
from router.rest.parts import Parts
from router.state.differing import DifferentError

log = logs.get(__name__)

PREFIX = "/mesh/v1/"
_MAX_LIMIT = 1000
_MAX_BODY = 64 * 1024  # bytes of one model or setting, as for a line of an import: 15 ms at most
_BODY_TIMEOUT = 30.0  # seconds
_READ_TIMEOUT = 60.0  # seconds that an import waits for more of its body, or for its answer to be read


@dataclass(frozen=True, slots=True)
class Route:
    """A route: HTTP method, path, operation, and the name of the handler's method that serves it."""

    method: str
    path: str
    operation: Operation
    handler: str


def route(method: str, path: str, operation: Operation, handler: str) -> Route:
    """Returns a route. An id is one segment, in which `/` is written `%2F`."""
    return Route(method, PREFIX + path.replace("{id}", "{id:[^/]+}"), operation, handler)


ROUTES = (
    route("GET", "models", operations.LIST, "list_models"),
    route("POST", "models:import", operations.IMPORT, "import_models"),
    route("POST", "models:unregister", operations.UNREGISTER_MANY, "unregister_models"),
    route("PUT", "models/{id}", operations.REGISTER, "register"),
    route("GET", "models/{id}", operations.STATUS, "status"),
    route("PATCH", "models/{id}", operations.LIMIT, "change"),
    route("DELETE", "models/{id}", operations.UNREGISTER, "unregister"),
    route("POST", "models/{id}/load", operations.LOAD, "load"),
    route("POST", "models/{id}/release", operations.RELEASE, "release"),
    route("POST", "models/{id}/reload", operations.RELOAD, "reload"),
    route("GET", "models/{id}/explain", operations.EXPLAIN, "explain"),
    route("GET", "aliases", operations.LIST_VMODELS, "list_aliases"),
    route("PUT", "aliases/{id}", operations.SET_VMODEL, "set_alias"),
    route("GET", "aliases/{id}", operations.VMODEL_STATUS, "alias_status"),
    route("DELETE", "aliases/{id}", operations.DELETE_VMODEL, "delete_alias"),
    route("POST", "aliases/{id}/rollback", operations.SET_VMODEL, "roll_back"),
    route("GET", "pods", operations.PODS, "pods"),
    route("GET", "pods/{id}", operations.POD, "describe_pod"),
    route("GET", "pods/{id}/decisions", operations.QUESTIONS, "questions"),
    route("DELETE", "pods/{id}/lives", operations.FORGET_POD, "forget_pod"),
    route("GET", "routers", operations.ROUTERS, "routers"),
    route("GET", "stats", operations.STATISTICS, "stats"),
    route("GET", "settings", operations.SETTINGS, "dynamic_settings"),
    route("PUT", "settings/{id}", operations.SET, "set_dynamic"),
)
"""All routes. Permissions depend on the operation, as over gRPC."""


class ManagementApi:
    """The handlers of the management API's REST routes, in one worker."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._management = parts.management
        self._imports = 0  # imports under way

    def add_to(self, app: web.Application) -> None:
        """Registers the paths."""
        for route in ROUTES:
            doors.add(app, route.method, route.path, route.operation, getattr(self, route.handler))

    # --- models ---

    async def list_models(self, request: web.Request) -> web.Response:
        """Returns a page of the registered models."""
        query = request.query
        page = await self._management.status.page(
            prefix=query.get("prefix", ""),
            after=query.get("after", ""),
            limit=v2.whole_number(request, "limit", 100, least=1, most=_MAX_LIMIT),
        )
        models = []
        for model_id, record in page.models:
            pods = self._pods_of(model_id)
            document = {**modeldocuments.registered(model_id, record), "resident": bool(pods), "pods": pods}
            if errors := self._management.status.errors(record):
                document |= {"errors": list(errors), "quarantined": record.quarantined}
            models.append(document)
        return web.json_response({"models": models, "next": page.next})

    async def register(self, request: web.Request) -> web.Response:
        """Registers a model. Answers 201 if the model is new."""
        model_id = id_of(request)
        body = await object_of(request)
        modeldocuments.check_names(body, (*modeldocuments.MODEL, "load", "sync"), modeldocuments.MODELS)
        item = modeldocuments.item_of(body, model_id)
        request_ = Register(item, load_now=_flag(body, "load"), sync=_flag(body, "sync"))
        try:
            status = await self._management.registration.register(request_)
        except DifferentError as error:
            raise modeldocuments.different(error) from error
        return web.json_response(modeldocuments.status_of(model_id, status), status=201 if status.created else 200)

    async def status(self, request: web.Request) -> web.Response:
        """Returns a model's status. Never loads the model."""
        model_id = id_of(request)
        status = await self._management.status.of(model_id)
        document = modeldocuments.status_of(model_id, status)
        if status.status is ModelStatus.LOADING:
            progress = await self._management.inspection.progress(model_id, status)
            for copy in document["copies"]:
                if (known := progress.get(copy["pod"])) is not None:
                    copy.update({name: value for name, value in asdict(known).items() if value is not None})
        return web.json_response(document)

    async def change(self, request: web.Request) -> web.Response:
        """Changes the limits of a model's copies. A null removes a limit."""
        model_id = id_of(request)
        body = await object_of(request)
        if unknown := sorted(body.keys() - set(modeldocuments.LIMITS)):
            text = f"{', '.join(unknown)[:200]} cannot be changed; {', '.join(modeldocuments.LIMITS)} can"
            raise MeshError(Reason.BAD_REQUEST, text)
        status = await self._management.registration.set_limits(
            model_id, lambda limits: modeldocuments.limits_of(body, limits)
        )
        return web.json_response(modeldocuments.status_of(model_id, status))

    async def unregister(self, request: web.Request) -> web.Response:
        """Unregisters a model."""
        model_id = id_of(request)
        return web.json_response({"id": model_id, "existed": await self._management.registration.unregister(model_id)})

    async def load(self, request: web.Request) -> web.Response:
        """Has a model loaded. With `sync`, answers once the load has succeeded or failed."""
        model_id = id_of(request)
        body = await object_of(request, optional=True)
        modeldocuments.check_names(body, ("sync",), "a load")
        status = await self._management.loading.ensure(Load(model_id, sync=_flag(body, "sync")))
        return web.json_response(modeldocuments.status_of(model_id, status))

    async def release(self, request: web.Request) -> web.Response:
        """Ends a model's quarantine, and removes the blames and failed loads from its record."""
        model_id = id_of(request)
        await self._management.registration.release(model_id)
        return web.json_response(modeldocuments.status_of(model_id, await self._management.status.of(model_id)))

    async def reload(self, request: web.Request) -> web.Response:
        """Has a model's copies replaced with copies of the content now at its path. Answers once the reload is
        recorded."""
        model_id = id_of(request)
        return web.json_response(
            modeldocuments.status_of(model_id, await self._management.registration.reload(model_id))
        )

    async def explain(self, request: web.Request) -> web.Response:
        """Explains which pods have a model, and why."""
        readable = doors.reader(request, self._parts.guard)
        return web.json_response(asdict(await self._management.inspection.explain(id_of(request), readable)))

    # --- aliases ---

    async def list_aliases(self, request: web.Request) -> web.Response:
        """Returns a page of the aliases."""
        query = request.query
        page = await self._management.vmodels.page(
            prefix=query.get("prefix", ""),
            after=query.get("after", ""),
            limit=v2.whole_number(request, "limit", 100, least=1, most=_MAX_LIMIT),
        )
        aliases = [aliasdocuments.defined(name, record) for name, record in page.vmodels]
        return web.json_response({"aliases": aliases, "next": page.next})

    async def set_alias(self, request: web.Request) -> web.Response:
        """Creates or changes an alias. Answers 201 if the alias is new."""
        alias = id_of(request, "vmodel")
        wanted = aliasdocuments.move_of(await object_of(request), alias)
        doors.concerns(request, named(wanted))
        # A caller of the alias calls its models, so more than the right to the alias is needed.
        doors.may(request, self._parts.guard, Verb.REGISTER, named(wanted))
        try:
            info = await self._set(request, wanted)
        except DifferentError as error:
            raise aliasdocuments.different(error) from error
        return self._alias(request, info, status=201 if info.created else 200)

    async def roll_back(self, request: web.Request) -> web.Response:
        """Moves an alias to the version before its target, or to the version that the body names."""
        alias = id_of(request, "vmodel")
        wanted = aliasdocuments.rollback_of(await object_of(request, optional=True), alias)
        return self._alias(request, await self._set(request, wanted))

    async def alias_status(self, request: web.Request) -> web.Response:
        """Returns an alias and the status of its models."""
        info = await self._management.vmodels.status(id_of(request, "vmodel"), request.query.get("owner", ""))
        return self._alias(request, info)

    async def _set(self, request: web.Request, wanted: MoveVModel) -> VModelInfo:
        """Changes an alias. The caller also needs the right to register the new target, even if the request does not
        name it, as in a rollback."""

        def permit(target: str) -> None:
            if target != wanted.change.target:
                doors.concerns(request, [target])
                doors.may(request, self._parts.guard, Verb.REGISTER, [target])

        return await self._management.vmodels.set(wanted, permit)

    def _alias(self, request: web.Request, info: VModelInfo, *, status: int = 200) -> web.Response:
        readable = doors.reader(request, self._parts.guard)
        return web.json_response(aliasdocuments.status_of(info, readable), status=status)

    async def delete_alias(self, request: web.Request) -> web.Response:
        """Deletes an alias."""
        alias = id_of(request, "vmodel")
        existed = await self._management.vmodels.delete(alias, request.query.get("owner", ""))
        return web.json_response({"id": alias, "existed": existed})

    async def import_models(self, request: web.Request) -> web.StreamResponse:
        """Registers many models from newline-delimited JSON."""
        return await self._many(request, bulk.Import)

    async def unregister_models(self, request: web.Request) -> web.StreamResponse:
        """Unregisters many models, named by newline-delimited JSON."""
        return await self._many(request, bulk.Removal)

    async def _many(self, request: web.Request, kind: type[bulk.Bulk[Any]]) -> web.StreamResponse:
        encoding = request.headers.get("Content-Encoding", "").strip().lower()
        if encoding not in ("", "identity", "gzip"):
            raise MeshError(Reason.BAD_REQUEST, f"Content-Encoding {encoding:.60} is not supported: use gzip")
        # Refused before it takes one of the few places, which a slow sender could hold.
        self._parts.guard.allow_some(doors.principal_of(request), Verb.REGISTER)
        if self._imports >= bulk.AT_ONCE:
            text = (
                f"{bulk.AT_ONCE} bulk requests are under way in this worker, which is the limit: "
                "try again when one has ended"
            )
            raise MeshError(Reason.OVERLOADED, text, retry_after=5.0)
        self._imports += 1
        try:
            return await self._carry_out(request, kind, gzipped=encoding == "gzip")
        finally:
            self._imports -= 1

    async def _carry_out(
        self, request: web.Request, kind: type[bulk.Bulk[Any]], *, gzipped: bool
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "application/x-ndjson"})
        await response.prepare(request)

        async def write(document: dict[str, Any]) -> None:
            try:
                async with asyncio.timeout(_READ_TIMEOUT):
                    await response.write(json.dumps(document).encode() + b"\n")
            except TimeoutError as error:
                if request.transport is not None:
                    request.transport.abort()  # close() would wait for unread data
                raise ConnectionResetError(f"the client has read nothing for {_READ_TIMEOUT:g} s") from error

        chunks = _chunks(request)
        lines = bulk.lines_of(bulk.bounded(bulk.gunzip(chunks) if gzipped else chunks))
        noted = doors.gathering(request, self._parts.guard, self._parts.audit)
        try:
            may, untaken = self._may(request), self._management.status.untaken
            await kind(self._management.registration, write, may, untaken=untaken, noted=noted.add).run(lines)
        except ConnectionError:  # the client has gone
            raise
        except Exception:  # the answer has begun, so it is too late for an error status
            log.exception("an import failed in the router's own code")
            text = "internal error; the router's log has the cause"
            await write({"error": {"line": None, "id": None, "reason": Reason.INTERNAL.name, "text": text}})
            await write({"finished": False})
        finally:
            noted.end()
        await response.write_eof()
        return response

    def _may(self, request: web.Request) -> Callable[[str], None]:
        """Returns a function that takes a model's id and raises MeshError unless the caller may register the model."""
        guard, principal = self._parts.guard, doors.principal_of(request)
        return lambda model_id: guard.allow(principal, Verb.REGISTER, model_id)

    # --- pods and numbers ---

    async def pods(self, _: web.Request) -> web.Response:
        """Returns the pods that this router knows, as published, and the open lives of pods that are cut off."""
        pods = self._management.pods
        return web.json_response(
            {"pods": list(map(asdict, pods.published())), "open": list(map(asdict, pods.open_lives()))}
        )

    async def forget_pod(self, request: web.Request) -> web.Response:
        """Forgets a pod that is cut off. Registering an id again then no longer waits for the pod."""
        name = id_of(request)
        return web.json_response({"pod": name, "incarnations": await self._management.pods.forget(name)})

    async def routers(self, _: web.Request) -> web.Response:
        """Returns all routers of the mesh as recorded in etcd."""
        return web.json_response({"routers": list(map(asdict, await self._management.pods.routers()))})

    async def describe_pod(self, request: web.Request) -> web.Response:
        """Returns a pod's description, as its agent reports it."""
        return web.json_response(asdict(await self._management.pods.describe(id_of(request))))

    async def questions(self, request: web.Request) -> web.Response:
        """Returns a pod's latest evictions, and its refusals for lack of room, with the data behind each decision."""
        lines = await self._management.pods.questions(id_of(request))
        return web.json_response({"decisions": [json.loads(line) for line in lines]})

    async def stats(self, _: web.Request) -> web.Response:
        """Returns this router's statistics, summed over its workers."""
        numbers = statistics.summary(await self._parts.snapshots())
        view = self._parts.view
        return web.json_response(
            {
                **numbers,
                "resident": len(view.copies),
                "pods": len(view.pods),
                "workers": self._parts.settings.workers,
                "dataplane": self._parts.dataplane(),
                "auth": self._parts.guard.statistics(),
                "grants_file": _summary(self._parts.grants_file()),
            }
        )

    async def dynamic_settings(self, _: web.Request) -> web.Response:
        """Returns the settings that can change while the mesh runs, as JSON texts."""
        return web.json_response({"settings": await self._management.tuning.read()})

    async def set_dynamic(self, request: web.Request) -> web.Response:
        """Changes a setting to the JSON object in the body. An empty object removes the setting."""
        name = id_of(request)
        tuning.check(name)
        body = await object_of(request, optional=True)
        text = json.dumps(body) if body else ""
        await self._management.tuning.write(name, text)
        return web.json_response({"name": name, "value": text})

    def _pods_of(self, model_id: str) -> list[str]:
        return sorted(copy.pod.name for copy in self._parts.view.copies.get(model_id, ()))


def _summary(filed: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Returns the facts about the file with grants for callers who may not see the grants: their number instead of the
    grants. Returns None without a file."""
    return None if filed is None else {**filed, "grants": len(filed["grants"])}


async def _chunks(request: web.Request) -> AsyncIterator[bytes]:
    content = request.content
    while True:
        try:
            async with asyncio.timeout(_READ_TIMEOUT):
                chunk = await content.readany()
        except TimeoutError as error:
            text = f"no more of the body arrived for {_READ_TIMEOUT:g} s: send it faster"
            raise MeshError(Reason.TOO_SLOW, text) from error
        if not chunk:
            return
        yield chunk


def id_of(request: web.Request, what: str = "model") -> str:
    """Returns the decoded id from the path, which was split before decoding. `what` names the kind of id in errors.
    Raises MeshError BAD_REQUEST if the id is not valid."""
    below = request.rel_url.raw_path.removeprefix(PREFIX).split("/")
    try:
        return records.check_id(decoded(below[1]), what)
    except ValueError as error:
        raise MeshError(Reason.BAD_REQUEST, str(error)) from error


async def object_of(request: web.Request, *, optional: bool = False) -> dict[str, Any]:
    """Returns the body, which must be a JSON object, or empty if `optional`. Raises MeshError: BAD_REQUEST, TOO_LARGE,
    TOO_SLOW."""
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise MeshError(Reason.BAD_REQUEST, "send this body without Content-Encoding")
    body = b""
    try:
        async with asyncio.timeout(_BODY_TIMEOUT):
            while len(body) <= _MAX_BODY and (more := await request.content.read(_MAX_BODY + 1 - len(body))):
                body += more
    except TimeoutError as error:
        raise MeshError(
            Reason.TOO_SLOW, f"the body did not arrive within {_BODY_TIMEOUT:g} s: send it faster"
        ) from error
    if len(body) > _MAX_BODY:
        raise too_large("the body", _MAX_BODY, "")
    if optional and not body:
        return {}
    return jsontext.load_object(body)


def _flag(body: dict[str, Any], name: str) -> bool:
    value = body.get(name, False)
    if not isinstance(value, bool):
        raise MeshError(Reason.BAD_REQUEST, f"{name} must be true or false")
    return value
