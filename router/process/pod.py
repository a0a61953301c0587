"""The router pod's main process. It follows etcd on behalf of all workers, starts the workers and the edge, and answers
probes.

This process is not on the path of any call. The kernel ensures that its workers and Envoy do not outlive it. A child
that dies or hangs is restarted, with back-off. If an essential task fails, the process logs the reason and exits, and
its supervisor restarts it. When it stops, it first reports this on `/ready`, then stops accepting calls, waits for
calls in flight, and ends its children.
"""

import asyncio
import contextlib
import functools
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mesh import process
from mesh.access import patterns
from mesh.envoy import config, minder
from mesh.etcd import Etcd, EtcdError, Patience
from mesh.host import cpus
from mesh.identity import Identity
from mesh.options import values as addresses
from mesh.process import ports
from mesh.process.ending import Ending
from mesh.process.supervisor import ChildLife, Program, Supervisor
from mesh.process.tasks import Tasks, turned
from mesh.schema import owner, records
from mesh.schema.keys import Keys
from mesh.schema.lives import RouterRecord
from mesh.statuses import MeshError
from mesh.telemetry import logs, metrics
from mesh.telemetry.probes import Probes
from mesh.wire.client import Pool
from mesh.wire.headers import AUTHORIZATION
from router.access import assembly, operations
from router.access.authority import Authority
from router.access.guard import OFF, REQUIRED
from router.fencing.closing import Closing
from router.fencing.prober import Prober
from router.fencing.tombstones import Tombstones
from router.fencing.withdrawal import Withdrawal
from router.leader.election import Election
from router.leader.rounds import Rounds
from router.loads.agents import Agents
from router.process import duties, sockets
from router.process.dataplanefile import DataplaneFile
from router.process.grantsfile import GrantsFile, GrantsFollower
from router.process.roster import Roster
from router.settings import RouterSettings
from router.state.dynamic import Dynamic
from router.state.feed import ranges
from router.state.feed.following import Following
from router.state.feed.server import FeedServer
from router.state.pods import News
from router.state.registry import Registry
from router.state.view import View
from router.state.vmodels import Vmodels
from router.vmodels.store import VModelStore

log = logs.get(__name__)

_SAY = 0.5  # seconds between "not ready" and the end of accepting calls, for load balancers that poll
_TICK = 1.0  # seconds
_DEAD = 60.0  # seconds without any worker or Envoy, in spite of restarts, after which the pod is not live
_STOPPING = 20.0  # seconds for an orderly end after a failure, besides the drains of Envoy and workers
_KILL = 5.0  # seconds after its drain before a worker is killed


