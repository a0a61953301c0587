"""The options of `make test-foreign`, and its report at the end."""

import os

import pytest

SECONDS = 240.0

_SAID = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options for `make test-foreign ARGS="--foreign-seed 7 --foreign-seconds 600"`."""
    group = parser.getgroup("foreign")
    group.addoption("--foreign-seed", type=int, help="Seed of the troubles; random by default.")
    group.addoption("--foreign-lie", default="", help="Kind of wrong size that servers state for every model.")
    group.addoption("--foreign-seconds", type=float, default=SECONDS, help="Length of the random run, in seconds.")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_SAID] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Prints the reports of all runs, even of runs without a fault."""
    for text in config.stash.get(_SAID, []):
        terminalreporter.write_line(f"foreign: {text}")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    given = request.config.getoption("--foreign-seed", None)
    return int.from_bytes(os.urandom(3)) if given is None else given


@pytest.fixture
def seconds(request: pytest.FixtureRequest) -> float:
    return request.config.getoption("--foreign-seconds", SECONDS)


@pytest.fixture
def lie(request: pytest.FixtureRequest) -> str:
    """Returns the kind of wrong size that the servers state for every model, or "" if they behave as usual."""
    return request.config.getoption("--foreign-lie", "")


@pytest.fixture
def say(request: pytest.FixtureRequest):
    """Returns a function that stores a text, which is printed at the end of the session whether or not the test
    passes."""
    said = request.config.stash.setdefault(_SAID, [])
    return said.append
