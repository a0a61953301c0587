"""The consequences of a model server's death: which requests are refused, and which models are quarantined.

`placement.suspects` decides, from how the server ended, which models may have caused the death. No model is blamed for
an end with an outside cause. This module decides what the blames in a model's record mean. A blame expires, so that
coincidences do not add up over days. A single death during a model's load only puts the model on probation
(`on_probation`): its next load runs apart from other loads, which separates the culprit from bystanders.

A load that kills its server will do so again: the model is quarantined after the second blame, if it is from another
pod or nothing else can have been the cause. If a call kills its server (by a division that overflows, say), the request
is blamed first: it is refused for `REFUSED_MS`, and the model is quarantined only once `REQUESTS` different requests
have killed servers.

A pod that is killed completely leaves no account of the cause. It is assumed to have run out of memory only if its last
memory samples suggest it (`exhausted`).

Times are in milliseconds since the epoch, as in records. Differences between the hosts' clocks are too small to matter
here.
"""

from collections.abc import Iterable
from dataclasses import dataclass

EXPIRY_MS = 3_600_000
"""Lifetime of a blame."""

REFUSED_MS = 600_000
"""Time for which a request that killed a server is refused."""

PODS = 2
"""Number of pods in which a model's loads must have killed the server before the model is quarantined. As many
deaths in one pod are enough if nothing else can have caused any of them."""

REQUESTS = 3
"""Number of different requests that must have killed a server before the model is quarantined."""

KEPT = 16
"""Blames kept for each model, the newest ones."""

DIGESTS = 8
"""Requests kept for each blame."""

UNKNOWN = "?"
"""The digest of requests that were not recorded, such as those of a foreign server. It counts as another request at
each death, and no request is refused because of it."""

_LOOKS = 3  # after the last sample, a pod may take this many times the memory that it took between the last two
_LITTLE = 0.05  # of all memory


@dataclass(frozen=True, slots=True)
class Blame:
    """One death of a server that a model may have caused."""

    pod: str
    at_ms: int
    text: str  # for people
    sure: bool = False  # nothing else can have caused it
    digests: tuple[str, ...] = ()  # of its requests, in hex, or `UNKNOWN`; none: it was being loaded

    @property
    def requests(self) -> bool:
        """True if a call caused the death, rather than a load."""
        return bool(self.digests)

    @property
    def known(self) -> bool:
        """True if a call caused the death, and its request can be recognised."""
        return any(digest != UNKNOWN for digest in self.digests)


def alive(blames: Iterable[Blame], now_ms: int) -> tuple[Blame, ...]:
    """Returns the blames that have not expired."""
    return tuple(blame for blame in blames if now_ms - blame.at_ms < EXPIRY_MS)


def quarantine(blames: Iterable[Blame], now_ms: int) -> str:
    """Returns why the model is quarantined, or "" if it is not."""
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
    """Returns the digests of requests that must not be sent to the model, because each of them alone is known to have
    killed a server recently."""
    return frozenset(
        digest
        for blame in blames
        if blame.sure and blame.known and len(blame.digests) == 1 and now_ms - blame.at_ms < REFUSED_MS
        for digest in blame.digests
    )


def on_probation(blames: Iterable[Blame], now_ms: int) -> bool:
    """Returns whether the model's next load must run apart from other loads, because an earlier one may have killed a
    server."""
    return any(not blame.requests for blame in alive(blames, now_ms))


def exhausted(left_bytes: int, fallen_bytes: int, whole_bytes: int) -> bool:
    """Returns whether a pod that was killed completely had probably run out of memory. `left_bytes` is the free memory
    at the last sample, `fallen_bytes` the decrease since the sample before, and `whole_bytes` all memory."""
    return left_bytes - _LOOKS * max(0, fallen_bytes) <= _LITTLE * whole_bytes


def _different(blames: Iterable[Blame]) -> int:
    """Counts the blames, except those whose requests earlier blames have named. Blames for unknown requests all
    count."""
    seen: set[str] = set()
    count = 0
    for blame in blames:
        if not blame.known or not seen.issuperset(blame.digests):
            count += 1
            seen.update(blame.digests)
    return count
