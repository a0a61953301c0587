"""The keys and grants of the mesh, as the feed's range `auth` delivers them.

While etcd is unavailable, the last known state applies. A record that cannot be read is logged and gives nobody access.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import unquote

from mesh.access.grants import Grant, Grants
from mesh.access.principals import Principal
from mesh.schema import auth
from mesh.schema.keys import Keys
from mesh.telemetry import logs
from router.state.feed.ranges import Item

log = logs.get(__name__)


@dataclass(frozen=True, slots=True)
class KnownKey:
    """One secret of a key: its owner, and the end of its validity."""

    principal: Principal
    until: float  # seconds since the epoch; 0: without end


class Authority:
    """The keys by their digests, and the grants."""

    def __init__(self, keys: Keys, changed: Callable[[], None] = lambda: None) -> None:
        """Makes an authority without keys and grants. `changed` is called after each change."""
        self._keys = keys
        self.changed = changed
        self.read = False  # the range was read once
        self.grants = Grants({})
        self.by_digest: dict[str, KnownKey] = {}
        self._digests: dict[str, tuple[str, ...]] = {}  # of each key, by its name
        self._grants: dict[str, Grant] = {}
        self.filed: Mapping[str, Grant] = {}  # grants of the routers' file

    def snapshot(self, _: int, items: Iterable[Item]) -> None:
        """Replaces all keys and grants with those in the snapshot."""
        self.by_digest.clear()
        self._digests.clear()
        self._grants.clear()
        self._take(items)
        self.read = True

    def delta(self, _: int, items: Iterable[Item]) -> None:
        """Applies changes of keys and grants."""
        self._take(items)

    def _take(self, items: Iterable[Item]) -> None:
        for key, value in items:
            if key.startswith(self._keys.auth_keys):
                self._take_key(_name(key, self._keys.auth_keys), value)
            elif key.startswith(self._keys.auth_grants):
                self._take_grant(_name(key, self._keys.auth_grants), value)
        self._decide()

    def adopt(self, filed: Mapping[str, Grant]) -> None:
        """Replaces the grants of the routers' file. They apply in addition to those in etcd, even to a grant of the
        same name."""
        self.filed = filed
        self._decide()

    def _decide(self) -> None:
        self.grants = Grants({**self._grants, **{f"{name} (file)": one for name, one in self.filed.items()}})
        self.changed()

    def _take_key(self, name: str, value: bytes | None) -> None:
        for digest in self._digests.pop(name, ()):
            self.by_digest.pop(digest, None)
        if value is None:
            return
        try:
            auth.check_name(name, "a key")
            record = auth.decode_key(value)
        except ValueError as error:
            log.error("the record of a key in etcd cannot be read; the key is refused", key=name, error=str(error))
            return
        principal = Principal(f"key:{name}", [f"group:{group}" for group in record.groups])
        self._digests[name] = tuple(secret.digest for secret in record.secrets)
        for secret in record.secrets:
            self.by_digest[secret.digest] = KnownKey(principal, secret.expires / 1000)

    def _take_grant(self, name: str, value: bytes | None) -> None:
        self._grants.pop(name, None)
        if value is None:
            return
        try:
            self._grants[name] = auth.decode_grant(value)
        except ValueError as error:
            log.error("a grant in etcd cannot be read; it gives nobody access", grant=name, error=str(error))


def _name(key: bytes, prefix: bytes) -> str:
    return unquote(key[len(prefix) :].decode(errors="replace"))
