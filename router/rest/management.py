"""The management API of REST, `/mesh/v1/`: models, pods, numbers. The same `Management` as behind gRPC.

Importing many models is in `router.rest.bulk`.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web

from mesh.schema import confidential, records
from mesh.statuses import MeshError, Reason, too_large
from mesh.telemetry import logs, metrics
from router.management.models import ModelStatus
from router.rest import bulk, documents, v2
from router.rest.asked import decoded
from router.rest.parts import Parts
from router.state import dynamic

log = logs.get(__name__)

_PREFIX = "/mesh/v1/"
_MAX_LIMIT = 1000
_MAX_BODY = 64 * 1024  # bytes of one model, or one setting, as of a line of an import: 15 ms at most
_BODY_TIMEOUT = 30.0  # seconds
_READ_TIMEOUT = 60.0  # seconds that an import waits for more of its body, or for its answer to be read


class ManagementApi:
    """The handlers of one worker."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._management = parts.management
        self._imports = 0  # under way

    def add_to(self, app: web.Application) -> None:
        """Registers the paths. Ids are one segment: a `/` inside them is written `%2F`."""
        routes = app.router
        routes.add_get(_PREFIX + "models", self.list_models)
        routes.add_post(_PREFIX + "models:import", self.import_models)
        routes.add_put(_PREFIX + "models/{id:[^/]+}", self.register)
        routes.add_get(_PREFIX + "models/{id:[^/]+}", self.status)
        routes.add_patch(_PREFIX + "models/{id:[^/]+}", self.change)
        routes.add_delete(_PREFIX + "models/{id:[^/]+}", self.unregister)
        routes.add_post(_PREFIX + "models/{id:[^/]+}/load", self.load)
        routes.add_post(_PREFIX + "models/{id:[^/]+}/release", self.release)
        routes.add_post(_PREFIX + "models/{id:[^/]+}/reload", self.reload)
        routes.add_get(_PREFIX + "models/{id:[^/]+}/explain", self.explain)
        routes.add_get(_PREFIX + "pods", self.pods)
        routes.add_get(_PREFIX + "pods/{id:[^/]+}", self.describe_pod)
        routes.add_get(_PREFIX + "pods/{id:[^/]+}/decisions", self.questions)
        routes.add_delete(_PREFIX + "pods/{id:[^/]+}/lives", self.forget_pod)
        routes.add_get(_PREFIX + "routers", self.routers)
        routes.add_get(_PREFIX + "stats", self.stats)
        routes.add_get(_PREFIX + "settings", self.dynamic_settings)
        routes.add_put(_PREFIX + "settings/{id:[^/]+}", self.set_dynamic)

    # --- models ---

    async def list_models(self, request: web.Request) -> web.Response:
        """A page of what is registered."""
        query = request.query
        page = await self._management.list(
            prefix=query.get("prefix", ""),
            after=query.get("after", ""),
            limit=v2.whole_number(request, "limit", 100, least=1, most=_MAX_LIMIT),
        )
        models = []
        for model_id, record in page.models:
            pods = self._pods_of(model_id)
            document = {**_registered(model_id, record), "resident": bool(pods), "pods": pods}
            if errors := self._management.errors(record):
                document |= {"errors": list(errors), "quarantined": record.quarantined}
            models.append(document)
        return web.json_response({"models": models, "next": page.next})

    async def register(self, request: web.Request) -> web.Response:
        """Registers a model; 201 where it is new."""
        model_id = _id(request)
        body = await _object(request)
        item = bulk.model_of(body, model_id)
        status = await self._management.register(
            *item[:4],
            sha256=item.sha256,
            limits=item.limits,
            load_now=_flag(body, "load"),
            sync=_flag(body, "sync"),
        )
        return web.json_response(_status(model_id, status), status=201 if status.created else 200)

    async def status(self, request: web.Request) -> web.Response:
        """How a model is. Never loads it."""
        model_id = _id(request)
        status = await self._management.status(model_id)
        document = _status(model_id, status)
        if status.status == "LOADING":
            progress = await self._management.progress(model_id, status)
            for copy in document["copies"]:
                copy.update(progress.get(copy["pod"], {}))
        return web.json_response(document)

    async def change(self, request: web.Request) -> web.Response:
        """Changes how many copies a model has; null takes a limit away."""
        model_id = _id(request)
        body = await _object(request)
        if unknown := sorted(body.keys() - set(bulk.LIMITS)):
            text = f"{', '.join(unknown)[:200]} cannot be changed; {', '.join(bulk.LIMITS)} can"
            raise MeshError(Reason.BAD_REQUEST, text)
        status = await self._management.set_limits(model_id, lambda limits: bulk.limits_of(body, limits))
        return web.json_response(_status(model_id, status))

    async def unregister(self, request: web.Request) -> web.Response:
        """Unregisters a model."""
        model_id = _id(request)
        return web.json_response({"id": model_id, "existed": await self._management.unregister(model_id)})

    async def load(self, request: web.Request) -> web.Response:
        """Has a model loaded; with `sync`, answers once it is, or has failed."""
        model_id = _id(request)
        body = await _object(request, optional=True)
        return web.json_response(
            _status(model_id, await self._management.ensure_loaded(model_id, sync=_flag(body, "sync")))
        )

    async def release(self, request: web.Request) -> web.Response:
        """Ends a model's quarantine."""
        model_id = _id(request)
        await self._management.release(model_id)
        return web.json_response(_status(model_id, await self._management.status(model_id)))

    async def reload(self, request: web.Request) -> web.Response:
        """Has a model's copies move to the content that lies at its path now. Answers once that has begun."""
        model_id = _id(request)
        return web.json_response(_status(model_id, await self._management.reload(model_id)))

    async def explain(self, request: web.Request) -> web.Response:
        """Why a model is where it is."""
        return web.json_response(await self._management.explain(_id(request)))

    async def import_models(self, request: web.Request) -> web.StreamResponse:
        """Registers many models from newline-delimited JSON."""
        encoding = request.headers.get("Content-Encoding", "").strip().lower()
        if encoding not in ("", "identity", "gzip"):
            raise MeshError(Reason.BAD_REQUEST, f"Content-Encoding {encoding:.60} is not known: use gzip")
        if self._imports >= bulk.AT_ONCE:
            text = f"{bulk.AT_ONCE} imports are under way in this worker: wait for one to end"
            raise MeshError(Reason.OVERLOADED, text, retry_after=5.0)
        self._imports += 1
        try:
            return await self._import(request, gzipped=encoding == "gzip")
        finally:
            self._imports -= 1

    async def _import(self, request: web.Request, *, gzipped: bool) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "application/x-ndjson"})
        await response.prepare(request)

        async def write(document: dict[str, Any]) -> None:
            try:
                async with asyncio.timeout(_READ_TIMEOUT):
                    await response.write(json.dumps(document).encode() + b"\n")
            except TimeoutError as error:
                if request.transport is not None:
                    request.transport.abort()  # a close would wait for what is not read
                raise ConnectionResetError(f"the client read no answer for {_READ_TIMEOUT:g} s") from error

        chunks = _chunks(request)
        lines = bulk.lines_of(bulk.bounded(bulk.gunzip(chunks) if gzipped else chunks))
        try:
            await bulk.Import(self._management, write).run(lines)
        except ConnectionError:  # the client has gone
            raise
        except Exception:  # the answer has begun: it cannot become an error any more
            log.exception("import failed")
            text = "internal error, see the router's log"
            await write({"error": {"line": None, "id": None, "reason": Reason.INTERNAL.name, "text": text}})
            await write({"finished": False})
        await response.write_eof()
        return response

    # --- pods and numbers ---

    async def pods(self, _: web.Request) -> web.Response:
        """All pods, as they say they are."""
        return web.json_response({"pods": await self._management.pods(), "open": self._management.open_lives()})

    async def forget_pod(self, request: web.Request) -> web.Response:
        """Forgets a pod that is cut off: nobody waits for it any longer before an id is registered again."""
        name = _id(request)
        return web.json_response({"pod": name, "incarnations": await self._management.forget_pod(name)})

    async def routers(self, _: web.Request) -> web.Response:
        """All routers of the mesh, as they stand in etcd."""
        return web.json_response({"routers": await self._management.routers()})

    async def describe_pod(self, request: web.Request) -> web.Response:
        """One pod, asked just now."""
        return web.json_response(await self._management.describe_pod(_id(request)))

    async def questions(self, request: web.Request) -> web.Response:
        """A pod's latest evictions and refusals for lack of room, with all that they rest on."""
        lines = await self._management.questions(_id(request))
        return web.json_response({"decisions": [json.loads(line) for line in lines]})

    async def stats(self, _: web.Request) -> web.Response:
        """What this router has done, all of its workers together."""
        numbers = summary(await self._parts.snapshots())
        view = self._parts.view
        return web.json_response(
            {**numbers, "resident": len(view.copies), "pods": len(view.pods), "workers": self._parts.settings.workers}
        )

    async def dynamic_settings(self, _: web.Request) -> web.Response:
        """What can be changed while the mesh runs, as JSON texts."""
        return web.json_response({"settings": await self._parts.dynamic.read()})

    async def set_dynamic(self, request: web.Request) -> web.Response:
        """Sets one of them: the body is the setting, a JSON object; an empty one takes it away."""
        name = _id(request)
        dynamic.check(name)
        body = await _object(request, optional=True)
        text = json.dumps(body) if body else ""
        await self._parts.dynamic.write(name, text)
        return web.json_response({"name": name, "value": text})

    def _pods_of(self, model_id: str) -> list[str]:
        return sorted(copy.pod.name for copy in self._parts.view.copies.get(model_id, ()))


