"""The guard of all interfaces of a router: it identifies the caller, and checks the caller's permission.

Both results are cached, because a call of a hot model is served in 30 us. The caller is cached by the bytes of the
`authorization` header, and each decision by caller, verb and name. (The header's bytes, not their digest, because the
connections' caches of heads hold them already, and a digest takes 0.5 us.) Both caches are bounded, and are cleared
when a key or a grant changes.

A refusal does not reveal whether a model exists, because nothing is looked up before the decision.
"""

import time
from collections.abc import Callable, Iterable

from mesh.access.grants import Ruling, decide
from mesh.access.principals import Principal
from mesh.access.verbs import Verb
from mesh.schema import auth
from mesh.statuses import MeshError, Reason
from mesh.telemetry import logs
from mesh.wire.call import Header
from mesh.wire.headers import AUTHORIZATION
from router.access.adminkeys import AdminKeys
from router.access.authority import Authority

log = logs.get(__name__)

OFF, MANAGEMENT, REQUIRED = "off", "management", "required"
MODES = (OFF, MANAGEMENT, REQUIRED)
"""The values of `--auth`."""

MANAGING = frozenset({Verb.READ, Verb.REGISTER, Verb.ADMIN})
"""The verbs for which a caller must be known with `--auth management`."""

_MAX_PRINCIPALS = 4096
_MAX_RULINGS = 16_384
_MAX_HEADER = 8192  # bytes of a credential: tokens of large organisations have 4 KB
_SCHEME = b"bearer "

ADMIN_KEY = Principal("the admin key")
"""The holder of a key in `--admin-key-file`, who may do everything. No subject of a grant has this name."""

OPEN = Principal("anyone")
"""The caller of an operation that is open to everybody."""


class Guard:
    """The guard of one process."""

    def __init__(
        self,
        authority: Authority,
        *,
        mode: str,
        admin: AdminKeys | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Makes a guard. `mode` is a value of `--auth`. `wall` returns seconds since the epoch."""
        self.authority = authority
        self.mode = mode
        self.unknown = 0  # requests without valid credentials
        self.denied = 0  # requests by callers without a grant
        self._admin = admin or AdminKeys("")
        self._wall = wall
        self._principals: dict[bytes, tuple[Principal, float]] = {}
        self._rulings: dict[tuple[Principal, Verb, str], Ruling] = {}
        authority.changed = self.clear

    def asks(self, verb: Verb) -> bool:
        """Returns whether a caller must be known for operations of this verb."""
        if verb is Verb.PUBLIC or self.mode == OFF:
            return False
        return self.mode == REQUIRED or verb in MANAGING

    def known(self, headers: Iterable[Header]) -> Principal:
        """Returns the caller of a request with these headers. Raises MeshError."""
        given = b""
        for name, value in headers:
            if name == AUTHORIZATION:
                if given and value != given:
                    raise self._unknown("the request has two different authorization headers: send one")
                given = value
        found = self._principals.get(given)
        if found is not None:
            principal, until = found
            if not until or self._wall() < until:
                return principal
            del self._principals[given]
        return self._identified(given)

    def allow(self, principal: Principal, verb: Verb, name: str) -> None:
        """Raises MeshError unless the principal may perform operations of this verb on the name."""
        ruling = self._rulings.get((principal, verb, name))
        if ruling is None:
            ruling = self.ruling(principal, verb, name)
            if len(self._rulings) >= _MAX_RULINGS:
                self._rulings.clear()
            self._rulings[principal, verb, name] = ruling
        if not ruling.allowed:
            self.denied += 1
            raise MeshError(Reason.FORBIDDEN, f"{ruling.why}. An admin can give it: mesh grants add")

    def ruling(self, principal: Principal, verb: Verb, name: str) -> Ruling:
        """Returns the decision, and why."""
        if principal is ADMIN_KEY:
            return Ruling(True, "the admin key may do everything")
        if principal is OPEN:
            return Ruling(True, "no key is needed")
        return decide(self.authority.grants, principal, verb, name)

    def look(self) -> None:
        """Reads the file of the admin key again if it has changed. Called once a second."""
        if self._admin.look():
            self.clear()

    def clear(self) -> None:
        """Forgets all cached answers."""
        self._principals.clear()
        self._rulings.clear()

    def _identified(self, given: bytes) -> Principal:
        if not given:
            raise self._unknown("no credentials: send a key in the header `authorization: Bearer KEY`")
        if len(given) > _MAX_HEADER or given[: len(_SCHEME)].lower() != _SCHEME:
            raise self._unknown("the authorization header must be `Bearer` and a key")
        digest = auth.digest_of(given[len(_SCHEME) :].strip())
        if digest in self._admin.digests:
            return self._remembered(given, ADMIN_KEY, 0.0)
        if not self.authority.read:
            text = "this router has not read the keys from etcd yet"
            raise MeshError(Reason.REGISTRY_AWAY, text, retry_after=1.0)
        found = self.authority.by_digest.get(digest)
        if found is None or (found.until and found.until <= self._wall()):
            raise self._unknown("the key is not known: it is wrong, was revoked or has expired")
        return self._remembered(given, found.principal, found.until)

    def _remembered(self, given: bytes, principal: Principal, until: float) -> Principal:
        if len(self._principals) >= _MAX_PRINCIPALS:
            self._principals.clear()
        self._principals[given] = principal, until
        return principal

    def _unknown(self, why: str) -> MeshError:
        self.unknown += 1
        return MeshError(Reason.UNAUTHENTICATED, why)
