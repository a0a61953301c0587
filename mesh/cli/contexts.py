"""Named meshes of this user, like the contexts of kubectl. One TOML file has, for each name, the endpoint and the paths
of the TLS files and of the file with the API key.

    current = "prod"

    [contexts.prod]
    endpoint = "https://mesh.example:8033"
    ca = "/home/me/mesh/ca.crt"

The file is read when a command needs it, never for `--help`. The context is the one that `--context` names, or else
MESH_CONTEXT, or else the current one. Options take precedence over the environment, and the environment over the
context. However, a context chosen with `--context` takes precedence over MESH_ENDPOINT and similar variables.
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
    """A named mesh: its endpoint, and the paths of PEM files and of the API key. An empty string means that the context
    does not set this value."""

    endpoint: str = ""
    ca: str = ""
    cert: str = ""
    key: str = ""
    api_key_file: str = ""


FIELDS = tuple(one.name for one in fields(Context))


@dataclass(slots=True)
class Contexts:
    """The contexts in the file, and the name of the current one."""

    current: str = ""
    named: dict[str, Context] = field(default_factory=dict)

    def get(self, name: str) -> Context:
        """Returns the context with that name. Raises CommandError, with the existing names, if there is none."""
        if name not in self.named:
            there = f"the contexts are {', '.join(sorted(self.named))}" if self.named else "none has been created yet"
            text = f"there is no context {name!r}; {there}. `mesh context set {name} --endpoint URL` creates it"
            raise CommandError(text, code=Exit.USAGE, reason="NO_CONTEXT")
        return self.named[name]


def path() -> Path:
    """Returns the path of the file with contexts."""
    folder = os.environ.get("XDG_CONFIG_HOME") or ""
    # The XDG specification says to ignore a relative one.
    if folder.startswith("/"):
        return Path(folder) / "mesh" / "contexts.toml"
    try:
        return Path.home() / ".config" / "mesh" / "contexts.toml"
    except RuntimeError:  # a user without a home, as in containers
        return Path("/.config/mesh/contexts.toml")


def read() -> Contexts:
    """Reads the file. A missing file has no contexts. Raises CommandError, which names the file and the line."""
    import tomllib

    file = path()
    try:
        file.stat()
    except OSError:  # missing, or in another user's home
        return Contexts()
    try:
        document = tomllib.loads(file.read_text())
    except (OSError, ValueError) as error:  # invalid TOML and invalid UTF-8 are both ValueErrors
        why = error.strerror if isinstance(error, OSError) else error
        raise _bad(file, f"{why}") from error
    if unknown := sorted(document.keys() - {"current", "contexts"}):
        raise _bad(file, f"{unknown[0]!r} is unknown; the file has current and contexts")
    current, named = document.get("current", ""), document.get("contexts", {})
    if not isinstance(current, str) or not isinstance(named, dict):
        raise _bad(file, "`current` must be a name, and `contexts` a table of contexts")
    found = {name: _context(file, name, given) for name, given in named.items()}
    if current and current not in found:
        raise _bad(file, f"the current context {current!r} is not among its contexts")
    return Contexts(current, found)


def _context(file: Path, name: str, given: Any) -> Context:
    if not isinstance(given, dict) or any(not isinstance(value, str) for value in given.values()):
        raise _bad(file, f"the context {name!r} must be a table of strings: {', '.join(FIELDS)}")
    if unknown := sorted(given.keys() - set(FIELDS)):
        raise _bad(file, f"{unknown[0]!r} in the context {name!r} is unknown; the known ones are {', '.join(FIELDS)}")
    try:
        normalize(given.get("endpoint", ""))
    except ValueError as error:
        raise _bad(file, f"in the context {name!r}, {error}") from error
    # A relative path, written by hand, is relative to the file.
    paths = {
        key: str(file.parent / Path(value).expanduser()) for key, value in given.items() if key != "endpoint" and value
    }
    return Context(**{**given, **paths})


def _bad(file: Path, why: str) -> CommandError:
    return CommandError(f"{file} cannot be used: {why}. Correct or remove it", code=Exit.USAGE, reason="BAD_CONTEXTS")


@contextlib.contextmanager
def changed() -> Iterator[Contexts]:
    """Yields the file's contents, which the block may change, and writes them if the block succeeds. Raises
    CommandError."""
    file = path()
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise CommandError(f"{file.parent} cannot be created: {error.strerror}") from error
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(folder, fcntl.LOCK_EX)  # another command may be changing the file too
        contexts = read()
        yield contexts
        _write(file.resolve(), _text(contexts))  # the target of a symbolic link
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
    """Returns the text as a TOML string, which is the JSON string with DEL escaped too."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _write(file: Path, text: str) -> None:
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)  # readable by its owner only
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
