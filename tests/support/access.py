"""Makes guards (`router.access.guard`) as a router has them once its keys and grants have arrived from etcd."""

import asyncio
from collections.abc import Callable, Sequence

from mesh.access.principals import Principal
from mesh.schema import auth
from mesh.schema.auth import KeyRecord, KeySecret
from mesh.schema.keys import Keys
from mesh.statuses import MeshError, Reason
from router.access.adminkeys import AdminKeys
from router.access.authority import Authority
from router.access.credentials import Authenticator, Credentials, Identified, Later
from router.access.guard import OFF, Guard

KEYS = Keys("mm/t")


class SlowTokens:
    """An authenticator of tokens `slow-NAME`. It accepts them, and refuses `slow-bad`, once the test has set
    `known`. A `broken` one fails then."""

    def __init__(self, *, broken: bool = False) -> None:
        self.broken = broken
        self.changed: Callable[[], None] = lambda: None
        self.known = asyncio.Event()
        self.waiting = 0

    def identify(self, given: Credentials) -> Later | None:
        name = given.token.decode(errors="replace")
        if not name.startswith("slow-"):
            return None

        async def later() -> Identified:
            self.waiting += 1
            await self.known.wait()
            if self.broken:
                raise ZeroDivisionError
            if name == "slow-bad":
                raise MeshError(Reason.UNAUTHENTICATED, "the token is not valid")
            return Identified(Principal(f"user:{name.removeprefix('slow-')}"))

        return later

    def look(self) -> None:
        pass

    async def close(self) -> None:
        pass

    def statistics(self) -> list[dict[str, object]]:
        return []


def open_guard() -> Guard:
    """Returns the guard of a mesh without access control."""
    return Guard(Authority(KEYS), mode=OFF)


def key_record(key: str, *, groups: tuple[str, ...] = (), expires: int = 0) -> bytes:
    return auth.encode_key(KeyRecord((KeySecret(auth.digest_of(key.encode()), 1, expires),), groups))


def items(keys: dict[str, str], grants: dict[str, tuple[str, list[str], list[str]]]) -> list[tuple[bytes, bytes]]:
    """Returns what the feed delivers for keys and grants, both given by name. A grant is given as role, patterns and
    subjects."""
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
    others: Sequence[Authenticator] = (),
    wall: Callable[[], float] = lambda: 1000.0,
) -> Guard:
    authority = Authority(KEYS)
    guard = Guard(authority, mode=mode, admin=admin, others=others, wall=wall)
    authority.snapshot(1, items(keys, grants))
    return guard
