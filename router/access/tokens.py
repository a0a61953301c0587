"""Tokens of other issuers (JWTs) as credentials.

Each source knows the tokens of one issuer: `IssuedTokens` verifies them with the issuer's keys, and
`router.access.reviewed` asks Kubernetes about them. A guard caches the caller of a valid token until the token expires,
so most calls do not use this module.

Verifying a signature takes up to 0.6 ms (ES512; 0.1 ms for RS256 and ES256), and anybody can send tokens. Invalid
tokens are therefore remembered for a moment by their digest, and only a limited number of tokens may fail in a second;
after that, unknown tokens are refused for a while. Thus invalid tokens take at most a twentieth of a worker's time.
"""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from cachetools import TTLCache

from mesh.access.principals import Principal
from mesh.statuses import MeshError, Reason
from mesh.telemetry import logs
from mesh.tokens import verification
from mesh.tokens.following import Busy, Following
from mesh.tokens.locations import LocationError
from mesh.tokens.verification import Rules, TokenError, UnknownKeyError, Unverified
from router.access.credentials import Credentials, Identified, Later
from router.access.pace import Failures

log = logs.get(__name__)

FAILURES = (80.0, 400.0)
"""Number of invalid tokens that may be verified per second, and in a burst."""

_REFUSED = (2048, 10.0)  # invalid tokens that are remembered, and for how many seconds


class TokenSource(Protocol):
    """A way to identify callers by the tokens of one issuer."""

    changed: Callable[[], None]
    """The callback for when cached callers have to be identified again."""

    def takes(self, unverified: Unverified) -> bool:
        """Returns whether the token claims to come from this issuer."""

    def identify(self, token: bytes, unverified: Unverified) -> Identified | Later:
        """Returns the caller, or a function that identifies the caller later and raises the same errors. Raises
        TokenError for an invalid token, and MeshError."""

    def look(self) -> None:
        """Does periodic work. `Tokens` calls this about once a second."""

    async def close(self) -> None:
        """Ends tasks and closes connections."""

    def statistics(self) -> Mapping[str, Any]:
        """Returns the source's state, for people."""


class Tokens:
    """The authenticator of tokens."""

    def __init__(self, sources: Sequence[TokenSource], *, clock: Callable[[], float] = time.monotonic) -> None:
        """Makes the authenticator. The first source that claims a token decides."""
        self.sources = tuple(sources)
        self.failures = Failures(*FAILURES, clock=clock)
        self.changed: Callable[[], None] = lambda: None
        self._refused: TTLCache[bytes, str] = TTLCache(*_REFUSED, timer=clock)
        for source in sources:
            source.changed = self._on_change

    def identify(self, given: Credentials) -> Identified | Later | None:
        """Returns the caller of a token, a function that identifies the caller later, or None for credentials that are
        no JWT. Raises MeshError: UNAUTHENTICATED for an invalid token, OVERLOADED if too many were invalid."""
        token = given.token
        if not verification.looks_like(token):
            return None
        digest = hashlib.sha256(token).digest()
        if (why := self._refused.get(digest)) is not None:
            raise MeshError(Reason.UNAUTHENTICATED, why)
        if not self.failures.allow():
            text = "this router refuses new tokens for a moment, because too many were invalid: try again"
            raise MeshError(Reason.OVERLOADED, text, retry_after=1.0)
        try:
            found = self._source_of(unverified := verification.read(token)).identify(token, unverified)
        except TokenError as error:
            raise self._refusal(digest, error) from None
        if isinstance(found, Identified):
            return found
        later = found

        async def settled() -> Identified:
            try:
                return await later()
            except TokenError as error:
                raise self._refusal(digest, error) from None

        return settled

    def look(self) -> None:
        """Does the sources' periodic work."""
        for source in self.sources:
            source.look()

    async def close(self) -> None:
        """Closes the sources."""
        for source in self.sources:
            await source.close()

    def statistics(self) -> Sequence[Mapping[str, object]]:
        """Returns the state of the sources."""
        return [{"kind": "tokens", **source.statistics()} for source in self.sources]

    def _source_of(self, unverified: Unverified) -> TokenSource:
        for source in self.sources:
            if source.takes(unverified):
                return source
        if not unverified.issuer:
            raise TokenError("the token does not name its issuer (the claim iss): get a token that does")
        raise TokenError(
            f"the token is of the issuer {unverified.issuer!r:.200}, which this mesh does not accept: get a token of "
            "an issuer that it accepts"
        )

    def _refusal(self, digest: bytes, error: TokenError) -> MeshError:
        self.failures.failed()
        self._refused[digest] = str(error)
        return MeshError(Reason.UNAUTHENTICATED, str(error))

    def _on_change(self) -> None:
        self._refused.clear()
        self.changed()


class IssuedTokens:
    """The tokens of an issuer whose keys are followed."""

    def __init__(
        self,
        following: Following,
        *,
        rules: Callable[[], Rules],
        algorithms: Sequence[str],
        takes: Callable[[Unverified], bool],
        principal: Callable[[Mapping[str, Any]], Principal],
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Makes the source. `rules` returns the claims that a token must have, and `principal` the caller of verified
        claims. `wall` returns seconds since the epoch."""
        self.changed: Callable[[], None] = lambda: None
        self.takes = takes
        self.following = following
        self._rules = rules
        self._algorithms = tuple(algorithms)
        self._principal = principal
        self._wall = wall
        following.changed = lambda: self.changed()

    def identify(self, token: bytes, unverified: Unverified) -> Identified | Later:
        """Returns the caller, or for a token with an unknown key, a function that first reads the keys again. Raises
        TokenError for an invalid token."""
        try:
            return self._verified(token, unverified)
        except UnknownKeyError:
            return lambda: self._later(token, unverified)

    def look(self) -> None:
        """Begins a reading of the keys if one is due."""
        self.following.look()

    async def close(self) -> None:
        """Ends a reading that is under way."""
        await self.following.close()

    def statistics(self) -> Mapping[str, Any]:
        """Returns the state of the keys."""
        found = self.following.statistics()
        return {
            "issuer": self._rules().issuer,
            "audiences": list(self._rules().audiences),
            "keys": found.keys,
            "age": found.age,
            "trouble": found.trouble,
            "clock_ahead": self.following.ahead,
        }

    def _verified(self, token: bytes, unverified: Unverified) -> Identified:
        keys = self.following.keys
        if keys is None:
            raise UnknownKeyError("this router has not read the keys of the token's issuer yet: try again")
        claims = verification.verify(token, unverified, keys, self._algorithms)
        until = verification.check(claims, self._rules(), now=self._wall(), ahead=self.following.ahead)
        return Identified(self._principal(claims), until)

    async def _later(self, token: bytes, unverified: Unverified) -> Identified:
        try:
            await self.following.newer()
        except Busy:
            text = "too many calls are waiting for keys of the token's issuer: try again"
            raise MeshError(Reason.OVERLOADED, text, retry_after=1.0) from None
        except LocationError:
            text = "this router cannot read the keys of the token's issuer now: try again; the router's log says why"
            raise MeshError(Reason.UNAVAILABLE, text, retry_after=2.0) from None
        return self._verified(token, unverified)
