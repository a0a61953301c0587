"""The guard of all interfaces of a router: it identifies the caller, and checks the caller's permission.

Both results are cached, because a call of a hot model is served in 30 us. The caller is cached by the bytes of the
`authorization` header, or without one by the client certificate, and each decision by caller, verb and name. (The key
is the header itself, not its digest, because the connections' caches of heads contain the header already, and a digest
takes 0.5 us.) Both caches are bounded, and are cleared when a key or a grant changes.

Authenticators identify the caller (`credentials`). If one of them must fetch something first, `known` raises
`Unsettled`. Interfaces that must not wait, which are most, then await `Unsettled.settle` in a task. The others use
`identified`.

A refusal does not reveal whether a model exists, because nothing is looked up before the decision.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from mesh.access import patterns
from mesh.access.grants import Ruling, decide
from mesh.access.principals import Principal
from mesh.access.verbs import ALLOWS, Verb
from mesh.statuses import MeshError, Reason
from mesh.telemetry import logs
from mesh.wire.call import Header
from mesh.wire.headers import AUTHORIZATION, CLIENT_CERTIFICATE
from router.access.adminkeys import AdminKeys
from router.access.authority import Authority
from router.access.credentials import Authenticator, Credentials, Identified, Later, Unsettled
from router.access.keys import ADMIN_KEY, AdminKey, ApiKeys, unread

log = logs.get(__name__)

OFF, MANAGEMENT, REQUIRED = "off", "management", "required"
MODES = (OFF, MANAGEMENT, REQUIRED)
"""The values of `--auth`."""

MANAGING = frozenset({Verb.READ, Verb.REGISTER, Verb.ADMIN})
"""The verbs for which a caller must be known with `--auth management`."""

_MAX_PRINCIPALS = 4096
_MAX_BYTES = 8 << 20  # of the headers by which callers are remembered
_MAX_RULINGS = 16_384
_MAX_HEADER = 8192  # bytes of a credential: tokens of large organisations have 4 KB
_SCHEME = b"bearer "

OPEN = Principal("anyone")
"""The caller of an operation that is open to everybody."""


_Given = bytes | Credentials
"""The credentials as they arrived: the `authorization` header, or else the others."""


class Guard:
    """The guard of one process."""

    def __init__(
        self,
        authority: Authority,
        *,
        mode: str,
        admin: AdminKeys | None = None,
        others: Sequence[Authenticator] = (),
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Makes a guard. `mode` is a value of `--auth`. `others` identify callers without API keys. `wall` returns
        seconds since the epoch."""
        self.authority = authority
        self.mode = mode
        self.unknown = 0  # requests without valid credentials
        self.denied = 0  # requests by callers without a grant
        self._wall = wall
        self._principals: dict[_Given, Identified] = {}
        self._bytes = 0  # of its keys, and of those that have expired
        self._rulings: dict[tuple[Principal, Verb, str], Ruling] = {}
        self._authenticators: list[Authenticator] = [
            AdminKey(admin or AdminKeys("")),
            *others,
            ApiKeys(authority, wall=wall),
        ]
        authority.changed = self.clear
        for one in self._authenticators:
            one.changed = self.clear

    def asks(self, verb: Verb) -> bool:
        """Returns whether a caller must be known for operations of this verb."""
        if verb is Verb.PUBLIC or self.mode == OFF:
            return False
        return self.mode == REQUIRED or verb in MANAGING

    def known(self, headers: Sequence[Header]) -> Principal:
        """Returns the caller of a request with these headers. If the request has a token, its certificate does not
        count. Raises MeshError, and Unsettled if the caller cannot be identified immediately."""
        given = b""
        for name, value in headers:
            if name == AUTHORIZATION:
                if given and value != given:
                    raise self._unknown("the request has two different authorization headers: send one")
                given = value
        key = given or _certified(headers)
        found = self._principals.get(key)
        if found is not None:
            principal, until = found
            if not until or self._wall() < until:
                return principal
            del self._principals[key]
        return self._identified(key)

    async def identified(self, headers: Sequence[Header], deadline: float | None = None) -> Principal:
        """Waits until the caller of a request with these headers is identified, and returns the caller. `deadline` is
        on the event loop's clock. Raises MeshError."""
        try:
            return self.known(headers)
        except Unsettled as unsettled:
            return await unsettled.settle(deadline)

    def allow(self, principal: Principal, verb: Verb, name: str) -> None:
        """Checks that the principal may perform operations of this verb on the name. Otherwise raises MeshError
        FORBIDDEN."""
        ruling = self._rulings.get((principal, verb, name))
        if ruling is None:
            ruling = self.ruling(principal, verb, name)
            if len(self._rulings) >= _MAX_RULINGS:
                self._rulings.clear()
            self._rulings[principal, verb, name] = ruling
        if not ruling.allowed:
            self.denied += 1
            raise MeshError(Reason.FORBIDDEN, f"{ruling.why}. An admin can give one: mesh grants add")

    def allow_some(self, principal: Principal, verb: Verb) -> None:
        """Checks that the principal may perform operations of this verb on at least some names. Otherwise raises
        MeshError FORBIDDEN."""
        if principal in (ADMIN_KEY, OPEN):
            return
        if not any(verb in ALLOWS[one.role] for one in self.authority.grants.of(principal).values()):
            self.allow(principal, verb, patterns.EVERYTHING)

    def ruling(self, principal: Principal, verb: Verb, name: str) -> Ruling:
        """Returns the decision, with its reason, from the current grants and not from the cache."""
        if principal is ADMIN_KEY:
            return Ruling(True, "the admin key may do everything")
        if principal is OPEN:
            return Ruling(True, "no key is needed")
        return decide(self.authority.grants, principal, verb, name)

    def look(self) -> None:
        """Does the authenticators' periodic work. Call this about once a second."""
        for one in self._authenticators:
            one.look()

    async def close(self) -> None:
        """Ends the authenticators' tasks and closes their connections."""
        for one in self._authenticators:
            await one.close()

    def statistics(self) -> Mapping[str, object]:
        """Returns the state of the guard, for people."""
        return {
            "mode": self.mode,
            "remembered": len(self._principals),
            "callers": [document for one in self._authenticators for document in one.statistics()],
        }

    def clear(self) -> None:
        """Forgets all cached callers and decisions."""
        self._forget()
        self._rulings.clear()

    def _forget(self) -> None:
        self._principals.clear()
        self._bytes = 0

    def _identified(self, key: _Given) -> Principal:
        if isinstance(key, Credentials):
            credentials = key
        elif key[: len(_SCHEME)].lower() != _SCHEME:
            raise self._unknown("the authorization header must have the form `Bearer KEY`")
        elif len(key) > _MAX_HEADER:
            limit = f"more than the {_MAX_HEADER} that are accepted"
            raise self._unknown(f"the authorization header has {len(key)} bytes, {limit}: request a smaller token")
        else:
            credentials = Credentials(key[len(_SCHEME) :].strip())
        try:
            for one in self._authenticators:
                found = one.identify(credentials)
                if isinstance(found, Identified):
                    return self._remembered(key, found)
                if found is not None:
                    raise Unsettled(partial(self._settled, key, found))
        except MeshError as error:
            raise self._counted(error) from None
        raise self._unknown("the call has no credentials: send a key in the header `authorization: Bearer KEY`")

    async def _settled(self, key: _Given, later: Later) -> Principal:
        try:
            return self._remembered(key, await later())
        except MeshError as error:
            raise self._counted(error) from None

    def _remembered(self, key: _Given, found: Identified) -> Principal:
        if not self.authority.read and found.principal is not ADMIN_KEY:
            raise unread()  # without grants, all would be denied
        size = sum(map(len, key)) if isinstance(key, Credentials) else len(key)
        if len(self._principals) >= _MAX_PRINCIPALS or self._bytes + size > _MAX_BYTES:
            self._forget()
        self._bytes += size
        self._principals[key] = found
        return found.principal

    def _unknown(self, why: str) -> MeshError:
        return self._counted(MeshError(Reason.UNAUTHENTICATED, why))

    def _counted(self, error: MeshError) -> MeshError:
        if error.reason is Reason.UNAUTHENTICATED:
            self.unknown += 1
        return error


def _certified(headers: Sequence[Header]) -> Credentials:
    """Returns the credentials of a request without a token."""
    return Credentials(b"", b",".join(value for name, value in headers if name == CLIENT_CERTIFICATE))
