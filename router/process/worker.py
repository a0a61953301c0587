"""`python -m router.process.worker SETTINGS INDEX [DESCRIPTOR...]`: a worker process, started by the router pod.

With Envoy, the worker answers on unix sockets that the pod has created (`sockets`) and whose descriptors it passes: for
gRPC over HTTP/1.1, for inference over REST, and for everything else over REST. With a separate port for management,
there are two more, for gRPC and REST at that port. If `grpc.aio` is the edge, the worker listens on the ports itself.
All of its state can be rebuilt from etcd, so it may die at any time.
"""

import asyncio
import contextlib
import gc
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop
from aiohttp import web

from mesh.etcd import Etcd
from mesh.host import heap, openfiles
from mesh.identity import Identity
from mesh.options import values as addresses
from mesh.process import begin_beating
from mesh.process.ending import Ending
from mesh.process.tasks import Tasks, turned
from mesh.schema.authstore import AuthStore
from mesh.schema.keys import Keys
from mesh.statuses import MeshError, Reason
from mesh.telemetry import logs, metrics
from mesh.wire.budget import Budget
from mesh.wire.call import Call, Handler
from mesh.wire.client import Pool
from mesh.wire.framing import MAX_LENGTH
from mesh.wire.pieces import Pieces
from mesh.wire.plainserver import PlainServer
from mesh.wire.server import Server
from router import services
from router.access import assembly
from router.access.audit import Audit
from router.access.authority import Authority
from router.access.guard import OFF, REQUIRED
from router.calls import answers
from router.calls.dispatch import Dispatcher
from router.calls.forwarder import Forwarder
from router.calls.meter import Meter
from router.calls.routes import Routes
from router.fencing.prober import Prober
from router.fencing.tombstones import Tombstones
from router.inference.models import Models
from router.inference.server import V2Server as V2Server
from router.loads.agents import Agents
from router.loads.coldstart import ColdStart
from router.management.handlers import Management
from router.process import duties, sockets
from router.process.dataplanefile import DataplaneFollower
from router.process.grantsfile import GrantsFollower
from router.rest import app
from router.rest.bodies import Bodies
from router.rest.conversions import Conversions
from router.rest.inference import Inference
from router.rest.parts import Parts
from router.rest.plain import PlainInference
from router.services import modelmesh
from router.settings import RouterSettings
from router.state.dynamic import Dynamic
from router.state.feed import ranges
from router.state.feed.client import FeedClient
from router.state.pods import News
from router.state.registry import Registry
from router.state.view import View
from router.state.vmodels import Vmodels

if TYPE_CHECKING:
    from router.edge import grpc as edges

log = logs.get(__name__)

_TICK = 1.0  # seconds
_FEED_WAIT = 5.0  # seconds to wait for the feed before calls are accepted; later, callers get an error that says so
_GRACE = 5.0  # seconds at most for calls in flight after a failure of this worker: others wait for the next one
_STOPPING = 10.0  # further seconds for an orderly end
_IDLE = 50.0  # seconds after which an idle connection to a pod is closed: before the model server closes it