def summary(snapshot: metrics.Snapshot) -> dict[str, Any]:
    """Calls, hits, cold starts and their latencies, of a snapshot of the workers' metrics."""
    found = {metric["name"]: metric for metric in snapshot["metrics"]}

    def count(name: str) -> int:
        return int(sum(value for _, value in found.get(name, {}).get("series", ())))

    def latency(name: str) -> dict[str, float]:
        metric = found.get(name)
        if metric is None or not metric["series"]:
            return {"p50": 0.0, "p90": 0.0, "p99": 0.0, "count": 0}
        counts = [sum(column) for column in zip(*(value[0] for _, value in metric["series"]), strict=True)]
        quantiles = {f"p{q}": round(metrics.quantile(metric["buckets"], counts, q / 100), 3) for q in (50, 90, 99)}
        return {**quantiles, "count": sum(counts)}

    calls: dict[str, dict[str, int]] = {}
    for (method, code), value in found.get("modelmesh_api_request_milliseconds", {}).get("series", ()):
        calls.setdefault(method, {})[code] = sum(value[0])
    hit, cold = latency("mesh_hit_milliseconds"), latency("mesh_cold_milliseconds")
    return {
        "calls": calls,
        "hits": hit["count"],
        "cold_starts": cold["count"],
        "loads": count("mesh_loads"),
        "load_failures": count("mesh_load_failures"),
        "latency_ms": {"hit": hit, "cold": cold},
    }


