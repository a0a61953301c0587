"""The agent of a runtime pod: starts the parts in order, says how the pod is, and takes it down.

Order of the start: the model server before the mesh is told of the pod, the control port before that too, so that what
is published can be used at once. Order of the end (drain): the mesh is told that the pod leaves, its copies are loaded
elsewhere, the fence is shut, the copies' keys go, calls in flight are waited for, the model server ends, and presence
last. Answers always end before keys go: whoever finds no key may rely on it. A router whose view is a moment behind is
answered *not here*, and goes elsewhere.

When the model server dies, everything that was in its memory is gone: the keys, the books, the files. What was loading
or running is written into those models' records first of all, because it may be the cause. Where the agent itself was
killed with it, its next life does that (`earlier`).
"""

import asyncio
import contextlib
import dataclasses
import functools
import secrets
import time
from collections.abc import Iterable

from mesh import process
from mesh.etcd import Etcd, EtcdError, Patience
from mesh.etcd.ranges import after_prefix
from mesh.host import memory
from mesh.identity import Identity
from mesh.options.values import format_address, format_bytes, parse_address
from mesh.process.ending import Ending
from mesh.process.tasks import Tasks
from mesh.runtime import control, duties
from mesh.runtime.blame import earlier, suspects
from mesh.runtime.blame.earlier import BOARD, Earlier
from mesh.runtime.blame.history import History
from mesh.runtime.blame.lastlooks import LastLooks
from mesh.runtime.cache import capacity
from mesh.runtime.cache.activity import Activity
from mesh.runtime.cache.decisions import Decisions
from mesh.runtime.cache.demand import Demand
from mesh.runtime.cache.files import Files
from mesh.runtime.cache.housekeeping import Housekeeping
from mesh.runtime.cache.ledger import Entry, Ledger, State
from mesh.runtime.cache.loading import Parts
from mesh.runtime.cache.loads import Loads
from mesh.runtime.cache.memory import MemoryWatch
from mesh.runtime.cache.meters import Meters, calls_snapshot
from mesh.runtime.cache.optimising import Optimising
from mesh.runtime.cache.outcomes import Refused
from mesh.runtime.cache.rate import Rate
from mesh.runtime.cache.unloads import Unloads
from mesh.runtime.presence import figures
from mesh.runtime.presence.claims import Claims
from mesh.runtime.presence.fence import Fence
from mesh.runtime.presence.ondisk import OnDisk
from mesh.runtime.presence.place import NameTaken
from mesh.runtime.presence.presence import Presence
from mesh.runtime.rundir import RunDir
from mesh.runtime.servers import serverprocess
from mesh.runtime.servers.relief import Relief
from mesh.runtime.servers.serverprocess import Death, ServerFailed, ServerProcess
from mesh.runtime.servers.spi import Spi
from mesh.runtime.settings import RuntimeSettings
from mesh.runtime.sharedmemory.board import Board
from mesh.schema import copytoken, owner
from mesh.schema.keys import Keys
from mesh.schema.records import LEAVING, READY, PodRecord
from mesh.statuses import Reason
from mesh.telemetry import logs, metrics
from mesh.telemetry.probes import Probes
from placement.room import Room
from placement.suspects import suspects as judge
from puller.http_client import HttpPolicy
from puller.limits import Limits
from puller.progress import Progress
from puller.puller import Puller

log = logs.get(__name__)

STARTING, SERVER_DOWN = "starting", "server-down"

_SERVER_GRACE = 8.0  # seconds that the model server has to end: its own grace is 5
_PORT_TRIES = 3  # of a port that we chose and somebody else took meanwhile
_DEAD = 180.0  # seconds without a model server, starting new ones all the while, after which the pod is not live
_QUIET = 0.1  # seconds between two looks at the calls in flight while draining
_LOOK_AGAIN = 1.0  # seconds between two looks at whether somebody can take the copies
_ASK = 2.0  # seconds for etcd to answer a pod that leaves
_KEYS_WAIT = 2.0  # seconds for a leaving pod's keys to go
_LEAVING = "this pod is leaving"
_HAND_OVER_SHARE = 0.8  # of the time to leave, for copies to be loaded elsewhere


class StartError(Exception):
    """Why the pod cannot start; the text says what to do."""


