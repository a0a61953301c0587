"""The names of classes: at most two classes share a name."""

import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CLASS = re.compile(r"^ *class _*(\w+)[(:]", re.MULTILINE)  # parsing every file would take seconds
MOST = 2
"""The most classes that may share a name. Readers rarely confuse two in unrelated packages."""


def test_no_name_stands_for_more_than_two_classes() -> None:
    found: defaultdict[str, list[str]] = defaultdict(list)
    for package in ("mesh", "placement", "puller", "router"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if "pb" in path.parts:
                continue
            for name in CLASS.findall(path.read_text()):
                found[name].append(path.relative_to(ROOT).as_posix())
    assert {name: where for name, where in found.items() if len(where) > MOST} == {}
