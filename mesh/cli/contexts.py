"""Named meshes of this user: endpoint and TLS files by name, in one small TOML file, as kubectl has its contexts.

    current = "prod"

    [contexts.prod]
    endpoint = "https://mesh.example:8033"
    ca = "/home/me/mesh/ca.crt"

It is read when a command needs it, never for `--help`. What is said on the command line comes first, then the
environment, then the context: that of `--context`, of MESH_CONTEXT, or the current one. A `--context` that is given is
said on the command line too, so it comes before MESH_ENDPOINT and the like.
"""

import contextlib
import fcntl
import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from mesh.cli.client import normalize
from mesh.cli.exits import CommandError, Exit

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True)
class Context:
    """One mesh. Paths of PEM files as they stand in the file; "": not given."""

    endpoint: str = ""
    ca: str = ""
    cert: str = ""
    key: str = ""


FIELDS = tuple(one.name for one in fields(Context))


@dataclass(slots=True)
class Contexts:
    """What the file holds."""

    current: str = ""
    named: dict[str, Context] = field(default_factory=dict)

    def get(self, name: str) -> Context:
        """The context of that name. Raises CommandError."""
        if name not in self.named:
            there = f"there are {', '.join(sorted(self.named))}" if self.named else "there is none yet"
            text = f"there is no context {name!r}; {there}. `mesh context set {name} --endpoint URL` makes it"
            raise CommandError(text, code=Exit.USAGE, reason="NO_CONTEXT")
        return self.named[name]


def path() -> Path:
    """Where the file is."""
    folder = os.environ.get("XDG_CONFIG_HOME") or ""
    # A relative one is to be ignored, says the specification of XDG.
    if folder.startswith("/"):
        return Path(folder) / "mesh" / "contexts.toml"
    try:
        return Path.home() / ".config" / "mesh" / "contexts.toml"
    except RuntimeError:  # a user without a home, as containers have them
        return Path("/.config/mesh/contexts.toml")


def read() -> Contexts:
    """What the file holds; nothing where there is none. Raises CommandError that names the file and the line."""
    import tomllib

    file = path()
    try:
        file.stat()
    except OSError:  # none, or in somebody else's home
        return Contexts()
    try:
        document = tomllib.loads(file.read_text())
    except (OSError, ValueError) as error:  # TOML that is none is a ValueError, and so is text that is none
        why = error.strerror if isinstance(error, OSError) else error
        raise _bad(file, f"{why}") from error
    if unknown := sorted(document.keys() - {"current", "contexts"}):
        raise _bad(file, f"{unknown[0]!r} is not known; there are current and contexts")
    current, named = document.get("current", ""), document.get("contexts", {})
    if not isinstance(current, str) or not isinstance(named, dict):
        raise _bad(file, "`current` is a name, and `contexts` a table of contexts")
    found = {name: _context(file, name, given) for name, given in named.items()}
    if current and current not in found:
        raise _bad(file, f"the current context {current!r} is not among its contexts")
    return Contexts(current, found)


def _context(file: Path, name: str, given: Any) -> Context:
    if not isinstance(given, dict) or any(not isinstance(value, str) for value in given.values()):
        raise _bad(file, f"the context {name!r} is a table of texts: {', '.join(FIELDS)}")
    if unknown := sorted(given.keys() - set(FIELDS)):
        raise _bad(file, f"{unknown[0]!r} of the context {name!r} is not known; there are {', '.join(FIELDS)}")
    try:
        normalize(given.get("endpoint", ""))
    except ValueError as error:
        raise _bad(file, f"of the context {name!r}, {error}") from error
    # A path that was written by hand is meant to be beside the file.
    paths = {
        key: str(file.parent / Path(value).expanduser()) for key, value in given.items() if key != "endpoint" and value
    }
    return Context(**{**given, **paths})


def _bad(file: Path, why: str) -> CommandError:
    return CommandError(
        f"{file} cannot be used: {why}. Correct it, or remove it", code=Exit.USAGE, reason="BAD_CONTEXTS"
    )


@contextlib.contextmanager
def changed() -> Iterator[Contexts]:
    """What the file holds, to be changed; it is written when the block has ended well. Raises CommandError."""
    file = path()
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise CommandError(f"{file.parent} cannot be made: {error.strerror}") from error
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(folder, fcntl.LOCK_EX)  # another command may be changing it too
        contexts = read()
        yield contexts
        _write(file.resolve(), _text(contexts))  # the file that a link leads to
    finally:
        os.close(folder)


def _text(contexts: Contexts) -> str:
    lines = [f"current = {_quoted(contexts.current)}"] if contexts.current else []
    for name, context in sorted(contexts.named.items()):
        given = {key: getattr(context, key) for key in FIELDS}
        lines += [
            "",
            f"[contexts.{_quoted(name)}]",
            *(f"{key} = {_quoted(text)}" for key, text in given.items() if text),
        ]
    return "\n".join(lines).lstrip() + "\n"


def _quoted(text: str) -> str:
    """A string of TOML, which is JSON's but for one character that JSON lets stand."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _write(file: Path, text: str) -> None:
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)  # for its owner only
        try:
            with open(descriptor, "w") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(name, file)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except (OSError, UnicodeEncodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise CommandError(f"{file} cannot be written: {why}") from error
