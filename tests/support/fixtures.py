"""Fixtures for tests of several areas. tests/conftest.py imports each by name."""

import itertools
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from mesh.etcd import Etcd
from mesh.schema.keys import Keys
from tests.support.etcd import EtcdServer

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def etcd_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """One etcd for the complete session. Each test uses its own `keys`, and leaves the etcd running."""
    with EtcdServer(tmp_path_factory.mktemp("etcd") / "data") as server:
        yield server


@pytest.fixture
def keys() -> Keys:
    """The keys under a prefix that only this test uses."""
    return Keys(f"test/{os.getpid()}-{next(_numbers)}")


@pytest.fixture
async def etcd(etcd_server: EtcdServer) -> AsyncIterator[Etcd]:
    """A client of `etcd_server`."""
    async with Etcd(etcd_server.settings) as client:
        yield client


@pytest.fixture
def own_etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    """An etcd for this test alone, which the test may kill and freeze."""
    with EtcdServer(tmp_path / "etcd") as server:
        yield server
