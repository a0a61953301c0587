"""The verification of JWTs, with keys and a time that the caller gives.

PyJWT verifies the signature. The claims are checked here, because PyJWT reads the clock itself, and because a refusal
must say how far a time is off: a clock that is wrong is the most frequent reason.

Claims are used only after the token is verified. `read` returns them unverified, for nothing but finding the issuer.
"""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jwt
import orjson

from mesh.tokens.keyset import Key, KeySet

_DOTS = 2
_BEGINS = b"ey"  # base64 of {", and of { followed by white space
_JUST_NOW = 600.0  # seconds; people notice a clock that is off by more
_OFF = 30.0  # seconds by which clocks differ before a refusal mentions it

_signatures = jwt.PyJWS(algorithms=None)


class TokenError(Exception):
    """A token that is not valid. The text says why, for its sender."""


class UnknownKeyError(TokenError):
    """A token that was signed with a key that the issuer does not publish, as far as is known."""


@dataclass(frozen=True, slots=True)
class Unverified:
    """The parts of a token by which its issuer and its key are found. They are not verified."""

    algorithm: str
    key_id: str | None
    claims: Mapping[str, Any]

    @property
    def issuer(self) -> str:
        """The issuer that the token claims."""
        found = self.claims.get("iss")
        return found if isinstance(found, str) else ""


@dataclass(frozen=True, slots=True)
class Rules:
    """The claims that a token must have."""

    issuer: str
    audiences: tuple[str, ...]  # one of them
    skew: float = 60.0  # seconds by which the clocks of issuer and router may differ


def looks_like(token: bytes) -> bool:
    """Returns whether a token has the form of a JWT."""
    return token.startswith(_BEGINS) and token.count(b".") == _DOTS


def read(token: bytes) -> Unverified:
    """Returns the unverified parts of a token. Raises TokenError."""
    head, claims = (_object(part) for part in token.split(b".")[:_DOTS])
    key_id, algorithm = head.get("kid"), head.get("alg")
    if not isinstance(algorithm, str) or not isinstance(key_id, str | None):
        raise TokenError("the token is not a JWT: its header is not valid")
    return Unverified(algorithm, key_id, claims)


def verify(token: bytes, unverified: Unverified, keys: KeySet, algorithms: Sequence[str]) -> Mapping[str, Any]:
    """Returns the claims of a token whose signature is right. Raises TokenError, and UnknownKeyError if its key is not
    in the set."""
    algorithm = unverified.algorithm
    if algorithm not in algorithms:
        raise TokenError(
            f"the token is signed by {algorithm!r:.20}, which is not accepted: use one of {', '.join(algorithms)}"
        )
    if not keys.named(unverified.key_id):
        raise UnknownKeyError(f"the issuer of the token has no key {unverified.key_id!r:.100}: request a new token")
    candidates = keys.candidates(unverified.key_id, algorithm)
    for key in candidates:
        if (payload := _payload(token, key, algorithm)) is not None:
            return _claims(payload)
    if not candidates:
        raise TokenError(f"the issuer's key of this token does not sign by {algorithm}: request a new token")
    if unverified.key_id is None:  # it may be one that was added
        raise UnknownKeyError("the token is signed with none of its issuer's keys: request a new token")
    raise TokenError("the token's signature is wrong: request a new token")


def check(claims: Mapping[str, Any], rules: Rules, *, now: float, ahead: float | None = None) -> float:
    """Checks issuer, audience and times of verified claims. Returns the time until which the claims are valid. Times
    are in seconds since the epoch. `ahead` is the number of seconds by which this clock is ahead of the issuer's, if
    known. Raises TokenError."""
    if claims.get("iss") != rules.issuer:
        issuer = claims.get("iss")
        named = isinstance(issuer, str) and issuer
        what = f"is of another issuer, {issuer!r:.200}" if named else "does not name its issuer (the claim iss)"
        raise TokenError(f"the token {what}: request one of {rules.issuer}")
    check_audience(claims, rules.audiences)
    return check_times(claims, skew=rules.skew, now=now, ahead=ahead)


def check_audience(claims: Mapping[str, Any], audiences: Sequence[str]) -> None:
    """Raises TokenError unless the token is for one of the audiences."""
    given = claims.get("aud")
    named = [given] if isinstance(given, str) else given if isinstance(given, list) else []
    if not any(one in audiences for one in named if isinstance(one, str)):
        told = ", ".join(f"{one!r:.100}" for one in named[:3]) or "nobody"
        raise TokenError(f"the token is for {told}, not for this mesh: request one for the audience {audiences[0]}")


def check_times(
    claims: Mapping[str, Any], *, skew: float, now: float, ahead: float | None = None, endless: bool = False
) -> float:
    """Checks the times of a token. Returns the time until which the token is valid, or 0 if it never expires, which
    only `endless` allows. Raises TokenError."""
    expires, begins, issued = (_time(claims, name) for name in ("exp", "nbf", "iat"))
    if expires is None and not endless:
        raise TokenError("the token never expires, because it has no `exp`: request one that expires")
    if expires is not None and now >= expires + skew:
        late = now - expires
        hint = _clocks(ahead) if late < _JUST_NOW else ""
        raise TokenError(f"the token expired {_span(late)} ago, by this router's clock{hint}")
    early = max(begins or 0.0, issued or 0.0) - now
    if early > skew:
        hint = (
            _clocks(ahead) or f". Their clocks differ by more than the {_span(skew)} that are allowed: set both right"
        )
        raise TokenError(f"the token was issued {_span(early)} in the future, by this router's clock{hint}")
    return 0.0 if expires is None else expires + skew


def _clocks(ahead: float | None) -> str:
    """Returns the end of a sentence that says how the clocks of router and issuer differ, or "" if this is unknown."""
    if ahead is None or abs(ahead) < _OFF:
        return ""
    return f", which is {_span(abs(ahead))} {'ahead of' if ahead > 0 else 'behind'} the issuer's: set both right"


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 2 * _JUST_NOW else f"{seconds / 60:.0f} min"


def _payload(token: bytes, key: Key, algorithm: str) -> Any:
    """Returns the token's payload if the key has signed the token, or None."""
    try:
        return _signatures.decode(token, key.public, algorithms=[algorithm])
    except (jwt.PyJWTError, ValueError, TypeError):
        return None


def _claims(payload: Any) -> Mapping[str, Any]:
    try:
        claims = orjson.loads(payload)
    except ValueError as error:
        raise TokenError("the token's claims are not JSON: request a new token") from error
    if not isinstance(claims, dict):
        raise TokenError("the token's claims are not a JSON object: request a new token")
    return claims


def _time(claims: Mapping[str, Any], name: str) -> float | None:
    found = claims.get(name)
    if found is None:
        return None
    if type(found) not in (int, float) or not math.isfinite(found):
        raise TokenError(f"the token's `{name}` is not a time: request a new token")
    return float(found)


def _object(part: bytes) -> dict[str, Any]:
    try:
        found = orjson.loads(base64.b64decode(part + b"=" * (-len(part) % 4), altchars=b"-_", validate=True))
    except ValueError as error:
        raise TokenError("the token is not a JWT: send it as its issuer gave it") from error
    if not isinstance(found, dict):
        raise TokenError("the token is not a JWT: send it as its issuer gave it")
    return found
