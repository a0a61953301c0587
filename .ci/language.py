"""Checks the rules of the language that a program can check (CONTRIBUTING.md, Language): `FILE:LINE: fault and remedy`.

    python .ci/language.py [PATH ...]      checks all files under version control, or only those under PATH

- A function's docstring begins with a verb in the third person (VERBS), a property's or fixture's with a noun phrase or
  such a verb, a class's or module's with a noun phrase. A test's is a sentence that stands alone (not CONTINUING).
- Words in BANNED (except as names of attributes) and phrases in UNCLEAR, over which readers stumble, do not occur in
  code, comments, docs and charts.
- A function's docstring does not open with a phrase in OPENINGS, which only repeats the signature.
- The help of an option begins with a noun phrase or an imperative, and names the unit of a number.

Needs only the standard library. The other rules are for readers to check.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

VERBS = frozenset((ROOT / ".ci" / "verbs.txt").read_text().split())
"""Verbs with which docstrings of functions begin. If one is missing, add it there."""

HEADLESS = frozenset(
    """
    And As At Because But By Either For From Had Has How However If In Into Is It Its Neither Nobody Nor Of On Once Or
    Out Over See So Somebody Something That Their Them Then There These They Those Though To Under Unless Until What
    Whatever When Where Whether Which Whichever Who Whoever Whom Whose Why With Within Without
    """.split()  # noqa: SIM905 - shorter than seventy lines of one word each
)
"""Words with which a noun phrase does not begin."""

CONTINUING = frozenset(
    """
    Also And But Else Even Except It Its Nor Not Of Or Otherwise Rather So Than That Their Them Then There These They
    This Those Unless
    """.split()  # noqa: SIM905 - as above
)
"""Words by which a test's docstring would continue the test's name, or the docstring of the test before it."""

BANNED = {
    "anew": "again",
    "whoever": "name the actor: the caller, the reader, each waiter",
    "for ever": "forever, or: without end",
    "in vain": "for nothing, or: without success",
    "reckon": "estimate, count",
    "reckons": "estimates, counts",
    "reckoned": "estimated, counted",
    "lets go of": "releases",
    "let go of": "release, released",
    "lets go": "releases, evicts",
    "let go": "release, evict",
    "fares": "does",
    "fared": "did",
    "unwell": "unhealthy",
    "told of": "informed about",
    "lets rest": "backs off",
    "peek": "look up (without a pin)",
    "the latter": "repeat the noun",
}

UNCLEAR = {
    r"\breplac(?:e|es|ing)\b(?:(?!\b(?:with|that|are|is)\b)[^.;:,()|\"]){1,60}?\bby\b"
    r"(?!\s+(?:(?:a|one|its)\s+)?(?:rename|link)\b)(?!\s+\w+ing\b)": "replaces X with Y",
    r"`\w+` tells whether\b": "`x` is true if, or `x` returns whether",
}
"""Patterns of phrases over which readers stumble, each with what to write instead."""

OPENINGS = {
    r"Tells (?:whether|if)\b": "Returns whether",
    r"(?:Takes|Stores|Keeps|Remembers) (?:`|the (?:arguments|parts|parameters|settings)\b)": "say what is made",
}
"""Openings of functions' docstrings that repeat the signature, each with what to write instead."""

BEGINNINGS = HEADLESS | {"Else", "Only", "Both", "Each"}

UNITS = re.compile(
    r"\b(second|millisecond|minute|hour|day|byte|bytes|size|MiB|GiB|percent|share|age|seconds|calls|loads|threads|number|"
    r"connections|workers|pods|models|port|seed|exponent|revision|lines|rows|copies|days|s|ms|%|snapshots|count)\b",
    re.IGNORECASE,
)

TEXT = {".py", ".md", ".yaml", ".yml", ".tpl", ".txt", ".toml", ".sh", ".proto", ".json"}
SKIPPED = (
    "mesh/pb/",
    "requirements/",
    "LICENSE",
    "deploy/kustomize/",
    ".ci/language.py",
    "tests/ci/test_language.py",
    "docs/glossary.md",
)
GENERATED_OR_FOREIGN = ("proto/mmesh", "proto/kserve", "proto/etcd", "proto/grpc")
FOLDERS = (".ci", "deploy", "docs", "mesh", "placement", "proto", "puller", "router", "tests")
COMPAT = "COMPAT"
"""Mark of a line whose text is fixed by ModelMesh's contract."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A place that breaks a rule."""

    path: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


def files(paths: list[str]) -> list[Path]:
    """Returns the project's files, optionally only those below `paths`. Files that git ignores are left out if git
    works here."""
    try:
        done = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "--", *paths],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        names = done.stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):  # no git here, or a tree that was unpacked
        names = [name for name in _walk() if not paths or name.startswith(tuple(paths))]
    return [Path(name) for name in names if (ROOT / name).is_file() and not name.startswith(SKIPPED)]


