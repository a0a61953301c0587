"""Restoring a backup's records into a mesh that may be in use.

Existing records with the same meaning stay unchanged, so running the command again continues an interrupted restore.
Measurements and notes that the mesh has added to a record since the backup stay. Records that differ also stay, unless
the admin asks to overwrite them.

Three things need more than writing keys:

- A copy belongs to one registration, identified by the create revision of its record. So a record that differs is
  deleted and created again. If a pod may still answer from the old registration, a tombstone is left
  (`mesh.schema.lives`), and the record is created only when no pod can. Agents compare their copies with the registry
  about every 30 seconds. Until then the model is not registered, so that callers wait instead of getting another
  model's answer. If only limits differ, they are changed in place.
- A model's record counts the vmodels that name it. Models are created with a count of 0, and the transaction that
  writes a vmodel increments it.
- The leader finds models with a set number of copies by the keys of `wanted/`, which this module writes with the record
  and which are not part of a backup.
"""

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from mesh import etcd as etcds
from mesh.cli import parallel
from mesh.cli.backup import file, meaning, saving
from mesh.etcd import Etcd, EtcdError, EtcdUnavailable, KeyValue
from mesh.etcd.ranges import after_prefix
from mesh.schema import owner
from mesh.schema.keys import TOMBSTONE, Keys
from mesh.schema.lives import Tombstone, all_present, census
from mesh.schema.records import ModelRecord
from mesh.statuses import Reason

BATCH = 60
"""Records in one transaction: each takes two comparisons and up to two writes, and etcd allows 128 operations."""

DELETIONS = 30
"""Deletions in one transaction: each takes up to four writes, and all together two counts."""

BATCH_BYTES = 512 * 1024
"""Bytes in one transaction: a third of etcd's limit for a request."""

IN_FLIGHT = 8
"""Concurrent batches: etcd writes concurrent requests to its disk together."""

_TOMBSTONE = f"/{TOMBSTONE}".encode()
_ROUNDS = 8  # attempts at a record that others keep changing
_PAUSE = 0.5  # seconds between two checks for copies that are being unloaded


@dataclass(slots=True)
class Outcome:
    """The number of records so far, by outcome and kind, and the records that were not restored."""

    created: Counter[str] = field(default_factory=Counter)
    existing: Counter[str] = field(default_factory=Counter)
    overwritten: Counter[str] = field(default_factory=Counter)
    differing: list[tuple[str, str]] = field(default_factory=list)  # kind and id
    failed: list[tuple[str, str, str]] = field(default_factory=list)  # kind, id, and why
    recounted: int = 0  # models whose count of references was wrong
    dangling: list[str] = field(default_factory=list)  # vmodels that name a model which is not registered

    @property
    def done(self) -> int:
        """Number of records with an outcome."""
        counted = sum(sum(kinds.values()) for kinds in (self.created, self.existing, self.overwritten))
        return counted + len(self.differing) + len(self.failed)


