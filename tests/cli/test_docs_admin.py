"""docs/admin.md: each `mesh` command on the page exists, with its options."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mesh.cli import doctor
from mesh.cli.app import build

PAGE = Path(__file__).parents[2] / "docs" / "admin.md"


def commands() -> list[str]:
    """Returns the page's lines with a prompt and a `mesh` command, without the prompt."""
    lines = re.findall(r"^\$ (.*)$", PAGE.read_text(), re.MULTILINE)
    return [line[line.index("mesh ") :].partition(" > ")[0].partition(" < ")[0] for line in lines if "mesh " in line]


@pytest.mark.parametrize("line", [pytest.param(line, id=line) for line in commands()])
def test_each_command_is_one(line: str) -> None:
    """The help of each command in docs/admin.md contains all options that the page uses with it."""
    words = re.sub(r"^mesh (--context \S+ )?", "", line)
    names = [word for word in shlex.split(words) if not word.startswith("-")]
    path = names[:2] if names[0] in ("context", "prefix") else names[:1]
    result = CliRunner().invoke(build(), [*path, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    for option in re.findall(r"--[a-z-]+", words):
        assert option in result.output


def test_the_doctors_areas_are_those_that_it_takes() -> None:
    """The table of areas in docs/admin.md lists exactly the areas that the doctor's `--only` accepts."""
    text = PAGE.read_text()
    table = text[text.index("| area | checks |") :].partition("\n\n")[0].splitlines()[2:]
    assert [row.split("|")[1].strip() for row in table] == list(doctor.AREAS)
    for area in doctor.AREAS:
        wanted = ["--certificates", "."] if area == "certificates" else []
        result = CliRunner().invoke(build(), ["doctor", "--only", area, "--timeout", "0.1", *wanted])
        assert "there is no area" not in result.output


def test_the_page_has_commands() -> None:
    assert len(commands()) > 10