def _walk() -> Iterator[str]:
    """Yields all files in the project's own folders, except those in hidden folders."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if "__pycache__" not in path.parts and not any(part[0] == "." for part in path.relative_to(ROOT).parts[1:]):
                yield path.relative_to(ROOT).as_posix()
    yield from (path.name for path in sorted(ROOT.iterdir()) if path.is_file())


def check(path: Path, text: str) -> Iterator[Finding]:
    """Yields all findings in one file."""
    if path.suffix not in TEXT and path.name not in ("Makefile", "Containerfile"):
        return
    if not str(path).startswith(GENERATED_OR_FOREIGN):
        yield from banned(path, text)
    if path.suffix == ".py":
        tree = ast.parse(text)
        yield from docstrings(path, tree)
        yield from helps(path, tree)


def banned(path: Path, text: str) -> Iterator[Finding]:
    """Yields a finding for each banned word, and for each banned or unclear phrase. A phrase may be wrapped over two
    lines."""
    lines = text.splitlines()
    for word, instead in BANNED.items():
        pattern = r"(?<![.\w])" + word.replace(" ", r"[\s#*]+") + r"\b"
        for found in re.finditer(pattern, text, re.IGNORECASE):
            number = text.count("\n", 0, found.start()) + 1
            if COMPAT not in lines[number - 1]:
                yield Finding(path, number, f'"{word}" is not a word of ours: {instead}')
    for pattern, instead in UNCLEAR.items():
        for found in re.finditer(pattern, text, re.IGNORECASE):
            number = text.count("\n", 0, found.start()) + 1
            if COMPAT not in lines[number - 1]:
                shown = " ".join(found[0].split())
                yield Finding(path, number, f'"{shown}" is unclear: write {instead}')


def docstrings(path: Path, tree: ast.Module) -> Iterator[Finding]:
    """Yields a finding for each docstring that begins wrongly. A test's docstring may be any sentence that stands
    alone."""
    in_tests = path.parts[0] == "tests"
    if found := _first(tree):
        yield from _noun_phrase(path, 1, "a module", found)
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        found = _first(node)
        if found is None:
            continue
        line = node.body[0].lineno
        if isinstance(node, ast.ClassDef):
            yield from _noun_phrase(path, line, "a class", found)
        elif in_tests and node.name.startswith("test_"):
            if found in CONTINUING:
                text = f'a docstring does not begin with "{found}": write a sentence that stands alone'
                yield Finding(path, line, text)
        elif _is_property(node):
            if found in HEADLESS:
                yield Finding(path, line, f'a property\'s docstring begins with a noun phrase, not with "{found}"')
        elif found not in VERBS:
            text = f'a function\'s docstring begins with a verb in the third person, not with "{found}"'
            yield Finding(path, line, text)
        elif not in_tests:
            for pattern, instead in OPENINGS.items():
                if opening := re.match(pattern, ast.get_docstring(node) or ""):
                    yield Finding(path, line, f'a docstring does not begin with "{opening[0]}": {instead}')


def helps(path: Path, tree: ast.Module) -> Iterator[Finding]:
    """Yields a finding for each option help that begins wrongly, or that describes a number without naming its unit."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or _called(node) not in ("Option", "Argument", "_option", "_size"):
            continue
        text = next((_literal(keyword.value) for keyword in node.keywords if keyword.arg == "help"), None)
        if text is None and _called(node) in ("_option", "_size") and node.args:
            text = _literal(node.args[-1])
        if not text:
            continue
        first = _word(text)
        if first in BEGINNINGS or (first.endswith("s") and first in VERBS - {"Calls", "Loads", "Copies", "Names"}):
            yield Finding(path, node.lineno, f'help begins with a noun phrase or an imperative, not with "{first}"')
        if not text.rstrip().endswith((".", ".)")):
            yield Finding(path, node.lineno, "help ends with a full stop")
        number = any(keyword.arg in ("min", "max") for keyword in node.keywords)
        seconds = any(
            keyword.arg == "metavar" and "SECONDS" in (_literal(keyword.value) or "") for keyword in node.keywords
        )
        if (seconds and "second" not in text) or (number and not UNITS.search(text)):
            yield Finding(path, node.lineno, f"help names the unit of the number: {text!r}")


def _noun_phrase(path: Path, line: int, what: str, first: str) -> Iterator[Finding]:
    if first in HEADLESS:
        yield Finding(path, line, f'{what}\'s docstring begins with a noun phrase, not with "{first}"')


def _first(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str | None:
    """Returns the first word of a docstring, or None without a docstring."""
    text = ast.get_docstring(node)
    return _word(text) if text and text.strip() else None


def _word(text: str) -> str:
    return text.split()[0].strip("`.,:;\"'*")


def _is_property(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Returns whether the function stands for a value: a property, a fixture of pytest, a strategy of Hypothesis."""
    made_by = (one.func if isinstance(one, ast.Call) else one for one in node.decorator_list)
    names = {getattr(one, "attr", getattr(one, "id", "")) for one in made_by}
    return bool(names & {"property", "cached_property", "setter", "fixture", "composite"})


def _called(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def _literal(node: ast.expr) -> str | None:
    """Returns the text of a string in the source, with X for each expression in it, or None for anything else."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.Constant) else "X" for part in node.values)
        return "".join(str(part) for part in parts)
    return None


def main() -> int:
    """Checks the paths from the command line and returns the exit status."""
    found = [
        finding
        for path in files(sys.argv[1:])
        for finding in check(path, (ROOT / path).read_text(encoding="utf-8", errors="replace"))
    ]
    for finding in sorted(found, key=lambda one: (str(one.path), one.line)):
        print(finding)
    if found:
        print(f"{len(found)} places; the rules are in CONTRIBUTING.md, Language")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
