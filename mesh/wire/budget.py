"""A limit on the bytes of bodies, of requests and replies, that one process holds for all its connections.

The limits on the size of a message and on the number of connections bound memory only by their product: 16 MiB times
thousands. So code that is about to hold a body first asks this budget for as many bytes as the head or the prefix
announces.

One caller must not use up what others need, so the bound depends on the kind of body. Large requests are refused once
half of the budget is used. Large replies, which have already been computed, are refused once seven eighths are used.
Requests of ordinary size are refused only when the whole budget is used. So large bodies that stall, or that nobody
reads, cannot stop small calls.

`add` counts bytes that are already in memory, without asking. Servers end bodies that arrive or leave too slowly, and
are stricter while the budget is `short`.
"""

from dataclasses import dataclass
from types import TracebackType

from mesh.statuses import MeshError, Reason

SMALL = 64 * 1024
"""Maximum bytes of a request of ordinary size."""

OPTION = "--max-body-bytes"

_UNBOUNDED = 1 << 62
_RETRY = 1.0  # seconds
_TRIM = 16 << 20  # bytes that must have been returned before the heap is worth trimming


@dataclass(frozen=True, slots=True)
class BudgetStatistics:
    """The limit of a budget and the bytes that it holds, and how often it has refused a request or a reply so far."""

    limit: int
    held: int
    refused: int


class Budget:
    """A budget for the bytes of bodies, used only in the thread of one event loop."""

    __slots__ = ("_highest", "_lately", "_peak", "held", "large", "limit", "refused", "replies", "short")

    def __init__(self, limit: int = _UNBOUNDED) -> None:
        """Makes an empty budget; `limit` is in bytes."""
        self.limit = limit
        self.large = limit // 2  # bound up to which large requests are admitted
        self.replies = limit - limit // 8  # the same for large replies
        self.held = 0
        self.refused = 0
        self.short = False  # a body was refused in this second or the one before
        self._lately = False
        self._highest = 0  # bytes held at most in this second
        self._peak = 0  # and since the heap was trimmed

    def take(self, size: int, most: int) -> bool:
        """Reserves `size` bytes and returns True. Returns False, and counts a refusal, if the budget would then hold
        more than `most`, which is one of the three bounds."""
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
        """Returns the bound for a request of `size` bytes."""
        return self.limit if size <= SMALL else self.large

    def add(self, size: int) -> None:
        """Counts bytes that are already held."""
        self.held += size
        if self.held > self._highest:
            self._highest = self.held

    def give(self, size: int) -> None:
        """Gives back reserved or counted bytes."""
        self.held -= size

    def settle(self) -> bool:
        """Ends a second of observation; called once a second. Returns True if trimming the heap is worthwhile: in that
        second the budget held at most half of the peak since the last trim, and at least 16 MiB less."""
        self.short, self._lately = self._lately, False
        highest, self._highest = self._highest, self.held
        self._peak = max(self._peak, highest)
        if self._peak - highest < _TRIM or highest > self._peak // 2:
            return False
        self._peak = highest
        return True

    def hold(self) -> "Hold":
        """Returns a holder for the bytes of one call, empty at first."""
        return Hold(self)

    def refusal(self, what: str) -> MeshError:
        """Returns the error for a body for which the budget has no room; `what` names the body."""
        text = (
            f"{what} was refused: the budget of {self.limit} bytes for bodies in flight (set by {OPTION}) has no room "
            "for it; try again later, or raise the budget"
        )
        return MeshError(Reason.OVERLOADED, text, retry_after=_RETRY, details={"option": OPTION})

    def statistics(self) -> BudgetStatistics:
        """Returns the current state."""
        return BudgetStatistics(limit=self.limit, held=self.held, refused=self.refused)


class Hold:
    """The bytes that one call holds, at any stage of the call. As a context manager, it gives all of them back at the
    end."""

    __slots__ = ("_budget", "size")

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self.size = 0

    def request(self, size: int) -> None:
        """Makes sure that at least this many bytes are held for a request. Raises MeshError if there is no room for
        them."""
        more = size - self.size
        if more <= 0:
            return
        if not self._budget.take(more, self._budget.most(size)):
            raise self._budget.refusal(f"a request of {size} bytes")
        self.size = size

    def counts(self, size: int) -> None:
        """Sets the number of bytes held, without asking for room, because they are already in memory."""
        self._budget.add(size - self.size)
        self.size = size

    def __enter__(self) -> "Hold":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.counts(0)


UNBOUNDED = Budget()
"""A budget that never refuses a body: the default of servers and pools."""
