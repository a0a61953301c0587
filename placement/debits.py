"""What an observer has sent to pods since they last published: the part of the view that it knows better.

A pod publishes every few seconds; a router may send it twenty loads in between. Each load is debited when it is sent
(its bytes, a copy, a load in progress), and the debit ends when the pod's own figures must contain it: at a
publication that comes some time after the sending, or after `expiry_ms` whatever happens, so that nothing sticks. A
load that failed is taken back at once; one that succeeded keeps its bytes debited until they are published.

Kept by each router for itself. Other routers' loads show only in what the pods publish; that remaining error is what
the coarse ranking of `choice` is for.
"""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace

from placement.pod import Pod

EXPIRY_MS = 15_000
SETTLE_MS = 500
"""A publication that arrives sooner than this after the sending may have been written before the load arrived."""


@dataclass(slots=True)
class _Debit:
    pod: str
    bytes: int
    device_bytes: int
    sent_ms: int
    loading: bool


@dataclass(frozen=True, slots=True)
class DebitsStatistics:
    """How much is debited now."""

    debits: int
    bytes: int


class Debits:
    """The loads that one observer has sent. Times in milliseconds on any clock that does not go back."""

    __slots__ = ("_debits", "_expiry_ms", "_settle_ms")

    def __init__(self, *, expiry_ms: int = EXPIRY_MS, settle_ms: int = SETTLE_MS) -> None:
        self._expiry_ms = expiry_ms
        self._settle_ms = settle_ms
        self._debits: dict[Hashable, _Debit] = {}  # in the order of sending: a key sent again is moved to the end

    def sent(self, pod: str, size_bytes: int, now_ms: int, key: Hashable, *, device_bytes: int = 0) -> None:
        """A load has been sent to the pod. The same key sent again replaces its former debit."""
        self._expire(now_ms)
        self._debits.pop(key, None)
        self._debits[key] = _Debit(pod, size_bytes, device_bytes, now_ms, loading=True)

    def done(self, key: Hashable, *, loaded: bool = True) -> None:
        """The load has ended. Without `loaded` its bytes are free again; with it, they wait for the publication."""
        if not loaded:
            self._debits.pop(key, None)
        elif key in self._debits:
            self._debits[key].loading = False

    def published(self, pod: str, now_ms: int) -> None:
        """New figures of the pod have arrived: they contain what was sent to it before."""
        before = now_ms - self._settle_ms
        for key in [key for key, debit in self._debits.items() if debit.pod == pod and debit.sent_ms <= before]:
            del self._debits[key]

    def forget(self, pod: str) -> None:
        """The pod has gone."""
        for key in [key for key, debit in self._debits.items() if debit.pod == pod]:
            del self._debits[key]

    def apply(self, pods: Iterable[Pod], now_ms: int) -> list[Pod]:
        """The pods as they will look once they have published what was sent to them."""
        self._expire(now_ms)
        if not self._debits:
            return list(pods)
        sums: dict[str, tuple[int, int, int, int]] = {}
        for debit in self._debits.values():
            size, device, copies, loading = sums.get(debit.pod, (0, 0, 0, 0))
            sums[debit.pod] = (size + debit.bytes, device + debit.device_bytes, copies + 1, loading + debit.loading)
        return [_debited(pod, *sums[pod.name]) if pod.name in sums else pod for pod in pods]

    def statistics(self) -> DebitsStatistics:
        """What is debited now; expired debits count until the next `sent` or `apply`."""
        return DebitsStatistics(len(self._debits), sum(debit.bytes for debit in self._debits.values()))

    def _expire(self, now_ms: int) -> None:
        expired = []
        for key, debit in self._debits.items():
            if now_ms - debit.sent_ms < self._expiry_ms:
                break
            expired.append(key)
        for key in expired:
            del self._debits[key]


def _debited(pod: Pod, size: int, device: int, copies: int, loading: int) -> Pod:
    return replace(
        pod,
        used_bytes=pod.used_bytes + size,
        device_used_bytes=pod.device_used_bytes + device,
        copies=pod.copies + copies,
        loads_in_progress=pod.loads_in_progress + loading,
    )
