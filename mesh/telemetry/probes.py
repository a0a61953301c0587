"""The port where Kubernetes, Prometheus and `mesh` query a process's state: `/ready`, `/live`, `/metrics`.

The owner of the port gives functions that return the answers. The reason why a process is not ready is sent as text, so
that `kubectl describe pod` shows it. The port is separate because it must answer while the main port is full, and
because it is not for clients.
"""

import asyncio
import functools
import inspect
from collections.abc import Awaitable, Callable, Sequence

from aiohttp import web

from mesh.telemetry import logs, metrics

log = logs.get(__name__)

Question = Callable[[], str | None]
"""A question that is answered with None for yes, or with the reason for no."""

_METRICS_TIMEOUT = 5.0  # seconds; Prometheus gives up after 10


Refused = tuple[int, str]
"""The HTTP status and the text of a refusal."""


class Probes:
    """An HTTP server for the three paths. `address` is host and port. Port 0 takes a free port."""

    def __init__(
        self,
        address: tuple[str, int],
        ready: Question,
        live: Question,
        metrics: Callable[[], Awaitable[bytes] | bytes],
        *,
        ask: Callable[[Sequence[bytes]], Awaitable[Refused | None]] | None = None,
    ) -> None:
        """Makes a server that does not listen yet. `ask` gets the `authorization` headers of a request for metrics, and
        returns the answer for a sender who may not read metrics, or None."""
        self._ask = ask
        self._host, self._port = address
        self._ready = ready
        self._live = live
        self._metrics = metrics
        self._runner: web.AppRunner | None = None

    async def start(self) -> int:
        """Starts to listen, and returns the port. Raises OSError if the address cannot be used."""
        app = web.Application()
        app.router.add_get("/ready{slash:/?}", functools.partial(self._answer, self._ready))
        app.router.add_get("/live{slash:/?}", functools.partial(self._answer, self._live))
        app.router.add_get("/metrics{slash:/?}", self._give_metrics)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0, keepalive_timeout=30.0)
        await runner.setup()
        try:
            site = web.TCPSite(runner, self._host, self._port)
            await site.start()
        except BaseException:
            await runner.cleanup()
            raise
        self._runner = runner
        port: int = runner.addresses[0][1]
        return port

    async def close(self) -> None:
        """Stops listening. May be called twice."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    async def _answer(self, question: Question, _: web.Request) -> web.Response:
        try:
            reason = question()
        except Exception:
            log.exception("a health check failed in this process's own code")
            reason = "the check failed; the log of this process has the cause"
        return web.Response(text="ok\n") if reason is None else web.Response(status=503, text=f"{reason}\n")

    async def _give_metrics(self, request: web.Request) -> web.Response:
        try:
            if self._ask is not None:
                given = [
                    value.encode("utf-8", "surrogateescape") for value in request.headers.getall("Authorization", ())
                ]
                if (refused := await self._ask(given)) is not None:
                    status, text = refused
                    fields = {"WWW-Authenticate": "Bearer"} if status == web.HTTPUnauthorized.status_code else {}
                    return web.Response(status=status, text=f"{text}\n", headers=fields)
            body = self._metrics()
            if inspect.isawaitable(body):
                async with asyncio.timeout(_METRICS_TIMEOUT):
                    body = await body
        except TimeoutError:
            return web.Response(
                status=503, text=f"the metrics were not collected within {_METRICS_TIMEOUT:g} s: try again\n"
            )
        except Exception:
            log.exception("the metrics could not be written")
            return web.Response(
                status=500, text="the metrics cannot be collected; the log of this process has the cause\n"
            )
        return web.Response(body=body, headers={"content-type": metrics.CONTENT_TYPE})
