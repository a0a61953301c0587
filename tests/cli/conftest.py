"""Fixtures for tests of the command line: a fake REST interface that runs in a thread, and a way to run commands."""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import pytest
from aiohttp import web
from typer.testing import CliRunner

from mesh.cli.app import build


def failure(http: int, reason: str, text: str, **more: Any) -> web.Response:
    """Returns an error in the mesh's format."""
    return web.json_response({"error": text, "reason": reason, "code": 0, "details": {}, **more}, status=http)


@dataclass
class FakeMesh:
    """A fake mesh with its models in a dictionary. A test may set other answers by path."""

    endpoint: str = ""
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    requests: list[tuple[str, str, Any]] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)  # of each request
    answers: dict[str, Callable[[], Any]] = field(default_factory=dict)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        raw = request.raw_path
        path = raw.partition("?")[0]
        text = await request.text()
        body = json.loads(text) if request.content_type == "application/json" and text else text
        self.requests.append((request.method, raw, body))
        self.headers.append(request.headers)
        if path in self.answers:
            answer = self.answers[path]()
            return await answer if isinstance(answer, Awaitable) else answer
        if path == "/mesh/v1/models":
            return self._list(request)
        if path == "/mesh/v1/models:import":
            return await self._import(request, text)
        if path == "/mesh/v1/models:unregister":
            return await self._remove(request, text)
        if path == "/mesh/v1/aliases":
            return web.json_response({"aliases": [], "next": None})
        if path.startswith("/mesh/v1/aliases/"):
            return failure(404, "UNKNOWN_MODEL", "there is no such alias")
        if path.startswith("/mesh/v1/models/"):
            encoded, _, action = path.removeprefix("/mesh/v1/models/").partition("/")
            return self._model(request.method, unquote(encoded), action, body)
        return web.Response(status=404, text="404: Not Found")

    def _list(self, request: web.Request) -> web.Response:
        prefix, after, limit = (request.query.get(n, "") for n in ("prefix", "after", "limit"))
        found = sorted(m for m in self.models if m.startswith(prefix) and m > after)
        page = found[: int(limit or 100)]
        listed = [{"id": m, "resident": False, "pods": [], **self.models[m]} for m in page]
        return web.json_response({"models": listed, "next": page[-1] if len(found) > len(page) else None})

    async def _import(self, request: web.Request, text: str) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        counts = {"created": 0, "existing": 0, "failed": 0}
        odd = 0
        for number, line in enumerate(text.splitlines(), 1):
            try:
                model = json.loads(line)
                outcome = "existing" if model["id"] in self.models else "created"
                self.models[model["id"]] = model
                odd += model.get("type") == "odd"
            except (ValueError, KeyError) as error:
                outcome = "failed"
                bad = {"error": {"line": number, "id": None, "reason": "BAD_REQUEST", "text": str(error)}}
                await response.write(json.dumps(bad).encode() + b"\n")
            counts[outcome] += 1
        last = {"finished": True, "done": sum(counts.values()), **counts}
        if odd:
            last["untaken"] = [{"type": "odd", "models": odd, "text": "no pod accepts models of type odd"}]
        await response.write(json.dumps(last).encode() + b"\n")
        return response

    async def _remove(self, request: web.Request, text: str) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        counts = {"unregistered": 0, "missing": 0, "failed": 0}
        for number, line in enumerate(text.splitlines(), 1):
            model = json.loads(line)["id"]
            if self.models.get(model, {}).get("named"):
                told = {"line": number, "id": model, "reason": "PRECONDITION", "text": f"Model {model} has referents"}
                await response.write(json.dumps({"error": told}).encode() + b"\n")
                counts["failed"] += 1
            else:
                counts["missing" if self.models.pop(model, None) is None else "unregistered"] += 1
        await response.write(json.dumps({"finished": True, "done": sum(counts.values()), **counts}).encode() + b"\n")
        return response

    def _model(self, method: str, model: str, action: str, body: Any) -> web.Response:
        if method == "PUT":
            existed = model in self.models
            self.models.setdefault(model, {k: body[k] for k in ("type", "path", "key")})
            return web.json_response(self._status(model, body), status=200 if existed else 201)
        if method == "DELETE":
            return web.json_response({"id": model, "existed": self.models.pop(model, None) is not None})
        if model not in self.models:
            return failure(404, "UNKNOWN_MODEL", f"model {model} is not registered")
        return web.json_response(self._status(model, body))

    def _status(self, model: str, body: Any) -> dict[str, Any]:
        loaded = isinstance(body, dict) and body.get("sync")
        copies = [{"pod": "pod-1", "status": "LOADED", "time_ms": 5, "bytes": 2048}] if loaded else []
        return {
            "id": model,
            **self.models[model],
            "status": "LOADED" if loaded else "NOT_LOADED",
            "errors": [],
            "copies": copies,
            "host_bytes": 2048,
            "device_bytes": 0,
            "load_ms": 12,
            "quarantined": False,
            "killed": [],
        }

    def answer(self, path: str, body: Any = None, *, make: Callable[[], Any] | None = None) -> None:
        self.answers[path] = make or (lambda: web.json_response(body))


@pytest.fixture
def mesh() -> Iterator[FakeMesh]:
    """A fake mesh that listens."""
    fake = FakeMesh()
    loop = asyncio.new_event_loop()
    started = threading.Event()

    async def start() -> web.AppRunner:
        app = web.Application(client_max_size=2**26)
        app.router.add_route("*", "/{path:.*}", fake.handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        fake.endpoint = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    def serve() -> None:
        runner = loop.run_until_complete(start())
        started.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=serve)
    thread.start()
    assert started.wait(10)
    yield fake
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


@pytest.fixture
def run(mesh, monkeypatch):
    """A function that runs `mesh ARGS...` against the fake mesh. Its result has `exit_code`, `stdout` and `stderr`."""
    monkeypatch.setenv("MESH_ENDPOINT", mesh.endpoint)
    monkeypatch.delenv("MESH_GRPC_ENDPOINT", raising=False)
    app = build()

    def command(*arguments: str, stdin: str | None = None):
        return CliRunner().invoke(app, list(arguments), input=stdin)

    return command