class Agent:
    """One runtime pod. `start`, then `drain` or not, then `close`."""

    def __init__(self, settings: RuntimeSettings) -> None:
        """Raises StartError."""
        self.settings = settings
        self.name = settings.name
        self.incarnation = secrets.token_hex(8)
        self._token_of_control = secrets.token_hex(16)
        self.ending = Ending()
        self._state = STARTING
        self._known = False  # to the mesh: it was published once
        self._labels = settings.labels
        self._addresses = ("", "", "")  # data, control, probe, as published
        self._tasks = Tasks(self.ending.because)
        self._rate = Rate(self._calls_so_far)
        self._began = time.monotonic()
        self._identity = Identity(settings.internal_tls) if settings.internal_tls is not None else None
        self._earlier = Earlier(settings.name)
        whose = earlier.owner(base=settings.base, pod=settings.name)
        self._run_dir = RunDir(whose=whose, on_left=self._earlier.read)
        self.board = Board.create(self._run_dir.path / BOARD, settings.slots, incarnation=self.incarnation)
        self.ledger = Ledger(settings.capacity, self.board, slots=settings.slots, eviction=settings.eviction)
        self._demand = Demand(self.ledger, window=settings.demand_window)
        self.meters = Meters()
        self._decisions = Decisions()
        self._etcd = Etcd(settings.etcd, follow=True)
        self._patience = Patience()
        self._keys = Keys(settings.base)
        self._puller = Puller(
            directory=settings.model_dir or self._run_dir.path / "models",
            file_roots=settings.file_roots,
            volumes=settings.pvc_root,
            secrets=settings.storage_config,
            http=HttpPolicy(
                allow_private=settings.http_allow_private, ca=settings.storage_ca, proxies=settings.proxies
            ),
            budget_bytes=settings.disk_budget,
            limits=Limits(bytes_per_second=settings.pull_bandwidth, connections=settings.pull_connections),
        )
        self._files = Files(self._puller)
        self._on_disk = OnDisk(self._puller.remembered)
        self._puller.listen(self._on_disk.changed)
        self._activity = Activity(self.ledger)
        self._optimising = Optimising(self._puller, free_bytes=memory.available_bytes)
        self.server: ServerProcess | None = None
        self.presence = Presence(
            self._etcd,
            self._keys,
            pod=settings.name,
            incarnation=self.incarnation,
            ttl=settings.lease_ttl,
            record=self._record,
            on_stale=self._on_stale,
            on_usurped=self._on_usurped,
            is_alive=functools.partial(control.is_alive, identity=self._identity),
            on_lost=self.ending.because,
        )
        self.fence = Fence(
            self.board,
            self.presence,
            ttl=settings.lease_ttl,
            serve_without_etcd=settings.serve_without_etcd,
            reach=lambda timeout: self._etcd.get(self.presence.key, timeout=timeout),
        )
        self.presence.listen(self.fence.wake)
        self._history = History(self._etcd, self._keys, pod=settings.name, secrets=lambda: self._puller.secrets)
        self._memory = MemoryWatch(
            self.ledger,
            limit_bytes=settings.memory_limit or capacity.limit(settings.capacity),
            used=self.resident_bytes,
            evict=self._evict,
        )
        self._device_memory = MemoryWatch(
            self.ledger,
            limit_bytes=0,  # until the model server has told of a device
            used=lambda: self.board.device_bytes,
            evict=self._evict,
            device=True,
        )
        there = memory.whole()
        self._last_looks = LastLooks(self._run_dir.path, memory.available_bytes, there.bytes if there else 0)
        self._relief = Relief(lambda: self.board.stuck, lambda: self.server)
        self._unloads = Unloads(
            self.ledger,
            self,
            self.presence,
            self._files,
            token=self._token,
            meters=self.meters,
            decisions=self._decisions,
            on_freed=lambda: self.loads.freed(),
        )
        parts = Parts(
            ledger=self.ledger,
            server=self,
            unloads=self._unloads,
            keys=self.presence,
            claiming=Claims(self._etcd, self._keys, self.presence),
            pulling=self._files,
            history=self._history,
            meters=self.meters,
            incarnation=self.incarnation,
            pod=settings.name,
            concurrency=settings.load_concurrency,
            load_timeout=settings.load_timeout,
            evict=self._make_room,
            why_refused=self._why_refused,
            why_silent=self._why_silent,
            why_down=lambda: self.server.why_down if self.server else "",
            optimised_tag=lambda: self._optimising.tag,
            slow=self._optimising.loaded,
        )
        self.loads = Loads(parts, self._decisions)
        self.meters.follow_loads(self.loads.loading.queued, self.loads.loading.sizes)
        self._housekeeping = Housekeeping(
            self._etcd,
            self._keys,
            self.ledger,
            self.presence,
            interval=settings.check_interval,
            outdated=self.loads.outdated,
        )
        self._control = control.Control(self, self.loads, self._token_of_control, self._identity)
        self._probes = Probes(settings.probe, self.why_not_ready, self._why_not_live, self._metrics)
        if self._identity is not None:
            self._identity.follow(self.meters.registry)
        self.meters.follow(
            self.ledger, self._puller.statistics, self._demand.pods, published=lambda: self.presence.published
        )

    # --- start ---

    async def start(self) -> None:
        """Returns once the mesh can use this pod. Raises StartError."""
        began = time.monotonic()
        settings = self.settings
        if self._identity is not None:
            self._tasks.run(duties.CERTIFICATES, self._identity.run)
        try:
            self._puller.sweep()
            probe = await self._probes.start()
        except (OSError, ValueError) as error:
            raise StartError(str(error)) from error
        try:
            await self._patience.until_done(lambda: owner.claim(self._etcd, self._keys, settings.install_id))
            await self._patience.until_done(self.presence.wait_for_name)  # before anything that takes seconds
        except (owner.OwnedByAnother, NameTaken) as error:
            raise StartError(str(error)) from error
        except EtcdError as error:
            raise StartError(error.detail) from error
        await self._earlier.accuse(self._etcd, self._keys, self._history)  # before anything is loaded again
        data = await self._start_server()
        try:
            control_address = await self._control.start(settings.control)
        except OSError as error:
            raise StartError(str(error)) from error
        self._addresses = (
            format_address(settings.reachable(settings.data), parse_address(data)[1]),
            format_address(settings.reachable(settings.control), parse_address(control_address)[1]),
            format_address(settings.reachable(settings.probe), probe),
        )
        self._state = READY
        try:
            await self.presence.start(self._patience)
        except (NameTaken, EtcdError) as error:
            raise StartError(str(error)) from error
        self._known = True
        self.fence.look()  # at once: what is published may be called
        check = dataclasses.replace(duties.HOUSEKEEPING, turns=duties.HOUSEKEEPING.turns + 2 * settings.check_interval)
        for duty, work in (
            (duties.FENCE, self.fence.run),
            (duties.MEMORY, self._memory.run),
            (duties.DEVICE_MEMORY, self._device_memory.run),
            (duties.RELIEF, self._relief.run),
            (duties.LAST_LOOKS, self._last_looks.run),
            (check, self._housekeeping.run),
            (duties.RATE, self._rate.run),
            (duties.ACTIVITY, self._activity.run),
            (duties.OPTIMISING, self._optimising.run),
            (duties.LONG_PULLS, self._files.watch),
        ):
            self._tasks.run(duty, work)
        log.info(
            "pod ready",
            pod=self.name,
            incarnation=self.incarnation,
            data=self._addresses[0],
            control=self._addresses[1],
            probe=self._addresses[2],
            s=round(time.monotonic() - began, 2),
        )

    async def _start_server(self) -> str:
        """The address that it answers on."""
        settings = self.settings
        host, port = parse_address(settings.data)
        for attempt in range(1, _PORT_TRIES + 1):
            data = format_address(host, port or process.free_port(host))
            self.server = ServerProcess(
                self._server_plan(data, settings.device),
                self.board,
                on_death=self._on_death,
                on_ready=self.presence.changed,
                on_given_up=self.ending.because,
                on_hung=self.meters.server_hangs.inc,
            )
            try:
                status = await self.server.start()
            except (ServerFailed, OSError) as error:
                if port or attempt == _PORT_TRIES or "listen" not in str(error):
                    raise StartError(str(error)) from error
                continue
            device = status.told.get("mesh-device", "")
            # What "auto" has found is what this pod has: a server that no longer finds its GPU has failed. It must not
            # go on as a slow one whose memory is counted on a device.
            self.server.plan = self._server_plan(data, device or settings.device)
            self._optimising.server(status.version, device)
            self._equip(*status.device_memory)
            label = "gpu" if device == "cuda" else "cpu"
            self._labels = tuple(dict.fromkeys((*settings.labels, label)))
            return data
        raise AssertionError("not reached")

    def _server_plan(self, data: str, device: str) -> serverprocess.Plan:
        settings = self.settings
        argv = serverprocess.argv(
            module=settings.server_module,
            data=data,
            incarnation=self.incarnation,
            board=self._run_dir.path / BOARD,
            capacity=settings.capacity,
            threads=settings.threads,
            load_timeout=settings.load_timeout,
            load_concurrency=settings.load_concurrency,
            device=device,
            max_message=settings.max_message,
            max_body_bytes=settings.max_body_bytes,
            internal_tls=settings.internal_tls,
            memory_limit=self._memory.limit_bytes,
            log_format=settings.log_format,
            log_level=settings.log_level,
        )
        return serverprocess.Plan(argv, self._run_dir.path, settings.hang_timeout)

    def _equip(self, used: int, total: int) -> None:
        """The device's memory, as the model server tells it, is for models too. Raises StartError."""
        wanted = self.settings.device_capacity
        if not total:
            if wanted:
                log.warning("--device-capacity has no effect: the model server tells of no device's memory")
            return
        try:
            models = capacity.device_capacity(wanted, used, total)
        except ValueError as error:
            raise StartError(f"--device-capacity: {error}") from error
        self.ledger.equip(models)
        self._device_memory.limit_bytes = total
        log.info("a device is used", capacity=format_bytes(models), of=format_bytes(total))

    # --- how it is ---

    @property
    def state(self) -> str:
        """starting, ready, leaving or server-down."""
        if self._state == READY and (self.server is None or self.server.state is not serverprocess.State.READY):
            return SERVER_DOWN
        return self._state

    def why_not_ready(self) -> str | None:
        """For the probe. A pod that has lost etcd serves what it has, and stays ready."""
        state = self.state
        if state == READY:
            if self.server is not None and (trouble := self.server.trouble) is not None:
                return trouble
            return None if self._known else self._patience.why or "the pod is being published"
        if state == SERVER_DOWN and self.server is not None:
            return f"{self.server.why_down}; another one is being started"
        return self._patience.why or f"the pod is {state}"

    def _why_not_live(self) -> str | None:
        """For the probe: a new container is wanted where no server could be had for minutes. That etcd is away, or that
        a server takes its time at its first start, is no reason."""
        if self.server is not None and self.server.down_for > _DEAD:
            return f"for {self.server.down_for:.0f} s no model server could be had: {self.server.why_down}"
        return None

    def resident_bytes(self) -> int:
        """Private memory of the model server."""
        return serverprocess.private_bytes(self.server.pid) if self.server is not None and self.server.pid else 0

    def progress(self, model_id: str) -> Progress | None:
        """How far the pull of a model's files is."""
        return self._puller.progress(model_id)

    def decisions(self, model_id: str) -> Iterable[str]:
        """The latest, as JSON."""
        return self._decisions.lines(model_id)

    def counters(self) -> dict[str, int]:
        """Counts since the start."""
        loads = self.loads.statistics()
        server = self.server.statistics() if self.server is not None else None
        return {
            "loads": loads.loads,
            "load_failures": loads.failures,
            "load_refusals": loads.refusals,
            "loads_in_progress": loads.in_progress,
            "evictions": int(self.meters.evictions.value),
            "calls": self._calls_so_far(),
            "calls_in_flight": self.board.in_flight,
            "server_lives": server.lives if server else 0,
            "leases": self.presence.statistics().leases,
            "pulled_bytes": self._puller.statistics().bytes,
            "fetched_bytes": self._puller.statistics().fetched_bytes,
            "optimised": self._optimising.statistics().made,
        }

    def _record(self) -> PodRecord:
        statistics, first = self.ledger.statistics(), self.ledger.first()
        data, control_address, probe = self._addresses
        return PodRecord(
            incarnation=self.incarnation,
            data_address=data,
            control_address=control_address,
            state=self.state,
            labels=self._labels,
            zone=self.settings.zone,
            capacity_bytes=self.settings.capacity,
            used_bytes=max(0, statistics.committed.host_bytes),
            device_capacity_bytes=statistics.capacity.device_bytes,
            device_used_bytes=max(0, statistics.committed.device_bytes),
            oldest_idle_ms=0 if first is None else self.ledger.idle_ms(first),
            oldest_unused=first is not None and not self.ledger.used(first),
            copies=statistics.copies,
            loads_in_progress=statistics.loading,
            loading_threads=self.settings.load_concurrency,
            rate=self._rate.per_minute,
            probe_address=probe,
            age_ms=figures.coarse_age_ms(time.monotonic() - self._began),
            disk=self._on_disk.text,
            secrets=self._puller.secrets,
            token=self._token_of_control,
        )

    def _metrics(self) -> bytes:
        snapshots = [self.meters.registry.snapshot(), calls_snapshot(self.board.calls())]
        if self.server is not None and self.server.pid:
            snapshots.append(metrics.process_snapshot("model-server", self.server.pid))
        return metrics.render(metrics.merge(snapshots))

    def _calls_so_far(self) -> int:
        return sum(sum(series.buckets) for series in self.board.calls())

    def _why_refused(self) -> Refused | None:
        if not self.presence.published:
            why = self.presence.away or "it is being published"
            return Refused(Reason.REGISTRY_AWAY, f"this pod has no lease in etcd: {why}")
        if self.state == SERVER_DOWN:
            why = self.server.why_down if self.server is not None else ""
            return Refused(Reason.UNAVAILABLE, f"{why or 'the model server is down'}; another one is being started")
        if self._relief.refusal:
            return Refused(Reason.UNAVAILABLE, self._relief.refusal)
        if refusal := self._memory.refusal or self._device_memory.refusal:
            return Refused(Reason.NO_ROOM, refusal)
        return None

    def _why_silent(self) -> Refused | None:
        if not (why := self.fence.why_silent()):
            return None
        return Refused(Reason.UNAVAILABLE if self._state == LEAVING else Reason.REGISTRY_AWAY, why)

    # --- what happens to it ---

    @property
    def lives(self) -> int:
        """Of the model server."""
        return self.server.lives if self.server is not None else 0

    async def ready(self, timeout: float) -> Spi | None:
        """The connection to the model server."""
        return await self.server.ready(timeout) if self.server is not None else None

    async def died(self, life: int, timeout: float) -> bool:
        """Whether that life of the model server has ended, or does within `timeout` seconds."""
        return self.server is None or await self.server.died(life, timeout)

    def _token(self, entry: Entry) -> bytes:
        return copytoken.make(self.incarnation, entry.revision, entry.generation)

    def _make_room(self, room: Room, cause: str) -> None:
        """Carries a decision out: its victims make way for `cause`."""
        for victim in room.victims:
            entry = self.ledger.entries.get(victim)
            if entry is not None and entry.state is State.LOADED:
                self._decisions.note("evict", victim, cause, why=room.why)
                self._demand.made_way(entry)
                self._unloads.start(entry, f"makes way for {cause}: {room.why}", evict=True)

    def _evict(self, entry: Entry, why: str) -> None:
        self._decisions.note("evict", entry.model_id, why=why)
        self._demand.made_way(entry)
        self._unloads.start(entry, why, evict=True)

    async def _on_stale(self, model_id: str) -> None:
        await self.loads.outdated(model_id, 0)

    def _on_usurped(self, why: str) -> None:
        self.fence.close()  # with another incarnation in its place, the mesh counts this one as ended
        self.ending.because(why)

    def _on_death(self, death: Death) -> None:
        """The model server has died: see the module's text."""
        self.meters.server_deaths.inc()
        gone = [
            entry
            for entry in self.ledger.entries.values()
            if entry.state in (State.LOADING, State.LOADED, State.UNLOADING)
        ]
        held = [(one, one.slot, use) for one in gone if one.slot is not None and (use := self.ledger.use(one))]
        work = suspects.work(held, self.board.at_work)
        accused = judge(death.cause, work, thread=death.thread)
        for suspect in accused:
            entry, doing = suspect.model, suspect.doing.value
            text = f"{self.name}: the model server {death.how} while it was {doing} this model"
            if suspect.digests:
                text += f" (request {', '.join(suspect.digests[:3])})"
            log.warning(
                "suspect",
                model=entry.model_id,
                doing=doing,
                sure=suspect.sure,
                why=suspect.why,
                requests=",".join(suspect.digests[:10]),
            )
            # Where it may be another one, whoever waits for its load is told that this pod could not take it.
            entry.suspect = suspect.sure or len(accused) == 1
            self._history.killed(entry.model_id, entry.revision, text, sure=entry.suspect, digests=suspect.digests)
        self._unloads.clear()
        for entry in gone:
            self.ledger.remove(entry)
            self.presence.drop(entry.model_id)
            if entry.state is not State.LOADING:  # of those, the load itself removes the files
                self._files.discard(entry.model_id)
        self.loads.freed()
        self.presence.changed()

    # --- end ---

    async def drain(self) -> None:
        """Leaves the mesh in order, within the drain time-out."""
        end = time.monotonic() + self.settings.drain_timeout
        self._state = LEAVING
        self._run_dir.disown()  # who is killed for taking too long to leave was not killed by a model
        log.info("leaving", copies=self.ledger.count(State.LOADED), calls=self.board.in_flight)
        self.loads.close(_LEAVING)
        self.presence.changed()
        await self._hand_over(end)
        await self.loads.settle(max(0.0, end - time.monotonic()))
        await self._fall_silent(max(0.0, end - time.monotonic()))
        quiet = 0
        while quiet < 2 and time.monotonic() < end:
            quiet = 0 if self.board.in_flight else quiet + 1
            await asyncio.sleep(_QUIET)

    async def _hand_over(self, end: float) -> None:
        """Waits while the leader has this pod's copies loaded elsewhere, which it lets go one by one; they are called
        until then. Not where nobody could take them, and never for all of the time: calls in flight want some too."""
        copies = self.ledger.count(State.LOADED)
        if not copies or not await self._successors():
            return
        limit = time.monotonic() + _HAND_OVER_SHARE * max(0.0, end - time.monotonic())
        left, looked = copies, time.monotonic()
        while left and time.monotonic() < limit:
            await asyncio.sleep(_QUIET)
            left = self.ledger.count(State.LOADED)
            if time.monotonic() - looked > _LOOK_AGAIN:
                looked = time.monotonic()
                if not await self._successors():  # the others leave too, as when a whole mesh is taken down
                    break
        log.info("handed over", copies=copies - left, left=left)

    async def _successors(self) -> bool:
        """Whether there is a leader, and another pod that takes loads."""
        try:
            if await self._etcd.get(self._keys.leader, timeout=_ASK) is None:
                return False
            page = await self._etcd.page(self._keys.pods, after_prefix(self._keys.pods), limit=1000, timeout=_ASK)
        except EtcdError as error:
            log.info("handover skipped: etcd is unavailable", error=error.detail)
            return False
        for kv in page.kvs:
            try:
                record = PodRecord.decode(kv.value)
            except ValueError:
                continue
            if record.incarnation != self.incarnation and record.state == READY:
                return True
        return False

    async def _fall_silent(self, patience: float) -> None:
        """Shuts the fence, then deletes the copies' keys, so that other pods may load what is here. Waits for that, 2 s
        or `patience` at most."""
        self.loads.close(_LEAVING)
        self.fence.close()
        held = [entry.model_id for entry in self.ledger.entries.values() if entry.state is State.LOADED]
        for model_id in held:
            self.presence.drop(model_id)
        if not self.presence.published:
            return  # they went with the lease
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(_KEYS_WAIT, patience)):
                for model_id in held:
                    await self.presence.settled(model_id, _KEYS_WAIT)

    async def close(self, *, grace: float = _SERVER_GRACE) -> None:
        """Ends all parts; nothing of the pod is left, in etcd as far as it answers. `grace` is the model server's."""
        self._state = LEAVING
        await self._fall_silent(grace)
        await self._tasks.close()
        await self.loads.settle(0.0)
        if self.server is not None:
            await self.server.stop(grace)
        await self.presence.close(revoke=True)
        await self._control.close(0.2)
        await self._unloads.close()
        await self._history.close()
        await self._files.close()
        await self._probes.close()
        await self._etcd.close()
        self._last_looks.close()
        self._run_dir.close()
        log.info("pod left", pod=self.name)
