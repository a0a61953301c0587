"""Bringing a backup's records into a mesh that may be in use.

What is there already and means the same is left as it is, so the same command goes on where an earlier one stopped, and
what the mesh has measured or noted since is not lost. What differs is left too, unless overwriting was asked for.

Three things make this more than writing keys:

- A copy belongs to one registration, which is the create revision of its record. So a record that differs is deleted,
  with a tombstone where a pod may answer for it (`mesh.schema.lives`), and created again once no pod may; agents
  compare their copies about every 30 seconds. Until then the model is not registered: a wait, and never another
  model's answer. Limits alone are changed in place.
- How many vmodels name a model stands in its record. Models are created with none, and each vmodel counts itself in the
  transaction that writes it.
- The leader finds models whose number of copies was set by keys of `wanted/`, which are written along and not kept.
"""

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from mesh import etcd as etcds
from mesh.cli.backup import file, meaning, saving
from mesh.etcd import Etcd, EtcdError, EtcdUnavailable, KeyValue
from mesh.etcd.ranges import after_prefix
from mesh.schema import owner
from mesh.schema.keys import TOMBSTONE, Keys
from mesh.schema.lives import Tombstone, all_present, census
from mesh.schema.records import ModelRecord
from mesh.statuses import Reason

BATCH = 60
"""Records of one transaction: two comparisons and up to two writes for each, of the 128 that etcd takes."""

DELETIONS = 30
"""Deletions of one transaction: up to four writes for each, and two counts."""

BATCH_BYTES = 512 * 1024
"""A third of what etcd takes in one request."""

IN_FLIGHT = 8
"""Batches on the way at once: etcd writes what comes together to its disk together."""

_TOMBSTONE = f"/{TOMBSTONE}".encode()
_ROUNDS = 8  # attempts at records that others keep changing
_PAUSE = 0.5  # seconds between two looks for copies that are being withdrawn


@dataclass(slots=True)
class Outcome:
    """What has come of the records so far, by kind; of those that were not restored, which."""

    created: Counter[str] = field(default_factory=Counter)
    existing: Counter[str] = field(default_factory=Counter)
    overwritten: Counter[str] = field(default_factory=Counter)
    differing: list[tuple[str, str]] = field(default_factory=list)  # kind and id
    failed: list[tuple[str, str, str]] = field(default_factory=list)  # kind, id, and why
    dangling: list[str] = field(default_factory=list)  # vmodels that name a model which is not there

    @property
    def done(self) -> int:
        """Records with an outcome."""
        counted = sum(sum(kinds.values()) for kinds in (self.created, self.existing, self.overwritten))
        return counted + len(self.differing) + len(self.failed)


