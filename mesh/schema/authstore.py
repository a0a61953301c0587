"""Changes of API keys and grants in etcd, for routers and for commands that work without a router.

All methods raise EtcdError, and MeshError for changes that are not possible. Each write of a record is compare-and-set.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from mesh.access.grants import Grant
from mesh.etcd import Etcd, KeyValue, absent, delete_op, modified, put_op
from mesh.etcd.ranges import after_prefix
from mesh.schema import auth
from mesh.schema.auth import KeyRecord, KeySecret
from mesh.schema.keys import Keys
from mesh.statuses import MeshError, Reason
from mesh.telemetry import logs

log = logs.get(__name__)

_OPS = 100  # operations of one transaction: etcd's limit is 128


@dataclass(frozen=True, slots=True)
class Made:
    """A new key. It can be shown only once, because only its digest is stored."""

    name: str
    key: str
    expires: int  # milliseconds since the epoch; 0: never
    former_until: int = 0  # when the secret that it replaces expires; 0: it replaces none


class AuthStore:
    """The keys and grants of one mesh. Times are in milliseconds since the epoch."""

    def __init__(self, etcd: Etcd, keys: Keys) -> None:
        self._etcd = etcd
        self._keys = keys

    # --- keys ---

    async def keys(self) -> dict[str, KeyRecord]:
        """Returns all keys by name. Leaves out records that cannot be read, which give nobody access."""
        found: dict[str, KeyRecord] = {}
        async for kv in self._etcd.scan(self._keys.auth_keys):
            try:
                found[_last(kv.key)] = auth.decode_key(kv.value)
            except ValueError as error:
                log.warning("the record of a key in etcd cannot be read", key=_last(kv.key), error=str(error))
        return found

    async def create(
        self, name: str, *, now: int, expires: int = 0, groups: tuple[str, ...] = (), given: Grant | None = None
    ) -> Made:
        """Creates a key, and optionally a grant under the same name. Raises BAD_REQUEST for an invalid name, and
        CONFLICT if the key or the grant exists."""
        _name(name, "a key")
        key = auth.fresh()
        record = KeyRecord((KeySecret(auth.digest_of(key.encode()), now, expires),), groups)
        at = self._keys.auth_key(name)
        compares, ops = [absent(at)], [put_op(at, auth.encode_key(record))]
        if given is not None:
            compares.append(absent(self._keys.auth_grant(name)))
            ops.append(put_op(self._keys.auth_grant(name), auth.encode_grant(given)))
        if not (await self._etcd.txn(compares, ops)).succeeded:
            if await self._etcd.get(at) is None:
                text = (
                    f"the grant {name} already exists: remove it (mesh grants rm {name}), or give the key another name"
                )
            else:
                text = f"the key {name} already exists: rotate it (mesh keys rotate {name}), or give another name"
            raise MeshError(Reason.CONFLICT, text)
        return Made(name, key, expires)

    async def rotate(self, name: str, *, now: int, overlap: int, expires: int = 0) -> Made:
        """Adds a secret to a key. The old secret expires after at most `overlap` milliseconds, so that callers can
        switch without a gap. Without `expires`, the new secret is valid for as long as the old one was. Raises
        UNKNOWN_MODEL if there is no such key, and PRECONDITION if the key is being rotated already, or its record
        cannot be read."""
        _name(name, "a key")
        key = auth.fresh()

        def change(kv: KeyValue | None) -> bytes:
            record = _decoded(name, kv)
            last = record.secrets[-1]
            lifetime = last.expires - last.created if last.expires else 0
            fresh = KeySecret(auth.digest_of(key.encode()), now, expires or (now + lifetime if lifetime else 0))
            living = [one for one in record.secrets if not one.expired(now)]
            if len(living) > 1 and overlap:
                text = (
                    f"the key {name} is already being rotated, and its old secret is still valid: wait until it "
                    "expires, or end it now (--overlap 0)"
                )
                raise MeshError(Reason.PRECONDITION, text)
            kept = [replace(one, expires=min(one.expires or now + overlap, now + overlap)) for one in living[-1:]]
            return auth.encode_key(replace(record, secrets=(*(kept if overlap else ()), fresh)))

        done = await self._etcd.update(self._keys.auth_key(name), change)
        assert done.value is not None
        *former, fresh = auth.decode_key(done.value).secrets
        return Made(name, key, fresh.expires, max((one.expires for one in former), default=0))

    async def revoke(self, name: str) -> bool:
        """Deletes a key, and the grant of the same name if it names no other subject. Returns False if the key did not
        exist."""
        _name(name, "a key")
        at = self._keys.auth_key(name)
        found = await self._etcd.get(at)
        if found is None:
            return False
        await self._etcd.txn([], [delete_op(at)])
        grant = await self._etcd.get(self._keys.auth_grant(name))
        if grant is not None and _only_of(name, grant):
            unchanged = modified(self._keys.auth_grant(name), grant.mod_revision)
            await self._etcd.txn([unchanged], [delete_op(self._keys.auth_grant(name))])
        return True

    # --- grants ---

    async def grants(self) -> dict[str, Grant]:
        """Returns all grants by name. Leaves out records that cannot be read, which give nobody access."""
        return {name: one for name, (one, _) in (await self._grants()).items() if one is not None}

    async def put(self, name: str, one: Grant) -> bool:
        """Creates or replaces a grant. Returns whether the grant is new."""
        _name(name, "a grant")
        done = await self._etcd.update(self._keys.auth_grant(name), lambda _: auth.encode_grant(one))
        return done.before is None

    async def remove(self, name: str) -> bool:
        """Deletes a grant. Returns False if the grant did not exist."""
        return await self._etcd.delete(self._keys.auth_grant(_name(name, "a grant")))

    async def apply(self, wanted: Mapping[str, Grant]) -> tuple[list[str], list[str]]:
        """Creates, replaces and removes grants, so that those in etcd are the wanted ones. Returns the names that were
        written, and those that were removed. Grants with the name of a key stay. Raises CONFLICT if another request
        changes grants meanwhile; a part of the changes may then have been made."""
        for name in wanted:
            _name(name, "a grant")
        present = await self._grants()
        kept = set(await self.keys())
        written = [name for name, one in wanted.items() if name not in present or present[name][0] != one]
        removed = [name for name in present if name not in wanted and name not in kept]
        steps = [(name, True) for name in written] + [(name, False) for name in removed]
        for start in range(0, len(steps), _OPS // 2):
            part = steps[start : start + _OPS // 2]
            compares = [modified(self._keys.auth_grant(name), _revision(present, name)) for name, _ in part]
            ops = [
                put_op(self._keys.auth_grant(name), auth.encode_grant(wanted[name]))
                if put
                else delete_op(self._keys.auth_grant(name))
                for name, put in part
            ]
            if not (await self._etcd.txn(compares, ops)).succeeded:
                raise MeshError(
                    Reason.CONFLICT, "another client changed the grants at the same time: run the command again"
                )
        return written, removed

    async def _grants(self) -> dict[str, tuple[Grant | None, int]]:
        """Returns all grants by name, each with the revision of its record. In place of a record that cannot be read,
        returns None."""
        found: dict[str, tuple[Grant | None, int]] = {}
        async for kv in self._etcd.scan((self._keys.auth_grants, after_prefix(self._keys.auth_grants))):
            try:
                found[_last(kv.key)] = auth.decode_grant(kv.value), kv.mod_revision
            except ValueError as error:
                log.warning("a grant in etcd cannot be read", grant=_last(kv.key), error=str(error))
                found[_last(kv.key)] = None, kv.mod_revision
        return found


def _only_of(name: str, grant: KeyValue) -> bool:
    """Returns whether a grant is for this key only. Returns True for a record that cannot be read, because it gives
    nobody access."""
    try:
        return auth.decode_grant(grant.value).to == (f"key:{name}",)
    except ValueError:
        return True


def _revision(present: Mapping[str, tuple[Grant | None, int]], name: str) -> int:
    return present[name][1] if name in present else 0


def _last(key: bytes) -> str:
    return key.rpartition(b"/")[2].decode(errors="replace")


def _name(name: str, what: str) -> str:
    try:
        return auth.check_name(name, what)
    except ValueError as error:
        raise MeshError(Reason.BAD_REQUEST, str(error)) from error


def _decoded(name: str, kv: KeyValue | None) -> KeyRecord:
    if kv is None:
        raise MeshError(Reason.UNKNOWN_MODEL, f"there is no key {name}: create it (mesh keys create {name})")
    try:
        return auth.decode_key(kv.value)
    except ValueError as error:
        text = f"the record of the key {name} cannot be read: revoke it (mesh keys revoke {name})"
        raise MeshError(Reason.PRECONDITION, text) from error
