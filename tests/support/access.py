"""Guards with keys and grants, as routers have them once the feed has delivered these."""

from collections.abc import Callable

from mesh.schema import auth
from mesh.schema.auth import KeyRecord, KeySecret
from mesh.schema.keys import Keys
from router.access.adminkeys import AdminKeys
from router.access.authority import Authority
from router.access.guard import OFF, Guard

KEYS = Keys("mm/t")


def open_guard() -> Guard:
    """Returns the guard of a mesh without access control."""
    return Guard(Authority(KEYS), mode=OFF)


def key_record(key: str, *, groups: tuple[str, ...] = (), expires: int = 0) -> bytes:
    """Returns the record of a key."""
    return auth.encode_key(KeyRecord((KeySecret(auth.digest_of(key.encode()), 1, expires),), groups))


def items(keys: dict[str, str], grants: dict[str, tuple[str, list[str], list[str]]]) -> list[tuple[bytes, bytes]]:
    """Returns what the feed delivers for keys by their names, and for grants: role, patterns, subjects."""
    found = [(KEYS.auth_key(name), key_record(key)) for name, key in keys.items()]
    for name, (role, models, to) in grants.items():
        one = auth.grant_of({"role": role, "models": models, "to": to})
        found.append((KEYS.auth_grant(name), auth.encode_grant(one)))
    return found


def guard_of(
    mode: str,
    keys: dict[str, str],
    grants: dict[str, tuple[str, list[str], list[str]]],
    *,
    admin: AdminKeys | None = None,
    wall: Callable[[], float] = lambda: 1000.0,
) -> Guard:
    """Returns a guard with these keys and grants."""
    authority = Authority(KEYS)
    guard = Guard(authority, mode=mode, admin=admin, wall=wall)
    authority.snapshot(1, items(keys, grants))
    return guard
