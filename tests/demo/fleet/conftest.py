"""A small fleet that is trained once for all tests of this folder."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mesh.demo import fleet

COUNT = 12


@pytest.fixture(scope="session")
def two_fleets(tmp_path_factory) -> tuple[fleet.Fleet, fleet.Fleet]:
    """Two fleets, built by separate processes. The second one has only the first six models."""
    folders = tmp_path_factory.mktemp("fleet"), tmp_path_factory.mktemp("again")
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(fleet.build, folders[0], COUNT, jobs=1)
        second = threads.submit(fleet.build, folders[1], 6, jobs=1)
        return first.result(), second.result()


@pytest.fixture(scope="session")
def small(two_fleets) -> fleet.Fleet:
    """A dozen models that tests must not change."""
    return two_fleets[0]


@pytest.fixture
def copied(small, tmp_path) -> Path:
    """A copy of the small fleet's folder, which a test may damage."""
    import shutil

    shutil.copytree(small.directory, tmp_path / "fleet")
    return tmp_path / "fleet"
