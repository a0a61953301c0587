"""Fixtures that run commands against a real etcd, as an admin does."""

import asyncio
import threading
from collections.abc import Mapping

import pytest
from typer.testing import CliRunner

from mesh.cli.app import build
from mesh.etcd import Etcd
from mesh.etcd.ranges import after_prefix
from mesh.schema.keys import Keys
from tests.support.etcd import EtcdServer


class Admin:
    """A way to run commands against one etcd, and to access its keys."""

    def __init__(self, server: EtcdServer) -> None:
        self.server = server
        self.app = build()

    def run(self, *arguments: str, stdin: bytes | None = None):
        """Runs `mesh ARGS...`. The result has `exit_code`, `stdout` and `stderr`."""
        return CliRunner().invoke(self.app, [*arguments, "--etcd", self.server.endpoint], input=stdin)

    def put(self, values: Mapping[bytes, bytes]) -> None:
        async def work() -> None:
            async with Etcd(self.server.settings) as etcd:
                for key, value in values.items():
                    await etcd.put(key, value)

        asyncio.run(work())

    def put_aside(self, values: Mapping[bytes, bytes]) -> None:
        """Writes keys in another thread, because the event loop of this one runs a command."""
        thread = threading.Thread(target=self.put, args=(values,))
        thread.start()
        thread.join()

    def delete(self, key: bytes) -> None:
        async def work() -> None:
            async with Etcd(self.server.settings) as etcd:
                await etcd.delete(key)

        asyncio.run(work())

    def all(self, keys: Keys) -> dict[bytes, bytes]:
        """Returns all values below a mesh's prefix, by their keys without the prefix."""
        prefix = keys.base.encode() + b"/"

        async def work() -> dict[bytes, bytes]:
            async with Etcd(self.server.settings) as etcd:
                return {kv.key[len(prefix) :]: kv.value async for kv in etcd.scan((prefix, after_prefix(prefix)))}

        return asyncio.run(work())


@pytest.fixture
def admin(etcd_server: EtcdServer) -> Admin:
    """Commands against the session's etcd, which all tests share."""
    return Admin(etcd_server)
