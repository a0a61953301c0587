"""What follows from the deaths of model servers: whose requests are refused, and which models are quarantined.

Who may have caused a death is decided in `placement.suspects`, from how the server ended; nobody is blamed for an end
that came from outside. Here is the memory of that. A blame expires, so that chance does not add up over days, and one
death alone has no consequence but that the model's next load is made apart from others (`on_probation`), which tells it
from those that were merely there.

A load that kills its server does so again: after the second blame, of another pod, or where nothing else can have done
it, the model is quarantined. A call that kills its server (a division that overflows, say) is the request's fault
first: that request is refused for `REFUSED_MS`, and only a model whose servers died in `REQUESTS` different ones is
quarantined.

A whole pod that is killed leaves no account of why. It is taken for its memory's end only where the last looks at its
memory say so (`exhausted`).

Times in milliseconds since the epoch, as they stand in records: hosts' clocks differ by less than what counts here.
"""

from collections.abc import Iterable
from dataclasses import dataclass

EXPIRY_MS = 3_600_000
"""A blame counts for so long."""

REFUSED_MS = 600_000
"""A request in which a server died is refused for so long."""

PODS = 2
"""Different pods whose servers must have died of a model."""

REQUESTS = 3
"""Different requests that must have killed a server each."""

KEPT = 16
"""Blames that are kept of a model, the newest."""

DIGESTS = 8
"""Requests that are kept of a blame."""

_LOOKS = 3  # as much memory as went between the last two looks may have gone so many times before the kill
_LITTLE = 0.05  # of all memory


@dataclass(frozen=True, slots=True)
class Blame:
    """One death of a server that a model may have caused."""

    pod: str
    at_ms: int
    text: str  # for people
    sure: bool = False  # nothing else can have
    digests: tuple[str, ...] = ()  # of the requests that it ran for, in hex; none: it was being loaded, or nobody knows

    @property
    def requests(self) -> bool:
        """Whether it was a call."""
        return bool(self.digests)


def alive(blames: Iterable[Blame], now_ms: int) -> tuple[Blame, ...]:
    """Those that have not expired."""
    return tuple(blame for blame in blames if now_ms - blame.at_ms < EXPIRY_MS)


def quarantine(blames: Iterable[Blame], now_ms: int) -> str:
    """Why the model is to be quarantined, "" where it is not."""
    blames = alive(blames, now_ms)
    loads = [blame for blame in blames if not blame.requests]
    if len({blame.pod for blame in loads}) >= PODS:
        return "servers of different pods died of it"
    if sum(blame.sure for blame in loads) >= PODS:
        return "servers died of it, and can have died of nothing else"
    calls = [blame for blame in blames if blame.requests]
    for these in ([blame for blame in calls if blame.sure], calls):
        several = len({blame.pod for blame in these}) >= PODS or all(blame.sure for blame in these)
        if _different(these) >= REQUESTS and several:
            return f"servers died of it in {_different(these)} different requests"
    return ""


def refused(blames: Iterable[Blame], now_ms: int) -> frozenset[str]:
    """The requests that are not sent to the model: those that surely killed a server lately."""
    return frozenset(
        digest
        for blame in blames
        if blame.sure and len(blame.digests) == 1 and now_ms - blame.at_ms < REFUSED_MS
        for digest in blame.digests
    )


def on_probation(blames: Iterable[Blame], now_ms: int) -> bool:
    """Whether its next load is made apart from others: a server has died, perhaps of its load."""
    return any(not blame.requests for blame in alive(blames, now_ms))


def exhausted(left_bytes: int, fallen_bytes: int, whole_bytes: int) -> bool:
    """Whether a pod that was killed whole had run out of memory: `left_bytes` of it were left at the last look,
    `fallen_bytes` less than at the look before."""
    return left_bytes - _LOOKS * max(0, fallen_bytes) <= _LITTLE * whole_bytes


def _different(blames: Iterable[Blame]) -> int:
    """How many of them came with a request that none before had."""
    seen: set[str] = set()
    count = 0
    for blame in blames:
        if not seen.issuperset(blame.digests):
            count += 1
            seen.update(blame.digests)
    return count
