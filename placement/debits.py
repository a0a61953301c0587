"""Debits: loads that an observer has sent to pods and that the pods' published figures do not show yet.

A pod publishes its figures every few seconds, and a router may send it twenty loads in between. Each load is debited
when it is sent: its bytes, a copy, a load in progress. The debit ends when the pod's own figures must contain the load:
with the pod's first figures after it has published the copy, or with those published some time after the load was sent.
It ends after `expiry_ms` in any case, so that no debit is left behind. The debit of a failed load ends immediately;
after a successful one, its bytes stay debited until they are published.

Each router keeps its own debits, so loads by other routers only show in published figures. The coarse ranking of
`choice` absorbs that error.
"""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

from placement.footprint import Footprint
from placement.pod import Candidate

EXPIRY_MS = 15_000
SETTLE_MS = 500
"""A publication that arrives sooner than this after a load was sent may have been written before the load arrived, so
it only ends the debit if it shows the copy."""


@dataclass(slots=True)
class _Debit:
    pod: str
    bytes: int
    device_bytes: int
    sent_ms: int
    loading: bool


@dataclass(slots=True)
class _Total:
    bytes: int = 0
    device_bytes: int = 0
    loading: int = 0

    def add(self, debit: _Debit, sign: int = 1) -> None:
        self.bytes += sign * debit.bytes
        self.device_bytes += sign * debit.device_bytes
        self.loading += sign * debit.loading


@dataclass(frozen=True, slots=True)
class DebitsStatistics:
    """The number and the sums of debits at one moment."""

    debits: int
    bytes: int  # of host memory


class Debits:
    """The loads that one observer has sent. Times in milliseconds on any clock that does not go back."""

    __slots__ = ("_debited", "_debits", "_expiry_ms", "_of", "_settle_ms", "_totals")

    def __init__(self, *, expiry_ms: int = EXPIRY_MS, settle_ms: int = SETTLE_MS) -> None:
        self._expiry_ms = expiry_ms
        self._settle_ms = settle_ms
        self._debits: dict[Hashable, _Debit] = {}  # in the order of sending; a key sent again moves to the end
        self._of: dict[str, dict[Hashable, _Debit]] = {}  # the same by pod
        self._totals: dict[str, _Total] = {}
        self._debited: dict[
            str, tuple[Candidate, Candidate]
        ] = {}  # a pod as published, and as debited; invalid when a debit changes

    def sent(self, pod: str, size_bytes: int, now_ms: int, key: Hashable, *, device_bytes: int = 0) -> None:
        """Debits a load that was sent to the pod. The same key sent again replaces its former debit."""
        self._expire(now_ms)
        self._drop(key)
        debit = _Debit(pod, size_bytes, device_bytes, now_ms, loading=True)
        self._debits[key] = debit
        self._of.setdefault(pod, {})[key] = debit
        self._totals.setdefault(pod, _Total()).add(debit)
        self._debited.pop(pod, None)

    def done(self, key: Hashable, *, loaded: bool = True, measured: Footprint | None = None) -> None:
        """Notes that a load has ended. If it succeeded (`loaded`), its bytes stay debited until they are published: the
        `measured` ones, if they are known. If it failed, they are free again."""
        debit = self._debits.get(key)
        if debit is None:
            return
        if loaded:
            total = self._totals[debit.pod]
            total.add(debit, -1)
            debit.loading = False
            if measured is not None:
                debit.bytes, debit.device_bytes = measured.host_bytes, measured.device_bytes
            total.add(debit)
            self._debited.pop(debit.pod, None)
        else:
            self._drop(key)

    def published(self, pod: str, now_ms: int, *, shown: Callable[[Hashable], bool] | None = None) -> None:
        """Ends the debits that the pod's new figures contain: those of loads that were sent some time before, and those
        of loads whose copies the pod has published (`shown` returns whether a copy is)."""
        before, of = now_ms - self._settle_ms, self._of.get(pod, {})
        settled = [key for key, debit in of.items() if debit.sent_ms <= before or (shown is not None and shown(key))]
        for key in settled:
            self._drop(key)

    def forget(self, pod: str) -> None:
        """Removes all debits of a pod that has disappeared."""
        for key in list(self._of.get(pod, ())):
            self._drop(key)

    def apply(self, pods: Iterable[Candidate], now_ms: int) -> list[Candidate]:
        """Returns the pods as they will look once they have published the loads sent to them, in the same order."""
        self._expire(now_ms)
        if not self._debits:
            return list(pods)
        of, debited = self._of, self._debited
        found = []
        for pod in pods:
            name = pod.name
            if name in of:
                known = debited.get(name)
                pod = known[1] if known is not None and known[0] is pod else self._apply(pod)
            found.append(pod)
        return found

    def statistics(self) -> DebitsStatistics:
        """Returns statistics of the current debits. Expired debits count until the next `sent` or `apply`."""
        return DebitsStatistics(len(self._debits), sum(debit.bytes for debit in self._debits.values()))

    def _apply(self, pod: Candidate) -> Candidate:
        total = self._totals[pod.name]
        debited = pod.with_more(
            used_bytes=total.bytes,
            device_used_bytes=total.device_bytes,
            copies=len(self._of[pod.name]),
            loads_in_progress=total.loading,
        )
        self._debited[pod.name] = (pod, debited)
        return debited

    def _drop(self, key: Hashable) -> None:
        debit = self._debits.pop(key, None)
        if debit is None:
            return
        self._totals[debit.pod].add(debit, -1)
        debits = self._of[debit.pod]
        del debits[key]
        if not debits:
            del self._of[debit.pod], self._totals[debit.pod]
        self._debited.pop(debit.pod, None)

    def _expire(self, now_ms: int) -> None:
        expired = []
        for key, debit in self._debits.items():
            if now_ms - debit.sent_ms < self._expiry_ms:
                break
            expired.append(key)
        for key in expired:
            self._drop(key)