class Restorer:
    """One restore. `dry_run`: it only reads. `wait`: seconds, for copies that are being withdrawn."""

    def __init__(self, etcd: Etcd, keys: Keys, *, overwrite: bool, dry_run: bool, wait: float) -> None:
        self._etcd = etcd
        self._keys = keys
        self._overwrite = overwrite
        self._dry_run = dry_run
        self._wait = wait
        self._prefixes = saving.prefixes(keys)
        self._met = dry_run  # the last look found models there: then the next is looked for before it is created
        self._waiting: list[file.Entry] = []  # to be created when copies of their former lives have gone
        self._deleted: set[bytes] = set()  # models that were there, deleted to be created anew
        self.outcome = Outcome()

    async def check(self, header: file.Header, install_id: str) -> None:
        """Whether this backup may come into this mesh. Raises BackupError, EtcdError."""
        if header.schema > owner.SCHEMA:
            text = f"its records are of version {header.schema}, and this program knows {owner.SCHEMA}: use a newer one"
            raise file.BackupError(text)
        kv = await self._etcd.get(self._keys.owner)
        if kv is None:
            return
        try:
            found = json.loads(kv.value)
            install, schema = str(found["install"]), int(found["schema"])
        except (ValueError, KeyError, TypeError):
            return  # the mesh's own processes will say so
        if schema > owner.SCHEMA:
            text = f"the mesh at {self._keys.base} has keys of version {schema}, and this program knows {owner.SCHEMA}"
            raise file.BackupError(f"{text}: use a newer one")
        if install_id and install != install_id:
            text = f"the prefix {self._keys.base} belongs to the mesh {install!r}, and --install-id says {install_id!r}"
            raise file.BackupError(f"{text}: name that one, or another --base")

    async def run(self, entries: Iterable[file.Entry], progress: Callable[[int], None]) -> Outcome:
        """Restores all of them. `progress` is given the records with an outcome. Raises EtcdError."""
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
        return self.outcome

    # --- models ---

    async def _many(self, batches: Iterator[list[file.Entry]], progress: Callable[[int], None]) -> None:
        async def worker() -> None:
            for batch in batches:  # one iterator, shared: each takes the next when it has done its own
                await self._models(batch)
                progress(self.outcome.done)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(IN_FLIGHT):
                    group.create_task(worker())
        except* (EtcdError, file.BackupError) as several:
            raise several.exceptions[0] from None

    async def _models(self, batch: Sequence[file.Entry]) -> None:
        """One batch to its outcomes, but for those that have to wait for copies."""
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
                away = error  # it may have been done: the next look tells
            except EtcdError as error:
                if error.reason is not Reason.TOO_LARGE or len(todo) == 1:
                    self._fail(todo, error.text)
                    return
                for entry in todo:
                    await self._models([entry])
                return
        if away is not None:
            raise away
        self._fail(todo, "others keep changing it")

    async def _create(self, todo: Sequence[file.Entry]) -> bool:
        """Creates all, if none is there and none has copies left."""
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

    async def _settle(self, todo: Sequence[file.Entry]) -> list[file.Entry]:
        """Looks at each, settles those that are there, and gives those that are left to be created."""
        left: list[file.Entry] = []
        stale: list[tuple[file.Entry, KeyValue]] = []
        found, present = await self._look(todo)
        over: list[KeyValue] = []  # tombstones of models that no pod can answer for
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
                # Its own write, if it timed out and was done all the same, is found so too.
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

    async def _look(self, todo: Sequence[file.Entry]) -> tuple[list[tuple[KeyValue | None, KeyValue | None]], bool]:
        """For each the key as it is, and the first of its copies, its tombstone being the last. And whether each life
        of a pod has presence."""
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

    async def _limit(self, entry: file.Entry, kv: KeyValue) -> list[file.Entry]:
        """Changes the limits in place; the entry again where somebody else was faster."""
        record = replace(ModelRecord.decode(kv.value), limits=ModelRecord.decode(entry.value).limits)
        puts = [etcds.put_op(self._key(entry), record.encode()), etcds.put_op(self._want(entry), b"")]
        if not (await self._etcd.txn([etcds.modified(self._key(entry), kv.mod_revision)], puts)).succeeded:
            return [entry]
        self.outcome.overwritten[entry.kind] += 1
        return []

    async def _delete(self, stale: Sequence[tuple[file.Entry, KeyValue]]) -> list[file.Entry]:
        """Deletes records that are to be created anew, all or none; gives them back, to be looked at again."""
        looked, present = await self._look([entry for entry, _ in stale])
        compares = [etcds.modified(kv.key, kv.mod_revision) for _, kv in stale]
        deletions: list[etcds.Op] = []
        burials: list[tuple[etcds.Compare, etcds.Op]] = []  # of models that nobody answers for, as far as is known
        for (entry, kv), (_, lingering) in zip(stale, looked, strict=True):
            deletions += [etcds.delete_op(key) for key in (kv.key, self._want(entry), self._reload(entry))]
            burial = etcds.put_op(self._copies(entry) + TOMBSTONE.encode(), _tombstone(kv.value).encode())
            if present and lingering is None:
                compares.append(etcds.absent_prefix(self._copies(entry)))
                burials.append((etcds.absent(kv.key), burial))
            else:
                deletions.append(burial)
        # Noted before: if this times out and was done, what is created next has overwritten something all the same.
        self._deleted.update(entry.name for entry, _ in stale)
        result = await self._etcd.txn(compares, [*deletions, *census(self._keys)])
        if not result.succeeded:
            self._deleted.difference_update(entry.name for entry, _ in stale)
        elif burials and not all_present(result.responses[-2:]):  # a pod was cut off in this very moment
            await self._etcd.txn([absent for absent, _ in burials], [burial for _, burial in burials])
        return [entry for entry, _ in stale]

    async def _late(self, progress: Callable[[int], None]) -> None:
        """Creates those that had to wait for copies, as these go; what still has some after `wait` s has failed."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._wait
        while self._waiting:
            waiting, self._waiting = self._waiting, []
            for batch in _batches(iter(waiting)):
                await self._models(batch)
            progress(self.outcome.done)
            if self._waiting and loop.time() > deadline:
                text = (
                    f"pods still hold copies of its former registration after {self._wait:g} s, or may hold some, cut "
                    "off from etcd (`mesh pods` tells): restore again later"
                )
                self._fail(self._waiting, text)
                self._waiting = []
            if self._waiting:
                await asyncio.sleep(_PAUSE)

    # --- vmodels and settings ---

    async def _vmodel(self, entry: file.Entry) -> None:
        """Writes a vmodel, and counts it at the models that it names."""
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
        self._fail([entry], "others keep changing it")

    async def _setting(self, entry: file.Entry) -> None:
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
        self._fail([entry], "others keep changing it")

    async def _write(self, compares: Sequence[etcds.Compare], puts: Sequence[etcds.Op]) -> bool:
        """Whether it was done; a write of unknown outcome was not, and is found done by the next look."""
        if self._dry_run:
            return True
        try:
            return (await self._etcd.txn(compares, puts)).succeeded
        except EtcdUnavailable as error:
            if not error.ambiguous:
                raise
            return False

    # --- keys ---

    def _fail(self, entries: Iterable[file.Entry], why: str) -> None:
        self.outcome.failed += [(entry.kind, _shown(entry.name), why) for entry in entries]

    def _key(self, entry: file.Entry) -> bytes:
        return self._prefixes[entry.kind] + entry.name

    def _copies(self, entry: file.Entry) -> bytes:
        return self._keys.copies(entry.name.decode(errors="surrogateescape"))

    def _reload(self, entry: file.Entry) -> bytes:
        return self._keys.reload(entry.name.decode(errors="surrogateescape"))

    def _want(self, entry: file.Entry) -> bytes:
        return self._keys.want(entry.name.decode(errors="surrogateescape"))


def _tombstone(value: bytes) -> Tombstone:
    try:
        return Tombstone.of(ModelRecord.decode(value))
    except ValueError:  # nobody could have loaded it
        return Tombstone("", "", "", "")


def _shown(name: bytes) -> str:
    return name.decode(errors="backslashreplace")


def _batches(entries: Iterator[file.Entry]) -> Iterator[list[file.Entry]]:
    """Bounded in number and bytes."""
    batch: list[file.Entry] = []
    size = 0
    for entry in entries:
        if batch and (len(batch) >= BATCH or size + len(entry.value) > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(entry)
        size += len(entry.name) + len(entry.value)
    if batch:
        yield batch
