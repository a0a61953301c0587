"""The table of docs/compatibility.md: every row has a verdict, and names a test that exists."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "compatibility.md"


def rows() -> list[list[str]]:
    """Returns the cells of each row, without the headings in bold."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines[2:]]
    return [row for row in cells if not row[0].startswith("**")]


@functools.cache
def named_in(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / path).read_text())
    found = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return frozenset(node.name for node in found if node.name.startswith("test_"))


def test_the_table_follows_the_title_and_a_short_legend() -> None:
    title, *rest = PAGE.read_text().splitlines()
    assert title == "# Compatibility with ModelMesh"
    assert any(line.startswith("|") for line in rest[:12])


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0][:50])
def test_a_row_has_a_verdict_and_a_test(row: list[str]) -> None:
    """Each row says whether Mesh does the same, explains what is better or different, and names an existing test."""
    assert len(row) == 4, row
    what, verdict, why, test = row
    assert what
    assert verdict in ("same", "better", "different")
    assert why or verdict == "same"
    path, _, name = test.strip("`").partition("::")
    assert name in named_in(path), f"{path} has no test {name}"
