"""The keys of this pod's copies: which should stand in etcd, and which are not as they should be.

Whoever changes what should stand there says so and goes on; `publishing` writes the difference, a batch at a time. One
writer means that a put and a deletion of the same key cannot overtake each other. The one exception is a claim, which
must be decided by etcd: it takes its key out of the writer's hands while it runs.

Nothing here does I/O.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable

from mesh.schema.records import CopyRecord

BATCH = 100
"""Keys a transaction; etcd allows 128 operations."""


class Claiming:
    """A model's key in the hands of a claim."""

    __slots__ = ("lease", "record", "unsure")

    def __init__(self, lease: int | None) -> None:
        self.lease = lease  # None: not published at the moment
        self.record: CopyRecord | None = None  # what the claim has written; None: it was not won
        self.unsure = False  # a claim was sent, and what became of it is not known


class CopyKeys:
    """See the module's text. `on_change` is called where there may be something to write."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        self.wanted: dict[str, CopyRecord] = {}  # what should stand there, by model
        self._on_change = on_change
        self._dirty: dict[str, bool] = {}  # ids whose key is not as wanted -> whether to check the registration first
        self._unkeyed: set[str] = set()  # ids of copies that may answer, and may have no key under the lease
        self._writing: frozenset[str] = frozenset()
        self._claiming: set[str] = set()
        self._written = asyncio.Event()  # replaced after each batch

    # --- what should stand there

    def put(self, model_id: str, record: CopyRecord) -> bool:
        """That copy is there. Returns whether nothing has kept the id from being registered anew so far."""
        news = model_id not in self.wanted
        self.wanted[model_id] = record
        self._dirty.setdefault(model_id, False)
        if news:
            self._rewrite(model_id)
        return news

    def drop(self, model_id: str) -> None:
        """There is no copy of that model, or none that answers any more."""
        self._unkeyed.discard(model_id)
        if self.wanted.pop(model_id, None) is not None:
            self.touch(model_id)

    def touch(self, model_id: str) -> None:
        """The key of that model may not be as it should be."""
        self._dirty.setdefault(model_id, False)
        self._on_change()

    def missing(self, model_ids: Iterable[str]) -> None:
        """Those keys are not there, though they should be."""
        for model_id in model_ids:
            self._rewrite(model_id)
        self._on_change()

    def lost(self) -> None:
        """The lease has gone, and all keys with it."""
        self._unkeyed |= self.wanted.keys()

    def renew(self) -> None:
        """All keys are to be written again, each if its model is still the registration that it was loaded from."""
        for model_id in self.wanted:
            self._dirty[model_id] = True

    def forget(self, model_id: str) -> None:
        """No key is to stand for that model, and none does; its copy may answer still."""
        self.wanted.pop(model_id, None)
        self._unkeyed.add(model_id)

    def gone(self, model_id: str) -> None:
        """The copy of that model that was forgotten answers no more."""
        if model_id not in self.wanted:
            self._unkeyed.discard(model_id)

    def _rewrite(self, model_id: str) -> None:
        self._unkeyed.add(model_id)
        self._dirty[model_id] = True

    # --- how it stands

    @property
    def all_keyed(self) -> bool:
        """Whether each copy that may answer has its key."""
        return not self._unkeyed

    @property
    def behind(self) -> int:
        """Keys that are not as they should be."""
        return len(self._dirty) + len(self._writing)

    @property
    def as_wanted(self) -> list[str]:
        """The models whose keys are as they should be."""
        return [model_id for model_id in self.wanted if model_id not in self._dirty]

    def stray(self, model_ids: Iterable[str]) -> list[str]:
        """Those of the models for which no key should stand, by what is known here."""
        return [one for one in model_ids if one not in self.wanted and one not in self._claiming]

    async def settled(self, model_id: str, timeout: float) -> bool:
        """Waits until the key of that model is as it should be; False after `timeout` seconds."""
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
        """Leaves that model's key to a claim. `lease` is the one that is held, by its id."""
        while model_id in self._writing:
            await self._written.wait()
        left = self._dirty.pop(model_id, None) is not None  # a deletion that the claim makes needless, if it is won
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
                    self.missing([model_id])  # the lease was lost meanwhile, and the key with it
            elif left or claim.unsure:
                self.touch(model_id)

    # --- writing them

    def next_batch(self) -> list[str]:
        """Which are to be written next."""
        return [model_id for model_id in self._dirty if model_id not in self._claiming][:BATCH]

    def begin(self, batch: Iterable[str]) -> dict[str, bool]:
        """They are being written from now on. Returns which registrations are to be checked by that."""
        checked = {model_id: self._dirty.pop(model_id) for model_id in batch}
        self._writing = frozenset(checked)
        return checked

    def end(self, checked: dict[str, bool], *, done: bool) -> None:
        """They are written; where that is not `done`, they are to be written again."""
        self._writing = frozenset()
        if not done:
            for model_id, check in checked.items():
                self._dirty[model_id] = check or self._dirty.get(model_id, False)
        written, self._written = self._written, asyncio.Event()
        written.set()

    def stand(self, model_ids: Iterable[str]) -> bool:
        """Those keys stand under the lease. Returns whether any of them may not have."""
        if not self._unkeyed:
            return False
        self._unkeyed.difference_update(model_ids)
        return True

    def skip(self, model_ids: Iterable[str]) -> None:
        """Those keys are not to be written: they ended with the lease."""
        for model_id in model_ids:
            self._dirty.pop(model_id, None)
