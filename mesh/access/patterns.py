"""Patterns of names: a name itself, or a string in which each `*` stands for any characters, `/` included.

All other characters stand for themselves, so a pattern is compared with the decoded name, letter by letter: case
matters, `%2F` is not `/`, and an accented letter written as one code point is not the same as two. Nothing is
normalised, because the registry does not normalise ids either.

A pattern that covers an alias also covers its versions, which are the names that continue with `@`: `fraud` covers
`fraud@7`.

A request for a list has a prefix, and is decided as if it named that prefix followed by `*`. A pattern covers this text
only if it covers every name with the prefix. `EVERYTHING` is thus the name of the whole mesh.
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
    """Returns whether a pattern covers a name: it matches the name, or an alias that the name is a version of."""
    if matches(pattern, name):
        return True
    at = name.find(VERSION)
    while at > 0:
        if matches(pattern, name[:at]):
            return True
        at = name.find(VERSION, at + 1)
    return False


def listed(prefix: str) -> str:
    """Returns the name to which a caller needs a right in order to list all names with a prefix."""
    return prefix + EVERYTHING
