"""The environment of MLServer, and the models that its libraries train."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mesh.modelservers import environments


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks all tests here."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.servers)


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
    program = Path(__file__).with_name("trained_app.py")
    argv = [str(environments.python_of(environment)), "-I", str(program), str(folder)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "answers.json").read_text())
