"""The comparison of a pod's books with the memory that a foreign server really uses.

The memory of the server without models is its base. The base is measured when the server is found, and lowered whenever
a later measurement is lower. The memory beyond the base is the memory of the models. Each measurement updates the
ledger's factor (`placement.account`). Each load is weighed: if the server does not state a model's size, the growth of
the server's memory during the load is the size.

With Mesh's own server, which measures sizes itself, and with a server that cannot be observed, this module does
nothing.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from mesh.options.values import format_bytes
from mesh.runtime.cache.books.entries import EntryState
from mesh.runtime.cache.books.ledger import Ledger
from mesh.telemetry import logs
from placement.account import Factor, Growth

log = logs.get(__name__)

HEADROOM_SHARE, HEADROOM_LEAST = 0.25, 64 << 20
"""Memory beyond the capacity that the server may use for calls: a share of the capacity, and the minimum in bytes."""

_RECOUNT = 0.02  # change of the factor from which all copies are counted again


class SeenMemory(Protocol):
    """The memory of a foreign server, observed from outside."""

    lives: int
    why: str

    @property
    def what(self) -> str:
        """The observed processes, for operators."""

    @property
    def limit_bytes(self) -> int | None:
        """The limit of the server alone, if it is known."""

    async def find(self) -> bool:
        """Looks for the server's processes. Returns True if they can be observed."""

    def read(self, *, relook: bool = False) -> int | None:
        """Returns the bytes in use, or None if they cannot be read. With `relook`, also counts the newest processes."""


class Weighing:
    """One load that is being weighed."""

    __slots__ = ("alone", "before", "first", "fresh", "unloads")

    def __init__(self, before: int, *, alone: bool, first: bool, fresh: bool, unloads: int) -> None:
        self.before = before
        self.alone = alone
        self.first = first
        self.fresh = fresh
        self.unloads = unloads


@dataclass(frozen=True, slots=True)
class AccountStatistics:
    """The account in numbers, for operators."""

    observed_bytes: int  # taken by models; 0: nothing is observed
    accounted_bytes: int  # by the books, without the factor
    factor: float
    what: str  # observed processes
    unseen: str  # why a foreign server is not observed; "": it is, or the server is ours


class Account:
    """The account of one pod. Without `memory`, as for Mesh's own server, it changes nothing."""

    def __init__(
        self,
        ledger: Ledger,
        memory: SeenMemory | None,
        *,
        most_bytes: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Makes an account without observations. `most_bytes` is the most memory of the machine or container that the
        server may take; 0: unknown."""
        self.limit_bytes = 0  # for models and calls; 0: unknown
        self._ledger = ledger
        self._memory = memory
        self._most_bytes = most_bytes
        self._clock = clock
        self._base = 0
        self._life = 0
        self._since_unloads = 0  # the ledger's count when this life was found
        self._loads = 0  # in this life
        self._observed = 0
        self._looked = clock()
        self._counted = 1.0  # the factor by which copies were last counted
        self._weighings: set[Weighing] = set()

    @property
    def observes(self) -> bool:
        """True if the server's memory can be observed now."""
        return self._memory is not None and self._life > 0 and not self._memory.why

    @property
    def foreign(self) -> bool:
        """True if the server is a foreign one."""
        return self._memory is not None

    async def prepare(self) -> None:
        """Looks for the server's processes if the server is new. Call this method before a load."""
        memory = self._memory
        if memory is None or not await memory.find() or memory.lives == self._life:
            return
        ledger = self._ledger
        self._life = memory.lives
        self._base = max(0, (memory.read() or 0) - ledger.accounted_bytes)
        self._loads, self._since_unloads = 0, ledger.unloads
        self._looked = self._clock()
        self._weighings.clear()
        ledger.factor = Factor()
        self._bound()
        log.info("memory of the model server is observed", what=memory.what, base=format_bytes(self._base))

    def look(self) -> int:
        """Reads the memory, updates the factor, and returns the bytes that models use, or 0 if the memory is not
        observed."""
        ledger = self._ledger
        if self._memory is None or (used := self._memory.read()) is None:
            self._observed = 0
            return 0
        self._base = min(self._base, used)
        self._observed = used - self._base
        now = self._clock()
        accounted = ledger.accounted_bytes
        believed = ledger.factor.believed
        ledger.factor.look(self._observed, accounted, capacity=ledger.capacity.host_bytes, seconds=now - self._looked)
        self._looked = now
        if believed and not ledger.factor.believed:
            log.warning(
                "the model server's memory contradicts the sizes that it states, which are no longer used",
                observed=format_bytes(self._observed),
                stated=format_bytes(accounted),
            )
        if abs(ledger.factor.value - self._counted) > _RECOUNT * self._counted:
            self._counted = ledger.factor.value
            ledger.recount()
        return self._observed

    def observed(self) -> int:
        """Returns the bytes that models use at this moment, or 0 if the memory is not observed. Unlike `look`, changes
        nothing."""
        used = None if self._memory is None else self._memory.read()
        return 0 if used is None else max(0, used - self._base)

    def begin(self) -> Weighing | None:
        """Begins to weigh a load. Returns None if the memory is not observed."""
        if self._memory is None or (before := self._memory.read(relook=True)) is None:
            return None
        ledger = self._ledger
        for other in self._weighings:
            other.alone = False
        weighing = Weighing(
            before,
            alone=not self._weighings and not ledger.count(EntryState.UNLOADING),
            first=not self._loads,
            fresh=ledger.unloads == self._since_unloads,
            unloads=ledger.unloads,
        )
        self._loads += 1
        self._weighings.add(weighing)
        return weighing

    def end(self, weighing: Weighing | None) -> Growth | None:
        """Ends a weighing, and returns the growth. Returns None if the memory was not observed, or if the server has
        ended."""
        if weighing is None or weighing not in self._weighings:
            return None
        self._weighings.discard(weighing)
        if self._memory is None or (after := self._memory.read(relook=True)) is None:
            return None
        ledger = self._ledger
        ledger.factor.loaded(after - self._base, ledger.accounted_bytes, capacity=ledger.capacity.host_bytes)
        alone = weighing.alone and weighing.unloads == ledger.unloads
        return Growth(after - weighing.before, alone=alone, fresh=weighing.fresh, first=weighing.first)

    def statistics(self) -> AccountStatistics:
        """Returns the account in numbers."""
        memory, ledger = self._memory, self._ledger
        return AccountStatistics(
            observed_bytes=self._observed,
            accounted_bytes=ledger.accounted_bytes,
            factor=ledger.factor.value,
            what=memory.what if memory is not None else "",
            unseen=memory.why if memory is not None else "",
        )

    def _bound(self) -> None:
        """Sets the limit for models and calls together: the capacity plus its headroom, or less if the server may take
        less."""
        capacity = self._ledger.capacity.host_bytes
        limit = capacity + max(int(HEADROOM_SHARE * capacity), HEADROOM_LEAST)
        assert self._memory is not None
        for most in (self._most_bytes, self._memory.limit_bytes or 0):
            if most:
                limit = min(limit, most - self._base)
        self.limit_bytes = max(1, limit)
        if capacity > 0.9 * limit:
            log.warning(
                "the model server's capacity exceeds 90 % of the memory available to it, above which copies are "
                "evicted: lower --capacity, or give the server more memory",
                capacity=format_bytes(capacity),
                available=format_bytes(limit),
            )
