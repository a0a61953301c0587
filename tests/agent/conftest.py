"""Pods for tests of the agent: real processes on the session's etcd, or on one that the test may harm."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mesh.keys import Keys
from tests.support.agent import AgentProcess
from tests.support.etcd import EtcdServer


@pytest.fixture
async def pod(etcd_server: EtcdServer, keys: Keys, tmp_path: Path) -> AsyncIterator[AgentProcess]:
    """One pod of 64 MiB."""
    async with AgentProcess(etcd_server.settings, keys, tmp_path) as running:
        yield running
