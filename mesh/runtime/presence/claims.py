"""The right to load a model: one transaction that writes this pod's copy unless other pods already have copies.

The transaction succeeds only if the model still has the same registration, and no more copies in other pods than the
caller expects, so two routers, or two views of the mesh, never load a model twice. The same transaction returns the
model's record, and whether a few other models have copies in other pods (the choice of victims may depend on that), so
that neither costs another round trip.

The claim is under the pod's lease, so a dead pod's claims end with its lease. The claim requires that the pod is
published.

The first load of a registration's content determines the registration's digest. The copy is therefore *published* by a
separate transaction, which writes the digest into the model's record, before the load is answered. If two pods make a
first load, the later pod thus learns of the earlier one, and whether both have the same content (`publish`).
"""

from collections.abc import Callable, Sequence

from mesh.etcd import (
    Etcd,
    EtcdError,
    EtcdLeaseLost,
    EtcdUnavailable,
    KeyValue,
    TxnResult,
    absent_range,
    created,
    get_op,
    get_range_op,
    leased,
    modified,
    put_op,
)
from mesh.etcd.ranges import after_prefix
from mesh.runtime.presence.publishing import Presence
from mesh.runtime.presence.verdicts import (
    Away,
    Claimed,
    Contradicted,
    Elsewhere,
    Publication,
    Published,
    Stale,
    Verdict,
)
from mesh.schema import records
from mesh.schema.keys import Keys
from mesh.telemetry import logs

log = logs.get(__name__)

TIMEOUT = 3.0
"""Time limit of a claim, in seconds. A caller waits for the claim, and a fast refusal is better for the caller than a
late success."""

_TRIES = 4
_HOLDERS = 16  # holders that are read if a claim fails
_SPARES = 3  # copies read of a possible victim: it only matters whether there is another


