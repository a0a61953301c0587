"""A puller over temporary folders, and fixtures to inspect it."""

from pathlib import Path

import pytest

from puller.http_client import HttpPolicy
from puller.puller import Puller
from tests.support.once import ONCE


@pytest.fixture
def root(tmp_path) -> Path:
    """The folder under which the puller may read models."""
    path = tmp_path / "root"
    path.mkdir()
    return path


@pytest.fixture
async def puller(tmp_path, root):
    """A puller with short waits that reads files under `root` and HTTP from loopback."""
    policy = HttpPolicy(allow_private=True, connect_timeout=5, read_timeout=0.3, total_timeout=10)
    puller = Puller(
        directory=tmp_path / "models",
        file_roots=[root],
        http=policy,
        retries=ONCE,
        max_bytes=32 * 2**20,
    )
    puller.sweep()
    yield puller
    await puller.close()


@pytest.fixture
def left(puller):
    """A function that returns the entries of the puller's directory, without its lock and the files that it keeps."""
    return lambda: {entry.name for entry in puller.directory.iterdir()} - {".lock", ".blobs"}
