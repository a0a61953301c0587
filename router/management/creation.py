"""Writes of registrations to etcd, one by one or in batches, but never while copies of an id's old registration exist.

Registering a model is idempotent. If etcd did not confirm a write, a read shows whether it was made. If copies of an
old registration are left, their agents are asked to unload them, and the registration waits for this, up to a limit.
"""

import asyncio
from collections.abc import Iterable, Sequence

from mesh import etcd as etcds
from mesh.etcd import Etcd, KeyValue
from mesh.etcd.ranges import after_prefix
from mesh.schema.keys import TOMBSTONE, Keys
from mesh.schema.lives import Tombstone
from mesh.schema.records import ModelRecord
from mesh.statuses import MeshError, Reason
from mesh.telemetry import logs
from placement.copies import UNLIMITED
from router.fencing.tombstones import Holder, Tombstones, waits
from router.fencing.withdrawal import ROUNDS, Withdrawal
from router.management.requests import Item
from router.state.differing import DifferentError
from router.state.registry import Registration, Registry, decode

log = logs.get(__name__)

BATCH = 60
"""Largest number of registrations in one transaction: each needs two compares, and etcd allows 128."""

BATCHES = 16
"""Largest number of concurrent transactions."""

EXISTING = "existing"
"""The outcome of an item that is already registered with the same attributes."""

Fate = str | MeshError | None
"""The outcome for one item of many: None (created), EXISTING, or the error."""

Way = tuple[list[etcds.Compare], list[etcds.Op]]
"""The comparisons and writes with which a transaction creates a record, provided that no copies of a former
registration are left."""

_HOLDERS = 1000  # copies read at once
_PAUSE = 0.1  # seconds between two checks of the copies of a former registration
_TELL = 1.0  # seconds between requests to the agents of those copies: the view may lag


