"""The options of `make test-chaos`, and its report at the end."""

import os

import pytest

SECONDS = 600.0

_SAID = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options for `make test-chaos ARGS="--chaos-seed 7 --chaos-seconds 1800"`."""
    group = parser.getgroup("chaos")
    group.addoption("--chaos-seed", type=int, help="Seed of the troubles; random by default.")
    group.addoption("--chaos-seconds", type=float, default=SECONDS, help="Length of the random run, in seconds.")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_SAID] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Prints the reports of all runs, also of those without a fault."""
    for text in config.stash.get(_SAID, []):
        terminalreporter.write_line(f"chaos: {text}")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    given = request.config.getoption("--chaos-seed", None)
    return int.from_bytes(os.urandom(3)) if given is None else given


@pytest.fixture
def seconds(request: pytest.FixtureRequest) -> float:
    return request.config.getoption("--chaos-seconds", SECONDS)


@pytest.fixture
def say(request: pytest.FixtureRequest):
    """Returns a function that stores a text, which is printed at the end of the session whether or not the test
    passes."""
    said = request.config.stash.setdefault(_SAID, [])
    return said.append