async def _chunks(request: web.Request) -> AsyncIterator[bytes]:
    content = request.content
    while True:
        try:
            async with asyncio.timeout(_READ_TIMEOUT):
                chunk = await content.readany()
        except TimeoutError as error:
            raise MeshError(Reason.DEADLINE, f"no more of the body came for {_READ_TIMEOUT:g} s") from error
        if not chunk:
            return
        yield chunk


def _registered(model_id: str, record: records.ModelRecord) -> dict[str, Any]:
    document: dict[str, Any] = {
        "id": model_id,
        "type": record.type,
        "path": confidential.masked_path(record.path),
        "key": confidential.masked_key(record.key),
    }
    for name, text in (("sha256", record.sha256), ("digest", record.digest)):
        if text:
            document[name] = text
    limits = record.limits
    for name, value in zip(bulk.LIMITS, (limits.minimum, limits.maximum, limits.pinned), strict=True):
        if value is not None:
            document[name] = value
    return document


def _status(model_id: str, status: ModelStatus) -> dict[str, Any]:
    """A model's status as JSON. Raises MeshError where it is not registered."""
    record = status.record
    if status.status == "NOT_FOUND":
        raise MeshError(Reason.UNKNOWN_MODEL, f"model {model_id} is not registered")
    document: dict[str, Any] = {"id": model_id, "type": "", "path": "", "key": ""}
    if record is not None:
        document |= _registered(model_id, record)
    return document | {
        "status": status.status,
        "errors": list(status.errors),
        "copies": [
            {
                "pod": copy.pod,
                "status": copy.status,
                "time_ms": copy.time_ms,
                "bytes": copy.bytes,
                "generation": copy.generation,
                "digest": copy.digest,
            }
            for copy in status.copies
        ],
        "digest": record.digest if record else "",
        "digest_ms": record.digest_ms if record else 0,
        "generation": record.generation if record else 0,
        "reload": {"generation": status.reload.generation, "why": status.reload.why} if status.reload else None,
        "host_bytes": record.host_bytes if record else 0,
        "device_bytes": record.device_bytes if record else 0,
        "load_ms": record.load_ms if record else 0,
        "quarantined": record.quarantined if record else False,
        "killed": list(record.killed) if record else [],
    }


def _id(request: web.Request) -> str:
    """The id in the path, from the path as it came. Raises MeshError."""
    below = request.rel_url.raw_path.removeprefix(_PREFIX).split("/")
    try:
        return records.check_id(decoded(below[1]))
    except ValueError as error:
        raise MeshError(Reason.BAD_REQUEST, str(error)) from error


async def _object(request: web.Request, *, optional: bool = False) -> dict[str, Any]:
    """The body, a JSON object. Raises MeshError."""
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise MeshError(Reason.BAD_REQUEST, "send this body without Content-Encoding")
    body = b""
    try:
        async with asyncio.timeout(_BODY_TIMEOUT):
            while len(body) <= _MAX_BODY and (more := await request.content.read(_MAX_BODY + 1 - len(body))):
                body += more
    except TimeoutError as error:
        raise MeshError(Reason.TOO_SLOW, f"the body did not come within {_BODY_TIMEOUT:g} s") from error
    if len(body) > _MAX_BODY:
        raise too_large("the body", _MAX_BODY, "")
    if optional and not body:
        return {}
    return documents.load_object(body)


def _flag(body: dict[str, Any], name: str) -> bool:
    value = body.get(name, False)
    if not isinstance(value, bool):
        raise MeshError(Reason.BAD_REQUEST, f"{name} must be true or false")
    return value
