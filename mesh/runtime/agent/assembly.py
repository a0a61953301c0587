"""The parts of one pod's agent. Each is made from parts that were made before it, and has no reference to later ones.

Events that concern a later part (a server dies, a copy's registration is gone, another pod takes the name) reach that
part through callbacks, most of which are set here.
"""

import functools
import secrets
from collections.abc import Callable

from mesh.etcd import Etcd, Patience
from mesh.host import memory
from mesh.identity import Identity
from mesh.options.values import parse_address
from mesh.runtime.agent import control
from mesh.runtime.agent.leaving import Leaving
from mesh.runtime.agent.rundir import RunDir
from mesh.runtime.agent.serverstart import ServerStart
from mesh.runtime.agent.settings import RuntimeSettings
from mesh.runtime.agent.standing import AgentStanding
from mesh.runtime.blame import earlier
from mesh.runtime.blame.earlier import BOARD, Earlier
from mesh.runtime.blame.history import History
from mesh.runtime.blame.lastlooks import LastLooks
from mesh.runtime.cache.assembly import Below, Cache, Limits
from mesh.runtime.cache.books.activity import Activity
from mesh.runtime.cache.books.ledger import Ledger
from mesh.runtime.cache.disk.files import Files
from mesh.runtime.cache.disk.optimising import Optimising
from mesh.runtime.cache.evictions import capacity
from mesh.runtime.cache.housekeeping import Housekeeping
from mesh.runtime.presence.claims import Claims
from mesh.runtime.presence.fence import Fence
from mesh.runtime.presence.publishing import Presence
from mesh.runtime.servers import adapted
from mesh.runtime.servers.endings import Death
from mesh.runtime.servers.foreign import BadCommand, ForeignServer, words_of
from mesh.runtime.servers.observing import ServerMemory
from mesh.runtime.servers.relief import Relief
from mesh.runtime.servers.serverprocess import ServerProcess
from mesh.runtime.sharedmemory.board import Board
from mesh.schema.keys import Keys
from mesh.telemetry.probes import Probes
from puller import limits
from puller.http_client import HttpPolicy
from puller.puller import Puller