class WorkerProcess:
    """A worker and its parts. Call `start()`, then `stop()`.

    If Envoy is the edge, `handed` has the descriptors of the listening sockets. The worker owns and closes the sockets.
    """

    def __init__(self, settings: RouterSettings, index: int, handed: Sequence[int] = ()) -> None:
        self.settings = settings
        self._handed = handed
        self.index = index
        self.name = f"worker{index}"
        self.metrics = metrics.Registry(f"router-{self.name}")
        self._draining = False
        self.etcd = Etcd(settings.etcd, follow=True)
        keys = Keys(settings.base)
        self.identity = Identity(Path(settings.internal_tls)) if settings.internal_tls else None
        self.budget = Budget(settings.max_body_bytes)
        self.view = View(keys, self._connect)
        self.agents = Agents(self.identity)
        self.view.listen(self._on_pod)
        self.vmodels = Vmodels(keys)
        self.registry = Registry(
            self.etcd,
            keys,
            timeout=settings.registry_timeout,
            remember=settings.registry_cache,
            vmodels=self.vmodels,
        )
        meter = Meter(self.metrics)
        self.dynamic = Dynamic(keys)
        self.coldstart = ColdStart(
            view=self.view,
            registry=self.registry,
            agents=self.agents,
            meter=meter,
            settings=settings,
            current=lambda: self.dynamic.current,
        )
        self.forwarder = Forwarder(
            view=self.view,
            coldstart=self.coldstart,
            registry=self.registry,
            meter=meter,
            counted=self.metrics,
            vmodels=self.vmodels,
            settings=settings,
            budget=self.budget,
        )
        self.management = Management.of(
            etcd=self.etcd,
            keys=keys,
            registry=self.registry,
            view=self.view,
            coldstart=self.coldstart,
            agents=self.agents,
            tombstones=Tombstones(self.etcd, keys, self.agents),
            settings=settings,
            listen=self.vmodels.listen,
            note=self.vmodels.read,
        )
        authority = Authority(keys)
        self.guard = assembly.guard(settings, authority)
        guard = self.guard if settings.auth == REQUIRED else None
        self.audit = Audit(settings.audit)
        routes = Routes()
        self.dataplane = DataplaneFollower(settings.dataplane_published, routes)
        self.grants = GrantsFollower(settings.grants_published, authority)
        self.dispatcher = Dispatcher(self.forwarder, routes, guard)
        self.prober = Prober(self.view, self.agents)
        readers: dict[ranges.Range, ranges.Reader] = {
            ranges.PRESENCE: self.view,
            ranges.CONFIG: self.dynamic,
            ranges.VMODELS: self.vmodels,
        }
        if settings.auth != OFF:
            readers[ranges.AUTH] = authority
        self.feed = FeedClient(
            settings.feed,
            self.name,
            readers,
            ready=self.why_not_ready,
            snapshot=self.metrics.snapshot,
            on_drain=self._drain,
        )
        self.conversions = Conversions(max_message=settings.max_message)
        models = Models(self.dispatcher.dispatch, max_message=settings.max_message)
        inference = Inference(models, self.conversions, max_message=settings.max_message)
        bodies = Bodies(self.budget, limit=settings.max_message, least=settings.min_body_rate)
        v2server = V2Server(self.view, self.why_not_ready)
        self._rest_parts = Parts(
            settings=settings,
            server=v2server,
            models=models,
            inference=inference,
            management=self.management,
            view=self.view,
            bodies=bodies,
            guard=self.guard,
            audit=self.audit,
            authstore=AuthStore(self.etcd, keys),
            snapshots=self.feed.merged,
            dataplane=self.dataplane.document,
            grants_file=self.grants.document,
        )
        self.dispatcher.serve(
            services.methods(
                ready=self.why_not_ready,
                server=v2server,
                management=self.management,
                managed=meter.managed,
                guard=self.guard,
                audit=self.audit,
            )
        )
        self.server = self._grpc_server(self._unmanaged if settings.management_listen else self.dispatcher.dispatch)
        self._managed_server: Server | None = None
        self._inference = PlainInference(models, inference, self.budget, guard)
        self.inference_server = PlainServer(
            self._inference.serve,
            self._inference.refusal,
            max_message=settings.max_message,
            budget=self.budget,
            min_rate=settings.min_body_rate,
            opening=self._inference.opening,
        )
        self._edge: edges.GrpcEdge | None = None
        self._rest: web.AppRunner | None = None
        self._managed_rest: web.AppRunner | None = None
        self.ending = Ending()
        self._tasks = Tasks(self.ending.because)
        self._listening = False
        self._gauges(bodies)

    def why_not_ready(self) -> str | None:
        """Returns the reason why this worker accepts no calls, or None if it does."""
        if self._draining:
            return "this router is stopping"
        if not self._listening:
            return "this worker is starting"
        return None if self.feed.seen else "the registry (etcd) has not been read yet"

    async def start(self) -> None:
        """Starts the tasks, waits up to five seconds for the feed, then listens and accepts calls."""
        settings = self.settings
        self.dataplane.look()
        self.grants.look()
        self._tasks.run(duties.FEED, self.feed.run)
        self._tasks.run(duties.WORKER_TICK, self._tick)
        if self.identity is not None:
            self._tasks.run(duties.WORKER_CERTIFICATES, self.identity.run)
        # Without the feed, every call is a cold start, and a resident model needs etcd.
        if not await self.feed.first(_FEED_WAIT):
            log.warning("calls are accepted before the registry (etcd) was read", waited=_FEED_WAIT)
        if settings.edge == "envoy":
            grpc, inference, rest, *managed = map(sockets.adopt, self._handed)
            await self.server.listen_on(grpc)
            await self.inference_server.listen_on(inference)
            if managed:
                self._managed_server = self._grpc_server(self.dispatcher.dispatch)
                await self._managed_server.listen_on(managed[0])
                self._managed_rest = await app.serve_on(self._rest_parts, managed[1], grace=settings.drain)
            self._rest = await app.serve_on(self._rest_parts, rest, grace=settings.drain, managed=not managed)
        else:
            from router.edge import grpc as edge  # grpcio's server, which is not needed behind Envoy

            self._edge = edge.GrpcEdge(
                self.dispatcher.dispatch, max_message=settings.max_message, shared=True, budget=self.budget
            )
            await self._edge.listen(*addresses.parse_address(settings.listen))
            host, port = addresses.parse_address(settings.rest_listen)
            self._rest = await app.serve_tcp(self._rest_parts, host, port, shared=True, grace=settings.drain)
        self._listening = True
        self.feed.tell()
        # The objects that exist now stay, so the garbage collector need not scan them again.
        gc.collect()
        gc.freeze()

    async def stop(self) -> None:
        """Stops accepting calls, waits for calls in flight, up to a limit, and releases all resources."""
        self._drain()
        self.feed.tell()
        grace = min(self.settings.drain, _GRACE) if self.ending.why else self.settings.drain
        closing = [self.server.close(grace), self.inference_server.close(grace)]
        if self._edge is not None:
            closing.append(self._edge.close(grace))
        if self._managed_server is not None:
            closing.append(self._managed_server.close(grace))
        closing += [runner.cleanup() for runner in (self._rest, self._managed_rest) if runner is not None]
        await asyncio.gather(*closing)
        await self._inference.close()
        await self.conversions.close()
        await self._tasks.close()
        await self.prober.close()
        await self.management.vmodels.close()
        await self.coldstart.close()
        await self.forwarder.close()
        await self.registry.close()
        self.view.close()
        await self.agents.close()
        await self.etcd.close()
        await self.guard.close()
        self.audit.close()

    def _grpc_server(self, handler: Handler) -> Server:
        settings = self.settings
        return Server(
            handler,
            max_message=settings.max_message,
            budget=self.budget,
            min_rate=settings.min_body_rate,
            pieces=Pieces(limit=settings.max_forwarded_message or MAX_LENGTH, wanted=self.dispatcher.forwards),
        )

    def _unmanaged(self, call: Call) -> None:
        if call.method.startswith(modelmesh.SERVICES):
            answers.fail(call, MeshError(Reason.UNKNOWN_METHOD, app.NO_MANAGEMENT))
        else:
            self.dispatcher.dispatch(call)

    def _drain(self) -> None:
        self._draining = True

    def _connect(self, address: str) -> Pool:
        settings = self.settings
        return Pool(
            address,
            max_connections=settings.max_connections_per_pod,
            connect_timeout=settings.connect_timeout,
            max_message=settings.max_message,
            idle_timeout=_IDLE,
            identity=self.identity,
            budget=self.budget,
            pieces=Pieces(limit=settings.max_forwarded_message or MAX_LENGTH),
        )

    def _on_pod(self, name: str, news: News) -> None:
        if news is News.GONE:
            self.agents.forget(name)

    async def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_TICK)
            turned()
            self.view.settle(loop.time(), away=self.forwarder.verifier.away)
            self.forwarder.deaths.settle(self.forwarder.loop.time())
            self.prober.look()
            self.dataplane.look()
            self.grants.look()
            self.guard.look()
            self.audit.look()
            self.feed.tell()
            if self.budget.settle():
                await asyncio.to_thread(heap.trim)

    def _gauges(self, bodies: Bodies) -> None:
        view, coldstart, forwarder = self.view, self.coldstart, self.forwarder
        gauge = self.metrics.gauge
        # All workers have the same view, so the highest value is that of the router pod.
        gauge("mesh_pods", "Runtime pods in view.", merge="max").follow(lambda: len(view.pods))
        gauge("mesh_suspect_pods", "Pods that disappeared without notice and are still called.", merge="max").follow(
            lambda: sum(pod.suspect for pod in view.pods.values())
        )
        gauge("modelmesh_models_loaded_total", "Models with a copy that may be called.", merge="max").follow(
            lambda: len(view.copies)
        )
        gauge("mesh_calls_in_flight", "Inference calls in the workers.").follow(lambda: forwarder.in_flight)
        gauge("mesh_waiters", "Calls that wait for loads.").follow(lambda: coldstart.statistics().waiters)
        gauge("mesh_waiting_bytes", "Bytes of the calls that wait for loads.").follow(
            lambda: coldstart.statistics().bytes
        )
        budget, server, plain = self.budget, self.server, self.inference_server
        gauge("mesh_body_bytes", "Bytes of requests and replies in the workers.").follow(lambda: budget.held)
        counter = self.metrics.counter
        counter("mesh_bodies_refused", "Bodies refused because those in flight filled --max-body-bytes.").follow(
            lambda: budget.refused
        )
        counter("mesh_bodies_slow", "Bodies ended because they arrived or were read too slowly.").follow(
            lambda: server.slow + plain.slow + bodies.slow
        )
        counter("mesh_requests_unauthenticated", "Requests without valid credentials.").follow(
            lambda: self.guard.unknown
        )
        counter("mesh_requests_denied", "Requests of callers who lack the grant.").follow(lambda: self.guard.denied)
        if self.identity is not None:
            self.identity.follow(self.metrics)
        gauge("mesh_flights", "Models that are being loaded for callers.").follow(
            lambda: coldstart.statistics().flights
        )


async def _serve(settings: RouterSettings, index: int, handed: Sequence[int]) -> int:
    """Runs the worker until a signal stops it, or until it has to end. Returns the exit status."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    begin_beating()
    process = WorkerProcess(settings, index, handed)
    ends = asyncio.ensure_future(process.ending.wait())
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await process.start()
        log.debug("the worker accepts calls", worker=index)
        await asyncio.wait((stopped, ends), return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopped.cancel()
        ends.cancel()
        status = await process.ending.close(process.stop(), within=_GRACE + _STOPPING)
    return status


def main() -> None:
    """Runs the worker that the arguments describe, and exits with its status."""
    heap.keep()
    openfiles.raise_limit()
    settings = RouterSettings.read(Path(sys.argv[1]))
    index, *handed = map(int, sys.argv[2:])
    logs.configure(level=settings.log_level, fmt=settings.log_format, process=f"worker{index}")  # type: ignore[arg-type]
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(uvloop.run(_serve(settings, index, handed)))


if __name__ == "__main__":
    main()
