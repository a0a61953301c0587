"""The keys of this pod's copies: their wanted state, and those whose state in etcd still differs.

Other parts note which keys should exist, and do not wait; `publishing` writes the difference, one batch at a time.
Because there is only one writer, a put and a deletion of the same key cannot overtake each other. The exception is a
claim, whose outcome etcd must decide: while it runs, the writer does not write its key.

This module does no I/O.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable

from mesh.schema.records import CopyRecord

BATCH = 100
"""Keys per transaction; etcd allows 128 operations."""


class Claiming:
    """A model's key while a claim writes it."""

    __slots__ = ("lease", "record", "unsure")

    def __init__(self, lease: int | None) -> None:
        self.lease = lease  # None: not published at the moment
        self.record: CopyRecord | None = None  # the record that the claim wrote; None: it was not won
        self.unsure = False  # a claim was sent, and its outcome is unknown


class CopyKeys:
    """The keys of one pod's copies. `on_change` is called when there may be something to write."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        self.wanted: dict[str, CopyRecord] = {}  # the keys that should exist, by model
        self._on_change = on_change
        self._dirty: dict[str, bool] = {}  # ids whose key differs -> whether to check the registration first
        self._unkeyed: set[str] = set()  # ids of copies that may answer and may have no key under the lease
        self._writing: frozenset[str] = frozenset()
        self._claiming: set[str] = set()
        self._written = asyncio.Event()  # replaced after each batch

    # --- what should be there

    def put(self, model_id: str, record: CopyRecord) -> bool:
        """Adds a copy's key. Returns True if the key is new, which means that until now no key prevented a new
        registration of the id."""
        news = model_id not in self.wanted
        self.wanted[model_id] = record
        self._dirty.setdefault(model_id, False)
        if news:
            self._rewrite(model_id)
        return news

    def drop(self, model_id: str) -> None:
        """Drops a model's key, because the model has no copy, or none that still answers."""
        self._unkeyed.discard(model_id)
        if self.wanted.pop(model_id, None) is not None:
            self.touch(model_id)

    def touch(self, model_id: str) -> None:
        """Marks a model's key as possibly different in etcd."""
        self._dirty.setdefault(model_id, False)
        self._on_change()

    def missing(self, model_ids: Iterable[str]) -> None:
        """Marks keys that are missing in etcd."""
        for model_id in model_ids:
            self._rewrite(model_id)
        self._on_change()

    def lost(self) -> None:
        """Marks all keys as missing in etcd, because the lease has ended."""
        self._unkeyed |= self.wanted.keys()

    def renew(self) -> None:
        """Marks all keys to be written again, each on condition that its copy is still of the current registration."""
        for model_id in self.wanted:
            self._dirty[model_id] = True

    def forget(self, model_id: str) -> None:
        """Forgets a model's key, which does not exist in etcd. The model's copy may still answer."""
        self.wanted.pop(model_id, None)
        self._unkeyed.add(model_id)

    def gone(self, model_id: str) -> None:
        """Notes that the forgotten copy of a model no longer answers."""
        if model_id not in self.wanted:
            self._unkeyed.discard(model_id)

    def _rewrite(self, model_id: str) -> None:
        self._unkeyed.add(model_id)
        self._dirty[model_id] = True

    # --- the state of the keys

    @property
    def all_keyed(self) -> bool:
        """True if each copy that may answer has its key."""
        return not self._unkeyed

    @property
    def behind(self) -> int:
        """The number of keys whose state in etcd may differ from the wanted state."""
        return len(self._dirty) + len(self._writing)

    @property
    def as_wanted(self) -> list[str]:
        """The models that should have a key, and whose key in etcd is as wanted."""
        return [one for one in self.wanted if one not in self._dirty and one not in self._writing]

    def stray(self, model_ids: Iterable[str]) -> list[str]:
        """Returns the models among these that should have no key."""
        return [one for one in model_ids if one not in self.wanted and one not in self._claiming]

    async def settled(self, model_id: str, timeout: float) -> bool:
        """Waits until the key of a model in etcd is as wanted. Returns False after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                while model_id in self._dirty or model_id in self._writing:
                    await self._written.wait()
        except TimeoutError:
            return False
        return True

    # --- claims

    @contextlib.asynccontextmanager
    async def claiming(self, model_id: str, lease: Callable[[], int | None]) -> AsyncIterator[Claiming]:
        """Leaves a model's key to a claim for the duration of the block. `lease` returns the id of the current lease,
        or None."""
        while model_id in self._writing:
            await self._written.wait()
        left = self._dirty.pop(model_id, None) is not None  # a deletion, which is unnecessary if the claim is won
        self._claiming.add(model_id)
        claim = Claiming(lease())
        try:
            yield claim
        finally:
            self._claiming.discard(model_id)
            if claim.record is not None:
                self.wanted[model_id] = claim.record
                if claim.lease is not None and lease() == claim.lease:
                    self._unkeyed.discard(model_id)
                else:
                    self.missing([model_id])  # the lease was lost in the meantime, and the key with it
            elif left or claim.unsure:
                self.touch(model_id)

    # --- writing them

    def next_batch(self) -> list[str]:
        """Returns the models whose keys are to be written next."""
        return [model_id for model_id in self._dirty if model_id not in self._claiming][:BATCH]

    def begin(self, batch: Iterable[str]) -> dict[str, bool]:
        """Notes that a batch is about to be written. Returns the batch's models, each with True if the transaction must
        check its registration."""
        checked = {model_id: self._dirty.pop(model_id) for model_id in batch}
        self._writing = frozenset(checked)
        return checked

    def end(self, checked: dict[str, bool], *, done: bool) -> None:
        """Ends the writing of a batch. Unless it is `done`, the batch must be written again."""
        self._writing = frozenset()
        if not done:
            for model_id, check in checked.items():
                self._dirty[model_id] = check or self._dirty.get(model_id, False)
        written, self._written = self._written, asyncio.Event()
        written.set()

    def stand(self, model_ids: Iterable[str]) -> bool:
        """Notes that these keys are now under the lease. Returns False if no key at all was missing before."""
        if not self._unkeyed:
            return False
        self._unkeyed.difference_update(model_ids)
        return True

    def skip(self, model_ids: Iterable[str]) -> None:
        """Removes keys from those to write, because they ended with the lease."""
        for model_id in model_ids:
            self._dirty.pop(model_id, None)
