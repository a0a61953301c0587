"""Fixtures that tests of several areas use. Each is imported by name in tests/conftest.py."""

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
    """One etcd for the whole session: tests are separated by `keys` and leave it running."""
    with EtcdServer(tmp_path_factory.mktemp("etcd") / "data") as server:
        yield server


@pytest.fixture
def keys() -> Keys:
    """A prefix for this test alone."""
    return Keys(f"test/{os.getpid()}-{next(_numbers)}")


@pytest.fixture
async def etcd(etcd_server: EtcdServer) -> AsyncIterator[Etcd]:
    """A client of `etcd_server`."""
    async with Etcd(etcd_server.settings) as client:
        yield client


@pytest.fixture
def own_etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    """An etcd for this test alone, which it may kill and freeze."""
    with EtcdServer(tmp_path / "etcd") as server:
        yield server
