"""API keys: those in etcd, and the admin's in a file."""

import time
from collections.abc import Callable, Mapping, Sequence

from mesh.access.principals import Principal
from mesh.schema import auth
from mesh.statuses import MeshError, Reason
from router.access.adminkeys import AdminKeys
from router.access.authority import Authority
from router.access.credentials import Credentials, Identified

ADMIN_KEY = Principal("the admin key")
"""The holder of a key in `--admin-key-file`, who may do everything. No subject of a grant has this name."""


class ApiKeys:
    """The authenticator of API keys. The guard asks this one last, because it refuses every token that it does not
    know."""

    def __init__(self, authority: Authority, *, wall: Callable[[], float] = time.time) -> None:
        """Makes the authenticator. `wall` returns seconds since the epoch."""
        self.changed: Callable[[], None] = lambda: None
        self._authority = authority
        self._wall = wall

    def identify(self, given: Credentials) -> Identified | None:
        """Returns the caller of a key, or None for a request without a token. Raises MeshError: UNAUTHENTICATED for a
        key that is unknown or has expired, REGISTRY_AWAY if the keys have not been read yet."""
        if not given.token:
            return None
        if not self._authority.read:
            raise unread()
        found = self._authority.by_digest.get(auth.digest_of(given.token))
        if found is None or (found.until and found.until <= self._wall()):
            raise MeshError(
                Reason.UNAUTHENTICATED, "the key is unknown: it is wrong, was revoked or has expired; use a valid key"
            )
        return Identified(found.principal, found.until)

    def look(self) -> None:
        """Does nothing, because the feed delivers changed keys."""

    async def close(self) -> None:
        """Does nothing."""

    def statistics(self) -> Sequence[Mapping[str, object]]:
        """Returns how many secrets the keys have, and whether the keys have been read from etcd."""
        return [{"kind": "keys", "secrets": len(self._authority.by_digest), "read": self._authority.read}]


class AdminKey:
    """The authenticator of the admin's keys. It needs no etcd."""

    def __init__(self, keys: AdminKeys) -> None:
        self.changed: Callable[[], None] = lambda: None
        self._keys = keys

    def identify(self, given: Credentials) -> Identified | None:
        """Returns `ADMIN_KEY` for one of the keys in the file, and None for all other credentials."""
        if given.token and auth.digest_of(given.token) in self._keys.digests:
            return Identified(ADMIN_KEY)
        return None

    def look(self) -> None:
        """Reads the file again if it has changed."""
        if self._keys.look():
            self.changed()

    async def close(self) -> None:
        """Does nothing."""

    def statistics(self) -> Sequence[Mapping[str, object]]:
        """Returns the number of keys."""
        return [{"kind": "admin", "keys": len(self._keys.digests)}]


def unread() -> MeshError:
    """Returns the error of a router that has not read keys and grants."""
    text = "this router has not read the keys and grants from etcd yet: try again"
    return MeshError(Reason.REGISTRY_AWAY, text, retry_after=1.0)
