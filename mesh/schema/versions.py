"""The version of a model that no alias names.

With V2, a caller can name a version, and existing model repositories keep versions in numbered folders. The version of
such a model is therefore the number of the folder in its path, or `1` without such a folder. An alias names the
versions of its own models.
"""

import urllib.parse

ONLY = "1"
"""The version of a model whose path has no numbered folder."""

_MAX_DIGITS = 18  # maximum length of a version; longer numbers in paths are digests or times


def own(path: str) -> str:
    """Returns the version of a model with this path: the last component that consists of 1 to 18 digits, or else
    `ONLY`."""
    scheme, separator, rest = path.partition("://")
    if separator:
        _, _, path = rest.partition("/")  # a host or bucket does not count as a folder
        if scheme in ("http", "https"):
            path = path.partition("?")[0]
    for component in reversed(path.split("/")):
        component = urllib.parse.unquote(component)
        if component.isascii() and component.isdigit() and len(component) <= _MAX_DIGITS:
            return component
    return ONLY
