"""The most recently used models, kept in etcd so that a restarted mesh knows what to load first.

Every minute the leader asks each agent how long its copies have been idle. Models that are evicted keep the time of
their last use. The list is bounded and kept in etcd, in at most twenty compressed pieces without a lease. The times are
not written into the models' records: that would take a write for each model, and transactions that compare a record
would fail.

Times are by the leader's clock. If the next leader's clock differs, models seem to have been used earlier or later.
This does no harm, because only the order of models matters, and preloads evict nothing.
"""

import contextlib
import heapq
import json
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping

from mesh.etcd import Etcd
from mesh.etcd.ranges import after_prefix
from mesh.schema.keys import Keys
from mesh.schema.records import ModelRecord
from mesh.telemetry import logs

log = logs.get(__name__)

MOST = 20_000
"""Maximum number of models that are remembered."""

PIECE = 1000
"""Number of models in one key, whose value then has 10 to 30 KB, compressed."""

_LARGEST = 8 << 20  # bytes of a decompressed piece; a larger one was not written by Mesh


class Recency:
    """The list that one leader keeps. `clock` returns seconds since the epoch."""

    def __init__(self, etcd: Etcd, keys: Keys, *, clock: Callable[[], float] = time.time) -> None:
        self._etcd = etcd
        self._keys = keys
        self._clock = clock
        self._used: dict[str, int] = {}  # ms since the epoch, by model
        self._saved: dict[bytes, bytes] = {}  # the pieces in etcd, as far as known

    async def load(self) -> None:
        """Reads the list of an earlier leader. If no list exists, reads the times from the models' records, where
        ModelMesh keeps them. Raises EtcdError."""
        prefix = self._keys.recent
        self._saved = {}
        async for page in self._etcd.pages(prefix, after_prefix(prefix)):
            for kv in page.kvs:
                self._saved[kv.key] = kv.value
                try:
                    found = _unpack(kv.value)
                except ValueError as error:
                    log.warning("a part of the list of last uses cannot be read", key=kv.key, why=str(error))
                    continue
                for model_id, used in found.items():
                    self._note(model_id, used)
        if not self._saved:
            await self._load_records()

    async def _load_records(self) -> None:
        prefix = self._keys.registry
        async for page in self._etcd.pages(prefix, after_prefix(prefix)):
            for kv in page.kvs:
                with contextlib.suppress(ValueError):  # a record that cannot be read is logged when it is used
                    self._note(self._keys.model_of(kv.key), ModelRecord.decode(kv.value).last_used_ms)
            self._trim(2 * MOST)
        self._trim(MOST)

    def note(self, idle_ms: Mapping[str, int]) -> None:
        """Notes how long models have been idle, in milliseconds, as agents have just reported. An earlier use than the
        one that is known changes nothing."""
        now = int(self._clock() * 1000)
        for model_id, idle in idle_ms.items():
            self._note(model_id, now - idle)
        self._trim(2 * MOST)  # pods report some hundreds at a time; `save` keeps at most MOST

    def forget(self, model_ids: Iterable[str]) -> None:
        """Removes models that are no longer registered."""
        for model_id in model_ids:
            self._used.pop(model_id, None)

    def newest(self, most: int, *, without: Callable[[str], bool]) -> list[tuple[str, int]]:
        """Returns the most recently used models for which `without` is false, each with its idle time in ms."""
        now = int(self._clock() * 1000)
        found = ((used, model_id) for model_id, used in self._used.items() if not without(model_id))
        return [(model_id, max(1, now - used)) for used, model_id in heapq.nlargest(most, found)]

    async def save(self) -> None:
        """Writes the changed pieces. Raises EtcdError."""
        self._trim(MOST)
        pieces = dict(self._pieces())
        for key, value in pieces.items():
            if self._saved.get(key) != value:
                await self._etcd.put(key, value)
                self._saved[key] = value
        for key in self._saved.keys() - pieces.keys():
            await self._etcd.delete(key)
            del self._saved[key]

    def _pieces(self) -> Iterator[tuple[bytes, bytes]]:
        models = sorted(self._used.items(), key=lambda item: (-item[1], item[0]))
        for number in range(0, len(models), PIECE):
            yield self._keys.recent_piece(number // PIECE), _pack(dict(models[number : number + PIECE]))

    def _note(self, model_id: str, used: int) -> None:
        if used > self._used.get(model_id, 0):
            self._used[model_id] = used

    def _trim(self, most: int) -> None:
        if len(self._used) > most:
            kept = heapq.nlargest(most, self._used.items(), key=lambda item: item[1])
            self._used = dict(kept)

    def __contains__(self, model_id: str) -> bool:
        return model_id in self._used


def _pack(used: dict[str, int]) -> bytes:
    return zlib.compress(json.dumps(used, separators=(",", ":"), ensure_ascii=False).encode(), 1)


def _unpack(value: bytes) -> dict[str, int]:
    """Returns the times in a piece. Raises ValueError if it is malformed."""
    unpacking = zlib.decompressobj()
    try:
        text = unpacking.decompress(value, _LARGEST)
        found = json.loads(text)
    except (zlib.error, RecursionError) as error:
        raise ValueError(str(error)) from error
    if not isinstance(found, dict) or not all(type(used) is int for used in found.values()):
        raise ValueError("it holds something other than times of use")
    for model_id in found:
        model_id.encode()  # an id that cannot be encoded would make the next write fail
    return found