class Restorer:
    """One restore. With `dry_run`, writes nothing. `wait` is the longest wait for copies to be unloaded, in seconds."""

    def __init__(self, etcd: Etcd, keys: Keys, *, overwrite: bool, dry_run: bool, wait: float) -> None:
        self._etcd = etcd
        self._keys = keys
        self._overwrite = overwrite
        self._dry_run = dry_run
        self._wait = wait
        self._prefixes = saving.prefixes(keys)
        self._met = dry_run  # the last batch had existing models: then read the next one before creating it
        self._waiting: list[file.BackupEntry] = []  # to be created once copies of earlier registrations are unloaded
        self._deleted: set[bytes] = set()  # models that were deleted to be created again
        self.outcome = Outcome()

    async def check(self, header: file.Header, install_id: str) -> None:
        """Raises BackupError if this backup must not be restored into this mesh, and EtcdError."""
        if header.schema > owner.SCHEMA:
            text = (
                f"its records have version {header.schema}, but this program knows {owner.SCHEMA}: use a newer program"
            )
            raise file.BackupError(text)
        kv = await self._etcd.get(self._keys.owner)
        if kv is None:
            return
        try:
            found = json.loads(kv.value)
            install, schema = str(found["install"]), int(found["schema"])
        except (ValueError, KeyError, TypeError):
            return  # the mesh's own processes report this
        if schema > owner.SCHEMA:
            text = f"the mesh at {self._keys.base} has keys of version {schema}, but this program knows {owner.SCHEMA}"
            raise file.BackupError(f"{text}: use a newer program")
        if install_id and install != install_id:
            text = f"the prefix {self._keys.base} belongs to the mesh {install!r}, but --install-id is {install_id!r}"
            raise file.BackupError(f"{text}: correct it, or use another --base")

    async def run(self, entries: Iterable[file.BackupEntry], progress: Callable[[int], None]) -> Outcome:
        """Restores all entries. Calls `progress` with the number of records that are restored so far. Raises
        EtcdError."""
        by_kind = itertools.groupby(entries, key=lambda entry: entry.kind)
        for kind, group in by_kind:
            batches = _batches(group)
            if kind == "registry":
                await self._many(batches, progress)
                await self._late(progress)
                continue
            for entry in itertools.chain.from_iterable(batches):
                await (self._vmodel(entry) if kind == "vmodels" else self._setting(entry))
                progress(self.outcome.done)
        if not self._dry_run:
            await self._recount()
        return self.outcome

    # --- models ---

    async def _many(self, batches: Iterator[list[file.BackupEntry]], progress: Callable[[int], None]) -> None:
        async def worker() -> None:
            for batch in batches:  # one shared iterator: each worker takes the next batch when its own is done
                await self._models(batch)
                progress(self.outcome.done)

        await parallel.run(worker, IN_FLIGHT, EtcdError, file.BackupError)

    async def _models(self, batch: Sequence[file.BackupEntry]) -> None:
        """Restores one batch, except for entries that have to wait for copies."""
        todo, look = list(batch), self._met
        away: EtcdUnavailable | None = None
        for _ in range(_ROUNDS):
            if not todo:
                return
            try:
                if not look and await self._create(todo):
                    return
                todo, look = await self._settle(todo), self._dry_run
            except EtcdUnavailable as error:
                if not error.ambiguous:
                    raise
                away = error  # it may have succeeded: the next read shows
            except EtcdError as error:
                if error.reason is not Reason.TOO_LARGE or len(todo) == 1:
                    self._fail(todo, error.text)
                    return
                for entry in todo:
                    await self._models([entry])
                return
        if away is not None:
            raise away
        self._fail(todo, "other clients keep changing it: try again later")

    async def _create(self, todo: Sequence[file.BackupEntry]) -> bool:
        """Creates all records if none exists, and if no copies of earlier registrations are left. Otherwise creates
        none, and returns False."""
        compares: list[etcds.Compare] = []
        puts: list[etcds.Op] = []
        for entry in todo:
            key = self._key(entry)
            value, limited = meaning.fresh(entry.value)
            compares += [etcds.absent(key), etcds.absent_prefix(self._copies(entry))]
            puts.append(etcds.put_op(key, value))
            if limited:
                puts.append(etcds.put_op(self._want(entry), b""))
        if not (await self._etcd.txn(compares, puts)).succeeded:
            return False
        for entry in todo:
            counted = self.outcome.overwritten if entry.name in self._deleted else self.outcome.created
            counted[entry.kind] += 1
        return True

    async def _settle(self, todo: Sequence[file.BackupEntry]) -> list[file.BackupEntry]:
        """Compares entries with existing records. Handles the entries whose records exist, and returns those still to
        be created."""
        left: list[file.BackupEntry] = []
        stale: list[tuple[file.BackupEntry, KeyValue]] = []
        found, present = await self._look(todo)
        over: list[KeyValue] = []  # tombstones of models for which no pod can answer
        self._met = self._dry_run or any(kv is not None for kv, _ in found)
        for entry, (kv, lingering) in zip(todo, found, strict=True):
            if kv is None and self._dry_run:
                self.outcome.created[entry.kind] += 1
            elif kv is None and lingering is not None and present and lingering.key.endswith(_TOMBSTONE):
                over.append(lingering)
                left.append(entry)
            elif kv is None:
                (self._waiting if lingering else left).append(entry)
            elif (difference := meaning.difference(kv.value, entry.value)) is meaning.Difference.NONE:
                # This also finds our own write if it timed out but succeeded.
                counted = self.outcome.overwritten if entry.name in self._deleted else self.outcome.existing
                counted[entry.kind] += 1
            elif not self._overwrite:
                self.outcome.differing.append((entry.kind, _shown(entry.name)))
            elif self._dry_run:
                self.outcome.overwritten[entry.kind] += 1
            elif difference is meaning.Difference.LIMITS:
                left += await self._limit(entry, kv)
            else:
                stale.append((entry, kv))
        if over:
            unchanged = [etcds.modified(kv.key, kv.mod_revision) for kv in over]
            await self._etcd.txn(unchanged, [etcds.delete_op(kv.key) for kv in over])
        for start in range(0, len(stale), DELETIONS):
            left += await self._delete(stale[start : start + DELETIONS])
        return left

    async def _look(
        self, todo: Sequence[file.BackupEntry]
    ) -> tuple[list[tuple[KeyValue | None, KeyValue | None]], bool]:
        """Returns, for each entry, the existing record, and the key of one of its copies or else its tombstone. Also
        returns whether the lives of all pods are present."""
        gets: list[etcds.Op] = census(self._keys)
        for entry in todo:
            copies = self._copies(entry)
            gets += [
                etcds.get_op(self._key(entry)),
                etcds.get_range_op(copies, after_prefix(copies), limit=1, keys_only=True),
            ]
        responses = (await self._etcd.txn((), gets)).responses
        found = [part[0] if isinstance(part, tuple) and part else None for part in responses[2:]]
        return list(zip(found[::2], found[1::2], strict=True)), all_present(responses[:2])

    async def _limit(self, entry: file.BackupEntry, kv: KeyValue) -> list[file.BackupEntry]:
        """Changes a model's limits in place. Returns the entry if another write came first."""
        record = replace(ModelRecord.decode(kv.value), limits=ModelRecord.decode(entry.value).limits)
        puts = [etcds.put_op(self._key(entry), record.encode()), etcds.put_op(self._want(entry), b"")]
        if not (await self._etcd.txn([etcds.modified(self._key(entry), kv.mod_revision)], puts)).succeeded:
            return [entry]
        self.outcome.overwritten[entry.kind] += 1
        return []

    async def _delete(self, stale: Sequence[tuple[file.BackupEntry, KeyValue]]) -> list[file.BackupEntry]:
        """Deletes records that are to be created again: all, or none if one has changed. Returns the entries, whose
        keys have to be read again."""
        looked, present = await self._look([entry for entry, _ in stale])
        compares = [etcds.modified(kv.key, kv.mod_revision) for _, kv in stale]
        deletions: list[etcds.Op] = []
        burials: list[tuple[etcds.Compare, etcds.Op]] = []  # of models for which no pod is known to answer
        for (entry, kv), (_, lingering) in zip(stale, looked, strict=True):
            deletions += [etcds.delete_op(key) for key in (kv.key, self._want(entry), self._reload(entry))]
            burial = etcds.put_op(self._copies(entry) + TOMBSTONE.encode(), _tombstone(kv.value).encode())
            if present and lingering is None:
                compares.append(etcds.absent_prefix(self._copies(entry)))
                burials.append((etcds.absent(kv.key), burial))
            else:
                deletions.append(burial)
        # Noted beforehand: if this times out but succeeds, what is created next still counts as overwritten.
        self._deleted.update(entry.name for entry, _ in stale)
        result = await self._etcd.txn(compares, [*deletions, *census(self._keys)])
        if not result.succeeded:
            self._deleted.difference_update(entry.name for entry, _ in stale)
        elif burials and not all_present(result.responses[-2:]):  # a pod was cut off meanwhile
            await self._etcd.txn([absent for absent, _ in burials], [burial for _, burial in burials])
        return [entry for entry, _ in stale]

    async def _late(self, progress: Callable[[int], None]) -> None:
        """Creates the records of waiting entries, each when its copies are unloaded. Entries that still have copies
        after `wait` seconds fail."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._wait
        while self._waiting:
            waiting, self._waiting = self._waiting, []
            for batch in _batches(iter(waiting)):
                await self._models(batch)
            progress(self.outcome.done)
            if self._waiting and loop.time() > deadline:
                text = (
                    f"pods still have copies of its earlier registration after {self._wait:g} s, or are cut "
                    "off from etcd and may have some (see `mesh pods`): restore again later"
                )
                self._fail(self._waiting, text)
                self._waiting = []
            if self._waiting:
                await asyncio.sleep(_PAUSE)

    # --- vmodels and settings ---

    async def _vmodel(self, entry: file.BackupEntry) -> None:
        """Writes a vmodel, and increments the counts in the records of the models that it names."""
        key = self._key(entry)
        for _ in range(_ROUNDS):
            kv = await self._etcd.get(key)
            if kv is not None and meaning.same_vmodel(kv.value, entry.value):
                self.outcome.existing[entry.kind] += 1
                return
            if kv is not None and not self._overwrite:
                self.outcome.differing.append((entry.kind, _shown(entry.name)))
                return
            change = Counter(meaning.named(entry.value))
            change.subtract(meaning.named(kv.value) if kv is not None else ())
            compares = [etcds.modified(key, kv.mod_revision if kv is not None else 0)]
            puts = [etcds.put_op(key, entry.value)]
            dangling = False
            for model, difference in change.items():
                found = await self._etcd.get(self._keys.model(model))
                dangling |= found is None and difference > 0
                if found is not None and difference:
                    compares.append(etcds.modified(found.key, found.mod_revision))
                    puts.append(etcds.put_op(found.key, meaning.counted(found.value, difference)))
            if await self._write(compares, puts):
                if dangling:
                    self.outcome.dangling.append(_shown(entry.name))
                (self.outcome.created if kv is None else self.outcome.overwritten)[entry.kind] += 1
                return
        self._fail([entry], "other clients keep changing it: try again later")

    async def _recount(self) -> None:
        """Corrects the number of references in models' records, because an unchanged vmodel may name a model that was
        created again.

        A write that changes which vmodels name a model also writes the model's record. So if a record has not changed
        since the vmodels were read, the count from the vmodels is right."""
        for _ in range(_ROUNDS):
            names = sorted(await self._named())
            read: dict[str, KeyValue] = {}
            for start in range(0, len(names), BATCH):
                part = names[start : start + BATCH]
                ops = [etcds.get_op(self._keys.model(name)) for name in part]
                for name, response in zip(part, (await self._etcd.txn((), ops)).responses, strict=True):
                    if kvs := etcds.found(response):
                        read[name] = kvs[0]
            counts = await self._named()
            wrong = {name: kv for name, kv in read.items() if meaning.references(kv.value) not in (None, counts[name])}
            left = False
            for name, kv in wrong.items():
                value = meaning.counted(kv.value, counts[name] - (meaning.references(kv.value) or 0))
                done = await self._write([etcds.modified(kv.key, kv.mod_revision)], [etcds.put_op(kv.key, value)])
                self.outcome.recounted += done
                left |= not done
            if not left:
                return

    async def _named(self) -> Counter[str]:
        """Returns the number of vmodels that name each model now."""
        named: Counter[str] = Counter()
        async for kv in self._etcd.scan(self._keys.vmodels):
            named.update(meaning.named(kv.value))
        return named

    async def _setting(self, entry: file.BackupEntry) -> None:
        key = self._key(entry)
        for _ in range(_ROUNDS):
            kv = await self._etcd.get(key)
            if kv is not None and meaning.of(kv.value) == meaning.of(entry.value):
                self.outcome.existing[entry.kind] += 1
                return
            if kv is not None and not self._overwrite:
                self.outcome.differing.append((entry.kind, _shown(entry.name)))
                return
            compare = etcds.modified(key, kv.mod_revision if kv is not None else 0)
            if await self._write([compare], [etcds.put_op(key, entry.value)]):
                (self.outcome.created if kv is None else self.outcome.overwritten)[entry.kind] += 1
                return
        self._fail([entry], "other clients keep changing it: try again later")

    async def _write(self, compares: Sequence[etcds.Compare], puts: Sequence[etcds.Op]) -> bool:
        """Writes if all comparisons hold. Returns False if one does not. Also returns False if the outcome is unknown,
        because the entry is then read again."""
        if self._dry_run:
            return True
        try:
            return (await self._etcd.txn(compares, puts)).succeeded
        except EtcdUnavailable as error:
            if not error.ambiguous:
                raise
            return False

    # --- keys ---

    def _fail(self, entries: Iterable[file.BackupEntry], why: str) -> None:
        self.outcome.failed += [(entry.kind, _shown(entry.name), why) for entry in entries]

    def _key(self, entry: file.BackupEntry) -> bytes:
        return self._prefixes[entry.kind] + entry.name

    def _copies(self, entry: file.BackupEntry) -> bytes:
        return self._keys.copies(entry.name.decode(errors="surrogateescape"))

    def _reload(self, entry: file.BackupEntry) -> bytes:
        return self._keys.reload(entry.name.decode(errors="surrogateescape"))

    def _want(self, entry: file.BackupEntry) -> bytes:
        return self._keys.want(entry.name.decode(errors="surrogateescape"))


def _tombstone(value: bytes) -> Tombstone:
    try:
        return Tombstone.of(ModelRecord.decode(value))
    except ValueError:  # no pod could have loaded it
        return Tombstone("", "", "", "")


def _shown(name: bytes) -> str:
    return name.decode(errors="backslashreplace")


def _batches(entries: Iterator[file.BackupEntry]) -> Iterator[list[file.BackupEntry]]:
    """Yields batches of entries, bounded in number and bytes."""
    batch: list[file.BackupEntry] = []
    size = 0
    for entry in entries:
        if batch and (len(batch) >= BATCH or size + len(entry.value) > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(entry)
        size += len(entry.name) + len(entry.value)
    if batch:
        yield batch
