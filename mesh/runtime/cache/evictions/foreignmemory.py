"""The watch over the memory of a foreign server, by the same rules as for Mesh's own (`memory`).

Three things differ. A size on the books may be wrong, so a copy counts with its share of the observed memory. For the
same reason, the memory is read before each load. And the server may keep the memory of unloaded models for later
models, so evictions end if they do not free memory.
"""

from mesh.options.values import format_bytes
from mesh.runtime.cache.books.account import Account
from mesh.runtime.cache.books.entries import CacheEntry, EntryState
from mesh.runtime.cache.books.ledger import Ledger
from mesh.runtime.cache.evictions.eviction import Eviction
from mesh.runtime.cache.evictions.memory import MemoryWatch
from mesh.telemetry import logs

log = logs.get(__name__)

_HELP = 0.1  # part of the expected memory that an eviction must free to have helped
_IN_VAIN = 3  # evictions in a row that did not help, after which there are no more
_LONGEST = 45.0  # seconds for which unloads are waited for: calls in flight take 30 of them, and some unloads never end
_SETTLES = 3.0  # seconds after which a server has freed the memory of an unloaded model


class ForeignMemoryWatch(MemoryWatch):
    """The watch over a foreign server's memory. It does nothing if the memory cannot be observed."""

    def __init__(self, ledger: Ledger, eviction: Eviction, account: Account) -> None:
        super().__init__(ledger, eviction, limit_bytes=0, used=lambda: account.statistics().observed_bytes)
        self._account = account
        self._observed = 0
        self._scale = 1.0  # observed memory over the books
        self._expected = 0  # bytes that the last evictions should free
        self._before = 0  # observed when they began
        self._since_ns = 0
        self._in_vain = 0

    def look(self) -> None:
        """Reads the memory once, and evicts copies or refuses loads if necessary."""
        self._observed = self._account.look()
        self.limit_bytes = self._account.limit_bytes if self._account.observes else 0
        books = sum(entry.footprint.host_bytes for entry in self._ledger.entries.values() if entry.physical)
        self._scale = max(1.0, self._observed / books) if books else 1.0
        self._judge()
        super().look()

    def full(self) -> str:
        """Returns the reason why no load may begin now, or "" if one may.

        Reads the memory again, because a server may load many models between two reads by `run` if their sizes on the
        books are far too small.
        """
        if self.refusal or not self.limit_bytes or not self._account.observes:
            return self.refusal
        return self._refused(self._account.observed())

    def _may_evict(self) -> bool:
        return not self._expected and self._in_vain < _IN_VAIN

    def _begun(self, victims: list[CacheEntry]) -> None:
        if victims:
            self._expected, self._before = sum(map(self._of, victims)), self._observed
            self._since_ns = self._ledger.now_ns()

    def _judge(self) -> None:
        """Decides whether the last evictions have freed memory, once nothing is left of their victims."""
        if self._observed < self._before:
            self._in_vain = 0
        if not self._expected:
            return
        age = (self._ledger.now_ns() - self._since_ns) / 1e9
        unloading = self._ledger.count(EntryState.UNLOADING) > 0 and age < _LONGEST
        if unloading or (self._observed >= self._before and age < _SETTLES):
            return
        if self._before - self._observed < _HELP * self._expected:
            self._in_vain += 1
            if self._in_vain == _IN_VAIN:
                expected = format_bytes(self._expected)
                log.warning("evictions end, because they do not free memory of the model server", expected=expected)
        self._expected = 0

    def _of(self, entry: CacheEntry) -> int:
        return int(entry.footprint.host_bytes * self._scale)