class Pod:
    """The parts of one pod, as attributes. `lifecycle` starts and ends them."""

    def __init__(self, settings: RuntimeSettings, *, cannot_go_on: Callable[[str], None]) -> None:
        """Makes the parts. `cannot_go_on` is called with the reason once the pod cannot continue. Raises OSError,
        ValueError."""
        self.settings = settings
        self.incarnation = incarnation = secrets.token_hex(8)
        self._cannot_go_on = cannot_go_on
        token = secrets.token_hex(16)
        self.identity = Identity(settings.internal_tls) if settings.internal_tls is not None else None
        self.earlier = Earlier(settings.name)
        whose = earlier.owner(base=settings.base, pod=settings.name)
        self.run_dir = RunDir(whose=whose, on_left=self.earlier.read)
        self.board = board = Board.create(self.run_dir.path / BOARD, settings.slots, incarnation=incarnation)
        self.patience = Patience()
        self.etcd = Etcd(settings.etcd, follow=True)
        self.keys = Keys(settings.base)
        self.puller = _puller(settings, self.run_dir)
        self.files = Files(self.puller)
        self.optimising = Optimising(self.puller, free_bytes=memory.available_bytes)
        there = memory.whole()
        self.last_looks = LastLooks(self.run_dir.path, memory.available_bytes, there.bytes if there else 0)
        self.history = History(self.etcd, self.keys, pod=settings.name, secrets=lambda: self.puller.secrets)

        self.foreign, address, calls = _foreign(settings, self.run_dir, on_given_up=cannot_go_on)
        self.server = ServerProcess(
            board,
            on_death=self._on_death,
            on_ready=lambda: self.presence.changed(),
            on_given_up=cannot_go_on,
            on_hung=lambda: self.cache.meters.server_hangs.inc(),
            foreign=self.foreign,
        )
        self.relief = Relief(lambda: board.stuck, self.server)
        self.presence = Presence(
            self.etcd,
            self.keys,
            pod=settings.name,
            incarnation=incarnation,
            ttl=settings.lease_ttl,
            record=lambda: self.standing.record(),
            on_stale=lambda model_id: self.cache.loads.outdated(model_id, 0),
            on_usurped=self._on_usurped,
            is_alive=functools.partial(control.is_alive, identity=self.identity),
            on_lost=cannot_go_on,
        )
        self.fence = Fence(
            board,
            self.presence,
            ttl=settings.lease_ttl,
            serve_without_etcd=settings.serve_without_etcd,
            reach=lambda timeout: self.etcd.get(self.presence.key, timeout=timeout),
        )
        self.presence.listen(self.fence.wake)

        child = self.foreign
        seen = None
        if settings.foreign:
            pid = (lambda: child.pid) if child is not None else None
            seen = ServerMemory(address, pid, watched=settings.server_memory == "auto")
        ledger = Ledger(settings.capacity, board, slots=settings.slots, eviction=settings.eviction)
        self.cache = Cache(
            ledger,
            Below(
                incarnation=incarnation,
                server=self.server,
                relief=self.relief,
                presence=self.presence,
                claims=Claims(self.etcd, self.keys, self.presence),
                fence=self.fence,
                history=self.history,
                files=self.files,
                optimising=self.optimising,
                resident_bytes=lambda: self.server.resident_bytes,
                device_bytes=lambda: board.device_bytes,
                lost=lambda: board.lost,
                foreign=seen,
            ),
            Limits(
                memory_bytes=settings.server_memory_limit or capacity.foreign_limit(there)
                if settings.foreign
                else settings.memory_limit or capacity.limit(settings.capacity),
                load_concurrency=settings.load_concurrency,
                load_timeout=settings.load_timeout,
                demand_window=settings.demand_window,
                types=frozenset(settings.types),
            ),
        )
        self.activity = Activity(ledger)
        self.housekeeping = Housekeeping(
            self.etcd,
            self.keys,
            ledger,
            self.presence,
            self.cache.loads,
            interval=settings.check_interval,
        )

        self.standing = AgentStanding(
            settings,
            self.cache,
            self.server,
            board,
            self.presence,
            self.puller,
            self.optimising,
            self.history,
            self.relief,
            self.patience,
            incarnation=incarnation,
            token=token,
        )
        self.server_start = ServerStart(
            settings,
            self.server,
            self.cache,
            self.optimising,
            incarnation=incarnation,
            run_dir=self.run_dir.path,
            foreign=self.foreign,
            address=address,
            calls=calls,
        )
        self.leaving = Leaving(
            self.etcd, self.keys, self.cache, self.presence, self.fence, board, incarnation=incarnation
        )
        self.control = control.Control(self.standing, self.cache, token, self.identity)
        standing = self.standing
        probe = parse_address(settings.probe)
        self.probes = Probes(probe, standing.why_not_ready, standing.why_not_live, standing.metrics)

        meters = self.cache.meters
        if self.identity is not None:
            self.identity.follow(meters.registry)
        meters.follow(ledger, self.puller.statistics, self.cache.demand.pods, published=lambda: self.presence.published)

    def _on_death(self, death: Death) -> None:
        self.cache.deaths.happened(death, self.board.at_work)

    def _on_usurped(self, why: str) -> None:
        self.fence.close()  # once another incarnation has this pod's place, the mesh considers this one ended
        self._cannot_go_on(why)


def _foreign(
    settings: RuntimeSettings, run_dir: RunDir, *, on_given_up: Callable[[str], None]
) -> tuple[ForeignServer | None, str, str]:
    """Returns the foreign server that this pod starts, or None; the address of the foreign server's management, or "";
    and its address for inference calls, or "". Raises ValueError and OSError."""
    models = settings.server_models or run_dir.path / adapted.MODELS
    if settings.adapter and not settings.server and not settings.server_command:
        started = adapted.begin(settings.adapter, models, threads=settings.threads, types=settings.types)
        child = ForeignServer(
            started.words, on_given_up=on_given_up, folder=started.folder, variables=started.variables
        )
        return child, started.address, started.calls
    if not settings.server_command:
        if settings.adapter:
            adapted.share(settings.adapter, models, types=settings.types)
        return None, settings.server, settings.server_calls or settings.server
    adapted.prepare(settings.adapter, models)
    try:
        words, address = words_of(
            settings.server_command, address=settings.server, run_dir=run_dir.path, models=models / adapted.MODELS
        )
    except BadCommand as error:
        raise ValueError(f"--server-command {error}") from error
    return ForeignServer(words, on_given_up=on_given_up), address, settings.server_calls or address


def _puller(settings: RuntimeSettings, run_dir: RunDir) -> Puller:
    http = HttpPolicy(allow_private=settings.http_allow_private, ca=settings.storage_ca, proxies=settings.proxies)
    return Puller(
        directory=settings.model_dir or run_dir.path / "models",
        file_roots=settings.file_roots,
        volumes=settings.pvc_root,
        secrets=settings.storage_config,
        http=http,
        budget_bytes=settings.disk_budget,
        limits=limits.PullLimits(bytes_per_second=settings.pull_bandwidth, connections=settings.pull_connections),
    )