class Creation:
    """The writer of one worker."""

    def __init__(
        self,
        *,
        etcd: Etcd,
        keys: Keys,
        registry: Registry,
        withdrawal: Withdrawal,
        tombstones: Tombstones,
        wait: float,
        reregister_after: float | None,
    ) -> None:
        """Makes a writer. `wait` is the time to wait for copies of a former registration to be withdrawn, in seconds.
        `reregister_after` is the time, in seconds, that registrations wait for a pod that is cut off (None: no limit);
        it appears only in errors."""
        self._etcd = etcd
        self._keys = keys
        self._registry = registry
        self._withdrawal = withdrawal
        self._tombstones = tombstones
        self._wait = wait
        self._reregister_after = reregister_after
        self._batches = asyncio.Semaphore(BATCHES)

    async def create(self, model_id: str, record: ModelRecord) -> tuple[Registration, bool]:
        """Registers a model. Returns the registration, and whether it is new. Raises MeshError: CONFLICT if the id is
        registered with other attributes, FORMER_LIFE if pods may still answer for its former registration, INTERNAL if
        the existing record cannot be decoded, REGISTRY_AWAY."""
        key, copies = self._keys.model(model_id), self._keys.copies(model_id)
        puts = self._puts(model_id, record, record.encode())
        way: Way = [etcds.absent_prefix(copies)], []
        deadline = asyncio.get_running_loop().time() + self._wait
        while True:
            compares, ops = way
            try:
                result = await self._etcd.txn([etcds.absent(key), *compares], [*puts, *ops], [etcds.get_op(key)])
            except etcds.EtcdUnavailable as error:
                return await self._done(model_id, record, error), True
            if result.succeeded:
                return self._created(model_id, record, result.revision), True
            if existing := etcds.found(result.responses[0]):
                return _existing(decode(model_id, existing[0]), record), False
            way = await self.make_way(model_id, record, deadline=deadline)

    async def make_way(self, model_id: str, record: ModelRecord, *, deadline: float | None = None) -> Way:
        """Waits until no copies of the id's former registration are left, or only a tombstone that allows this
        registration. Returns the comparisons and operations that the transaction that creates the record must include.

        `deadline` is on the loop's clock. If it is None, the default applies. Raises FORMER_LIFE, REGISTRY_AWAY."""
        copies, tombstone = self._keys.copies(model_id), self._keys.tombstone(model_id)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._wait if deadline is None else deadline
        told = 0.0
        holders: list[Holder] = []
        while True:
            page = await self._etcd.page(copies, after_prefix(copies), limit=_HOLDERS)
            if not page.kvs:
                return [etcds.absent_prefix(copies)], []
            if (former := self._former(page.kvs)) is not None and former.allows(record):
                buried = etcds.modified(tombstone, page.kvs[0].mod_revision)
                return [buried, etcds.absent_range(copies, tombstone)], [etcds.delete_op(tombstone)]
            if loop.time() - told > _TELL:
                told = loop.time()
                await self._withdrawal.withdraw(model_id, page.kvs, "its id is registered again")
                holders = await self._tombstones.resolve(model_id)
            elif loop.time() > deadline:
                holders = holders or [Holder(pod, None) for pod in self._withdrawal.pods_of(page.kvs)]
                raise waits(model_id, holders, self._reregister_after)
            else:
                await asyncio.sleep(_PAUSE)

    async def _done(self, model_id: str, record: ModelRecord, error: etcds.EtcdUnavailable) -> Registration:
        """Returns the registration if it is in etcd although the write was not confirmed. Otherwise raises the error.
        (Reading is sufficient, because registering is idempotent.)"""
        if error.ambiguous:
            found = await self._registry.read(model_id, fresh=True)
            if found is not None and found.record.same_registration(record):
                return found
        raise error

    def _created(self, model_id: str, record: ModelRecord, revision: int) -> Registration:
        registration = Registration(model_id, record, revision, revision)
        self._registry.remember(registration)
        return registration

    def _former(self, lingering: Sequence[KeyValue]) -> Tombstone | None:
        """Returns the tombstone of the id's former registration. Returns None if copies are left too, or if the
        tombstone cannot be read."""
        if len(lingering) != 1 or self._keys.copy_of(lingering[0].key)[1] != TOMBSTONE:
            return None
        try:
            return Tombstone.decode(lingering[0].value)
        except ValueError as error:
            log.warning("a tombstone cannot be read", key=lingering[0].key, error=str(error))
            return None

    def _puts(self, model_id: str, record: ModelRecord, value: bytes) -> list[etcds.Op]:
        puts = [etcds.put_op(self._keys.model(model_id), value)]
        if record.limits != UNLIMITED:
            puts.append(etcds.put_op(self._keys.want(model_id), b""))
        return puts

    async def create_many(self, items: Sequence[Item], records: Sequence[ModelRecord | MeshError]) -> list[Fate]:
        """Registers the items that have a record. Returns the outcome of each item. Never raises."""
        fates: list[Fate] = [None] * len(items)
        good: list[int] = []
        again: list[int] = []  # ids that occur earlier in `items` too: created after the others
        seen: set[str] = set()
        values: dict[int, ModelRecord] = {}
        for index, (item, record) in enumerate(zip(items, records, strict=True)):
            if isinstance(record, MeshError):
                fates[index] = record
                continue
            values[index] = record
            (again if item.model_id in seen else good).append(index)
            seen.add(item.model_id)

        async def batch(indexes: list[int]) -> None:
            async with self._batches:
                await self._create_batch(indexes, items, values, fates)

        parts = [good[start : start + BATCH] for start in range(0, len(good), BATCH)]
        await asyncio.gather(*(batch(part) for part in parts))
        # If etcd is unavailable, these would wait for the same timeout one after another.
        away = next((r for r in fates if isinstance(r, MeshError) and r.reason is Reason.REGISTRY_AWAY), None)
        await self._create_each(again, items, values, fates, away)
        return fates

    async def _create_batch(
        self,
        indexes: list[int],
        items: Sequence[Item],
        values: dict[int, ModelRecord],
        fates: list[Fate],
    ) -> None:
        keys = self._keys
        late: list[int] = []  # these wait, concurrently, for former copies to be withdrawn
        for _ in range(ROUNDS):
            if not indexes:
                break
            compares, puts = [], []
            for index in indexes:
                key, copies = keys.model(items[index].model_id), keys.copies(items[index].model_id)
                compares += [etcds.absent(key), etcds.absent_prefix(copies)]
                puts += self._puts(items[index].model_id, values[index], values[index].encode())
            try:
                if (await self._etcd.txn(compares, puts)).succeeded:
                    indexes = []
                    break
                # Some are registered already, or former copies are left. This is rare, so it is a separate read:
                # reads in the transaction's other branch would double the cost of every batch.
                gets = []
                for index in indexes:
                    key, copies = keys.model(items[index].model_id), keys.copies(items[index].model_id)
                    gets += [
                        etcds.get_op(key),
                        etcds.get_range_op(copies, after_prefix(copies), limit=1, keys_only=True),
                    ]
                seen = (await self._etcd.txn((), gets)).responses
            except etcds.EtcdUnavailable as error:
                if not error.ambiguous:
                    for index in indexes:
                        fates[index] = error
                    return
                break  # the write may have been done: look up each item
            except etcds.EtcdError:  # most likely the batch is too large
                break
            # Items that exist have their outcome, and those with former copies come later: try the rest together.
            rest = []
            for place, index in enumerate(indexes):
                existing, lingering = etcds.found(seen[2 * place]), etcds.found(seen[2 * place + 1])
                if existing:
                    try:
                        _existing(decode(items[index].model_id, existing[0]), values[index])
                        fates[index] = EXISTING
                    except MeshError as error:
                        fates[index] = error
                elif lingering:
                    late.append(index)
                else:
                    rest.append(index)
            indexes = rest
        if late:
            await asyncio.gather(*(self._create_one(index, items, values, fates) for index in late))
        await self._create_each(indexes, items, values, fates, None)

    async def _create_each(
        self,
        indexes: Iterable[int],
        items: Sequence[Item],
        values: dict[int, ModelRecord],
        fates: list[Fate],
        away: MeshError | None,
    ) -> None:
        """Registers items one by one. Stops if etcd is unavailable, because each further item would wait for the same
        timeout. `away` is the error if etcd is known to be unavailable already, or None."""
        for index in indexes:
            if away is None:
                away = await self._create_one(index, items, values, fates)
            else:
                fates[index] = away

    async def _create_one(
        self,
        index: int,
        items: Sequence[Item],
        values: dict[int, ModelRecord],
        fates: list[Fate],
    ) -> MeshError | None:
        """Registers one item and sets its outcome. Returns the error if etcd is unavailable."""
        try:
            _, created = await self.create(items[index].model_id, values[index])
            fates[index] = None if created else EXISTING
        except MeshError as error:
            fates[index] = error
            return error if error.reason is Reason.REGISTRY_AWAY else None
        return None


def _existing(registration: Registration, record: ModelRecord) -> Registration:
    """Returns the existing registration if it has the attributes of `record`. Raises DifferentError if not."""
    if not registration.record.same_registration(record):
        raise DifferentError(registration.model_id, registration.record, record)
    return registration
