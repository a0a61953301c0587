"""Patterns of names: a name itself, or a string in which each `*` stands for any characters, `/` included.

All other characters stand for themselves, so a pattern is compared with the decoded name, letter by letter: case
matters, `%2F` is not `/`, and an accented letter written as one code point is not the same as two. Nothing is
normalised, because the registry does not normalise ids either.

A pattern that covers an alias also covers its versions, which are the names that continue with `@`: `fraud` covers
`fraud@7`.

A request to list names with a prefix is decided as a request about the name `<prefix>*`. A pattern covers `<prefix>*`
only if it covers every name with the prefix. `EVERYTHING`, which is `*`, is therefore the name of the whole mesh.
"""

EVERYTHING = "*"
"""The pattern that covers every name, and the name of operations on the mesh as a whole."""

VERSION = "@"
"""The character between an alias and the name of a version."""


def matches(pattern: str, name: str) -> bool:
    """Returns whether a pattern matches a name. At worst, the time is proportional to the product of both lengths."""
    if EVERYTHING not in pattern:
        return pattern == name
    first, *middle, last = pattern.split(EVERYTHING)
    if len(name) < len(first) + len(last) or not name.startswith(first) or not name.endswith(last):
        return False
    at, end = len(first), len(name) - len(last)
    for part in middle:  # the leftmost place of each part leaves the most for the parts after it
        found = name.find(part, at, end)
        if found < 0:
            return False
        at = found + len(part)
    return True


def covers(pattern: str, name: str) -> bool:
    """Returns whether a pattern covers a name. A pattern covers the names that it matches, and the versions of the
    aliases that it matches."""
    if matches(pattern, name):
        return True
    at = name.find(VERSION)
    while at > 0:
        if matches(pattern, name[:at]):
            return True
        at = name.find(VERSION, at + 1)
    return False


def listed(prefix: str) -> str:
    """Returns the text that a grant must cover so that a caller may list all names with this prefix."""
    return prefix + EVERYTHING
