"""Principals: callers whose identity is proven."""

import re
from collections.abc import Iterable

EVERYONE = "everyone"
"""The subject that stands for every known caller."""

KINDS = ("key", "user", "serviceaccount", "cert", "group")
"""The kinds of subjects that a grant may name, besides `EVERYONE`: `key:ci`, `group:team-a`."""

MAX_SUBJECT = 300
"""Largest number of characters of a subject."""

_FORMS = f"key:NAME, user:NAME, serviceaccount:NAMESPACE:NAME, cert:NAME, group:NAME or {EVERYONE}"
_ACCOUNT = re.compile(r"[^:]+:[^:]+")
_ACCOUNT_OF = "system:serviceaccount:"


class Principal:
    """A known caller. Principals are compared by identity, which makes it quick to find a cached decision."""

    __slots__ = ("name", "subjects")

    def __init__(self, name: str, subjects: Iterable[str] = ()) -> None:
        """Makes a principal. The name is one of its subjects; `subjects` has the others, such as groups of the
        caller."""
        self.name = name
        self.subjects = frozenset((name, EVERYONE, *subjects))

    def __repr__(self) -> str:
        return f"Principal({self.name})"


def check_subject(subject: str) -> str:
    """Returns the subject unchanged. Raises ValueError if a grant may not name it."""
    kind, _, rest = subject.partition(":")
    if subject.startswith(_ACCOUNT_OF):
        hint = f"serviceaccount:{subject.removeprefix(_ACCOUNT_OF)}"
        raise ValueError(f"{subject[:100]!r} is a service account, as Kubernetes names it: write {hint[:100]}")
    if kind == "serviceaccount" and not _ACCOUNT.fullmatch(rest):
        raise ValueError(f"{subject[:100]!r} is not a service account: write serviceaccount:NAMESPACE:NAME")
    if subject != EVERYONE and (kind not in KINDS or not rest):
        raise ValueError(f"{subject[:100]!r} is not a subject: write {_FORMS}")
    if len(subject) > MAX_SUBJECT:
        raise ValueError(f"the subject {subject[:100]!r} has {len(subject)} characters: the limit is {MAX_SUBJECT}")
    if not subject.isprintable():
        text = "has characters that cannot be printed, such as line breaks or unusual spaces: leave them out"
        raise ValueError(f"the subject {subject[:100]!r} {text}")
    return subject
