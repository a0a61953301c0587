"""The environment of MLServer, the models that its libraries train, and the options for the run of troubles."""

import json
import os
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mesh.modelservers import environments
from tests.servers.training import run_there
from tests.support.localmesh import LocalMesh, Program

SECONDS = 180.0

_SAID = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options for `make test-servers ARGS="--mixed-seed 7 --mixed-seconds 600"`."""
    group = parser.getgroup("servers")
    group.addoption("--mixed-seed", type=int, help="Seed of the troubles; by default another one each time.")
    group.addoption("--mixed-seconds", type=float, default=SECONDS, help="Length of the random run, in seconds.")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Prints the reports of all runs, even of runs without a fault."""
    for text in config.stash.get(_SAID, []):
        terminalreporter.write_line(f"servers: {text}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.servers)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds the last lines of all processes of a mesh to the report of a failed test. The mesh of a module prints its
    lines only when the module ends, where pytest shows them only if the module's last test fails."""
    report = yield
    if report.when == "call" and report.failed:
        for program in _programs(getattr(item, "funcargs", {}).values()):
            report.sections.append((f"last lines of {program.name}", program.tail(80)))
    return report


def _programs(fixtures: Iterable[object]) -> Iterator[Program]:
    """Yields the processes that belong to the fixtures of a test, or to attributes of them."""
    for fixture in fixtures:
        for held in (fixture, *getattr(fixture, "__dict__", {}).values()):
            if isinstance(held, Program):
                yield held
            elif isinstance(held, LocalMesh):
                yield from (*held.routers, *held.pods)


@pytest.fixture(scope="session")
def environment() -> Path:
    """Returns the folder of MLServer's environment. Skips the tests if it is not installed."""
    folder = environments.installed("mlserver")
    if folder is None:
        pytest.skip("SKIPPED, NO TEST OF MLSERVER HAS RUN: run `mesh servers install mlserver`")
    return folder


@pytest.fixture(scope="session")
def trained(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Returns the trained models by name: their paths, their types, and their libraries' own answers."""
    folder = tmp_path_factory.mktemp("trained")
    run_there(environment, "trained_app.py", str(folder))
    return json.loads((folder / "answers.json").read_text())


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Returns the seed of the random run: the option's, or a random one."""
    given = request.config.getoption("--mixed-seed", None)
    return int.from_bytes(os.urandom(3)) if given is None else given


@pytest.fixture
def seconds(request: pytest.FixtureRequest) -> float:
    """Returns the length of the random run, in seconds."""
    return request.config.getoption("--mixed-seconds", SECONDS)


@pytest.fixture
def say(request: pytest.FixtureRequest):
    """Returns a function that records a text to be printed at the end of the session, whether or not the test
    passes."""
    said = request.config.stash.setdefault(_SAID, [])
    return said.append
