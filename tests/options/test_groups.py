"""Option groups, whose fields become options of a command and variables of the environment."""

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from mesh.options import groups


@dataclass(frozen=True, slots=True)
class Login:
    """A group of two options."""

    user: Annotated[str, typer.Option(envvar="TEST_USER", help="User.")] = "nobody"
    tries: Annotated[int, typer.Option("--attempts", min=1)] = 3


@dataclass(frozen=True, slots=True)
class Required:
    """A group with a required option."""

    name: Annotated[str, typer.Option()]


def run(*argv: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    app = typer.Typer()

    @app.command()
    @groups.expanded
    def command(*, first: int = 1, login: Login, required: Required, last: bool = False) -> None:
        """Takes the options and does its work."""
        typer.echo(f"{first} {login} {required.name} {last}")

    result = CliRunner().invoke(app, list(argv), env=env)
    return result.exit_code, result.output


@pytest.mark.parametrize(
    ("argv", "env", "shown"),
    [
        pytest.param(["--name", "x"], None, "1 Login(user='nobody', tries=3) x False", id="defaults"),
        pytest.param(
            ["--name", "x", "--attempts", "5", "--user", "me", "--first", "2", "--last"],
            None,
            "2 Login(user='me', tries=5) x True",
            id="all given",
        ),
        pytest.param(["--name", "x"], {"TEST_USER": "env"}, "1 Login(user='env', tries=3) x False", id="environment"),
    ],
)
def test_fields_are_options(argv: list[str], env: dict[str, str] | None, shown: str) -> None:
    assert run(*argv, env=env) == (0, shown + "\n")


@pytest.mark.parametrize(
    ("argv", "named"),
    [(["--name", "x", "--attempts", "0"], "--attempts"), ([], "--name"), (["--login", "x"], "--login")],
)
def test_what_is_wrong_is_named(argv: list[str], named: str) -> None:
    status, output = run(*argv)
    assert status == 2
    assert named in output


def test_help_describes_the_fields() -> None:
    status, output = run("--help")
    assert status == 0
    for text in ("--user", "TEST_USER", "--attempts", "Takes the options and does its work."):
        assert text in output


def test_a_name_occurs_once() -> None:
    def command(*, login: Login, user: str = "") -> None:
        """Does nothing: only its options are read."""

    with pytest.raises(TypeError, match="option user twice"):
        groups.expanded(command)
