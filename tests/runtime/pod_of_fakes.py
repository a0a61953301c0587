"""A pod whose agent is real in its decisions and has fakes for etcd, files, model server and board."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from mesh.runtime.blame.history import Took
from mesh.runtime.cache.assembly import Below, Cache, Limits
from mesh.runtime.cache.books import demand
from mesh.runtime.cache.books.entries import CacheEntry, EntryState
from mesh.runtime.cache.books.ledger import Ledger
from mesh.runtime.cache.loads.outcomes import Loaded, Outcome, Refused, Want
from mesh.runtime.presence import verdicts
from mesh.runtime.presence.verdicts import Stale
from mesh.runtime.servers.relief import Relief
from mesh.runtime.sharedmemory.slot import SlotState as SlotState
from mesh.runtime.sharedmemory.slot import Use
from mesh.schema.records import CopyRecord, Failure, ModelRecord
from placement.failures import FailureKind
from placement.footprint import Footprint
from placement.modeltypes import ANY
from puller.errors import PullError, PullErrorKind
from puller.puller import Pulled
from puller.source import Source
from tests.support.modelserver import FakeModelServer
from tests.support.waiting import until


class FakeBoard:
    """A board on which every slot is free unless the test fills it, as with a server that writes no board."""

    def __init__(self) -> None:
        self.uses: dict[int, Use] = {}

    def read(self, slot: int) -> Use:
        return self.uses.get(slot, Use(SlotState.FREE, 0, 0, 0, 0, 0, 0, 0))


class FakeKeys:
    """A fake of this pod's keys in etcd."""

    published = True
    away = ""

    def __init__(self) -> None:
        self.keys: dict[str, CopyRecord] = {}

    def put(self, model_id: str, record: CopyRecord) -> None:
        self.keys[model_id] = record

    def wanted(self, model_id: str) -> CopyRecord | None:
        return self.keys.get(model_id)

    def drop(self, model_id: str) -> None:
        self.keys.pop(model_id, None)

    async def settled(self, model_id: str, timeout: float) -> bool:
        return True

    def changed(self) -> None:
        """Does nothing. (The real keys note that the pod's record may have changed.)"""


class FakeClaims:
    """A fake that grants every claim, unless the test says otherwise."""

    def __init__(self, keys: FakeKeys) -> None:
        self.keys = keys
        self.verdicts: dict[str, verdicts.Verdict] = {}
        self.spares: dict[str, int] = {}
        self.records: dict[str, ModelRecord] = {}
        self.publications: dict[str, verdicts.Publication] = {}
        self.asked: list[str] = []
        self.held: dict[str, asyncio.Event] = {}

    async def claim(
        self, model_id: str, copy: CopyRecord, *, expected: int = 0, ask: Sequence[str] = ()
    ) -> verdicts.Verdict:
        self.asked.append(model_id)
        if model_id in self.held:
            await self.held[model_id].wait()
        if model_id in self.verdicts:
            return self.verdicts[model_id]
        self.keys.keys[model_id] = copy
        spares = {victim: self.spares.get(victim, 0) for victim in ask}
        return self._claimed(model_id, spares)

    def _claimed(self, model_id: str, spares: dict[str, int]) -> verdicts.Claimed:
        return verdicts.Claimed(self.records.setdefault(model_id, ModelRecord(type="t")), spares, 1)

    async def look(self, model_id: str, revision: int) -> verdicts.Claimed | Stale | verdicts.Away:
        self.asked.append(model_id)
        verdict = self.verdicts.get(model_id)
        return verdict if isinstance(verdict, Stale | verdicts.Away) else self._claimed(model_id, {})

    async def publish(
        self,
        model_id: str,
        copy: CopyRecord,
        claimed: verdicts.Claimed,
        remember: Callable[[ModelRecord], ModelRecord],
    ) -> verdicts.Publication:
        """Publishes like the real claims. `records` holds what other pods have written."""
        if model_id in self.publications:
            return self.publications[model_id]
        record = self.records[model_id]
        if record.digest and record.digest != copy.digest:
            return verdicts.Contradicted(record)
        record = self.records[model_id] = remember(record)
        self.keys.keys[model_id] = copy
        return verdicts.Published(record)


