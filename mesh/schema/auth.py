"""Records of API keys and grants in etcd, `auth/keys/<name>` and `auth/grants/<name>`.

A key is 256 random bits, and its record contains only the SHA-256 of the key, so that etcd's data and backups give
nobody access. (Slow hashes are needed only for passwords, which can be guessed.) While a key is rotated, its record has
two secrets.

A record with an attribute that this version does not know is refused. The attribute may be a restriction of a newer
version, and ignoring it would allow too much.
"""

import hashlib
import re
import secrets
from dataclasses import dataclass
from typing import Any

from mesh.access.grants import Grant, grant
from mesh.access.principals import check_subject
from mesh.schema.jsonfields import BAD, integer, read_object, why, write_object

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
"""Pattern of the names of keys and of grants."""

PREFIX = "mesh_"
"""The beginning of each key, by which scanners for leaked secrets recognise it."""

MAX_GROUPS = 20


@dataclass(frozen=True, slots=True)
class KeySecret:
    """One secret of a key. Times are in milliseconds since the epoch."""

    digest: str  # SHA-256 of the key, in hexadecimal digits
    created: int
    expires: int = 0  # 0: never

    def expired(self, now: int) -> bool:
        """Returns whether the secret is no longer valid."""
        return 0 < self.expires <= now


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """An API key: its secrets, the newest last, and the groups that it belongs to."""

    secrets: tuple[KeySecret, ...]
    groups: tuple[str, ...] = ()


def fresh() -> str:
    """Returns a new key."""
    return PREFIX + secrets.token_urlsafe(32)


def digest_of(key: bytes) -> str:
    """Returns the SHA-256 of a key, in hexadecimal digits."""
    return hashlib.sha256(key).hexdigest()


def check_name(name: str, what: str) -> str:
    """Returns the name unchanged. Raises ValueError if `what`, a key or a grant, cannot have it."""
    if not NAME.fullmatch(name):
        raise ValueError(
            f"{name[:100]!r} is not a valid name for {what}: use at most 63 letters, digits, dots, dashes and "
            "underscores, beginning with a letter or digit"
        )
    return name


def check_groups(groups: object) -> tuple[str, ...]:
    """Returns the names of groups (without `group:`), each once. Raises ValueError."""
    if not isinstance(groups, list | tuple) or not all(isinstance(one, str) for one in groups):
        raise ValueError("groups must be a list of strings")
    if len(groups) > MAX_GROUPS:
        raise ValueError(f"a key may belong to at most {MAX_GROUPS} groups, not {len(groups)}")
    for one in groups:
        check_subject(f"group:{one}")
    return tuple(dict.fromkeys(groups))


def encode_key(record: KeyRecord) -> bytes:
    """Encodes the record of a key as JSON."""
    held = [
        {"sha256": one.digest, "created": one.created} | ({"expires": one.expires} if one.expires else {})
        for one in record.secrets
    ]
    return write_object({"secrets": held} | ({"groups": list(record.groups)} if record.groups else {}))


def decode_key(value: bytes) -> KeyRecord:
    """Decodes the record of a key. Raises ValueError."""
    data = _known(value, {"secrets", "groups"})
    try:
        held = tuple(_secret(one) for one in data["secrets"])
        if not held:
            raise ValueError("the key has no secret")
        return KeyRecord(held, check_groups(data.get("groups", [])))
    except BAD as error:
        raise ValueError(why(error)) from error


def encode_grant(one: Grant) -> bytes:
    """Encodes a grant as JSON."""
    return write_object(document_of(one))


def decode_grant(value: bytes) -> Grant:
    """Decodes a grant. Raises ValueError."""
    return grant_of(_known(value, {"role", "models", "to"}))


def document_of(one: Grant) -> dict[str, Any]:
    """Returns a grant as a document, the inverse of `grant_of`."""
    return {"role": one.role.value, "models": list(one.models), "to": list(one.to)}


def grant_of(data: dict[str, Any]) -> Grant:
    """Returns the grant that a document describes. Raises ValueError."""
    if unknown := sorted(data.keys() - {"role", "models", "to"}):
        raise ValueError(f"a grant has no {unknown[0][:60]!r}: its attributes are role, models and to")
    for name in ("models", "to"):
        if not isinstance(data.get(name), list):
            raise ValueError(f"{name} must be a list of strings")
    return grant(data.get("role"), data["models"], data["to"])


def _secret(data: Any) -> KeySecret:
    if unknown := data.keys() - {"sha256", "created", "expires"}:
        raise ValueError(f"it has unknown attributes: {', '.join(sorted(unknown))}")
    digest = data["sha256"]
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError("sha256 is not 64 hexadecimal digits in lower case")
    expires = integer(data.get("expires", 0))
    if expires < 0:
        raise ValueError("expires is negative")
    return KeySecret(digest, integer(data["created"]), expires)


def _known(value: bytes, names: set[str]) -> dict[str, Any]:
    data = read_object(value)
    if unknown := data.keys() - names:
        raise ValueError(f"it has unknown attributes: {', '.join(sorted(unknown))[:100]}")
    return data
