"""The names of classes: at most two classes share one, and names that were once ambiguous belong to one class."""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOST = 2
"""The most classes that may share a name, in packages that never meet; with more than two, readers have to look it
up."""


def test_no_name_stands_for_more_than_two_classes() -> None:
    found: defaultdict[str, list[str]] = defaultdict(list)
    for package in ("mesh", "placement", "puller", "router"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if "pb" in path.parts:
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ClassDef):
                    found[node.name.lstrip("_")].append(path.relative_to(ROOT).as_posix())
    assert {name: where for name, where in found.items() if len(where) > MOST} == {}