class FakeFiles:
    """A fake puller. The last part of a path is the size of its files in bytes. `errors` holds the failures to
    report."""

    def __init__(self) -> None:
        self.errors: dict[str, PullError] = {}
        self.skipped: dict[str, tuple[str, ...]] = {}  # by path
        self.budget: int | None = None  # disk budget in bytes
        self.sizes: dict[str, int] = {}  # bytes on disk, by id
        self.held: dict[str, asyncio.Event] = {}
        self.stopping: dict[str, asyncio.Event] = {}  # by id, what a cancelled pull waits for before it stops
        self.present: set[str] = set()
        self.doomed: set[str] = set()
        self.digests: dict[str, str] = {}  # by path; "" for other paths
        self.cancelled: list[str] = []

    async def pull(self, source: Source, *, into: str, tag: str = "") -> Pulled:
        try:
            if into in self.held:
                await self.held[into].wait()
        except asyncio.CancelledError:
            self.cancelled.append(into)
            if into in self.stopping:
                await self.stopping[into].wait()
            raise
        if source.path in self.errors:
            raise self.errors[source.path]
        self.present.add(into)
        size = int(source.path.rpartition("/")[2])
        if self.budget is not None and (short := sum(self.sizes.values()) + size - self.budget) > 0:
            never = size > self.budget
            text = "the disk is full"
            raise PullError(PullErrorKind.DISK_FULL, text, short=0 if never else short, never=never, needs=size)
        self.sizes[into] = size
        digest, skipped = self.digests.get(source.path, ""), self.skipped.get(source.path, ())
        return Pulled(Path(source.path), size, source.path, source.key, digest=digest, skipped=skipped)

    async def made(self, into: str, size: int) -> None:
        self.sizes[into] += size

    def short(self, needs: int) -> int:
        return 0 if self.budget is None else max(0, sum(self.sizes.values()) + needs - self.budget)

    @property
    def removing(self) -> bool:
        return bool(self.doomed)

    def doom(self, into: str) -> None:
        self.doomed.add(into)

    def discard(self, into: str) -> None:
        self.present.discard(into)
        self.doomed.discard(into)
        self.sizes.pop(into, None)

    async def remove(self, into: str) -> None:
        self.discard(into)


class FakeHistory:
    """A fake history that collects writes to records instead of making them."""

    def __init__(self) -> None:
        self.failures: dict[str, str] = {}
        self.sizes: dict[str, int] = {}
        self.contents: dict[str, str] = {}  # digests of pulled contents that are not the registration's
        self.deaths: list[tuple[str, str]] = []
        self.requests: list[tuple[str, ...]] = []  # digests of the requests of each death

    def first(self, record: ModelRecord, digest: str, took: Took) -> ModelRecord:
        return replace(record, digest=digest, digest_ms=1000)

    def loaded(self, model_id: str, revision: int, known: ModelRecord, took: Took) -> None:
        self.sizes[model_id] = took.footprint.host_bytes

    async def measured(self, model_id: str, revision: int, footprint: Footprint) -> None:
        self.sizes[model_id] = footprint.total_bytes

    def known(self, record: ModelRecord) -> Failure | None:
        return next((failure for failure in record.failures if failure.pod == "pod-1"), None)

    async def failed(
        self, model_id: str, revision: int, text: str, kind: FailureKind, *, asked_ms: int = 0, digest: str = ""
    ) -> None:
        self.failures[model_id] = text

    def killed(
        self, model_id: str, revision: int, text: str, *, sure: bool = False, digests: tuple[str, ...] = ()
    ) -> None:
        self.deaths.append((model_id, text))
        self.requests.append(digests)

    async def changed(self, model_id: str, revision: int, digest: str) -> None:
        self.contents[model_id] = digest


class FakeFence:
    """A fake fence that permits everything, unless the test gives a reason not to."""

    def __init__(self) -> None:
        self.why = ""

    def why_silent(self) -> str:
        return self.why


class FakeOptimising:
    """A fake optimiser that collects the loads reported to it."""

    tag = "tag"

    def __init__(self) -> None:
        self.slow: list[tuple[str, Path]] = []

    def loaded(self, model_id: str, pulled: Pulled, server_ms: float) -> None:
        self.slow.append((model_id, pulled.path))


