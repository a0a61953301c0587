"""The shared fixtures, from tests/support/fixtures.py, and settings of all tests.

Tests start hundreds of processes. Without stored bytecode each would compile 150 modules, a quarter of its start time.
This module therefore has bytecode stored.

Hypothesis tries different examples in each run on a developer's machine, and more with `HYPOTHESIS_EXAMPLES=5000` or
in `make test-long`. CI always uses the same examples, so a change never fails for a chance find in unrelated code.
"""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support.fixtures import etcd, etcd_server, keys, own_etcd

__all__ = ["etcd", "etcd_server", "keys", "own_etcd"]

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Our processes find no module in the current folder, and the model server that tests let pods run, `twin`, is not
# installed.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")))
)

settings.register_profile(
    "mesh",
    # How long an example takes says how busy the machine is, not whether the code is right.
    deadline=None,
    suppress_health_check=(HealthCheck.too_slow,),
    derandomize=bool(os.environ.get("CI")),
    max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "25")),
)
settings.load_profile("mesh")

LONG = tuple(Path(__file__).parent / name for name in ("system", "chaos"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Says which kinds of tests the run has left out, and which commands run them."""
    left_out = [
        marker for marker in config.getini("markers") if f"not {marker.partition(':')[0]}" in config.option.markexpr
    ]
    for marker in left_out:
        terminalreporter.write_line(f"NOT RUN: tests marked {marker}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs the longest tests first, so that parallel test processes end at about the same time."""
    items.sort(key=lambda item: not any(item.path.is_relative_to(folder) for folder in LONG))