class Claims:
    """The claims of one pod."""

    def __init__(self, etcd: Etcd, keys: Keys, presence: Presence) -> None:
        self._etcd = etcd
        self._keys = keys
        self._presence = presence

    async def claim(
        self, model_id: str, copy: records.CopyRecord, *, expected: int = 0, ask: Sequence[str] = ()
    ) -> Verdict:
        """Claims the model for `copy` if at most `expected` other pods have a copy. A won claim also says how many
        other pods have loaded copies of the models in `ask`: up to three each.

        Overwrites a key that this pod has left behind. If etcd is unavailable, the verdict is Away. If cancelled,
        cleans up in the background.
        """
        async with self._presence.claiming(model_id) as claiming:
            if claiming.lease is None:
                return Away("this pod is not published in etcd at the moment")
            try:
                for _ in range(_TRIES):
                    others = await self._others(model_id) if expected else ()
                    if len(others) > expected:
                        return Elsewhere(_best(others, self._keys))
                    claiming.unsure = True
                    result = await self._attempt(model_id, copy, others, claiming.lease, ask)
                    claiming.unsure = False
                    if result.succeeded:
                        claiming.record = copy
                        return self._claimed(result, ask)
                    verdict = self._lost(model_id, copy, expected, result, claiming.lease)
                    if verdict is not None:
                        return verdict
            except EtcdLeaseLost:
                self._presence.lease_gone(claiming.lease, "etcd no longer knows its lease")
                return Away("this pod has lost its lease")
            except EtcdUnavailable as error:
                return Away(error.text)
            except EtcdError as error:
                log.warning("claim refused by etcd", model=model_id, error=error.detail)
                return Away(error.text)
        return Away("the copies of this model keep changing: try again")

    async def look(self, model_id: str, revision: int) -> Claimed | Stale | Away:
        """Reads the record of a model that needs no claim, because this pod already has a copy. Returns Stale if
        `revision` is not the current registration, and Away if etcd does not answer."""
        try:
            kv = await self._etcd.get(self._keys.model(model_id), timeout=TIMEOUT)
        except EtcdError as error:
            return Away(error.text)
        if kv is None or kv.create_revision != revision:
            return Stale()
        return _read(kv, {})

    async def publish(
        self,
        model_id: str,
        copy: records.CopyRecord,
        claimed: Claimed,
        remember: Callable[[records.ModelRecord], records.ModelRecord],
    ) -> Publication:
        """Publishes a loaded copy together with the results of its load, which `remember` puts into the record. Returns
        Contradicted if the record has another digest than the copy, Stale if the model was registered again or its
        content reloaded since the claim, and Away if etcd does not confirm the transaction."""
        key = self._keys.model(model_id)
        async with self._presence.claiming(model_id) as claiming:
            if claiming.lease is None:
                return Away("this pod is not published in etcd at the moment")
            try:
                for _ in range(_TRIES):
                    record = claimed.record
                    if record.generation != copy.generation:
                        return Stale()
                    if record.digest and record.digest != copy.digest:
                        return Contradicted(record)
                    after = remember(record)
                    claiming.unsure = True
                    result = await self._etcd.txn(
                        [leased(self._presence.key, claiming.lease), modified(key, claimed.modified)],
                        [
                            put_op(self._keys.copy(model_id, self._presence.pod), copy.encode(), claiming.lease),
                            *([put_op(key, after.encode())] if after != record else ()),
                        ],
                        [get_op(self._presence.key), get_op(key)],
                        timeout=TIMEOUT,
                    )
                    claiming.unsure = False
                    if result.succeeded:
                        claiming.record = copy
                        return Published(after)
                    pods, found = result.responses
                    if not isinstance(pods, tuple) or not pods or pods[0].lease != claiming.lease:
                        self._presence.lease_gone(claiming.lease, "its key is not in etcd")
                        return Away("this pod has lost its lease")
                    if not isinstance(found, tuple) or not found or found[0].create_revision != copy.create_revision:
                        return Stale()
                    claimed = _read(found[0], {})
                    if not claimed.modified:
                        return Away("the model's record cannot be read")
            except EtcdLeaseLost:
                self._presence.lease_gone(claiming.lease, "etcd no longer knows its lease")
                return Away("this pod has lost its lease")
            except EtcdError as error:
                return Away(error.text)
        return Away("the record of this model keeps changing: try again")

    async def _others(self, model_id: str) -> tuple[KeyValue, ...]:
        prefix = self._keys.copies(model_id)
        page = await self._etcd.page(prefix, after_prefix(prefix), limit=_HOLDERS, timeout=TIMEOUT)
        own = self._keys.copy(model_id, self._presence.pod)
        return tuple(kv for kv in page.kvs if kv.key != own)

    async def _attempt(
        self,
        model_id: str,
        copy: records.CopyRecord,
        others: Sequence[KeyValue],
        lease: int,
        ask: Sequence[str],
    ) -> TxnResult:
        keys, prefix = self._keys, self._keys.copies(model_id)
        own, record = keys.copy(model_id, self._presence.pod), keys.model(model_id)
        compares = [leased(self._presence.key, lease), created(record, "==", copy.create_revision)]
        compares += [created(kv.key, "==", kv.create_revision) for kv in others]
        # No key lies between those that may exist.
        start = prefix
        for key in sorted([own, *(kv.key for kv in others)]):
            compares.append(absent_range(start, key))
            start = key + b"\0"
        compares.append(absent_range(start, after_prefix(prefix)))
        success = [put_op(own, copy.encode(), lease), get_op(record)]
        for victim in ask:
            copies = keys.copies(victim)
            success.append(get_range_op(copies, after_prefix(copies), limit=_SPARES))
        failure = [
            get_op(self._presence.key),
            get_range_op(record, record + b"\0", keys_only=True),
            get_range_op(prefix, after_prefix(prefix), limit=_HOLDERS),
        ]
        return await self._etcd.txn(compares, success, failure, timeout=TIMEOUT)

    def _claimed(self, result: TxnResult, ask: Sequence[str]) -> Claimed:
        _, record, *copies = result.responses
        assert isinstance(record, tuple)
        spares = {}
        for victim, found in zip(ask, copies, strict=True):
            assert isinstance(found, tuple)
            spares[victim] = sum(self._pod(kv) != self._presence.pod and _loaded(kv) for kv in found)
        return _read(record[0], spares)

    def _lost(
        self, model_id: str, copy: records.CopyRecord, expected: int, result: TxnResult, lease: int
    ) -> Verdict | None:
        """Returns the reason why the claim failed, or None if the reason no longer holds."""
        pods, record, found = result.responses
        assert isinstance(pods, tuple)
        assert isinstance(record, tuple)
        assert isinstance(found, tuple)
        if not pods or pods[0].lease != lease:
            self._presence.lease_gone(lease, "its key is not in etcd")
            return Away("this pod has lost its lease")
        if not record or record[0].create_revision != copy.create_revision:
            return Stale()
        others = [kv for kv in found if self._pod(kv) != self._presence.pod]
        return Elsewhere(_best(others, self._keys)) if len(others) > expected else None

    def _pod(self, kv: KeyValue) -> str:
        return self._keys.copy_of(kv.key)[1]


def _read(kv: KeyValue, spares: dict[str, int]) -> Claimed:
    try:
        return Claimed(records.ModelRecord.decode(kv.value), spares, kv.mod_revision)
    except ValueError as error:
        log.warning("the record of a model cannot be read", key=kv.key, error=str(error))
        return Claimed(records.ModelRecord(type=""), spares)


def _loaded(kv: KeyValue) -> bool:
    return f'"state":"{records.LOADED}"'.encode() in kv.value


def _best(copies: Sequence[KeyValue], keys: Keys) -> str:
    """Returns the pod to ask instead: a pod that has a copy, or else one that is loading the model."""
    return keys.copy_of(max(copies, key=_loaded).key)[1]
