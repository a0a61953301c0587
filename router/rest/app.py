"""The aiohttp application of a worker: V2 REST, management, and error responses.

Run the application with `make_runner`, because two of aiohttp's defaults would be wrong here. When a client goes away,
its request must be cancelled, because otherwise the request's call would continue. Compressed bodies must arrive
unchanged, because aiohttp applies its own limit when it decompresses them.
"""

import socket
import ssl
from http import HTTPStatus

from aiohttp import web

from mesh.statuses import MeshError, Reason
from mesh.telemetry import logs
from router.inference.models import CallFailed
from router.rest import bodies, doors, errors, origins, responses
from router.rest.access import AccessApi
from router.rest.doors import Handler
from router.rest.management import ManagementApi
from router.rest.parts import Parts
from router.rest.v2 import V2

log = logs.get(__name__)

NO_MANAGEMENT = "this port does not serve management: send the request to the mesh's management port"
"""The error for management requests to `--listen` while `--management-listen` is set."""

_BACKLOG = 4096  # connections not yet accepted: a unix socket refuses further ones, and Envoy opens one for each call
_KEEPALIVE = 3630.0  # seconds; longer than Envoy keeps a connection, so that Envoy ends it
_LINGER = 5.0  # seconds for which the rest of a refused body is read, so that the answer arrives
_MAX_HEADER = 64 * 1024  # bytes; the edge has the same limit


def make_app(parts: Parts, *, managed: bool = True) -> web.Application:
    """Returns the application, with management if `managed` is True. Run the application with `make_runner`."""
    settings, guard, audit = parts.settings, parts.guard, parts.audit
    address = settings.management_listen or settings.listen
    loopback = origins.is_loopback(address if settings.edge == "envoy" else settings.rest_listen)

    def check(request: web.Request) -> None:
        if request.rel_url.raw_path.startswith("/mesh/"):
            origins.check(request, loopback=loopback)

    @web.middleware
    async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not doors.is_plain(request):
            raise web.HTTPNotFound
        if not managed and request.rel_url.raw_path.startswith("/mesh/"):
            raise MeshError(Reason.UNKNOWN_METHOD, NO_MANAGEMENT)
        return await doors.audited(request, guard, audit, handler, check)

    app = web.Application(middlewares=[_heard_out, _failures, guarded])
    app.on_response_prepare.append(_anonymous)
    doors.prepare(app)
    V2(parts).add_to(app)
    if managed:
        ManagementApi(parts).add_to(app)
        AccessApi(parts).add_to(app)
    return app


def make_runner(parts: Parts, *, grace: float = 20.0, managed: bool = True) -> web.AppRunner:
    """Returns a runner with the options that the application needs. The caller runs `setup()` and `cleanup()`.

    `cleanup()` gives requests in flight `grace` seconds."""
    return web.AppRunner(
        make_app(parts, managed=managed),
        shutdown_timeout=grace,
        access_log=None,
        handler_cancellation=True,
        auto_decompress=False,
        keepalive_timeout=_KEEPALIVE,
        lingering_time=_LINGER,
        max_line_size=_MAX_HEADER,
        max_field_size=_MAX_HEADER,
    )


async def serve_on(
    parts: Parts, listening: socket.socket, *, grace: float = 20.0, managed: bool = True
) -> web.AppRunner:
    """Serves on a socket that already listens, with management if `managed` is True. The runner's `cleanup()` stops
    serving, gives requests in flight `grace` seconds, and closes the socket."""
    runner = make_runner(parts, grace=grace, managed=managed)
    await runner.setup()
    try:
        await web.SockSite(runner, listening, backlog=_BACKLOG).start()
    except BaseException:
        await runner.cleanup()
        raise
    return runner


async def serve_tcp(
    parts: Parts,
    host: str,
    port: int,
    *,
    tls: ssl.SSLContext | None = None,
    shared: bool = False,
    grace: float = 20.0,
) -> web.AppRunner:
    """Serves on a TCP port. If `shared`, other workers listen on the same port (SO_REUSEPORT). Raises OSError if the
    port is taken."""
    runner = make_runner(parts, grace=grace)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, backlog=_BACKLOG, ssl_context=tls, reuse_port=shared or None).start()
    except BaseException:
        await runner.cleanup()
        raise
    return runner


async def _anonymous(_: web.Request, response: web.StreamResponse) -> None:
    response.headers.pop("Server", None)  # callers need not know the libraries' versions


@web.middleware
async def _heard_out(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Reads the body of a refused request to its end, unless the request was refused because its body arrived too
    slowly."""
    response = await handler(request)
    if response.status >= HTTPStatus.BAD_REQUEST and response.status != Reason.TOO_SLOW.http:
        await bodies.drop(request)
    return response


@web.middleware
async def _failures(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answers every failure in the same form."""
    try:
        return await handler(request)
    except CallFailed as failed:
        return responses.response(*errors.of_answer(failed.answer))
    except MeshError as error:
        return responses.of_error(error)
    except web.HTTPException as error:
        return _plain(request, error)
    except ConnectionError:  # the client has gone
        raise
    except Exception:
        log.exception("a request failed in the router's own code", method=request.method, path=request.rel_url.raw_path)
        return responses.of_error(MeshError(Reason.INTERNAL, "internal error; the router's log has the cause"))


def _plain(request: web.Request, error: web.HTTPException) -> web.Response:
    """Returns the response for an error that aiohttp raised: an unknown path or method, or a body that is too large."""
    reason = Reason.UNKNOWN_METHOD if error.status in (404, 405) else Reason.BAD_REQUEST
    if error.status == Reason.TOO_LARGE.http:
        reason = Reason.TOO_LARGE
    _, body = errors.of_error(MeshError(reason, f"{request.method} {request.rel_url.raw_path:.200}: {error.reason}"))
    response = responses.response(error.status, body)
    if "Allow" in error.headers:
        response.headers["Allow"] = error.headers["Allow"]
    return response