def default_workers(cpus: int) -> int:
    """Returns the number of workers: one for every two CPUs.

    Envoy uses 60 % of a router's CPU time per call, so with one worker per CPU, some workers would always be idle. With
    fewer workers, each also finds more calls to handle when it wakes. Measured on 2 CPUs, 64 calls in flight: one
    worker takes 58 us a call and Envoy 100, two take 80 to 100 and Envoy 115 to 150.
    """
    return max(1, (cpus + 1) // 2)


class StartError(Exception):
    """The error that a router cannot start. The text says why, and what to do."""


class RouterPod:
    """The main process of a router pod, with its workers and its edge as children."""

    def __init__(self, settings: RouterSettings) -> None:
        self._own_dir = not settings.run_dir
        run_dir = settings.run_dir or tempfile.mkdtemp(prefix="mesh-", dir="/tmp")
        workers = settings.workers or default_workers(cpus.available())
        self.settings = replace(settings, run_dir=run_dir, workers=workers)
        self._dir = Path(run_dir)
        self._metrics = metrics.Registry("router-pod")
        self.ending = Ending()
        self._tasks = Tasks(self.ending.because)
        self._etcd = Etcd(settings.etcd, follow=True)
        self._patience = Patience()
        keys = Keys(settings.base)
        self._view = View(keys, self._connect)
        self._identity = Identity(Path(settings.internal_tls)) if settings.internal_tls else None
        self._agents = Agents(self._identity)
        self._view.listen(self._on_pod)
        self._registry = Registry(self._etcd, keys, timeout=settings.registry_timeout)
        self._dynamic = Dynamic(keys)
        self._vmodels = Vmodels(keys)
        self._tombstones = Tombstones(self._etcd, keys, self._agents)
        self._store = VModelStore(
            etcd=self._etcd,
            keys=keys,
            registry=self._registry,
            withdrawal=Withdrawal(
                etcd=self._etcd,
                keys=keys,
                registry=self._registry,
                view=self._view,
                agents=self._agents,
                tombstones=self._tombstones,
                wait=settings.unload_wait,
            ),
            tombstones=self._tombstones,
            note=self._vmodels.read,
        )
        authority = Authority(keys)
        self._guard = assembly.guard(settings, authority)
        self._feed = FeedServer(self._snapshot, wanted=lambda range: self._following.want(range))
        readers: dict[ranges.Range, ranges.Reader] = {
            ranges.PRESENCE: self._view,
            ranges.CONFIG: self._dynamic,
            ranges.VMODELS: self._vmodels,
        }
        if settings.auth == REQUIRED:
            readers[ranges.AUTH] = authority
        self._following = Following(
            self._etcd,
            keys,
            readers=readers,
            apply=self._feed.apply,
            run=functools.partial(self._tasks.run, duties.FOLLOW_ETCD),
        )
        self._prober = Prober(self._view, self._agents)
        self._rounds = Rounds(
            view=self._view,
            agents=self._agents,
            registry=self._registry,
            etcd=self._etcd,
            keys=keys,
            settings=lambda: self._dynamic.current,
            records=self._vmodels,
            store=self._store,
            failure_expiry=settings.failure_expiry,
        )
        self._closing = Closing(
            self._view, self._etcd, keys, self._tombstones, reregister_after=settings.reregister_after
        )
        self._election = Election(self._etcd, keys, settings.name, self._lead)
        self._roster = Roster(self._etcd, keys, settings.name, self._record)
        self._workers: list[Supervisor] = []
        self._sockets: list[sockets.Sockets] = []
        self._restarts = self._metrics.counter("mesh_worker_restarts", "Workers that died and were restarted.")
        self._hung = self._metrics.counter("mesh_hung_processes", process.HUNG_HELP, ("process",))
        settings = self.settings
        self._dataplane = DataplaneFile(settings.dataplane, settings.dataplane_path, settings.dataplane_published)
        self._dataplane.follow(self._metrics)
        self._grants_file = GrantsFile(settings.grants_file, settings.grants_published)
        self._grants_file.follow(self._metrics)
        self._grants = GrantsFollower(settings.grants_published, authority)
        self._envoy: minder.Minder | None = None
        probe = addresses.parse_address(settings.probe)
        ask = self._ask if settings.auth == REQUIRED else None
        self._probes = Probes(probe, self.why_not_ready, self._why_not_live, self._render, ask=ask)
        self._stopping = False
        self._served = asyncio.get_running_loop().time()  # when it was last able to serve
        self.probe_port = 0
        if self._identity is not None:
            self._identity.follow(self._metrics)
        gauge = self._metrics.gauge
        gauge("mesh_workers", "Workers that are connected.").follow(lambda: len(self._feed.ready()))
        gauge("mesh_leader", "1 if this router leads.", merge="max").follow(lambda: int(self._election.leading))
        carrying = self._rounds.carrying
        gauge("mesh_planned_loads", "Loads that the leader requested and that succeeded.", merge="max").follow(
            lambda: carrying.statistics().loads
        )
        gauge("mesh_planned_load_failures", "Loads that the leader requested and that failed.", merge="max").follow(
            lambda: carrying.statistics().failures
        )
        gauge("mesh_planned_unloads", "Copies that agents unloaded at the leader's request.", merge="max").follow(
            lambda: carrying.statistics().unloads
        )
        transitions = self._rounds.transitions
        gauge("mesh_alias_moves_under_way", "Aliases that the leader is moving to a new target.", merge="max").follow(
            lambda: transitions.statistics().moving
        )
        gauge("mesh_alias_moves_parked", "Aliases whose new target could not be loaded.", merge="max").follow(
            lambda: transitions.statistics().parked
        )
        gauge("mesh_alias_moves", "Moves of aliases that this router, as leader, has ended.", merge="max").follow(
            lambda: transitions.statistics().moved
        )
        gauge("mesh_open_lives", "Pods that are cut off from etcd and may still answer.", merge="max").follow(
            lambda: self._closing.statistics().open
        )
        gauge("mesh_tombstones", "Unregistered models that a pod may still answer for.", merge="max").follow(
            lambda: self._closing.statistics().tombstones
        )
        gauge("mesh_lives_expired", "Pods cut off for so long that the wait for them has ended.", merge="max").follow(
            lambda: self._closing.statistics().expired
        )
        gauge(
            "mesh_registry_stale_seconds", "Seconds for which changes in etcd have not arrived; 0 while they do."
        ).follow(lambda: self._following.stale_for)

    def why_not_ready(self) -> str | None:
        """Returns the reason why this router accepts no calls, or None if it does."""
        if self._stopping:
            return "this router is stopping"
        if not self._following.read.is_set():
            return self._patience.why or "the registry (etcd) has not been read yet"
        if (reason := self._why_nobody_serves()) is not None:
            return reason
        ready = self._feed.ready()
        if all(reason is not None for reason in ready.values()):
            return "; ".join(f"{name}: {reason}" for name, reason in sorted(ready.items()))
        return None

    def _why_nobody_serves(self) -> str | None:
        """Returns the reason why no calls can be served, or None if Envoy and at least one worker run and respond."""
        if self._envoy is not None and (reason := self._envoy.why_not_ready) is not None:
            return reason
        connected = self._feed.ready()
        if not connected:
            return "no worker is running"
        troubles = [worker.trouble for worker in self._workers if worker.program.name in connected]
        return "; ".join(filter(None, troubles)) if troubles and all(troubles) else None

    def _why_not_live(self) -> str | None:
        """Returns the reason why the pod is not live, or None. A pod is not live if restarts of its children have not
        helped, but a new container may help."""
        down = asyncio.get_running_loop().time() - self._served
        if self._stopping or down < _DEAD:
            return None
        return f"nothing has served for {down:.0f} s: {self._why_nobody_serves() or 'it serves again'}"

    async def start(self) -> None:
        """Starts all parts. If one cannot start, stops the others and raises StartError."""
        settings = self.settings
        try:
            self._dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            settings = self.settings = self._with_ports(settings)
            settings.write(self._dir / "settings.json")
            self._dataplane.begin()
            if self._dataplane.is_watched:
                self._tasks.run(duties.DATAPLANE, self._dataplane.run)
            self._grants_file.begin()
            self._grants.look()
            if self._grants_file.is_watched:
                self._tasks.run(duties.GRANTS, self._grants_file.run)
            await self._feed.start(settings.feed)
            self._tasks.run(duties.TAKE_PART, self._take_part)
            self._tasks.run(duties.TICK, self._tick)
            if self._identity is not None:
                self._tasks.run(duties.POD_CERTIFICATES, self._identity.run)
            self.probe_port = await self._probes.start()
            if settings.edge == "envoy":
                for index in range(settings.workers):
                    kinds = sockets.KINDS + (sockets.MANAGED if settings.management_listen else ())
                    paths = {kind: settings.socket(kind, index) for kind in kinds}
                    self._sockets.append(sockets.Sockets(paths))
            for index in range(settings.workers):
                worker = self._make_worker(index)
                self._workers.append(worker)
                self._tasks.run(duties.WORKER, worker.run, str(index))
            if settings.edge == "envoy":
                self._envoy = self._make_envoy(settings)
                self._envoy.follow(self._metrics)
                await self._envoy.start()
        except (minder.EnvoyError, OSError, ValueError) as error:
            await self.stop(grace=0.0)
            raise StartError(str(error)) from error
        except BaseException:
            await self.stop(grace=0.0)
            raise
        log.info("router started", listen=self.address, edge=settings.edge, workers=settings.workers)

    @property
    def address(self) -> str:
        """The address that clients call."""
        host, port = addresses.parse_address(self.settings.listen)
        return addresses.format_address(host, self._envoy.port if self._envoy is not None else port)

    def _with_ports(self, settings: RouterSettings) -> RouterSettings:
        """Returns the settings. Without Envoy, replaces each port 0 with a free port, which all workers then share.
        Raises StartError if a port is taken."""
        if settings.edge == "envoy":
            return settings
        chosen = []
        for option, address in (("--listen", settings.listen), ("--rest-listen", settings.rest_listen)):
            host, port = addresses.parse_address(address)
            try:
                ports.check_free(host, port)
            except ports.Unusable as error:
                raise StartError(f"{error}: choose another address ({option})") from error
            chosen.append(addresses.format_address(host, port or process.free_port(host)))
        return replace(settings, listen=chosen[0], rest_listen=chosen[1])

    def _make_envoy(self, settings: RouterSettings) -> minder.Minder:
        host, port = addresses.parse_address(settings.listen)
        door = None
        if settings.management_listen:
            managed_host, managed_port = addresses.parse_address(settings.management_listen)
            door = config.Door(
                host=managed_host,
                port=managed_port,
                grpc_sockets=tuple(settings.socket(sockets.MANAGED_GRPC, index) for index in range(settings.workers)),
                rest_sockets=tuple(settings.socket(sockets.MANAGED_REST, index) for index in range(settings.workers)),
            )
        return minder.Minder(
            config.EnvoySettings(
                host=host,
                port=port,
                admin_socket=f"{settings.run_dir}/admin",
                grpc_sockets=tuple(settings.socket(sockets.GRPC, index) for index in range(settings.workers)),
                inference_sockets=tuple(settings.socket(sockets.INFERENCE, index) for index in range(settings.workers)),
                rest_sockets=tuple(settings.socket(sockets.REST, index) for index in range(settings.workers)),
                management=door,
                tls=_tls(settings),
                concurrency=cpus.available(),
                max_connection_age=settings.connection_age,
                heap=settings.edge_memory,
            ),
            run_dir=self._dir,
            on_hung=self._hung.labels("envoy").inc,
            on_lost=self.ending.because,
        )

    async def _take_part(self) -> None:
        """Checks the prefix's owner, then follows etcd, and leads while elected."""
        keys = Keys(self.settings.base)
        try:
            await self._patience.until_done(lambda: self._etcd.get(keys.owner))  # also if the owner is not checked
            await self._patience.until_done(lambda: owner.claim(self._etcd, keys, self.settings.install_id))
        except (owner.OwnedByAnother, EtcdError) as error:
            self.ending.because(error.detail if isinstance(error, EtcdError) else str(error))
            return
        self._tasks.run(duties.ROSTER, self._roster.run)
        self._following.begin()
        await self._following.read.wait()  # a leader must first know the pods and copies
        await self._election.run()

    async def _lead(self) -> None:
        """Runs the leader's duties until cancelled. Raises RuntimeError if one of them fails or hangs."""
        failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        tasks = Tasks(lambda why: None if failed.done() else failed.set_result(why))
        tasks.run(duties.ROUNDS, self._rounds.lead)
        tasks.run(duties.LIVES, self._closing.lead)
        try:
            raise RuntimeError(await failed)
        finally:
            await tasks.close()

    def _record(self) -> RouterRecord:
        return RouterRecord(self.address, self.settings.probe, self.settings.workers, records.SPOKEN)

    async def _tick(self) -> None:
        """Sends heartbeats to the workers, and updates the view, the probes of suspect pods, the grants and the admin
        keys, about once a second, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_TICK)
            turned()
            self._feed.beat()
            self._view.settle(loop.time())
            self._prober.look()
            self._grants.look()
            self._guard.look()
            if self._why_nobody_serves() is None:
                self._served = loop.time()

    def _connect(self, address: str) -> Pool:
        return Pool(address)  # never used: this process makes no calls

    def _on_pod(self, name: str, news: News) -> None:
        if news is News.GONE:
            self._agents.forget(name)

    def _make_worker(self, index: int) -> Supervisor:
        name = f"worker{index}"
        argv = process.python("router.process.worker", str(self._dir / "settings.json"), str(index))
        handed = self._sockets[index].descriptors if self._sockets else ()
        argv += map(str, handed)

        async def spawn(_: ChildLife) -> process.Process:
            return await process.spawn(argv, name=name, pass_fds=handed, on_line=_say, beats=True)

        return Supervisor(
            Program(name, spawn),
            on_death=lambda _: self._restarts.inc(),
            on_hung=self._hung.labels("worker").inc,
        )

    async def _snapshot(self) -> metrics.Snapshot:
        parts = await self._feed.snapshots()
        if self._envoy is not None:
            parts.append(await self._envoy.snapshot())
        return metrics.merge([self._metrics.snapshot(), *parts])

    async def _ask(self, authorization: Sequence[bytes]) -> tuple[int, str] | None:
        """Returns the HTTP status and the text for a sender who may not read the metrics, or None for one who may."""
        try:
            principal = await self._guard.identified([(AUTHORIZATION, value) for value in authorization])
            self._guard.allow(principal, operations.METRICS.verb, patterns.EVERYTHING)
        except MeshError as error:
            return error.reason.http, error.text
        return None

    async def _render(self) -> bytes:
        return metrics.render(await self._snapshot())

    async def stop(self, grace: float | None = None) -> None:
        """Stops all parts in order. Calls in flight get `grace` seconds to end (None: the time in the settings)."""
        grace = self.settings.drain if grace is None else grace
        self._stopping = True
        for worker in self._workers:
            worker.leave()  # from now on the grace period limits its drain
        self._feed.drain()
        if grace:
            log.info("router stops", grace=grace)
            await asyncio.sleep(min(_SAY, grace))
        if self._envoy is not None:
            await self._envoy.stop(grace)
        await asyncio.gather(*(worker.stop(grace + _KILL) for worker in self._workers))
        await self._tasks.close()
        await self._rounds.close()
        await self._store.close()
        await self._prober.close()
        await self._registry.close()
        await self._agents.close()
        await self._guard.close()
        self._view.close()
        for listening in self._sockets:
            listening.close()
        await self._probes.close()
        await self._feed.close()
        await self._etcd.close()
        if self._own_dir:
            await asyncio.to_thread(shutil.rmtree, self._dir, ignore_errors=True)


def _tls(settings: RouterSettings) -> config.Tls | None:
    if not settings.tls_certificate:
        return None
    return config.Tls(
        certificate=settings.tls_certificate,
        private_key=settings.tls_key,
        client_ca=settings.tls_client_ca,
        client_optional=settings.tls_client_auth == "optional",
        client_shown=settings.auth != OFF,
    )


def _say(line: str) -> None:
    """Prints a worker's log line, which the worker has already formatted."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


async def run(settings: RouterSettings) -> int:
    """Runs a router pod until SIGTERM or SIGINT, or until it has to end. Returns the exit status. Raises StartError."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    process.begin_beating()
    pod = RouterPod(settings)
    await pod.start()
    ends = asyncio.ensure_future(pod.ending.wait())
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((stopped, ends), return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopped.cancel()
        ends.cancel()
        status = await pod.ending.close(pod.stop(), within=2 * settings.drain + _STOPPING)
    return status
