"""Sets of public keys (JWKS, RFC 7517) that tokens are verified with.

Only asymmetric keys are used. A set may contain keys of other kinds, for encryption or newer algorithms; these are left
out. A key verifies only the algorithms that fit its type, and only its `alg` if it has one. No token can therefore
choose to be verified by HMAC with a public key as the secret.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jwt
import orjson

from mesh.tokens.settings import ALGORITHMS

MAX_BYTES = 256 * 1024
"""Largest size of a set, in bytes."""

MAX_KEYS = 100

_RSA_BITS = (2048, 8192)
_TRIED = 4  # keys that are tried for a token that does not name its key
_CURVES = {"P-256": "ES256", "P-384": "ES384", "P-521": "ES512"}
_PRIVATE = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth"})


@dataclass(frozen=True, slots=True)
class Key:
    """One public key, and the algorithms that it may verify."""

    id: str | None
    algorithms: frozenset[str]
    public: Any = field(repr=False)  # an object of `cryptography`


@dataclass(frozen=True, slots=True)
class KeySet:
    """The usable keys of a set. Two sets are equal if their keys have the same text, in any order."""

    keys: tuple[Key, ...] = field(compare=False)
    text: frozenset[str] = field(repr=False)

    def named(self, key_id: str | None) -> list[Key]:
        """Returns the keys with that id, or all keys if the id is None."""
        return [key for key in self.keys if key_id is None or key.id == key_id]

    def candidates(self, key_id: str | None, algorithm: str) -> list[Key]:
        """Returns the keys with which a token may have been signed, at most four."""
        return [key for key in self.named(key_id) if algorithm in key.algorithms][:_TRIED]


def parse(raw: bytes, algorithms: Iterable[str] = ALGORITHMS) -> KeySet:
    """Returns the usable keys of a set in JSON. Raises ValueError, whose text says what is wrong with the set."""
    if len(raw) > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES // 1024} KiB")
    try:
        document = orjson.loads(raw)
    except ValueError as error:
        raise ValueError("it is not JSON") from error
    found = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(found, list):
        raise ValueError('it is not a JWKS: it has no list "keys"')
    if len(found) > MAX_KEYS:
        raise ValueError(f"it has more than {MAX_KEYS} keys")
    allowed = frozenset(algorithms)
    keys = [key for one in found if isinstance(one, dict) and (key := _key(one, allowed)) is not None]
    if not keys:
        raise ValueError(f"none of its {len(found)} keys can verify signatures by {', '.join(sorted(allowed))}")
    return KeySet(tuple(keys), frozenset(json.dumps(one, sort_keys=True) for one in found))


def _key(data: Mapping[str, Any], allowed: frozenset[str]) -> Key | None:
    """Returns a key, or None if no accepted algorithm can use it."""
    operations = data.get("key_ops")
    if data.get("use", "sig") != "sig" or (isinstance(operations, list) and "verify" not in operations):
        return None
    algorithms = _algorithms(data) & allowed
    if (stated := data.get("alg")) is not None:
        algorithms &= {stated} if isinstance(stated, str) else set()
    if not algorithms:
        return None
    public = {name: value for name, value in data.items() if name not in _PRIVATE}
    try:
        key = jwt.PyJWK(public, min(algorithms)).key
    except (jwt.PyJWTError, ValueError, TypeError):
        return None
    if data["kty"] == "RSA" and not _RSA_BITS[0] <= key.key_size <= _RSA_BITS[1]:
        return None
    key_id = data.get("kid")
    return Key(key_id if isinstance(key_id, str) else None, frozenset(algorithms), key)


def _algorithms(data: Mapping[str, Any]) -> set[str]:
    match data.get("kty"):
        case "RSA":
            return {name for name in ALGORITHMS if name[:2] in ("RS", "PS")}
        case "EC":
            return {_CURVES[curve]} if (curve := data.get("crv")) in _CURVES else set()
        case "OKP":
            return {"EdDSA"} if data.get("crv") == "Ed25519" else set()
        case _:
            return set()
