"""Fixtures for tests of the agent: pods as real processes, on the session's etcd or on one that the test may break."""

from pathlib import Path

import pytest

from mesh.schema.keys import Keys
from tests.support.agent import AgentProcess, AnAgent
from tests.support.etcd import EtcdServer


@pytest.fixture
def an_agent(etcd_server: EtcdServer, keys: Keys, tmp_path: Path) -> AnAgent:
    """Returns a function that makes pods in a mesh of this test alone: `async with an_agent(capacity="64MiB") as
    pod`."""

    def make(*options: str, **more: object) -> AgentProcess:
        return AgentProcess(etcd_server.settings, keys, tmp_path, *options, **more)  # type: ignore[arg-type]

    return make