class FakePod:
    """A pod that loads on a fake server, with a capacity in bytes: `async with FakePod(capacity=...) as pod`."""

    def __init__(
        self,
        *,
        capacity: int = 1_000_000,
        concurrency: int = 2,
        slots: int = 64,
        server: FakeModelServer | None = None,
        types: frozenset[str] = ANY,
    ) -> None:
        self.server = server or FakeModelServer()
        self.board = FakeBoard()
        self.keys = FakeKeys()
        self.claims = FakeClaims(self.keys)
        self.files = FakeFiles()
        self.history = FakeHistory()
        self.fence = FakeFence()
        self.optimising = FakeOptimising()
        self.refusal: Refused | None = None
        self.later_ns = 0  # nanoseconds by which the ledger's clock is ahead
        self.ledger = Ledger(capacity, self.board, slots=slots, clock=lambda: time.monotonic_ns() + self.later_ns)
        below = Below(
            incarnation="life",
            server=self.server,
            relief=Relief(lambda: 0, self.server),
            presence=self.keys,
            claims=self.claims,
            fence=self.fence,
            history=self.history,
            files=self.files,
            optimising=self.optimising,
            resident_bytes=lambda: 0,
            device_bytes=lambda: 0,
            lost=lambda: 0,
        )
        self.cache = Cache(self.ledger, below, Limits(0, concurrency, 30.0, demand.WINDOW, types))
        self.cache.gate.why_refused = lambda: self.refusal
        self.loads, self.unloads, self.victims = self.cache.loads, self.cache.unloads, self.cache.victims
        self.decisions, self.meters = self.cache.decisions, self.cache.meters

    async def __aenter__(self) -> "FakePod":
        await self.server.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.loads.close("the test is over")
        await self.loads.settle(0.0)
        await self.unloads.close()
        await self.server.__aexit__()

    def want(self, model_id: str, size: int = 1000, *, revision: int = 1, known: bool = True, **fields: int) -> Want:
        """Returns a request for a model of the given size, with a file of 10 bytes. Without `known`, the request does
        not state the size, which has yet to be measured."""
        path = f"/{model_id}/10"
        self.server.sizes[path] = size
        return Want(model_id, revision, "t", path, footprint=Footprint(size if known else 0), **fields)

    async def load(self, model_id: str, size: int = 1000, **fields: int) -> Outcome:
        return await self.loads.load(self.want(model_id, size, **fields))

    async def fill(self, *model_ids: str, size: int) -> None:
        """Loads models one after the other, each a second younger than the last."""
        for model_id in model_ids:
            self.later_ns += 1_000_000_000
            outcome = await self.load(model_id, size)
            assert isinstance(outcome, Loaded), outcome

    def busy(self, model_id: str, *, in_flight: int = 1) -> None:
        """Starts a call of the model that stays in flight."""
        entry = self.entry(model_id)
        assert entry.slot is not None
        self.board.uses[entry.slot] = Use(SlotState.FREE, 1, in_flight, in_flight, 0, 0, 0, 0)

    def called(self, model_id: str) -> None:
        """Records a call of the model that has just ended."""
        entry = self.entry(model_id)
        assert entry.slot is not None
        now = time.monotonic_ns() + self.later_ns
        self.board.uses[entry.slot] = Use(SlotState.FREE, 1, 0, 0, now, 1, 0, 0)

    def entry(self, model_id: str) -> CacheEntry:
        return self.ledger.entries[model_id]

    @property
    def resident(self) -> set[str]:
        """Returns the loaded models according to the ledger."""
        return {name for name, entry in self.ledger.entries.items() if entry.state is EntryState.LOADED}

    def unloaded(self) -> list[str]:
        """Returns the models that the server was asked to unload, in order."""
        return [model_id for what, model_id in self.server.asked if what == "unload"]

    async def asked(self, what: str, model_id: str) -> None:
        """Waits until the server has received the given request."""
        await until(lambda: (what, model_id) in self.server.asked, why=f"{what} {model_id}")

    async def nothing_left(self, model_id: str) -> None:
        """Waits until the model is off the ledger, and checks that the server, the keys and the files have nothing of
        it."""
        await until(lambda: model_id not in self.ledger.entries, why=f"{model_id} off the books")
        assert model_id not in self.server.models
        assert model_id not in self.keys.keys
        assert model_id not in self.files.present
