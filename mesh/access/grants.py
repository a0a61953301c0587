"""Grants, and the decision that follows from them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from mesh.access import patterns
from mesh.access.principals import Principal, check_subject
from mesh.access.verbs import ALLOWS, Role, Verb

MAX_PATTERNS = 100
"""Largest number of patterns, and of subjects, of one grant."""

MAX_PATTERN = 512
"""Largest number of characters of a pattern."""


@dataclass(frozen=True, slots=True)
class Grant:
    """A role that subjects have, for all names that match the grant's patterns."""

    role: Role
    models: tuple[str, ...]
    """Patterns of the ids and aliases that the role is for."""
    to: tuple[str, ...]
    """The subjects that have the role."""


@dataclass(frozen=True, slots=True)
class Ruling:
    """A decision on a principal's operation, and the reason."""

    allowed: bool
    why: str


@dataclass(frozen=True, slots=True)
class Grants:
    """All grants by their names, indexed by their subjects."""

    by_name: Mapping[str, Grant]
    _by_subject: dict[str, list[str]] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        for name in sorted(self.by_name):
            for subject in self.by_name[name].to:
                self._by_subject.setdefault(subject, []).append(name)

    def of(self, principal: Principal) -> dict[str, Grant]:
        """Returns the grants of a principal by their names."""
        names = {name for subject in principal.subjects for name in self._by_subject.get(subject, ())}
        return {name: self.by_name[name] for name in sorted(names)}


NONE = Grants({})


def grant(role: object, models: Iterable[object], to: Iterable[object]) -> Grant:
    """Returns a grant made of these parts. Raises ValueError if a part is not valid."""
    try:
        chosen = Role(str(role))
    except ValueError as error:
        raise ValueError(f"{role!r:.100} is not a role: use one of {', '.join(Role)}") from error
    named = tuple(dict.fromkeys(_pattern(one) for one in models))
    given = tuple(dict.fromkeys(check_subject(_text(one, "a subject")) for one in to))
    for what, count in (("patterns", len(named)), ("subjects", len(given))):
        if not 0 < count <= MAX_PATTERNS:
            raise ValueError(f"a grant must have from 1 to {MAX_PATTERNS} {what}, not {count}")
    return Grant(chosen, named, given)


def decide(grants: Grants, principal: Principal, verb: Verb, name: str) -> Ruling:
    """Returns whether the principal may perform operations of `verb` on a name, and why. For an operation on the whole
    mesh, the name is `patterns.EVERYTHING`."""
    if verb is Verb.PUBLIC or verb is Verb.KNOWN:
        return Ruling(True, "every known caller may")
    for known, one in grants.of(principal).items():
        if verb in ALLOWS[one.role]:
            for pattern in one.models:
                if patterns.covers(pattern, name):
                    return Ruling(True, f"the grant {known} gives {one.role} on {pattern}")
    return Ruling(False, f"{principal.name} has no grant of {_roles(verb)} {_on(name)}")


def _roles(verb: Verb) -> str:
    return " or ".join(role for role in Role if verb in ALLOWS[role])


def _on(name: str) -> str:
    if name == patterns.EVERYTHING:
        return "on all models (*)"
    return f"on {name[:200]}"


def _pattern(value: object) -> str:
    pattern = _text(value, "a pattern")
    if not 0 < len(pattern) <= MAX_PATTERN:
        text = f"the pattern {pattern[:60]!r} has {len(pattern)} characters"
        raise ValueError(f"{text}, but it must have from 1 to {MAX_PATTERN}")
    return pattern


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} must be a string, not {value!r:.100}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} contains half of a surrogate pair: remove it") from error
    return value
