"""The bytes of bodies that one process holds, requests and replies, of all its connections together.

The limits on one message and on connections bound memory only by their product: 16 MiB times thousands. So code that is
about to hold a body first asks here, with the size that its head or prefix announces, before any of it is read.

A caller must not be able to use up what others need, so the total is shared by rank: large requests stop being
admitted at half of it, large replies at seven eighths (their requests were admitted, and they have been computed), and
requests of ordinary size only at the whole. Large bodies that stall, or are not read, cannot stop small calls.

Bytes that are already in memory are counted without asking: `add`. Servers cut bodies that come or go too slowly, and
are stricter while the budget is `short`.
"""

from dataclasses import dataclass
from types import TracebackType

from mesh.statuses import MeshError, Reason

SMALL = 64 * 1024
"""Bytes up to which a request is of ordinary size."""

OPTION = "--max-body-bytes"

_UNBOUNDED = 1 << 62
_RETRY = 1.0  # seconds
_TRIM = 64 << 20  # bytes that must have been given back before the heap is worth trimming


@dataclass(frozen=True, slots=True)
class BudgetStatistics:
    """Bytes that a budget holds, and requests that it has refused so far."""

    limit: int
    held: int
    refused: int


class Budget:
    """Bytes of bodies. For the thread of one event loop."""

    __slots__ = ("_highest", "_lately", "held", "large", "limit", "refused", "replies", "short")

    def __init__(self, limit: int = _UNBOUNDED) -> None:
        """Makes an empty budget; `limit` is in bytes."""
        self.limit = limit
        self.large = limit // 2  # bound up to which large requests are admitted
        self.replies = limit - limit // 8  # the same for large replies
        self.held = 0
        self.refused = 0
        self.short = False  # something was refused in this second or the one before
        self._lately = False
        self._highest = 0

    def take(self, size: int, most: int) -> bool:
        """Reserves `size` bytes, unless more than `most` would be held then: one of the three bounds."""
        held = self.held + size
        if held > most:
            self.refused += 1
            self.short = self._lately = True
            return False
        self.held = held
        if held > self._highest:
            self._highest = held
        return True

    def most(self, size: int) -> int:
        """Returns the bound for a request of so many bytes."""
        return self.limit if size <= SMALL else self.large

    def add(self, size: int) -> None:
        """Counts bytes that are already held."""
        self.held += size
        if self.held > self._highest:
            self._highest = self.held

    def give(self, size: int) -> None:
        """Returns reserved or counted bytes."""
        self.held -= size

    def settle(self) -> bool:
        """Ends a second. Returns whether so much was given back that the heap is worth trimming."""
        self.short, self._lately = self._lately, False
        if self._highest - self.held < _TRIM or self.held > self._highest // 2:
            return False
        self._highest = self.held
        return True

    def hold(self) -> "Hold":
        """Returns a holder for the bytes of one call, empty at first."""
        return Hold(self)

    def refusal(self, what: str) -> MeshError:
        """Returns the error for a body that finds no room; `what` names the body."""
        text = f"{what} has to wait: the bodies in flight fill {self.limit} bytes (set by {OPTION})"
        return MeshError(Reason.OVERLOADED, text, retry_after=_RETRY, details={"option": OPTION})

    def statistics(self) -> BudgetStatistics:
        """Returns the current state."""
        return BudgetStatistics(limit=self.limit, held=self.held, refused=self.refused)


class Hold:
    """Bytes that one call holds in its stages; all of them are given back at its end. A context manager."""

    __slots__ = ("_budget", "size")

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self.size = 0

    def request(self, size: int) -> None:
        """Holds so many bytes of a request in all, at least. Raises MeshError if there is no room for them."""
        more = size - self.size
        if more <= 0:
            return
        if not self._budget.take(more, self._budget.most(size)):
            raise self._budget.refusal(f"a request of {size} bytes")
        self.size = size

    def counts(self, size: int) -> None:
        """Holds exactly so many bytes from now on: they are already in memory."""
        self._budget.add(size - self.size)
        self.size = size

    def __enter__(self) -> "Hold":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.counts(0)


UNBOUNDED = Budget()
"""The budget of connections that are given no other."""
