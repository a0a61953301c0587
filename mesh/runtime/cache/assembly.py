"""The cache of one pod: all parts that load models into the model server's memory, and unload them.

`Cache` makes the parts of this package from those below it: the server, the use board, this pod's presence in etcd, the
writes to models' records, and the pulled files. Each part is made after the parts that it uses, and gets them then.
"""

from collections.abc import Callable
from dataclasses import dataclass

from mesh.runtime.blame.history import History
from mesh.runtime.cache.books.account import Account, SeenMemory
from mesh.runtime.cache.books.decisions import Decisions
from mesh.runtime.cache.books.demand import Demand
from mesh.runtime.cache.books.ledger import Ledger
from mesh.runtime.cache.books.meters import Meters
from mesh.runtime.cache.books.space import Space
from mesh.runtime.cache.deaths import Deaths
from mesh.runtime.cache.disk.files import Files
from mesh.runtime.cache.disk.optimising import Optimising
from mesh.runtime.cache.evictions.eviction import Eviction
from mesh.runtime.cache.evictions.foreignmemory import ForeignMemoryWatch
from mesh.runtime.cache.evictions.memory import MemoryWatch
from mesh.runtime.cache.evictions.unloads import Unloads
from mesh.runtime.cache.evictions.victims import Victims
from mesh.runtime.cache.loads.admission import Admission
from mesh.runtime.cache.loads.fetching import Fetching
from mesh.runtime.cache.loads.flights import Loads
from mesh.runtime.cache.loads.gate import Gate
from mesh.runtime.cache.loads.loading import Loading
from mesh.runtime.cache.loads.publication import Publication
from mesh.runtime.cache.loads.rooms import Rooms
from mesh.runtime.cache.loads.serverside import ServerSide
from mesh.runtime.cache.losses import Losses
from mesh.runtime.presence.claims import Claims
from mesh.runtime.presence.fence import Fence
from mesh.runtime.presence.publishing import Presence
from mesh.runtime.servers.relief import Relief
from mesh.runtime.servers.serverprocess import ServerProcess
from placement.modeltypes import ANY


@dataclass(frozen=True, slots=True)
class Limits:
    """The operator's limits for the cache."""

    memory_bytes: int  # of the whole model server
    load_concurrency: int  # loads in the model server at once
    load_timeout: float  # seconds, the model server's own
    demand_window: float  # seconds after its last call for which a model counts as in use
    types: frozenset[str] = ANY  # of models that the model server takes


@dataclass(frozen=True, slots=True)
class Below:
    """The parts of the pod that the cache is built on."""

    incarnation: str  # of the agent
    server: ServerProcess
    relief: Relief
    presence: Presence
    claims: Claims
    fence: Fence
    history: History
    files: Files
    optimising: Optimising
    resident_bytes: Callable[[], int]  # of the model server
    device_bytes: Callable[[], int]  # in use on its device, by any process
    lost: Callable[[], int]  # copies that it has lost so far without dying
    foreign: SeenMemory | None = None  # the memory of a server that is not ours


class Cache:
    """The parts of the cache, as attributes."""

    def __init__(self, ledger: Ledger, below: Below, limits: Limits) -> None:
        self.ledger = ledger
        self.meters = meters = Meters()
        self.decisions = Decisions()
        self.demand = Demand(ledger, window=limits.demand_window)
        self.victims = Victims(ledger)
        self.space = space = Space()
        self.unloads = Unloads(
            ledger,
            below.server,
            below.presence,
            below.files,
            space,
            incarnation=below.incarnation,
            meters=meters,
            decisions=self.decisions,
        )
        self.eviction = Eviction(ledger, self.unloads, self.demand, decisions=self.decisions, meters=meters)
        self.account = account = Account(ledger, below.foreign, most_bytes=limits.memory_bytes if below.foreign else 0)
        self.memory = (
            MemoryWatch(ledger, self.eviction, limit_bytes=limits.memory_bytes, used=below.resident_bytes)
            if below.foreign is None
            else ForeignMemoryWatch(ledger, self.eviction, account)
        )
        # No limit until the model server has reported a device.
        self.device_memory = MemoryWatch(ledger, self.eviction, limit_bytes=0, used=below.device_bytes, device=True)
        watches = (self.memory, self.device_memory)
        self.gate = gate = Gate(below.presence, below.server, below.relief, watches)
        self.rooms = Rooms(ledger, self.victims, self.eviction, gate, space)
        self.server_side = server = ServerSide(
            ledger,
            below.server,
            gate,
            below.history,
            below.optimising,
            meters,
            account,
            incarnation=below.incarnation,
            load_timeout=limits.load_timeout,
        )
        self.admission = Admission(
            ledger,
            self.rooms,
            server,
            self.unloads,
            gate,
            space,
            meters,
            account,
            concurrency=limits.load_concurrency,
        )
        publication = Publication(
            ledger,
            self.victims,
            self.unloads,
            meters,
            server=below.server,
            presence=below.presence,
            claims=below.claims,
            history=below.history,
            incarnation=below.incarnation,
        )
        loading = Loading(
            ledger,
            publication,
            Fetching(ledger, below.files, self.rooms, below.optimising, meters),
            self.admission,
            self.unloads,
            space,
            files=below.files,
            history=below.history,
        )
        self.loads = Loads(
            ledger,
            self.victims,
            loading,
            self.admission,
            self.unloads,
            gate,
            server=below.server,
            fence=below.fence,
            meters=meters,
            decisions=self.decisions,
            types=limits.types,
        )
        self.deaths = Deaths(
            ledger,
            self.unloads,
            space,
            meters,
            files=below.files,
            presence=below.presence,
            history=below.history,
            foreign=account.foreign,
        )
        self.losses = Losses(ledger, self.unloads, below.lost)
        meters.follow_loads(self.admission.queued, self.admission.sizes)
        if account.foreign:
            meters.follow_account(account.statistics)

    async def adopt(
        self, *, capacity_bytes: int, load_concurrency: int, load_timeout: float, default_bytes: int
    ) -> None:
        """Applies what a foreign server reports about itself. `capacity_bytes` is the memory for models, `load_timeout`
        is in seconds, and `default_bytes` is the size of a model of which nothing is known. Call this method before the
        first load."""
        self.ledger.resize(capacity_bytes)
        await self.account.prepare()
        self.admission.resize(load_concurrency)
        self.server_side.load_timeout = load_timeout
        self.server_side.default_bytes = default_bytes
