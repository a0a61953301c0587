"""CONTRIBUTING's lists of files follow the code: what a reader is sent to is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
TRAVELS = TEXT.split("## How a request travels\n")[1].split("\n## ")[0]
SECTIONS = dict(re.findall(r"### (.+?)\n(.*?)(?=\n### |\Z)", TRAVELS, re.S))


def files(section: str) -> list[str]:
    """The files of a section's table, in order. A name without a folder lies in the folder of the one before it."""
    found: list[str] = []
    for row in re.findall(r"^\| (`.+?`) \|", section, re.M):
        for name in re.findall(r"`([^`]+\.py)`", row):
            found.append(name if "/" in name else str(Path(found[-1]).parent / name))
    return found


@pytest.mark.parametrize("name", SECTIONS)
def test_every_file_on_the_way_is_there_and_comes_once(name):
    """No step of a request goes back to where it came from."""
    passed = files(SECTIONS[name])
    assert len(passed) > 5
    assert [file for file in passed if not (ROOT / file).is_file()] == []
    assert len(set(passed)) == len(passed)
