"""The lists of files in CONTRIBUTING.md: every file in them exists and is listed once, and no file of an eviction
imports an earlier one."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
TRAVELS = TEXT.split("## How a request travels\n")[1].split("\n## ")[0]
SECTIONS = dict(re.findall(r"### (.+?)\n(.*?)(?=\n### |\Z)", TRAVELS, re.S))


def files(section: str) -> list[str]:
    """Returns the files in a section's table, in order. A name without a folder lies in the same folder as the file
    before it."""
    found: list[str] = []
    for row in re.findall(r"^\| (`.+?`) \|", section, re.M):
        for name in re.findall(r"`([^`]+\.py)`", row):
            found.append(name if "/" in name else str(Path(found[-1]).parent / name))
    return found


@pytest.mark.parametrize("name", SECTIONS)
def test_every_file_on_the_way_is_there_and_comes_once(name):
    """Every file that a request passes exists and is listed once, so no step returns to an earlier file."""
    passed = files(SECTIONS[name])
    assert len(passed) > 5
    assert [file for file in passed if not (ROOT / file).is_file()] == []
    assert len(set(passed)) == len(passed)


def imported(path: str) -> set[str]:
    """Returns the modules that a file imports, and the names that it imports from them."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_an_eviction_goes_one_way():
    """No file on an eviction's way imports an earlier file, so none can call back. `placement` may be imported
    anywhere, because its decisions are only data."""
    passed = [path for path in files(SECTIONS["An eviction"]) if not path.startswith("placement/")]
    modules = [path.removesuffix(".py").replace("/", ".") for path in passed]
    for place, path in enumerate(passed):
        assert imported(path).isdisjoint(modules[:place]), path
