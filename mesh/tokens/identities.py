"""The principals that the claims of a token stand for.

Names that begin with `system:` belong to Kubernetes. No other issuer can give them, neither to users nor as groups.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from mesh.access.principals import Principal, check_subject
from mesh.tokens.verification import TokenError

MAX_GROUPS = 500
"""Largest number of groups of one token."""

_KUBERNETES = "system:"
_ACCOUNT = re.compile(r"system:serviceaccount:([a-z0-9.-]{1,63}):([a-z0-9.-]{1,253})")
_ACCOUNTS = "system:serviceaccounts"


def user(claims: Mapping[str, Any], *, name: str = "sub", groups: str = "groups") -> Principal:
    """Returns the user of a token of an OIDC issuer. `name` and `groups` are the claims with the user's name and
    groups, or paths to them: `realm_access.roles`. Raises TokenError."""
    found = _claim(claims, name)
    if not isinstance(found, str) or not found or found.startswith(_KUBERNETES) or not _usable(f"user:{found}"):
        text = f"the token has no usable name in its claim {name!r}: the name must be printable, not too long, and "
        raise TokenError(f"{text}not begin with {_KUBERNETES}")
    if name == "email" and claims.get("email_verified", True) is not True:
        raise TokenError("the token's email is not verified by its issuer: verify it there")
    return Principal(f"user:{found}", _groups(_claim(claims, groups)))


def is_account(name: object) -> bool:
    """Returns whether a user name of Kubernetes is that of a service account."""
    return isinstance(name, str) and _ACCOUNT.fullmatch(name) is not None


def account(name: object, groups: Iterable[object] | None = None) -> Principal:
    """Returns a service account by its user name in Kubernetes. Without `groups`, the account has the groups that
    Kubernetes gives to every account. Raises TokenError."""
    found = _ACCOUNT.fullmatch(name) if isinstance(name, str) else None
    if found is None:
        raise TokenError("the token is not one of a service account: request one (kubectl create token)")
    namespace = found[1]
    given = (_ACCOUNTS, f"{_ACCOUNTS}:{namespace}") if groups is None else [one for one in groups if _text(one)]
    return Principal(
        f"serviceaccount:{namespace}:{found[2]}", [f"group:{one}" for one in given if _usable(f"group:{one}")]
    )


def _groups(found: Any) -> list[str]:
    given = [found] if isinstance(found, str) else found if isinstance(found, list) else []
    if len(given) > MAX_GROUPS:
        raise TokenError(f"the token has more than {MAX_GROUPS} groups: request one with fewer")
    return [
        subject
        for one in given
        if _text(one) and not one.startswith(_KUBERNETES) and _usable(subject := f"group:{one}")
    ]


def _claim(claims: Mapping[str, Any], path: str) -> Any:
    """Returns a claim by its name, or by a path of names with dots between them."""
    if path in claims:
        return claims[path]
    found: Any = claims
    for name in path.split("."):
        if not isinstance(found, dict):
            return None
        found = found.get(name)
    return found


def _text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _usable(subject: str) -> bool:
    try:
        check_subject(subject)
    except ValueError:
        return False
    return True
